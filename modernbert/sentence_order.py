"""Sentence ordering prediction on top of masked language modelling: the head, the joint model, the accuracy.

    Lan et al. 2019, ALBERT (arXiv:1909.11942); `modernbert.data.ordering` makes the labels.

The joint model exists for training only. What is kept of it is its `masked_lm`, a plain ModernBERT that stock tools
open, and beside it the head's few weights, so that training can go on.

Shapes: T packed tokens, B sequences, D hidden size, C = k! orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from modernbert.config import ModernBertConfig, load_config
from modernbert.data.masking import IGNORED
from modernbert.data.ordering import SEGMENTS
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM, ModernBertPredictionHead, ModernBertPreTrainedModel

HEAD_FILE = "sentence_order_head.safetensors"


class SentenceOrderHead(nn.Module):
    """Classifies which of the k! orders the segments of a sequence are in, from its first token's vector."""

    def __init__(self, config: ModernBertConfig, segments: int) -> None:
        super().__init__()
        self.dense = ModernBertPredictionHead(config)
        self.classifier = nn.Linear(config.hidden_size, math.factorial(segments))
        self.classifier.init_std = config.initializer_range  # read by _init_weights

    def forward(self, first_BD: Tensor) -> Tensor:
        """[B, D] -> logits [B, C]."""
        return self.classifier(self.dense(first_BD))


@dataclass
class PreTrainingOutput(ModelOutput):
    """`loss` = masked-LM loss + weight * ordering loss. Without a head what is about order is None."""

    loss: Tensor | None = None
    masked_lm_loss: Tensor | None = None
    order_loss: Tensor | None = None
    order_logits: Tensor | None = None  # [B, C]


class ModernBertForPreTraining(ModernBertPreTrainedModel):
    """Masked language model and, where `segments` is not 0, a sentence-order head, on one encoder.

    Args:
        masked_lm: trained further in place.
        segments: k of sentence ordering, 0 to leave it out.
        order_weight: of the ordering loss against the masked-LM loss.
    """

    accepts_loss_kwargs = True

    def __init__(self, masked_lm: ModernBertForMaskedLM, segments: int = 0, order_weight: float = 1.0) -> None:
        super().__init__(masked_lm.config)
        self.order_weight = order_weight
        self.sentence_order = SentenceOrderHead(masked_lm.config, segments) if segments else None
        self.post_init()  # before the masked LM is there, whose weights stay as they are
        self.masked_lm = masked_lm

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor,
        order_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_orders_in_batch: Tensor | int | None = None,
    ) -> PreTrainingOutput:
        """Losses of a packed batch.

        Args:
            input_ids: [T].
            cu_seqlens: [B + 1].
            labels: [T], -100 where there is nothing to predict.
            order_labels: [B], -100 where a sequence has none.
            num_items_in_batch: divisor of the summed masked-LM loss; the number of labels when absent.
            num_orders_in_batch: divisor of the summed ordering loss; the number of its labels when absent.
        """
        output = self.masked_lm(
            input_ids,
            cu_seqlens=cu_seqlens,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            output_hidden_states=self.sentence_order is not None,
        )
        if self.sentence_order is None or order_labels is None:
            return PreTrainingOutput(loss=output.loss, masked_lm_loss=output.loss)
        last_hidden_state_TD = output.hidden_states[-1]
        logits_BC = self.sentence_order(last_hidden_state_TD[cu_seqlens[:-1].long()])
        divisor = num_orders_in_batch if num_orders_in_batch is not None else (order_labels != IGNORED).sum()
        # Without a label anywhere the sum is 0, and so shall be the loss.
        divisor = torch.as_tensor(divisor, device=logits_BC.device).clamp(min=1)
        order_loss = F.cross_entropy(logits_BC.float(), order_labels, ignore_index=IGNORED, reduction="sum") / divisor
        return PreTrainingOutput(
            loss=output.loss + self.order_weight * order_loss,
            masked_lm_loss=output.loss,
            order_loss=order_loss,
            order_logits=logits_BC,
        )

    def save(self, out: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the masked LM in transformers' layout, and the head beside it.

        Args:
            out: a directory.
            weights: the state dict to write, where this model has but a shard of it.
        """
        weights = self.state_dict() if weights is None else weights
        masked_lm, head = (
            {name.removeprefix(part): weight for name, weight in weights.items() if name.startswith(part)}
            for part in ("masked_lm.", "sentence_order.")
        )
        self.masked_lm.save_pretrained(out, state_dict=masked_lm)
        if head:
            save_file({name: weight.contiguous() for name, weight in head.items()}, out / HEAD_FILE)

    def load_head(self, directory: Path) -> None:
        """Continues with the head that stands beside a masked LM; keeps the new one where there is none.

        Raises:
            InputError: it is for another number of segments or another size.
        """
        file = directory / HEAD_FILE
        if self.sentence_order is None or not file.is_file():
            return
        weights = load_file(file)
        wanted = {name: weight.shape for name, weight in self.sentence_order.state_dict().items()}
        if {name: weight.shape for name, weight in weights.items()} != wanted:
            raise InputError(
                f"{str(file)!r} does not fit: it tells {len(weights['classifier.bias'])} orders apart, sop_segments "
                f"asks for {len(self.sentence_order.classifier.bias)}; use the same sop_segments, or remove it"
            )
        self.sentence_order.load_state_dict(weights)

    @classmethod
    def load(cls, directory: Path) -> ModernBertForPreTraining:
        """Reads what `save` wrote, in eval mode.

        Raises:
            InputError: there is no masked LM, or no head.
        """
        if not (directory / HEAD_FILE).is_file():
            raise InputError(f"model {str(directory)!r} has no {HEAD_FILE}; it was trained without sentence ordering")
        orders = len(load_file(directory / HEAD_FILE)["classifier.bias"])
        segments = next(k for k in SEGMENTS if math.factorial(k) == orders)
        model = cls(load_masked_lm(directory, load_config(directory)), segments)
        model.load_head(directory)
        return model.eval()


def load_masked_lm(directory: Path, config: ModernBertConfig) -> ModernBertForMaskedLM:
    """Loads a masked language model in fp32, whole.

    Raises:
        InputError: weights are missing, unreadable or of another shape.
    """
    try:
        model, found = ModernBertForMaskedLM.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"model {str(directory)!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"model {str(directory)!r} lacks {len(missing)} weights of a masked language model, {missing[0]} among them"
        )
    return model


def order_accuracy(logits_BC: Tensor, order_labels_B: Tensor) -> tuple[int, int]:
    """How many sequences have a label, and for how many of these the likeliest order is the right one."""
    labelled = order_labels_B != IGNORED
    correct = (logits_BC.argmax(-1) == order_labels_B) & labelled
    return int(labelled.sum()), int(correct.sum())
