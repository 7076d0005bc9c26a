"""The packed form of an embedding model: the tokens of all texts one behind the other, and no padding anywhere.

    input_ids, position_ids  int64 [tokens]         a token's position counts from the start of its text
    cu_seqlens               int64 [texts + 1]      text b holds tokens cu_seqlens[b] to cu_seqlens[b + 1]
    last_hidden_state        [tokens, dim]
    sentence_embedding       [texts, dim]

Texts never see each other: a text's vectors are the same whatever stands beside it. At least one token. The graph is
for ONNX Runtime's CPU provider, whose own attention it has.

Shapes: T tokens, B texts, C = B + 1 offsets, D hidden size, H heads, K size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.attention import rotary_tables
from modernbert.config import LayerType, ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertModel
from modernbert_export.ops.packed_global_attention import packed_global_attention
from modernbert_export.ops.packed_local_attention import packed_local_attention
from modernbert_export.ops.rotary import rotary
from modernbert_export.tasks import EMBEDDING
from modernbert_export.trace import OUTPUTS, to_graph

# Names of the inputs and of their axes.
PACKED_INPUTS: Mapping[str, tuple[str, ...]] = {
    "input_ids": ("tokens",),
    "position_ids": ("tokens",),
    "cu_seqlens": ("bounds",),
}


class TracedPackedEmbedder(nn.Module):
    """The packed twin of `trace.TracedEmbedder`. Models without global tokens only."""

    def __init__(self, model: ModernBertModel, pooling: str, *, normalize: bool) -> None:
        super().__init__()
        assert not model.config.num_global_tokens
        assert pooling in ("mean", "cls")
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens_C: Tensor) -> tuple[Tensor, ...]:
        """The outputs, then the hidden states: the input of every layer, [1, T, D]."""
        config = self.model.config
        hidden_size, size = config.hidden_size, config.head_dim
        document_T = documents(cu_seqlens_C, input_ids_T.shape[0])
        tables = {}
        for layer_type in sorted(set(config.layer_types)):
            cos, sin = rotary_tables(position_ids_T, config.rope_theta(layer_type), size, torch.float32)
            tables[layer_type] = cos[:, 0], sin[:, 0]

        def attend(qkv: Tensor, layer_type: LayerType) -> Tensor:
            qk, v = (x.unflatten(-1, (-1, size)) for x in qkv.split((2 * hidden_size, hidden_size), dim=-1))
            qk = rotary(qk, *tables[layer_type])
            attention = packed_global_attention if layer_type == "full_attention" else packed_local_attention
            return attention(qk, qk, v, document_T, cu_seqlens_C, size**-0.5, config.window_radius)

        # As one row: linear layers become the very products that the padded form has, with the very weights.
        x_1TD, hidden = self.model.encode(self.model.embeddings(input_ids_T[None]), attend, keep_hidden=True)
        x_TD = x_1TD[0]
        return x_TD, self._pool(x_TD, document_T, cu_seqlens_C), *hidden[:-1]

    def _pool(self, x_TD: Tensor, document_T: Tensor, cu_seqlens_C: Tensor) -> Tensor:
        """[B, D], as `modernbert.pooling` does it for rows; zeros for a text without tokens under "mean"."""
        if self.pooling == "cls":
            y_BD = x_TD[cu_seqlens_C[:-1].clamp(max=x_TD.shape[0] - 1)]
        else:
            # A product with ones and zeros: a sum of exactly the text's own tokens. The one matrix of size B * T.
            of_BT = (torch.arange(cu_seqlens_C.shape[0] - 1)[:, None] == document_T).to(x_TD.dtype)
            y_BD = of_BT @ x_TD / cu_seqlens_C.diff().clamp(min=1).to(x_TD.dtype)[:, None]
        return F.normalize(y_BD, dim=-1, eps=1e-12) if self.normalize else y_BD


def documents(cu_seqlens_C: Tensor, tokens: int) -> Tensor:
    """Which text each token belongs to [T], from the texts' offsets. Texts without tokens count, too."""
    ends_C = cu_seqlens_C[1:]
    begun = torch.zeros(tokens + 1, dtype=torch.int64).scatter_add(0, ends_C, torch.ones_like(ends_C))
    return begun.cumsum(0)[:-1]


def trace_packed(model: ModernBertModel, *, pooling: str, normalize: bool) -> ir.Model:
    """Traces the packed form; for the rest see `trace.trace`."""
    example = (torch.ones(200, dtype=torch.int64), torch.arange(200) % 110, torch.tensor((0, 110, 200)))
    # A tracer tells one text from several, where ONNX does not: the graph takes any number.
    dims = {"tokens": torch.export.Dim("tokens"), "bounds": torch.export.Dim("bounds", min=3)}
    graph = to_graph(
        TracedPackedEmbedder(model, pooling, normalize=normalize),
        dict(zip(PACKED_INPUTS, example, strict=True)),
        {name: [dims[axis] for axis in axes] for name, axes in PACKED_INPUTS.items()},
        OUTPUTS,
        [f"layers.{index}.input" for index in range(model.config.num_hidden_layers)],
    )
    graph.graph.outputs[1].shape = ir.Shape(["texts", model.config.hidden_size])
    return graph


def check_packable(config: ModernBertConfig, task: str) -> None:
    """Refuses what has no packed form.

    Raises:
        InputError: another task than embedding, or a model with global tokens.
    """
    if task != EMBEDDING:
        raise InputError(f"packed is there for task {EMBEDDING} only, not {task}; leave it out")
    if config.num_global_tokens:
        raise InputError(
            f"packed is not there for models with global tokens: num_global_tokens is {config.num_global_tokens}; "
            "leave it out"
        )
