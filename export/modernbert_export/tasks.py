"""Tasks: which head of a checkpoint goes into the graph, and what the graph gives in its place.

    embedding               last_hidden_state [batch, sequence, dim], sentence_embedding [batch, dim]
    fill-mask               logits [batch, sequence, vocabulary]
    text-classification     logits [batch, labels]
    token-classification    logits [batch, sequence, labels]

Names of outputs and of heads are those that transformers, optimum and transformers.js look for. To add a task: its
head here, a line in `TASKS`, its name in `modernbert_runtime.manifest.TASKS`.

Shapes: B sequences, S padded length, G global tokens, D hidden size, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.heads import ModernBertForSequenceClassification, ModernBertForTokenClassification
from modernbert.model import ModernBertForMaskedLM, ModernBertModel, ModernBertPreTrainedModel, load_model
from modernbert.pooling import EmbeddingHead

EMBEDDING, FILL_MASK = "embedding", "fill-mask"
LOGITS = "logits"


class PooledHead(nn.Module):
    """The token vectors as they are, and pooled to one vector per text."""

    def __init__(self, pooling: str, *, normalize: bool) -> None:
        super().__init__()
        self.pool = EmbeddingHead(pooling, normalize=normalize)

    def forward(self, x_BSD: Tensor, attention_mask_BS: Tensor, x_BGD: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, S, D], the mask and, of a model with global tokens, [B, G, D] -> [B, S, D] and [B, D]."""
        return x_BSD, self.pool(x_BSD, attention_mask_BS, x_BGD)


class MaskedLMHead(nn.Module):
    """Logits of the vocabulary for every token. The decoder may share 16-bit embeddings; its sums come out in fp32."""

    def __init__(self, model: ModernBertForMaskedLM) -> None:
        super().__init__()
        self.head, self.decoder = model.head, model.decoder

    def forward(self, x_BSD: Tensor, attention_mask_BS: Tensor, x_BGD: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, S, D] -> [B, S, V]."""
        x_BSD = self.head(x_BSD)
        logits_BSV = F.linear(x_BSD.to(self.decoder.weight.dtype), self.decoder.weight).to(x_BSD.dtype)
        return (logits_BSV if self.decoder.bias is None else logits_BSV + self.decoder.bias,)


class TextHead(nn.Module):
    """Logits of the labels of a text."""

    def __init__(self, model: ModernBertForSequenceClassification) -> None:
        super().__init__()
        self.pool, self.head, self.classifier = model.pool, model.head, model.classifier

    def forward(self, x_BSD: Tensor, attention_mask_BS: Tensor, x_BGD: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, S, D] -> [B, C]."""
        return (self.classifier(self.head(self.pool(x_BSD, attention_mask_BS, x_BGD))),)


class TokenHead(nn.Module):
    """Logits of the labels of every token."""

    def __init__(self, model: ModernBertForTokenClassification) -> None:
        super().__init__()
        self.head, self.classifier = model.head, model.classifier

    def forward(self, x_BSD: Tensor, attention_mask_BS: Tensor, x_BGD: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, S, D] -> [B, S, C]."""
        return (self.classifier(self.head(x_BSD)),)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A head.

    Args:
        name: as `--task` and the manifest have it.
        model: our class; transformers' has the same name, which config.json keeps under `architectures`.
        stock: transformers' class, which parity compares with.
        head: makes the part of the graph after the encoder.
        per_token: whether there are logits for every token, or for the text.
    """

    name: str
    model: type[ModernBertPreTrainedModel]
    stock: Any
    head: Callable[[Any], nn.Module]
    per_token: bool

    def outputs(self, config: ModernBertConfig) -> dict[str, list[str | int]]:
        """Name -> axes of what the graph gives."""
        width = config.vocab_size if self.model is ModernBertForMaskedLM else config.num_labels
        return {LOGITS: ["batch", "sequence", width] if self.per_token else ["batch", width]}


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=FILL_MASK,
            model=ModernBertForMaskedLM,
            stock=transformers.ModernBertForMaskedLM,
            head=MaskedLMHead,
            per_token=True,
        ),
        Task(
            name="text-classification",
            model=ModernBertForSequenceClassification,
            stock=transformers.ModernBertForSequenceClassification,
            head=TextHead,
            per_token=False,
        ),
        Task(
            name="token-classification",
            model=ModernBertForTokenClassification,
            stock=transformers.ModernBertForTokenClassification,
            head=TokenHead,
            per_token=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint for one task: all of it, the encoder inside, and what the graph computes after that."""

    whole: ModernBertPreTrainedModel
    encoder: ModernBertModel
    head: nn.Module


def load_for_task(path: Path, task: str, *, pooling: str, normalize: bool) -> Loaded:
    """Loads a checkpoint in fp32, in eval mode.

    Args:
        path: its directory.
        task: "embedding", or one of `TASKS`, whose head it has (`check_head`).
        pooling: of an embedding.
        normalize: whether an embedding has unit length.
    """
    if task == EMBEDDING:
        encoder = load_model(path)
        return Loaded(whole=encoder, encoder=encoder, head=PooledHead(pooling, normalize=normalize))
    whole = load_head(path, task)
    return Loaded(whole=whole, encoder=whole.model, head=TASKS[task].head(whole))


def load_head(path: Path, task: str) -> Any:
    """The whole model of one of `TASKS`, ours, in fp32 and eval mode.

    Raises:
        InputError: the files cannot be read.
    """
    try:
        return TASKS[task].model.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"model {str(path)!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def check_head(name: str, config: ModernBertConfig, task: str) -> None:
    """Refuses a task that there is not, or that a checkpoint was not trained for.

    The weights of both classifiers have the same names: only `architectures` tells them apart.

    Raises:
        InputError: says which head the checkpoint has.
    """
    if task == EMBEDDING:
        return
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join((EMBEDDING, *TASKS))}, not {task!r}")
    stated = list(getattr(config, "architectures", None) or [])
    if stated and TASKS[task].model.__name__ not in stated:
        other = [known.name for known in TASKS.values() if known.model.__name__ in stated]
        raise InputError(
            f"model {name!r} has no head for {task}: its config.json says {', '.join(map(str, stated))}; take --task "
            f"{other[0] if other else EMBEDDING}, or train that head first"
        )


def labels_of(name: str, config: ModernBertConfig, task: str) -> tuple[str, ...]:
    """Names of a classifier's outputs in order; empty for other tasks.

    Raises:
        InputError: the numbers in `id2label` have gaps.
    """
    if not task.endswith("-classification"):
        return ()
    names = dict(config.id2label)
    if sorted(names) != list(range(len(names))):
        raise InputError(
            f"id2label of model {name!r} must name the labels 0 to {len(names) - 1}, not {sorted(names)}; number them "
            "as the classifier does"
        )
    return tuple(str(names[index]) for index in range(len(names)))


def score_function(config: ModernBertConfig, task: str) -> str:
    """How a text's logits become scores, as transformers' and sentence-transformers' pipelines decide; else ""."""
    if task != "text-classification":
        return ""
    stated = getattr(config, "sentence_transformers", None) or {}
    if config.problem_type == "regression" or str(stated.get("activation_fn", "")).endswith(".Identity"):
        return "identity"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"
