"""`ModernBertRotary`: rotary embedding, split-half, with tables computed once per graph.

Shapes: B batch, H heads, S sequence, K size of a head.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert.attention import rotate
from modernbert_export.ops.op import OPSET, GraphOp


@torch.library.custom_op("modernbert::rotary", mutates_args=())
def rotary(x_BHSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns q or k [B, H, S, K] by the angles whose cosines and sines [S, K / 2] are given."""
    return rotate(x_BHSK, cos, sin)


@rotary.register_fake
def _(x_BHSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x_BHSK, memory_format=torch.contiguous_format)


def _node(x, cos, sin):
    return OPSET.ModernBertRotary(x, cos, sin)


@script(OPSET)
def ModernBertRotary(x, cos, sin):
    """Standard operators. Both halves at once: x * [cos, cos] + swapped x * [-sin, sin]."""
    halves_BHS2K = op.Reshape(x, [0, 0, 0, 2, -1])  # 0 keeps an axis
    swapped_BHS2K = op.Gather(halves_BHS2K, [1, 0], axis=3)
    cos_S2K = op.Concat(op.Unsqueeze(cos, [1]), op.Unsqueeze(cos, [1]), axis=1)
    sin_S2K = op.Concat(op.Unsqueeze(op.Neg(sin), [1]), op.Unsqueeze(sin, [1]), axis=1)
    return op.Reshape(halves_BHS2K * cos_S2K + swapped_BHS2K * sin_S2K, [0, 0, 0, -1])


ROTARY = GraphOp(
    name="ModernBertRotary",
    torch_op=torch.ops.modernbert.rotary.default,
    node=_node,
    inputs=("x", "cos", "sin"),
    bodies={"portable": ModernBertRotary},
)
