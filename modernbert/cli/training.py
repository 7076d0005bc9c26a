"""`modernbert demo`, `modernbert pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.common import console, quiet_libraries
from modernbert.errors import InputError


def demo(
    out: Annotated[Path, typer.Option(help="Directory to make for what the demo trains and exports.")] = Path(
        "demo-output"
    ),
) -> None:
    """Train, export, verify and search, on text that ships with Python, in minutes."""
    quiet_libraries()
    from modernbert.demo import run

    run(out)


def pretrain(
    data: Annotated[
        list[str],
        typer.Option(metavar="PATH", help="Text, JSON lines, Parquet, a directory of them, a hub dataset; repeatable."),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="What `modernbert tokenizer train` wrote, or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to make. The unfinished run stands beside it, in OUT.run.")],
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.")],
    preset: Annotated[str | None, typer.Option(help="Size of a new model: large, base, 68m, 32m, 17m or tiny.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model to train further, not a new one.")] = None,
    tile_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Smaller model that a new one starts from, as large from base.")
    ] = None,
    global_theta: Annotated[
        float | None,
        typer.Option(help="Rotary theta of global layers: 10000 for 1,024 tokens, 160000 for 8,192."),
    ] = None,
    num_global_tokens: Annotated[int, typer.Option(help="Global tokens of a new model.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step, on all ranks together.")] = 65_536,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Most tokens at once on a device; the rest of a step by accumulation.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Context: most tokens of a piece. Longer texts are cut.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 8e-4,
    warmup_steps: Annotated[int | None, typer.Option(help="Of the linear rise; default: 6 % of the steps.")] = None,
    decay_steps: Annotated[int | None, typer.Option(help="Of the 1-sqrt fall; default: 20 % of the steps.")] = None,
    mlm_probability: Annotated[float, typer.Option(help="Share of tokens to predict.")] = 0.3,
    sop_segments: Annotated[int, typer.Option(help="Segments of sentence ordering, 2 to 4; 0: without it.")] = 2,
    sop_weight: Annotated[float, typer.Option(help="Of the ordering loss.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (on a GPU).")] = "fp32",
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "banded",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more work.")] = False,
    compile: Annotated[bool, typer.Option(help="Run through torch.compile.")] = False,  # noqa: A002
    fsdp: Annotated[bool, typer.Option(help="Shard over the ranks (FSDP2), not copy (DDP).")] = False,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 1,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order, masking and reordering.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.run.")] = False,
    field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    text_unit: Annotated[
        str, typer.Option(help="A document of a .txt: the whole file, a paragraph or a line.")
    ] = "file",
) -> None:
    """Pretrain on text: masked language modelling and sentence ordering. Start it with torchrun for many devices."""
    if (preset is None) == (model is None):
        raise InputError("give one of --preset, for a new model, and --model, to train one further")
    if model is not None and tile_from is not None:
        raise InputError("--tile-from is for a new model, with --preset; --model has weights of its own")
    if num_global_tokens and (model or tile_from):
        raise InputError("--num-global-tokens is for a model from nothing; others have those that they were made with")
    quiet_libraries()
    from accelerate import PartialState

    from modernbert.data.documents import open_documents
    from modernbert.data.tokenizer import load_tokenizer
    from modernbert.training import pretrain as training
    from modernbert.training.settings import PretrainSettings

    settings = PretrainSettings(
        max_steps=max_steps,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        max_length=max_length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        mlm_probability=mlm_probability,
        sop_segments=sop_segments,
        sop_weight=sop_weight,
        precision=precision,  # type: ignore[arg-type]  # checked there
        attention=attention,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        fsdp=fsdp,
        workers=workers,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        seed=seed,
    )
    documents = open_documents(data, field=field, text_unit=text_unit)  # type: ignore[arg-type]
    loaded = load_tokenizer(tokenizer)
    if model is not None:
        config = training.extended(model, max_length=max_length, global_theta=global_theta)
    else:
        overrides: dict[str, Any] = {"num_global_tokens": num_global_tokens} if num_global_tokens else {}
        config = (
            training.enlarged(tile_from, str(preset))
            if tile_from
            else training.config_for(loaded, str(preset), **overrides)
        )
        if global_theta is not None:
            config = training.with_global_theta(config, global_theta)
    report = training.pretrain(
        config, loaded, documents, out, settings, weights=model, tile_from=tile_from, resume=resume, tell=console.print
    )
    processes = PartialState()
    if processes.is_main_process:
        print(f"{out}: loss {report.losses[0]:.3f} at first, {report.losses[-1]:.3f} in the end")
    processes.destroy_process_group()
