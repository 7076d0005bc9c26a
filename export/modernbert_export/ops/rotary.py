"""`ModernBertRotary`: rotary embedding, split-half, with tables computed once per graph.

Shapes: B batch, S sequence, H heads, K size of a head.
"""

from onnxscript import opset20 as op
from onnxscript import script

import torch
from modernbert.attention import rotate
from modernbert_export.ops.op import OPSET, GraphOp
from torch import Tensor


@torch.library.custom_op("modernbert::rotary", mutates_args=())
def rotary(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns q or k [B, S, H, K] by the angles whose cosines and sines [S, 1, K / 2] are given."""
    return rotate(x_BSHK, cos, sin)


@rotary.register_fake
def _(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x_BSHK)


@script(OPSET)
def ModernBertRotary(x, cos, sin):  # type: ignore[no-untyped-def]
    """Standard operators; precision is the tables'."""
    first, second = op.Split(x, axis=-1, num_outputs=2)
    return op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        axis=-1,
    )


ROTARY = GraphOp(
    name="ModernBertRotary", torch_op=rotary, inputs=("x", "cos", "sin"), bodies={"portable": ModernBertRotary}
)
