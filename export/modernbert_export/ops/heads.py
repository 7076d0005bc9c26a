"""Queries and keys that stand in one tensor. A part of the attention operators' bodies.

One product with weights makes the queries and keys of a layer, and one rotation turns them: [B, S, 2 H, K], the
queries' heads first. So of q's heads the first H count, and of k's the last H, where v has H. Where they are tensors of
their own, with H heads each, those are all.

Shapes: B batch, S sequence, H heads, J heads of q or k, K size of a head.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.op import OPSET


def queries_and_keys(q_BSJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """The heads that count of q and of k, as many as v has."""
    heads = v_BSHK.shape[2]
    return q_BSJK[:, :, :heads], k_BSJK[:, :, -heads:]


def like_values(q_BSJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor, *_: object) -> Tensor:
    """The fake of operators with as many queries as keys."""
    return torch.empty_like(v_BSHK, memory_format=torch.contiguous_format)


@script(OPSET)
def ModernBertQueriesAndKeys(q, k, num_heads: int):
    """The same as tensors of their own with heads in front, [B, H, S, K].

    Cut after the transposition: it is one for both, and cancels out with that of a rotation that wants heads in front.
    """
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    q_BJSK, k_BJSK = op.Transpose(q, perm=[0, 2, 1, 3]), op.Transpose(k, perm=[0, 2, 1, 3])
    keys = op.Shape(k, start=2, end=3)
    # With the steps named, the optimizer drops what cuts nothing off.
    return op.Slice(q_BJSK, [0], heads, [1], [1]), op.Slice(k_BJSK, keys - heads, keys, [1], [1])
