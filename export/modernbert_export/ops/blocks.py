"""Cuts tokens into blocks with heads in front, and joins blocks again. A part of the local operators' bodies.

Both are one gather of rows, a vector of K for each head of each token: no transposition, padding or slice, each of
which would be one more copy. The positions depend on shapes and mask alone: they are the same in all layers, and merged
there.

Shapes: B batch, S sequence, J heads of a tensor, of which H are taken, K size of a head, N blocks, W or L tokens of a
block.
"""

from onnxscript import opset20 as op
from onnxscript import script

from modernbert_export.ops.op import OPSET


@script(OPSET)
def ModernBertBlocks(x, token_NL, first, num_heads: int):
    """The tokens [N, L] of x [B, S, J, K], of each the heads from the `first` [1] on, as [B, H, N, L, K]."""
    head_H = first + op.Range(0, op.Squeeze(op.Reshape(op.Constant(value_int=num_heads), [1])), 1)
    rows = op.Concat([0, -1], op.Shape(x, start=3), axis=0)  # 0 keeps an axis
    row_HNL = token_NL * op.Shape(x, start=2, end=3) + op.Unsqueeze(head_H, [1, 2])
    return op.Gather(op.Reshape(x, rows), row_HNL, axis=1)


@script(OPSET)
def ModernBertJoined(x_BHNWK, token_NW, length, num_heads: int):
    """The blocks of the tokens [N, W] in a row again, as [B, S, H, K]; those beyond the length [1] are dropped."""
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    head_H = op.Range(0, op.Squeeze(heads), 1)
    token_S1 = op.Unsqueeze(op.Range(0, op.Squeeze(length), 1), [1])
    rows = op.Concat([0, -1], op.Shape(x_BHNWK, start=4), axis=0)
    return op.Gather(op.Reshape(x_BHNWK, rows), token_S1 + head_H * op.Size(token_NW), axis=1)
