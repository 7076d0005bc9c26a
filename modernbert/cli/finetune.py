"""`modernbert finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import ModelArgument, console, quiet_libraries, sizes


def finetune(
    model: ModelArgument,
    pairs: Annotated[
        Path,
        typer.Option(help=".jsonl, .csv or .parquet with the columns anchor, positive[, negative, negative_2, ...]."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make: a sentence-transformers model.")],
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Pairs of a step; each is a wrong answer to the others.")] = 64,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens computed at once: bounds memory.")] = 16_384,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a text in training.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-4,
    temperature: Annotated[float, typer.Option(help="Divisor of the cosines before the softmax.")] = 0.02,
    matryoshka: Annotated[
        str, typer.Option(metavar="N,...", help="Sizes to train beside the full one, such as 256,128.")
    ] = "",
    pooling: Annotated[str | None, typer.Option(help="mean, cls or global; default: what the checkpoint says.")] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Text before every anchor; kept in the model.")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Text before positives and negatives; kept.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "banded",
    seed: Annotated[int, typer.Option(help="Of the order of the pairs.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint; 0: none.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")] = False,
) -> None:
    """Train an embedding model from a ModernBERT and pairs of texts that belong together."""
    quiet_libraries()
    from modernbert.training.finetune import finetune as run
    from modernbert.training.pairs import read_pairs

    texts = read_pairs(pairs)
    console.print(f"{len(texts):,} pairs with {len(texts.column_names) - 2} hard negatives each")
    report = run(
        model,
        texts,
        out,
        max_steps=max_steps,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        max_length=max_length,
        learning_rate=learning_rate,
        temperature=temperature,
        matryoshka=sizes(matryoshka),
        pooling=pooling,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        precision=precision,  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
        seed=seed,
        checkpoint_every=checkpoint_every or None,
        resume=resume,
    )
    print(
        f"{out}: {report.steps} steps, loss {report.losses[0]:.3f} to {report.losses[-1]:.3f}, {report.seconds:.0f} s"
    )
