"""The whole way on text that ships with Python: tokenizer, masked LM, contrastive pairs, export, parity, search.

Run it with `modernbert demo`. It takes minutes on two CPU cores and downloads nothing. The model is tiny and the text
is little: the demo shows that every part works and that training helps, not how good a ModernBERT can be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from modernbert.config import ModernBertConfig
from modernbert.data.corpus import Section, documents, read_sections, retrieval_pairs, split
from modernbert.data.tokenizer import save_tokenizer, train_tokenizer
from modernbert.model import ModernBertForMaskedLM
from modernbert.output import whole_directory
from modernbert.training.finetune import finetune, sentence_transformer
from modernbert.training.pretrain import config_for, pretrain
from modernbert.training.progress import quiet_transformers
from modernbert.training.retrieval import RetrievalScores, retrieval_scores, top

QUERIES = (
    "read a compressed file",
    "parse command line arguments",
    "wait until a thread has finished",
    "convert a date to a string",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and steps, found by experiment: the best held-out recall that fits into minutes on two cores.

    The layer pattern is the real one, global attention in every third layer, with a window that these short texts
    exceed. Both learning rates are high because the model is small and the steps are few.
    """

    vocab_size: int = 4096
    model: tuple[tuple[str, Any], ...] = (
        ("hidden_size", 128),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 4),
        ("intermediate_size", 192),
        ("local_attention", 64),
        ("max_position_embeddings", 512),
    )
    pretrain_steps: int = 150
    pretrain_batch_tokens: int = 4096
    pretrain_max_length: int = 128
    pretrain_learning_rate: float = 2e-3
    finetune_steps: int = 400
    finetune_batch_size: int = 32
    finetune_max_length: int = 96
    finetune_learning_rate: float = 2e-3


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
        tokenizer = train_tokenizer(
            texts, vocab_size=recipe.vocab_size, max_length=dict(recipe.model)["max_position_embeddings"]
        )
        config = config_for(tokenizer, "tiny", **dict(recipe.model))
        _write_untrained(config, partial / "untrained", seed)
        save_tokenizer(tokenizer, partial / "untrained")
        pretrain(
            config,
            tokenizer,
            texts,
            partial / "pretrained",
            max_steps=recipe.pretrain_steps,
            batch_tokens=recipe.pretrain_batch_tokens,
            max_length=recipe.pretrain_max_length,
            learning_rate=recipe.pretrain_learning_rate,
            seed=seed,
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
            seed=seed,
        )
        before, after = (
            _torch_scores(sentence_transformer(partial / name), test_pairs) for name in ("untrained", "model")
        )

        progress.print("[bold]4/6[/] exporting to ONNX and verifying it against PyTorch")
        with progress.status("exporting") as status:
            manifest = export(str(partial / "model"), partial / "bundle", progress=status.update)
        parity = manifest.artifacts[0].parity

        progress.print("[bold]5/6[/] embedding the held-out sections with the runtime, without PyTorch")
        with Embedder.load(partial / "bundle") as embedder:
            tokens = embedder.tokenize([section.text for section in test_pairs])
            embedder.embed_tokens(tokens[:8])
            timed = time.perf_counter()
            vectors = embedder.embed_tokens(tokens)
            speed = sum(len(item.input_ids) for item in tokens) / (time.perf_counter() - timed)
            exported = retrieval_scores(embedder.embed([section.title for section in test_pairs]), vectors)

            progress.print("[bold]6/6[/] searching them")
            answers = Table("search", "nearest held-out sections", title_justify="left", show_lines=True)
            for query, vector in zip(QUERIES, embedder.embed(list(QUERIES)), strict=True):
                found = (f"{score:.2f}  {_label(test_pairs[index])}" for index, score in top(vector, vectors, 3))
                answers.add_row(query, "\n".join(found))

    console = Console()
    console.print(answers)
    table = Table("", "recall@1", "recall@10", title=f"Finding {len(test_pairs)} held-out sections by their titles")
    for name, scores in (("untrained", before), ("trained", after), ("trained, exported to ONNX", exported)):
        table.add_row(name, f"{scores.recall_at_1:.1%}", f"{scores.recall_at_10:.1%}")
    table.add_row("by chance", f"{before.chance:.1%}", f"{10 * before.chance:.1%}")
    console.print(table)
    console.print(
        f"parity with PyTorch: max abs error {parity['max_abs_error']:.1e}, min cosine {parity['min_cosine']:.7f}\n"
        f"embedding: {speed:,.0f} tokens/s\n"
        f"everything: {time.monotonic() - started:.0f} s; the bundle is in {out / 'bundle'}"
    )


def _write_untrained(config: ModernBertConfig, out: Path, seed: int) -> None:
    """The very weights that `pretrain` starts from."""
    transformers.set_seed(seed)
    ModernBertForMaskedLM(config).save_pretrained(out)


def _as_dataset(pairs: list[Section]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"anchor": [section.title for section in pairs], "positive": [section.text for section in pairs]}
    )


def _torch_scores(embedder: SentenceTransformer, pairs: list[Section]) -> RetrievalScores:
    titles, texts = (
        embedder.encode([getattr(section, field) for section in pairs], show_progress_bar=False)
        for field in ("title", "text")
    )
    return retrieval_scores(titles, texts)


def _label(section: Section) -> str:
    title = section.title if len(section.title) <= 60 else section.title[:57] + "..."
    return f"{section.name}: {title}"
