"""Masked-language-model pretraining of a new ModernBERT through transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from modernbert.config import ModernBertConfig
from modernbert.data.masking import masking_collator
from modernbert.data.tokenizer import rounded_vocab_size, save_tokenizer
from modernbert.errors import InputError
from modernbert.model import AttentionName, ModernBertForMaskedLM
from modernbert.output import whole_directory
from modernbert.training.progress import quiet_transformers, train_with_progress


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """How a run went: `losses` are means over successive stretches of steps."""

    steps: int
    losses: tuple[float, ...]
    seconds: float

    @classmethod
    def of(cls, trainer: Trainer) -> TrainingReport:
        """Reads it from a trainer that is done."""
        history = trainer.state.log_history
        losses = tuple(entry["loss"] for entry in history if "loss" in entry)
        return cls(steps=trainer.state.global_step, losses=losses, seconds=history[-1]["train_runtime"])


def config_for(tokenizer: PreTrainedTokenizerFast, preset: str, **overrides: Any) -> ModernBertConfig:
    """A preset with the tokenizer's special tokens, and its vocabulary rounded up to a multiple of 64."""
    return ModernBertConfig.preset(
        preset,
        **{
            "vocab_size": rounded_vocab_size(len(tokenizer)),
            "pad_token_id": tokenizer.pad_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            **overrides,
        },
    )


def require_vocabulary(config: ModernBertConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Checks that the model has a row for every token and pads with the token that the tokenizer pads with.

    Raises:
        InputError: they do not belong together.
    """
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer that the model was made with"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise InputError(
            f"the tokenizer pads with id {tokenizer.pad_token_id}, the model with {config.pad_token_id}; "
            "use the tokenizer that the model was made with"
        )


def pretrain(
    config: ModernBertConfig,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    out: Path,
    *,
    max_steps: int,
    batch_tokens: int = 4096,
    max_length: int = 1024,
    learning_rate: float = 8e-4,
    mlm_probability: float = 0.3,
    attention: AttentionName = "banded",
    seed: int = 0,
) -> TrainingReport:
    """Trains a new model on `texts` and writes it with its tokenizer to `out`, in transformers' layout.

    Args:
        config: size of the model; see `config_for`.
        tokenizer: turns the texts into tokens.
        texts: documents; long ones are cut into pieces of `max_length` tokens, and no piece holds two documents.
        out: directory to create.
        max_steps: optimizer steps; the texts are repeated as often as it takes, masked anew each time.
        batch_tokens: most tokens of a step; a batch has `batch_tokens // max_length` pieces.
        max_length: most tokens of a piece, special tokens included.
        learning_rate: its peak; it rises linearly over 6 % of the steps, then falls as a cosine.
        mlm_probability: share of tokens to predict.
        attention: backend to train with.
        seed: of initial weights, order and masking. The same seed gives the same model on the same machine.

    Raises:
        InputError: no text, a tokenizer or length that does not fit the model, or an output that exists.
    """
    require_vocabulary(config, tokenizer)
    if not 8 <= max_length <= config.max_position_embeddings:
        raise InputError(f"max_length must be from 8 to {config.max_position_embeddings}, not {max_length}")
    if batch_tokens < max_length:
        raise InputError(f"batch_tokens must be at least max_length, {max_length}, not {batch_tokens}")
    samples = _pieces(tokenizer, texts, max_length)
    if not samples:
        raise InputError("there is no text to train on: the corpus is empty")
    transformers.set_seed(seed)
    model = ModernBertForMaskedLM(config)
    model.set_attention(attention)
    # The output is made first: that it cannot be written must not show after hours of training.
    with whole_directory(out) as partial, tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                **common_arguments(Path(scratch), max_steps=max_steps, learning_rate=learning_rate, seed=seed),
                per_device_train_batch_size=batch_tokens // max_length,
            ),
            data_collator=masking_collator(tokenizer, mlm_probability=mlm_probability, seed=seed),
            train_dataset=samples,
        )
        train_with_progress(trainer, "masked LM")
        with quiet_transformers():
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
    return TrainingReport.of(trainer)


def common_arguments(scratch: Path, *, max_steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """What pretraining and fine-tuning ask of TrainingArguments alike.

    Raises:
        InputError: `max_steps` or `learning_rate` is not above 0.
    """
    if max_steps < 1:
        raise InputError(f"max_steps must be at least 1, not {max_steps}")
    if learning_rate <= 0:
        raise InputError(f"learning_rate must be above 0, not {learning_rate}")
    return dict(
        output_dir=str(scratch),
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=max(max_steps * 6 // 100, 1),
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        weight_decay=1e-5,
        seed=seed,
        logging_steps=max(max_steps // 50, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _pieces(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], max_length: int) -> list[dict[str, list[int]]]:
    texts = [text for text in texts if text.strip()]
    if not texts:
        return []
    encoded = tokenizer(
        texts, truncation=True, max_length=max_length, return_overflowing_tokens=True, return_attention_mask=False
    )
    return [{"input_ids": ids} for ids in encoded["input_ids"]]
