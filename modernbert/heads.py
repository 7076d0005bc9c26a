"""Classifiers on the encoder: one label per text, one label per token. State-dict names and losses are transformers'.

Two things differ on purpose. The loss is divided by `num_items_in_batch` where Trainer gives it, so that accumulated
steps weigh every label alike; without it, it is the mean that transformers computes. And a batch without a single label
has a loss of 0, not NaN.

Shapes: B sequences, S padded length, T packed tokens, D hidden size, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertModel, ModernBertPredictionHead, ModernBertPreTrainedModel, linear
from modernbert.pooling import EmbeddingHead


class ModernBertClassifier(ModernBertPreTrainedModel):
    """What both have: encoder, prediction head, dropout and a linear layer with one output per label."""

    # Tells Trainer that the loss is divided by `num_items_in_batch`: it must not divide by accumulated steps again.
    accepts_loss_kwargs = True

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModernBertModel(config)
        self.head = ModernBertPredictionHead(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = linear(config.hidden_size, config.num_labels, bias=True, std=config.hidden_size**-0.5)
        self.post_init()

    def classify(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., C]."""
        return self.classifier(self.drop(self.head(x)))


class ModernBertForSequenceClassification(ModernBertClassifier):
    """Labels of a text, from the vector that `config.classifier_pooling` names: "cls", "mean" or "global"."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.pool = EmbeddingHead(config.classifier_pooling, normalize=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classifies padded texts [B, S].

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], not 0 on tokens; all tokens when absent.
            inputs_embeds: [B, S, D] in place of `input_ids`.
            labels: classes [B]; numbers [B], or [B, C], to come close to; or 0.0 and 1.0 [B, C] where a text may have
                several labels. `config.problem_type` says which; the first labels decide where it does not.
            num_items_in_batch: divisor of the summed loss; the number of labels when absent.
            output_hidden_states: also return the encoder's.

        Returns:
            `logits` [B, C]; with labels `loss`.
        """
        encoded = self.model(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states
        )
        x_BSD = encoded.last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(x_BSD.shape[:2], device=x_BSD.device)
        # As a number 0 or 1: any other that a mask holds would be a weight.
        pooled_BD = self.pool(x_BSD, attention_mask != 0, encoded.global_hidden_state)
        logits_BC = self.classify(pooled_BD)
        loss = None if labels is None else self._loss(logits_BC, labels, num_items_in_batch)
        output = SequenceClassifierOutput(loss=loss, logits=logits_BC, hidden_states=encoded.hidden_states)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits_BC: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        # Kept in the configuration, as transformers does: a saved model says how its logits are to be read.
        if self.config.problem_type is None:
            self.config.problem_type = self._problem_type(labels)
        if self.config.problem_type == "single_label_classification":
            if labels.numel() != len(logits_BC):
                raise InputError(
                    f"labels {list(labels.shape)} must be one class per text, [{len(logits_BC)}]; "
                    "where a text may have several labels, give 0.0 and 1.0 for each"
                )
            return cross_entropy(logits_BC, labels.view(-1), num_items_in_batch)
        if labels.numel() != logits_BC.numel():
            raise InputError(
                f"labels {list(labels.shape)} must have one number per text and label, {list(logits_BC.shape)}, "
                f"where problem_type is {self.config.problem_type!r}"
            )
        targets_BC = labels.view_as(logits_BC).float()
        if self.config.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits_BC.float(), targets_BC, reduction="sum")
        else:
            loss = F.mse_loss(logits_BC.float(), targets_BC, reduction="sum")
        return loss / (num_items_in_batch if num_items_in_batch is not None else max(labels.numel(), 1))

    def _problem_type(self, labels: Tensor) -> str:
        if self.num_labels == 1:
            return "regression"
        whole = labels.dtype in (torch.int64, torch.int32)
        return "single_label_classification" if whole else "multi_label_classification"


class ModernBertForTokenClassification(ModernBertClassifier):
    """A label for every token, as in named entity recognition."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Classifies tokens; inputs, padded or packed, as `ModernBertModel.forward` takes them.

        Args:
            labels: classes in the shape of `input_ids`, -100 where there is none.
            num_items_in_batch: divisor of the summed loss; the number of labels when absent.

        Returns:
            `logits` [B, S, C], or [T, C] packed; with labels `loss`.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classify(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, -2), labels.flatten(), num_items_in_batch)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if return_dict else output.to_tuple()


def cross_entropy(logits_NC: Tensor, labels_N: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Summed over labels that are not -100, divided by their number or by what the caller says."""
    total = F.cross_entropy(logits_NC.float(), labels_N.long(), reduction="sum", ignore_index=-100)
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels_N != -100).sum().clamp(min=1))
