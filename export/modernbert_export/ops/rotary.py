"""`ModernBertRotary`: rotary embedding, split-half, with tables computed once per graph.

Shapes: B batch, H heads, S sequence, K size of a head.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import opset23 as op23
from onnxscript import script
from torch import Tensor

from modernbert.attention import rotate
from modernbert_export.ops.op import MICROSOFT, OPSET, GraphOp


@torch.library.custom_op("modernbert::rotary", mutates_args=())
def rotary(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns q or k [B, S, H, K] by the angles whose cosines and sines [S, K / 2] are given."""
    return rotate(x_BSHK, cos[:, None], sin[:, None])


@rotary.register_fake
def _(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x_BSHK, memory_format=torch.contiguous_format)


def _node(x, cos, sin):
    return OPSET.ModernBertRotary(x, cos, sin)


@script(OPSET)
def ModernBertRotary(x, cos, sin):
    """Standard operators. Both halves at once: x * [cos, cos] + swapped x * [-sin, sin], in the tables' precision."""
    halves_BSH2K = op.Reshape(op.CastLike(x, cos), [0, 0, 0, 2, -1])  # 0 keeps an axis
    swapped_BSH2K = op.Gather(halves_BSH2K, [1, 0], axis=3)
    cos_S12K = op.Unsqueeze(op.Concat(op.Unsqueeze(cos, [1]), op.Unsqueeze(cos, [1]), axis=1), [1])
    sin_S12K = op.Unsqueeze(op.Concat(op.Unsqueeze(op.Neg(sin), [1]), op.Unsqueeze(sin, [1]), axis=1), [1])
    return op.CastLike(op.Reshape(halves_BSH2K * cos_S12K + swapped_BSH2K * sin_S12K, [0, 0, 0, -1]), x)


@script(OPSET)
def fused(x, cos, sin):
    """ONNX Runtime's own operator."""
    x_BSD = op.Reshape(op.CastLike(x, cos), [0, 0, -1])
    y_BSD = MICROSOFT.RotaryEmbedding(x_BSD, op.Constant(value_ints=[0]), cos, sin)
    return op.CastLike(op.Reshape(y_BSD, op.Concat([0, 0], op.Shape(x, start=2), axis=0)), x)


@script(OPSET)
def native(x, cos, sin):
    """The operator of opset 23, in the tables' precision, with positions as the TensorRT parser takes them: int64."""
    batch, length = op23.Shape(x, start=0, end=1), op23.Shape(x, start=1, end=2)
    position_S = op23.Range(0, op23.Squeeze(length), 1)
    position_BS = op23.Expand(op23.Unsqueeze(position_S, [0]), op23.Concat(batch, length, axis=0))
    x_BHSK = op23.Transpose(op23.CastLike(x, cos), perm=[0, 2, 1, 3])
    y_BHSK = op23.RotaryEmbedding(x_BHSK, cos, sin, position_BS)
    return op23.CastLike(op23.Transpose(y_BHSK, perm=[0, 2, 1, 3]), x)


ROTARY = GraphOp(
    name="ModernBertRotary",
    torch_op=torch.ops.modernbert.rotary.default,
    node=_node,
    inputs=("x", "cos", "sin"),
    bodies={
        "portable": ModernBertRotary,
        "openvino": ModernBertRotary,
        "ort-cuda": fused,
        "tensorrt": native,
        "tensorrt-dense": native,
        "packed": fused,
    },
    float_inputs=("cos", "sin"),
)
