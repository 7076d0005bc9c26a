"""The whole way on text that ships with Python: tokenizer, masked LM, contrastive pairs, export, parity, search.

Run it with `modernbert demo`. It takes minutes on two CPU cores and downloads nothing. The model is tiny and the text
is little: the demo shows that every part works and that training helps, not how good a ModernBERT can be.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentence_transformers import SentenceTransformer

from modernbert.config import ModernBertConfig
from modernbert.data.corpus import Section, documents, read_sections, retrieval_pairs, split
from modernbert.data.documents import in_memory
from modernbert.data.tokenizer import save_tokenizer, train_tokenizer
from modernbert.model import ModernBertForMaskedLM
from modernbert.output import whole_directory
from modernbert.training.embedder import sentence_transformer
from modernbert.training.evaluation import RetrievalMetrics, RetrievalSet, one_to_one, retrieval_metrics
from modernbert.training.finetune import finetune
from modernbert.training.pretrain import config_for, pretrain
from modernbert.training.progress import quiet_transformers
from modernbert.training.settings import PretrainSettings

QUERIES = (
    "open a gzip file",
    "wake up a waiting coroutine",
    "comparison of floating point numbers",
    "delete a cookie",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Preset, sizes and steps, found by experiment: good held-out recall within minutes on two cores.

    `overrides` are of the preset's fields. The window of 64 tokens is shorter than the texts, so that sliding layers
    do slide. Learning rates are high because the model is small and the steps are few.
    """

    vocab_size: int = 4096
    overrides: Mapping[str, Any] = field(default_factory=lambda: {"local_attention": 64})
    max_length: int = 512
    pretrain_steps: int = 200
    pretrain_batch_tokens: int = 4096
    pretrain_max_length: int = 128
    pretrain_learning_rate: float = 5e-4
    finetune_steps: int = 150
    finetune_batch_size: int = 64
    finetune_max_length: int = 96
    finetune_learning_rate: float = 2e-3
    finetune_temperature: float = 0.05


def run(out: Path, *, recipe: Recipe | None = None, stdlib: Path | None = None, seed: int = 0) -> None:
    """Trains, exports, verifies and searches; prints what comes of it.

    Args:
        out: directory to create: `untrained`, `pretrained`, `model` (all in Hugging Face layout) and `bundle`.
        recipe: sizes and steps.
        stdlib: folder with the text, that of the running Python when absent.
        seed: of all training.

    Raises:
        InputError: `out` exists or cannot be written, or there is no text.
    """
    from modernbert_export.export import export
    from modernbert_runtime import Embedder

    recipe = recipe or Recipe()
    progress = Console(stderr=True)
    started = time.monotonic()
    with whole_directory(out) as partial, quiet_transformers():
        progress.print("[bold]1/6[/] reading the documentation that ships with Python")
        train, held_out = split(read_sections(stdlib))
        train_pairs, test_pairs = retrieval_pairs(train), retrieval_pairs(held_out)
        progress.print(
            f"    {len(train)} sections to train on, {len(held_out)} held out, "
            f"{len(test_pairs)} of these to find by their titles"
        )

        progress.print("[bold]2/6[/] training a WordPiece tokenizer, then masked language modelling")
        texts = documents(train)
        tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size, max_length=recipe.max_length)
        config = config_for(tokenizer, "tiny", max_position_embeddings=recipe.max_length, **recipe.overrides)
        _write_untrained(config, partial / "untrained", seed)
        save_tokenizer(tokenizer, partial / "untrained")
        pretrain(
            config,
            tokenizer,
            in_memory(texts),
            partial / "pretrained",
            PretrainSettings(
                max_steps=recipe.pretrain_steps,
                batch_tokens=recipe.pretrain_batch_tokens,
                max_length=recipe.pretrain_max_length,
                learning_rate=recipe.pretrain_learning_rate,
                sop_segments=0,
                seed=seed,
            ),
        )

        progress.print(f"[bold]3/6[/] contrastive fine-tuning on {len(train_pairs)} titles and their sections")
        finetune(
            partial / "pretrained",
            _as_dataset(train_pairs),
            partial / "model",
            max_steps=recipe.finetune_steps,
            batch_size=recipe.finetune_batch_size,
            max_length=recipe.finetune_max_length,
            learning_rate=recipe.finetune_learning_rate,
            temperature=recipe.finetune_temperature,
            seed=seed,
        )
        judged = one_to_one([pair.title for pair in test_pairs], [pair.text for pair in test_pairs])
        before, after = (
            _torch_metrics(sentence_transformer(partial / name), judged) for name in ("untrained", "model")
        )

        progress.print("[bold]4/6[/] exporting to ONNX and verifying it against PyTorch")
        with progress.status("exporting") as status:
            manifest = export(str(partial / "model"), partial / "bundle", progress=status.update)
        parity = manifest.artifacts[0].parity

        progress.print("[bold]5/6[/] embedding the held-out sections with the runtime")
        with Embedder.load(partial / "bundle") as embedder:
            tokens = embedder.tokenize([section.text for section in test_pairs])
            embedder.embed_tokens(tokens[:8])
            timed = time.perf_counter()
            vectors = embedder.embed_tokens(tokens)
            speed = sum(len(item.input_ids) for item in tokens) / (time.perf_counter() - timed)
            exported = retrieval_metrics(embedder.embed([pair.title for pair in test_pairs]), vectors, judged)

            progress.print("[bold]6/6[/] searching them")
            answers = embedder.embed(list(QUERIES)) @ vectors.T

    console = Console()
    for query, scores in zip(QUERIES, answers, strict=True):
        console.print(Text(f"search: {query}", style="bold"))
        for index in np.argsort(-scores)[:3]:
            hit = f"  {scores[index]:.2f}  {test_pairs[index].name}: {test_pairs[index].title}"
            console.print(Text(hit), no_wrap=True, overflow="ellipsis")
    table = Table(
        "",
        "recall@1",
        "recall@10",
        "parity error",
        "tokens/s",
        title=f"Finding {len(test_pairs)} held-out sections by their titles",
        caption="parity error: largest difference of the exported model from PyTorch",
    )
    table.add_row("by chance", f"{1 / len(test_pairs):.1%}", f"{10 / len(test_pairs):.1%}")
    table.add_row("untrained", *_recalls(before))
    table.add_row("trained", *_recalls(after))
    table.add_row("trained, exported to ONNX", *_recalls(exported), f"{parity['max_abs_error']:.1e}", f"{speed:,.0f}")
    console.print(table)
    console.print(f"everything took {time.monotonic() - started:.0f} s; the bundle is in {out / 'bundle'}")


def _write_untrained(config: ModernBertConfig, out: Path, seed: int) -> None:
    """The very weights that `pretrain` starts from."""
    transformers.set_seed(seed)
    ModernBertForMaskedLM(config).save_pretrained(out)


def _as_dataset(pairs: list[Section]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"anchor": [section.title for section in pairs], "positive": [section.text for section in pairs]}
    )


def _torch_metrics(embedder: SentenceTransformer, judged: RetrievalSet) -> RetrievalMetrics:
    queries, documents = (
        embedder.encode(list(texts.values()), show_progress_bar=False) for texts in (judged.queries, judged.documents)
    )
    return retrieval_metrics(queries, documents, judged)


def _recalls(metrics: RetrievalMetrics) -> tuple[str, str]:
    return f"{metrics.recall_at_1:.1%}", f"{metrics.recall_at_10:.1%}"
