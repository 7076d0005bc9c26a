"""Contrastive fine-tuning on pairs through sentence-transformers: an encoder becomes an embedding model.

In-batch negatives (van den Oord et al. 2018, InfoNCE; Henderson et al. 2017): for every anchor the other positives
of the batch are wrong answers. Mean pooling, vectors of length 1.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import datasets
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from modernbert.data.tokenizer import load_tokenizer, save_tokenizer
from modernbert.errors import InputError
from modernbert.model import AttentionName, load_model
from modernbert.output import whole_directory
from modernbert.training.pretrain import TrainingReport, common_arguments, require_vocabulary
from modernbert.training.progress import quiet_transformers, train_with_progress

COLUMNS = ("anchor", "positive")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_pairs(path: Path) -> datasets.Dataset:
    """Reads pairs from a .jsonl, .json, .csv or .parquet file with the columns `anchor` and `positive`.

    Raises:
        InputError: the file is missing, cannot be read, or lacks a column.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"pairs file {str(path)!r} must end in {', '.join(_READERS)}")
    if not path.is_file():
        raise InputError(f"pairs file {str(path)!r} does not exist")
    try:
        with tempfile.TemporaryDirectory() as cache:
            pairs = datasets.load_dataset(
                reader, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, StopIteration) as error:
        # The JSON reader of datasets runs out of lines on an empty file.
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"pairs file {str(path)!r} cannot be read: {reason or 'it is empty'}") from error
    return _checked(pairs)


def _checked(pairs: datasets.Dataset) -> datasets.Dataset:
    if len(pairs) < 2:
        raise InputError(f"pairs must be at least 2, so that one is wrong for the other; there are {len(pairs)}")
    missing = [column for column in COLUMNS if column not in pairs.column_names]
    if missing:
        raise InputError(
            f"pairs have no column {' or '.join(map(repr, missing))}, only {', '.join(pairs.column_names)}; rename them"
        )
    pairs = pairs.select_columns(list(COLUMNS))
    for index, row in enumerate(pairs):
        for column in COLUMNS:
            if not isinstance(row[column], str) or not row[column].strip():
                raise InputError(f"pairs must hold text: row {index}, column {column!r} is {row[column]!r}")
    return pairs


def sentence_transformer(
    model: str | os.PathLike[str], *, max_length: int | None = None, attention: AttentionName = "banded"
) -> SentenceTransformer:
    """Puts this package's encoder under mean pooling and normalisation, in sentence-transformers' modules.

    sentence-transformers constructs its Transformer module around its own choice of class; ours takes its place, which
    has the same configuration, weights' names and outputs. What is saved names stock classes only.

    Args:
        model: a local directory or hub id of a ModernBERT with its tokenizer, whatever head it has.
        max_length: most tokens of a text; what the model and tokenizer allow when absent.
        attention: backend to run with.

    Raises:
        InputError: it is not a ModernBERT, or its tokenizer does not fit.
    """
    with quiet_transformers():
        encoder = load_model(model)
        require_vocabulary(encoder.config, load_tokenizer(model))
        module = Transformer(os.fspath(model), max_seq_length=max_length)
    encoder.set_attention(attention)
    module.model = encoder
    pooling = Pooling(encoder.config.hidden_size, pooling_mode="mean")
    return SentenceTransformer(modules=[module, pooling, Normalize()])


def finetune(
    model: str | os.PathLike[str],
    pairs: datasets.Dataset,
    out: Path,
    *,
    max_steps: int,
    batch_size: int = 64,
    max_length: int | None = None,
    learning_rate: float = 1e-4,
    temperature: float = 0.05,
    attention: AttentionName = "banded",
    seed: int = 0,
) -> TrainingReport:
    """Trains an embedding model from a ModernBERT and writes it to `out` as sentence-transformers does.

    Args:
        model: local directory or hub id to start from.
        pairs: columns `anchor` and `positive`, texts that belong together.
        out: directory to create.
        max_steps: optimizer steps; the pairs are repeated as often as it takes.
        batch_size: pairs of a step. No batch holds a text twice.
        max_length: most tokens of a text in training; the written model takes as many as it did before.
        learning_rate: its peak; it rises linearly over 6 % of the steps, then falls as a cosine.
        temperature: divisor of the cosines before the softmax; lower makes near misses count for more.
        attention: backend to train with.
        seed: of the order.

    Raises:
        InputError: bad pairs, a model that cannot be loaded, a parameter out of range, or an output that exists.
    """
    pairs = _checked(pairs)
    if temperature <= 0:
        raise InputError(f"temperature must be above 0, not {temperature}")
    if batch_size < 2:
        raise InputError(f"batch_size must be at least 2, so that a batch has negatives, not {batch_size}")
    embedder = sentence_transformer(model, attention=attention)
    # No model card is written; an example in it spares the search for others, which shows a bar of its own.
    embedder.model_card_data.widget = [{}]
    full_length = embedder.max_seq_length
    if max_length is not None:
        embedder.max_seq_length = max_length
    transformers.set_seed(seed)
    # The output is made first: that it cannot be written must not show after hours of training.
    with whole_directory(out) as partial, tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            embedder,
            SentenceTransformerTrainingArguments(
                **common_arguments(Path(scratch), max_steps=max_steps, learning_rate=learning_rate, seed=seed),
                per_device_train_batch_size=batch_size,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
            ),
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(embedder, scale=1 / temperature),
        )
        train_with_progress(trainer, "contrastive")
        embedder.max_seq_length = full_length
        with quiet_transformers():
            embedder.save_pretrained(str(partial), create_model_card=False)
            save_tokenizer(embedder.tokenizer, partial)
    return TrainingReport.of(trainer)
