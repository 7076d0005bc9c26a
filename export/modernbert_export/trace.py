"""One trace of the model into ONNX, with rotary embedding and attention as named operators.

The result is an `onnx_ir.Model` whose nodes of the domain `modernbert` have no body yet: `lower` gives them one per
target. Inputs `input_ids` and `attention_mask`, int64 [batch, sequence]; outputs `last_hidden_state` [batch,
sequence, dim] and `sentence_embedding` [batch, dim], or those of another head (`tasks`). `packed` has another form.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.attention import rotary_tables
from modernbert.config import LayerType
from modernbert.model import ModernBertModel
from modernbert_export.ops import OPS
from modernbert_export.ops.global_attention import global_attention
from modernbert_export.ops.local_attention import local_attention
from modernbert_export.ops.local_attention_with_globals import local_attention_with_globals
from modernbert_export.ops.op import HIDDEN_KEY
from modernbert_export.ops.rotary import rotary
from modernbert_export.source_lines import note_sources
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
        config, number = self.model.config, self.model.config.num_global_tokens
        x = self.model.embeddings(input_ids)
        # fp32 whatever the rest is, as are the tables: bodies of operators bound or cast it as they need.
        key_bias_BS = (1 - attention_mask.to(torch.float32)) * HIDDEN_KEY
        position_S = torch.arange(input_ids.shape[1])
        hidden_size, size = config.hidden_size, config.head_dim
        scale = size**-0.5
        tables = {}
        for layer_type in sorted(set(config.layer_types)):
            cos, sin = rotary_tables(position_S, config.rope_theta(layer_type), size, torch.float32)
            tables[layer_type] = cos[:, 0], sin[:, 0]
        if number:
            # In front of the tokens, so that both are slices of constant bounds, whose shapes parsers can tell.
            globals_1GD = self.model.embeddings.global_rows(1)[None]
            x = torch.cat((globals_1GD.expand(x.shape[0], -1, -1), x), dim=1)
            all_bias_BX = F.pad(key_bias_BS, (number, 0))

        def attend(qkv: Tensor, layer_type: LayerType) -> Tensor:
            """Of all rows [B, X, 3 D]."""
            if number:
                return attend_with_globals(qkv, layer_type)
            # Queries and keys stay one tensor (`ops.heads`): one product and one rotation.
            qk, v = (x.unflatten(-1, (-1, size)) for x in qkv.split((2 * hidden_size, hidden_size), dim=-1))
            qk = rotary(qk, *tables[layer_type])
            if layer_type == "full_attention":
                return global_attention(qk, qk, v, key_bias_BS, scale)
            return local_attention(qk, qk, v, key_bias_BS, scale, config.window_radius)

        def attend_with_globals(qkv: Tensor, layer_type: LayerType) -> Tensor:
            """See `modernbert.global_tokens`, whose padded twin this is."""
            q, k, v = (x.unflatten(-1, (-1, size)) for x in qkv.chunk(3, dim=-1))
            from_globals = global_attention(q[:, :number], k, v, all_bias_BX, scale)
            plain_q, global_k = q[:, number:], k[:, :number]
            q, k = rotary(plain_q, *tables[layer_type]), rotary(k[:, number:], *tables[layer_type])
            if layer_type == "full_attention":
                # A query is both, rotated and not; a key has zeros where it is not met, a value for the size's sake.
                both_q = torch.cat((q, plain_q), dim=-1)
                keys = torch.cat((F.pad(global_k, (size, 0)), F.pad(k, (0, size))), dim=1)
                y = global_attention(both_q, keys, F.pad(v, (0, size)), all_bias_BX, scale)[..., :size]
            else:
                global_v, v = v[:, :number], v[:, number:]
                y = local_attention_with_globals(
                    q, plain_q, k, v, global_k, global_v, key_bias_BS, scale, config.window_radius
                )
            return torch.cat((from_globals, y), dim=1)

        x, hidden = self.model.encode(x, attend, keep_hidden=True)
        x_BSD, x_BGD = (x[:, number:], x[:, :number]) if number else (x, None)
        outputs = self.head(x_BSD, attention_mask, x_BGD)
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
    """
    outputs = OUTPUTS if head is None else (LOGITS,)
    hidden = [f"layers.{index}.input" for index in range(model.config.num_hidden_layers)]
    if OUTPUTS[0] not in outputs:
        hidden.append(OUTPUTS[0])
    module = TracedEmbedder(model, PooledHead(pooling, normalize=normalize) if head is None else head)
    example = {name: torch.ones(EXAMPLE_SHAPE, dtype=torch.int64) for name in INPUTS}
    axes = torch.export.Dim("batch"), torch.export.Dim("sequence")
    return to_graph(module, example, dict.fromkeys(INPUTS, axes), outputs, hidden)


def to_graph(
    module: nn.Module,
    example: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[torch.export.Dim]],
    outputs: Sequence[str],
    hidden: Sequence[str],
) -> ir.Model:
    """Traces a module with our operators as nodes without a body.

    Args:
        module: takes the inputs in order; gives the outputs, then the values called `hidden`.
        example: name -> input; each a tensor of its own, for one given twice would be traced as one input.
        axes: name of an input -> its axes, all dynamic.
        outputs: names of the graph's outputs.
        hidden: names of values that stay inside.
    """
    for op in OPS:
        op.register_schema()
    # torch.onnx prints its progress and warns of packages that it could use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            input_names=list(example),
            output_names=[*outputs, *hidden],
            opset_version=OPSET_VERSION,
            dynamo=True,
            dynamic_shapes=tuple(dict(enumerate(axes[name])) for name in example),
            custom_translation_table={op.torch_op: op.node for op in OPS},
            optimize=False,  # `lower` does it, once
        )
    assert program is not None
    graph = program.model.graph
    note_sources(graph)
    for name, value in zip(hidden, graph.outputs[len(outputs) :], strict=True):
        node = value.producer()
        if node is not None and node.op_type == "Identity":  # an output that is something else's too
            assert node.inputs[0] is not None
            value.name, node.inputs[0].name = node.inputs[0].name, name
    del graph.outputs[len(outputs) :]
    return program.model
