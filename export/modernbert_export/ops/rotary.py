"""`ModernBertRotary`: rotary embedding, split-half, with tables computed once per graph.

Shapes: B batch, S sequence, H heads, K size of a head.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert.attention import rotate
from modernbert_export.ops.op import OPSET, GraphOp


@torch.library.custom_op("modernbert::rotary", mutates_args=())
def rotary(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns q or k [B, S, H, K] by the angles whose cosines and sines [S, 1, K / 2] are given."""
    return rotate(x_BSHK, cos, sin)


@rotary.register_fake
def _(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x_BSHK)


def _node(x, cos, sin):
    return OPSET.ModernBertRotary(x, cos, sin)


@script(OPSET)
def ModernBertRotary(x, cos, sin):
    """Standard operators; precision is the tables'."""
    first, second = op.Split(x, axis=-1, num_outputs=2)
    return op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        axis=-1,
    )


ROTARY = GraphOp(
    name="ModernBertRotary",
    torch_op=torch.ops.modernbert.rotary.default,
    node=_node,
    inputs=("x", "cos", "sin"),
    bodies={"portable": ModernBertRotary},
)
