"""One trace of the model into ONNX, with rotary embedding and attention as named operators.

The result is an `onnx_ir.Model` whose nodes of the domain `modernbert` have no body yet: `lower` gives them one per
target. Inputs `input_ids` and `attention_mask`, int64 [batch, sequence]; outputs `last_hidden_state` [batch,
sequence, dim] and `sentence_embedding` [batch, dim], or those of another head (`tasks`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import onnx_ir as ir
import torch
from torch import Tensor, nn

from modernbert.attention import rotary_tables
from modernbert.config import LayerType
from modernbert.errors import InputError
from modernbert.model import ModernBertModel
from modernbert_export.ops import OPS
from modernbert_export.ops.global_attention import global_attention
from modernbert_export.ops.local_attention import local_attention
from modernbert_export.ops.op import HIDDEN_KEY
from modernbert_export.ops.rotary import rotary
from modernbert_export.tasks import LOGITS, PooledHead

OPSET_VERSION = 20
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
# A length or batch of 1 in the example would freeze that axis.
EXAMPLE_SHAPE = (2, 200)


class TracedEmbedder(nn.Module):
    """The padded form of the encoder that is traced, with what the task computes from its token vectors."""

    def __init__(self, model: ModernBertModel, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """[B, S] ids and mask -> the outputs, then the hidden states (the input of every layer, and the result)."""
        config = self.model.config
        x_BSD = self.model.embeddings(input_ids)
        hidden_BS = 1 - attention_mask.to(x_BSD.dtype)
        position_S = torch.arange(input_ids.shape[1])
        # Scores are scaled by way of the queries, and these by way of their tables, where it costs nothing.
        scale = config.head_dim**-0.5
        tables = {}
        for layer_type in sorted(set(config.layer_types)):
            cos, sin = rotary_tables(position_S, config.rope_theta(layer_type), config.head_dim, torch.float32)
            tables[layer_type] = (cos[:, 0], sin[:, 0]), (cos[:, 0] * scale, sin[:, 0] * scale)

        def attend(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, layer_type: LayerType) -> Tensor:
            table, scaled_table = tables[layer_type]
            q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
            # Angles are fp32; their sines have the precision of what they turn.
            q, k = rotary(q, *(x.to(q.dtype) for x in scaled_table)), rotary(k, *(x.to(k.dtype) for x in table))
            # fp16 ends at -65,504: half of that leaves room for the score.
            key_bias_BS = (hidden_BS * max(HIDDEN_KEY, torch.finfo(q.dtype).min / 2)).to(q.dtype)
            if layer_type == "full_attention":
                return global_attention(q, k, v, key_bias_BS).transpose(1, 2)
            return local_attention(q, k, v, key_bias_BS, config.window_radius).transpose(1, 2)

        x_BSD, hidden = self.model.encode(x_BSD, attend, keep_hidden=True)
        outputs = self.head(x_BSD, attention_mask)
        return *outputs, *(hidden[:-1] if outputs[0] is x_BSD else hidden)


def trace(
    model: ModernBertModel, *, pooling: str = "mean", normalize: bool = True, head: nn.Module | None = None
) -> ir.Model:
    """Traces the model. Its weights stay in memory, shared with `model`.

    The value between two layers is named `layers.N.input`, the last one `last_hidden_state`; `verify` reads them to
    find the first layer that differs.

    Args:
        model: the encoder.
        pooling: of the embedding.
        normalize: whether it has unit length.
        head: gives `logits` in place of an embedding; see `tasks`.

    Raises:
        InputError: the model has global tokens.
    """
    if model.config.num_global_tokens:
        raise InputError(
            f"models with global tokens cannot be exported yet: num_global_tokens is {model.config.num_global_tokens}, "
            "must be 0"
        )
    for op in OPS:
        op.register_schema()
    outputs = OUTPUTS if head is None else (LOGITS,)
    hidden = [f"layers.{index}.input" for index in range(model.config.num_hidden_layers)]
    if OUTPUTS[0] not in outputs:
        hidden.append(OUTPUTS[0])
    # Two tensors: one given twice would be traced as one input.
    example = tuple(torch.ones(EXAMPLE_SHAPE, dtype=torch.int64) for _ in INPUTS)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    # torch.onnx prints its progress and warns of packages that it could use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            TracedEmbedder(model, PooledHead(pooling, normalize=normalize) if head is None else head).eval(),
            example,
            input_names=INPUTS,
            output_names=[*outputs, *hidden],
            opset_version=OPSET_VERSION,
            dynamo=True,
            dynamic_shapes=(axes, axes),
            custom_translation_table={op.torch_op: op.node for op in OPS},
            optimize=False,  # `lower` does it, once
        )
    assert program is not None
    graph = program.model.graph
    for name, value in zip(hidden, graph.outputs[len(outputs) :], strict=True):
        node = value.producer()
        if node is not None and node.op_type == "Identity":  # an output that is something else's too
            assert node.inputs[0] is not None
            value.name, node.inputs[0].name = node.inputs[0].name, name
    del graph.outputs[len(outputs) :]
    return program.model
