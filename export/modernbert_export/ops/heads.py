"""Queries and keys that stand in one tensor. A part of the attention operators' bodies.

One product with weights makes the queries and keys of a layer, and one rotation turns them: [B, S, 2 H, K], the
queries' heads first. So of q's heads the first H count, and of k's the last H, where v has H. Where they are tensors of
their own, with H heads each, those are all.

Shapes: B batch, S sequence, H heads, J heads of q or k, K size of a head.
"""

from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.op import OPSET


def queries_and_keys(q_BSJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """The heads that count of q and of k, as many as v has."""
    heads = v_BSHK.shape[2]
    return q_BSJK[:, :, :heads], k_BSJK[:, :, -heads:]


@script(OPSET)
def ModernBertQueriesAndKeys(q, k, num_heads: int):
    """The same, for bodies that want tensors of their own."""
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    keys = op.Shape(k, start=2, end=3)
    return op.Slice(q, [0], heads, [2]), op.Slice(k, keys - heads, keys, [2])
