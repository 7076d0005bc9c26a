"""Contrastive fine-tuning through sentence-transformers: an encoder becomes an embedding model.

In-batch negatives (van den Oord et al. 2018, InfoNCE; Henderson et al. 2017): for every anchor the other positives of
the batch, and all hard negatives in it, are wrong answers. Gradients can be cached (Gao et al. 2021, GradCache), so
that memory holds a part of the batch at a time; Matryoshka sizes (Kusupati et al. 2022) train the first numbers of a
vector to be a vector of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import Tensor, nn
from transformers import TrainerCallback

from modernbert.data.tokenizer import save_tokenizer
from modernbert.errors import InputError
from modernbert.model import AttentionName
from modernbert.output import require_absent, whole_directory
from modernbert.training.embedder import document_prompt_name, sentence_transformer
from modernbert.training.pairs import checked_pairs
from modernbert.training.pretrain import TrainingReport
from modernbert.training.progress import quiet_transformers, train_with_progress
from modernbert.training.run_directory import RunDirectory, WholeCheckpoints

Precision = Literal["fp32", "bf16", "fp16"]


def finetune(
    model: str | os.PathLike[str],
    pairs: datasets.Dataset,
    out: Path,
    *,
    max_steps: int,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    learning_rate: float = 1e-4,
    temperature: float = 0.02,
    matryoshka: Sequence[int] = (),
    pooling: str | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    precision: Precision = "fp32",
    attention: AttentionName = "banded",
    seed: int = 0,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> TrainingReport:
    """Trains an embedding model from a ModernBERT and writes it to `out` as sentence-transformers does.

    Args:
        model: local directory or hub id to start from.
        pairs: columns `anchor` and `positive`, texts that belong together; `negative`, `negative_2`, ... are optional.
        out: directory to create.
        max_steps: optimizer steps; the pairs are repeated as often as it takes.
        batch_size: pairs of a step. No batch holds a text twice.
        batch_tokens: most tokens computed at once, for one column of the pairs: it bounds memory at the price of a
            second forward pass, and changes the result by rounding only. The whole batch at once when absent.
        max_length: most tokens of a text in training; the written model takes as many as it did before.
        learning_rate: its peak; it rises linearly over 6 % of the steps, then falls as a cosine.
        temperature: divisor of the cosines before the softmax; lower makes near misses count for more.
        matryoshka: sizes that the first numbers of a vector are trained to be useful at, beside its full size.
        pooling: "mean", "cls" or "global"; what the checkpoint says when absent.
        query_prompt: text before every anchor, here and in the model that is written; what it says when absent.
        document_prompt: text before every positive and negative, likewise.
        precision: of matrix products; weights and optimizer stay fp32. "fp16" needs a GPU.
        attention: backend to train with.
        seed: of the order.
        checkpoint_every: steps from one checkpoint to the next, in the folder `out` + ".run"; none when absent.
        resume: go on from the newest checkpoint there.

    Raises:
        InputError: bad pairs, a model that cannot be loaded, a parameter out of range, an output that exists, an
            unfinished run that is not to be resumed, or none that could be.
        TrainingError: the loss is no longer a number. `out` + ".run" says on which rows of the pairs.
    """
    require_absent(out)
    pairs = checked_pairs(pairs)
    arguments = _arguments(
        max_steps=max_steps,
        learning_rate=learning_rate,
        precision=precision,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, not {temperature}")
    if batch_size < 2:
        raise InputError(f"batch_size must be at least 2, so that a batch has negatives, not {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}")
    embedder = sentence_transformer(
        model, pooling=pooling, query_prompt=query_prompt, document_prompt=document_prompt, attention=attention
    )
    # No model card is written; an example in it spares the search for others, which shows a bar of its own.
    embedder.model_card_data.widget = [{}]
    sizes = _matryoshka_sizes(matryoshka, embedder)
    full_length = embedder.max_seq_length
    if max_length is not None:
        if not 3 <= max_length <= full_length:
            raise InputError(f"max_length must be from 3 to {full_length}, which the model takes, not {max_length}")
        embedder.max_seq_length = max_length
    # What the result depends on. Attention and batch_tokens change it by rounding only.
    settings = dict(
        model=os.fspath(model),
        pairs=_fingerprint(pairs),
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        temperature=temperature,
        matryoshka=sizes,
        pooling=embedder[1].pooling_mode,
        prompts=embedder.prompts,
        precision=precision,
        seed=seed,
    )
    transformers.set_seed(seed)
    run = RunDirectory(out)
    # The output is made first: that it cannot be written must not show after hours of training.
    with (
        _run_directory(run, settings, wanted=checkpoint_every is not None, resume=resume) as (
            scratch,
            newest,
            callbacks,
        ),
        whole_directory(out) as partial,
    ):
        trainer = _Trainer(
            embedder,
            SentenceTransformerTrainingArguments(
                **arguments,
                output_dir=str(scratch),
                per_device_train_batch_size=batch_size,
                # A last batch that is short has fewer wrong answers, at worst none.
                dataloader_drop_last=len(pairs) >= batch_size,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                prompts=_prompts_by_column(pairs.column_names, embedder.prompts),
            ),
            train_dataset=pairs,
            loss=_loss(embedder, temperature, batch_tokens, sizes),
            callbacks=callbacks,
            run=run,
        )
        _require_a_batch(trainer)
        train_with_progress(trainer, "contrastive", resume_from=newest)
        embedder.max_seq_length = full_length
        if sizes:
            # The name under which vLLM and others look for them.
            embedder[0].model.config.matryoshka_dimensions = sizes
        with quiet_transformers():
            embedder.save_pretrained(str(partial), create_model_card=False)
            save_tokenizer(embedder.tokenizer, partial)
    return TrainingReport.of(trainer)


class _Collator(SentenceTransformerDataCollator):
    """sentence-transformers' own, whose batches also know the texts that they are of."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(features), "texts": [tuple(row.values()) for row in features]}


class _Trainer(SentenceTransformerTrainer):
    """Stops where the loss is no number, instead of spoiling the weights for the rest of the run."""

    data_collator_class = _Collator

    def __init__(self, *arguments: Any, run: RunDirectory, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._run = run

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """sentence-transformers' own, checked.

        Raises:
            TrainingError: the loss is not a number.
        """
        texts = set(inputs.pop("texts"))
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss: Tensor = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            raise self._run.diverge(
                loss.item(),
                step=self.state.global_step + 1,
                learning_rate=self.lr_scheduler.get_last_lr()[0],
                batch={"rows": [n for n, row in enumerate(self.train_dataset, 1) if tuple(row.values()) in texts]},
                advice="lower learning_rate, raise temperature or precision, or leave these pairs out",
            )
        return result


def _arguments(
    *, max_steps: int, learning_rate: float, precision: str, checkpoint_every: int | None, seed: int
) -> dict[str, Any]:
    if max_steps < 1:
        raise InputError(f"max_steps must be at least 1, not {max_steps}")
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be above 0, not {learning_rate}")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError(f"checkpoint_every must be at least 1 step, not {checkpoint_every}")
    if precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"precision must be fp32, bf16 or fp16, not {precision!r}")
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise InputError("precision fp16 needs a CUDA GPU, and there is none; use bf16 or fp32")
    return dict(
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=max(max_steps * 6 // 100, 1),
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        weight_decay=1e-5,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not gpu,
        seed=seed,
        logging_steps=max(max_steps // 50, 1),
        save_strategy="no" if checkpoint_every is None else "steps",
        save_steps=checkpoint_every or max_steps,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
    )


def _matryoshka_sizes(sizes: Sequence[int], embedder: SentenceTransformer) -> list[int]:
    """The sizes to train, the full one among them, largest first; none if only the full one is asked for."""
    full = embedder.get_embedding_dimension()
    for size in sizes:
        if not 1 <= size <= full:
            raise InputError(f"matryoshka sizes must be from 1 to {full}, the model's own, not {size}")
    wanted = sorted({*sizes, full}, reverse=True)
    return wanted if len(wanted) > 1 else []


def _loss(
    embedder: SentenceTransformer, temperature: float, batch_tokens: int | None, sizes: Sequence[int]
) -> nn.Module:
    loss: nn.Module
    if batch_tokens is None:
        loss = MultipleNegativesRankingLoss(embedder, scale=1 / temperature)
    else:
        loss = CachedMultipleNegativesRankingLoss(embedder, scale=1 / temperature, mini_batch_num_tokens=batch_tokens)
    return MatryoshkaLoss(embedder, loss, sizes) if sizes else loss


def _prompts_by_column(columns: Sequence[str], prompts: dict[str, str]) -> dict[str, str]:
    document = prompts.get(document_prompt_name(prompts), "")
    by_column = dict.fromkeys(columns, document) | {"anchor": prompts.get("query", "")}
    return {column: prompt for column, prompt in by_column.items() if prompt}


def _require_a_batch(trainer: SentenceTransformerTrainer) -> None:
    """Texts that repeat too often leave no batch of distinct ones, and the Trainer would end after no step."""
    wanted = trainer.args.per_device_train_batch_size
    if not next(iter(trainer.get_train_dataloader().batch_sampler), None):
        raise InputError(f"batch_size {wanted} is more than the pairs have distinct texts for; lower it")


def _fingerprint(pairs: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for column in pairs.column_names:
        for text in (column, *pairs[column]):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@contextlib.contextmanager
def _run_directory(
    run: RunDirectory, settings: Mapping[str, Any], *, wanted: bool, resume: bool
) -> Iterator[tuple[Path, Path | None, list[TrainerCallback]]]:
    """Where Trainer writes, the checkpoint to go on from, and the callback that keeps checkpoints.

    Without checkpoints there is nothing to go on from, and no directory beside `out`.
    """
    if not wanted and not resume:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch), None, []
        return
    with run.opened(settings, resume=resume):
        yield run.partial, run.newest_checkpoint(), [WholeCheckpoints(run)]
    run.remove()
