"""The model, top-down: heads, encoder, layer, attention, MLP. Loads and writes transformers' ModernBERT checkpoints.

    Warner et al. 2024, "Smarter, Better, Faster, Longer" (arXiv:2412.13663): pre-norm encoder, rotary embedding, GLU
    (GeGLU) MLP, one global layer in three, the others with a sliding window.

State-dict names are transformers' own, so a checkpoint of either opens in the other. Two things differ on purpose:
padding is removed once at the edge (`modernbert.packing`) and its outputs are zeros, and the attention backend is an
explicit choice (`modernbert.attention`). One is added: global tokens (`modernbert.global_tokens`), none by default.
Heads other than masked LM are in `modernbert.heads`.

Shapes: B sequences, S padded length, T packed tokens, D hidden size, H heads, K size of a head, I MLP size,
V vocabulary, M tokens with a label, G global tokens per sequence.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.initialization import ones_, trunc_normal_, zeros_
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from modernbert.attention import BACKENDS, PLANS, ROWS, rotary_tables, rotated
from modernbert.config import LayerType, ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.global_tokens import attend_with_globals
from modernbert.packing import Packing, uncompiled
from modernbert.recompute import keep_input

logger = logging.getLogger(__name__)

# Attention [..., H, K] over queries, keys and values side by side [..., 3 * H * K], not rotated yet, for a layer of the
# given type. What surrounds it (packing, tables, backend) is the caller's, so that the exporter runs these very layers
# with operators of its own.
Attend = Callable[[Tensor, LayerType], Tensor]
AttentionName = Literal["eager", "sdpa", "banded", "flex", "varlen"]


class ModernBertPreTrainedModel(transformers.PreTrainedModel):
    """What all models here share: configuration, initialisation, choice of the attention backend."""

    config_class = ModernBertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModernBertEmbeddings", "ModernBertLayer"]  # noqa: RUF012  transformers' own name and type
    # transformers' dispatcher stays out of it: ours is `set_attention`.
    _supports_sdpa = True

    attention: AttentionName = "banded"

    def set_attention(self, name: AttentionName) -> None:
        """Selects the attention backend for this model and the encoder inside it.

        Raises:
            InputError: there is no backend of that name.
        """
        if name not in BACKENDS:
            raise InputError(f"attention must be one of {', '.join(BACKENDS)}, not {name!r}")
        logger.info("attention backend: %s", name)
        for module in self.modules():
            if isinstance(module, ModernBertPreTrainedModel):
                module.attention = name

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules that hold parameters themselves, and guards each one already loaded.
        def draw(weight: Tensor, std: float) -> None:
            cut = (self.config.initializer_cutoff_factor or 3.0) * std
            trunc_normal_(weight, mean=0.0, std=std, a=-cut, b=cut)

        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight, float(module.init_std))  # type: ignore[arg-type]
        elif isinstance(module, nn.LayerNorm):
            ones_(module.weight)
        elif isinstance(module, ModernBertEmbeddings) and self.config.num_global_tokens:
            draw(module.global_tokens, self.config.initializer_range)
        if getattr(module, "bias", None) is not None:
            zeros_(module.bias)


def linear(inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Linear:
    """A linear layer that knows the standard deviation of its initial weights."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.init_std = std  # type: ignore[assignment]
    return layer


def _narrow_std(config: ModernBertConfig) -> float:
    """Of layers that add to the residual stream, so that it does not grow with depth."""
    return float(config.initializer_range) / math.sqrt(2.0 * config.num_hidden_layers)


class ModernBertForMaskedLM(ModernBertPreTrainedModel):
    """Encoder with the masked-language-model head; the decoder shares the embeddings' weights."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}  # noqa: RUF012
    # Tells Trainer that the loss is divided by `num_items_in_batch`, so accumulated steps weigh every token alike.
    accepts_loss_kwargs = True

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.model = ModernBertModel(config)
        self.head = ModernBertPredictionHead(config)
        self.decoder = linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias, std=_narrow_std(config))
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The layer whose weights are tied to the input embeddings."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces that layer, as when the vocabulary is resized."""
        self.decoder = new_embeddings

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
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Predicts masked tokens; inputs as `ModernBertModel.forward` takes them.

        Args:
            labels: token ids in the shape of `input_ids`, -100 where there is nothing to predict.
            num_items_in_batch: divisor of the summed loss; the number of labels when absent.

        Returns:
            `logits` [B, S, V] (or [T, V] packed). With labels: `loss`, and `logits` [M, V] for the M tokens that have
            one, in order; the others' are never computed.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
        )
        loss, hidden = None, encoded.last_hidden_state
        if labels is not None:
            labelled = labels != -100
            hidden = hidden[labelled]
        logits = self.decoder(self.head(hidden))
        if labels is not None:
            divisor = num_items_in_batch if num_items_in_batch is not None else max(len(logits), 1)
            loss = F.cross_entropy(logits.float(), labels[labelled], reduction="sum") / divisor
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if return_dict else output.to_tuple()


@dataclass
class EncoderOutput(BaseModelOutput):
    """transformers' output, and the vectors of the global tokens [B, G, D] of a model that has any."""

    global_hidden_state: Tensor | None = None


class ModernBertModel(ModernBertPreTrainedModel):
    """The encoder: token ids in, one vector per token out."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.embeddings = ModernBertEmbeddings(config)
        self.layers = nn.ModuleList(ModernBertLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.num_global_tokens = config.num_global_tokens
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces them, as when the vocabulary is resized."""
        self.embeddings.tok_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Encodes padded or packed tokens.

        Args:
            input_ids: int64 [B, S]; or [T] together with `cu_seqlens`.
            attention_mask: [B, S], not 0 on tokens, 0 on padding; all tokens when absent.
            inputs_embeds: [B, S, D] or [T, D] in place of `input_ids`.
            cu_seqlens: [B + 1] offsets of packed sequences, from 0 to T.
            output_hidden_states: also return the input of every layer and the last layer's output.

        Returns:
            `last_hidden_state` [B, S, D], zeros on padding, or [T, D]; `hidden_states` likewise, `num_layers` + 1 of
            them, the last after the final norm; `global_hidden_state` [B, G, D] if the model has global tokens.

        Raises:
            InputError: not exactly one of ids and embeddings, or a mask together with `cu_seqlens`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        if cu_seqlens is None:
            mask = inputs.new_ones(inputs.shape[:2]) if attention_mask is None else attention_mask
            packing = Packing.from_mask(mask)
            inputs = packing.pack(inputs)
        elif attention_mask is None:
            packing = Packing.from_cu_seqlens(cu_seqlens)
        else:
            raise InputError("cu_seqlens says where packed sequences end; leave attention_mask out")

        x_TD = self.embeddings(inputs)
        x_XD = torch.cat((x_TD, self.embeddings.global_rows(len(packing.lengths)))) if self.num_global_tokens else x_TD
        x_XD, hidden = self.encode(x_XD, self._attend_packed(packing, x_XD.dtype), output_hidden_states)
        x_TD, x_BGD = self._split(x_XD, packing)
        output = EncoderOutput(
            last_hidden_state=packing.unpack(x_TD),
            hidden_states=tuple(packing.unpack(self._split(x, packing)[0]) for x in hidden) if hidden else None,
            global_hidden_state=x_BGD,
        )
        return output if return_dict else output.to_tuple()

    def _split(self, x_XD: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """[T + B * G, D] -> [T, D] and [B, G, D]."""
        if not self.num_global_tokens:
            return x_XD, None
        tokens = len(packing.sequence_T)
        return x_XD[:tokens], x_XD[tokens:].unflatten(0, (len(packing.lengths), self.num_global_tokens))

    def encode(self, x: Tensor, attend: Attend, keep_hidden: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Runs all layers and the final norm on embedded tokens [..., D].

        Returns:
            The result [..., D] and, if they are to be kept, the hidden states: the input of every layer, then the
            result.
        """
        hidden = []
        for layer in self.layers:
            if keep_hidden:
                hidden.append(x)
            x = layer(x, attend)
        x = self.final_norm(x)
        return x, [*hidden, x] if keep_hidden else []

    @uncompiled("masks depend on data, and are made once for all layers")
    def _plan(self, packing: Packing) -> None:
        if self.attention in PLANS:
            for layer_type in set(self.config.layer_types):
                PLANS[self.attention](packing, self._radius(layer_type), self.num_global_tokens)

    def _radius(self, layer_type: LayerType) -> int | None:
        return self.config.window_radius if layer_type == "sliding_attention" else None

    def _attend_packed(self, packing: Packing, dtype: torch.dtype) -> Attend:
        config, backend = self.config, BACKENDS[self.attention]
        self._plan(packing)
        precision = torch.promote_types(dtype, torch.float32)
        tables = {
            layer_type: rotary_tables(packing.position_T, config.rope_theta(layer_type), config.head_dim, precision)
            for layer_type in set(config.layer_types)
        }
        dropout = config.attention_dropout if self.training else 0.0

        def attend(qkv: Tensor, layer_type: LayerType) -> Tensor:
            q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in qkv.chunk(3, dim=-1))
            radius = self._radius(layer_type)
            if config.num_global_tokens:
                return attend_with_globals(
                    q,
                    k,
                    v,
                    num_global_tokens=config.num_global_tokens,
                    tables=tables[layer_type],
                    packing=packing,
                    radius=radius,
                    dropout=dropout,
                    backend=backend,
                    rows=ROWS[self.attention],
                )
            return backend(*rotated(q, k, v, *tables[layer_type]), packing, radius, dropout, None)

        return attend


class ModernBertPredictionHead(nn.Module):
    """Dense, activation, norm: what stands between the encoder and a decoder or classifier."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.dense = linear(
            config.hidden_size, config.hidden_size, bias=config.classifier_bias, std=_narrow_std(config)
        )
        self.act = ACT2FN[config.classifier_activation]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.norm(self.act(self.dense(x)))


class ModernBertEmbeddings(nn.Module):
    """Token embeddings and their norm. Position enters in the attention only."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.tok_embeddings.init_std = config.initializer_range
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.drop = nn.Dropout(config.embedding_dropout)
        if config.num_global_tokens:
            self.global_tokens = nn.Parameter(torch.empty(config.num_global_tokens, config.hidden_size))

    def global_rows(self, batch: int) -> Tensor:
        """The global tokens of `batch` sequences [B * G, D], normed as all that enters the first layer."""
        return self.drop(self.norm(self.global_tokens).repeat(batch, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids [...] or their embeddings [..., D] -> [..., D]."""
        x = inputs if inputs.is_floating_point() else self.tok_embeddings(inputs)
        return self.drop(self.norm(x))


class ModernBertLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normed before and added to the residual stream. Layer 0 follows a norm already."""

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        norm = dict(normalized_shape=config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.attn_norm = nn.LayerNorm(**norm) if index else nn.Identity()
        self.attn = ModernBertAttention(config, config.layer_types[index])
        self.mlp_norm = nn.LayerNorm(**norm)
        self.mlp = ModernBertMLP(config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """[..., D] -> [..., D]."""
        x = x + self.attn(x, self.attn_norm, attend)
        return x + self.mlp(x, self.mlp_norm)


class ModernBertAttention(nn.Module):
    """Projections around the attention function that the caller passes in."""

    def __init__(self, config: ModernBertConfig, layer_type: LayerType) -> None:
        super().__init__()
        self.layer_type = layer_type
        hidden, bias = config.hidden_size, config.attention_bias
        self.Wqkv = linear(hidden, 3 * hidden, bias=bias, std=config.initializer_range)
        self.Wo = linear(hidden, hidden, bias=bias, std=_narrow_std(config))
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(self, x: Tensor, norm: nn.Module, attend: Attend) -> Tensor:
        """[..., D], and the norm that comes before -> [..., D]."""
        qkv = keep_input(lambda x: self.Wqkv(norm(x)), x)
        y = attend(qkv, self.layer_type)
        return self.out_drop(self.Wo(y.flatten(-2)))


class ModernBertMLP(nn.Module):
    """Gated linear unit: Wo(act(input) * gate), both from one matrix."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.Wi = linear(hidden, 2 * inner, bias=bias, std=config.initializer_range)
        self.act = ACT2FN[config.hidden_activation]
        self.drop = nn.Dropout(config.mlp_dropout)
        self.Wo = linear(inner, hidden, bias=bias, std=_narrow_std(config))

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """[..., D], and the norm that comes before -> [..., D]."""
        both = keep_input(lambda x: self.Wi(norm(x)), x)
        return keep_input(lambda both: self.Wo(self._gated(both)), both, random=self.training and self.drop.p > 0)

    def _gated(self, both: Tensor) -> Tensor:
        """[..., 2 I] -> [..., I]."""
        value, gate = both.chunk(2, dim=-1)
        return self.drop(self.act(value) * gate)


def load_model(model: str | os.PathLike[str]) -> ModernBertModel:
    """Loads the encoder of a local directory or hub id in fp32, in eval mode, from whatever head it was saved with.

    Raises:
        InputError: it is not a ModernBERT, its weights are missing, unreadable, or do not fit its configuration.
    """
    config = load_config(model)
    try:
        encoder, report = ModernBertModel.from_pretrained(
            model, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"model {str(model)!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise InputError(f"model {str(model)!r}: weight {name} is {list(stored)}, its config.json wants {list(wanted)}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"model {str(model)!r} lacks {len(missing)} weights: {', '.join(missing)}")
    return encoder.eval()
