"""`ModernBertLocalAttention`: sliding-window attention, |q - k| <= radius, as a band of blocks.

The sequence is cut into blocks of one radius; a block of queries meets the keys of its own block and of its two
neighbours, so time and memory grow with S * radius.

Shapes: B batch, S sequence, H heads, K size of a head, N blocks, W radius, L = 3 W keys that a block meets.
"""

import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.op import HIDDEN_KEY, OPSET, GraphOp


@torch.library.custom_op("modernbert::local_attention", mutates_args=())
def local_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor, radius: int) -> Tensor:
    """Softmax attention [B, S, H, K] within the window; `key_bias_BS` is 0 on tokens, `HIDDEN_KEY` on padding."""
    position = torch.arange(q_BSHK.shape[1], device=q_BSHK.device)
    far_SS = (position[:, None] - position).abs() > radius
    bias_BSS = key_bias_BS[:, None, :] + HIDDEN_KEY * far_SS.to(q_BSHK.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BSS[:, None]).transpose(1, 2).contiguous()


@local_attention.register_fake
def _(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor, radius: int) -> Tensor:
    return torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)


def _node(q, k, v, key_bias, radius):
    return OPSET.ModernBertLocalAttention(
        q, k, v, key_bias, num_heads=q.shape[2], scale=q.shape[3] ** -0.5, radius=radius
    )


@script(OPSET)
def ModernBertLocalAttention(q, k, v, key_bias, num_heads: int, scale: float, radius: int):
    """Banded, standard operators. What depends on `key_bias` alone is the same in all layers, and merged there."""
    batch, length = op.Split(op.Shape(key_bias), num_outputs=2)
    width = op.Reshape(op.Constant(value_int=radius), [1])
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    blocks = (length + width - 1) / width
    rest = blocks * width - length

    # [B, S, H, K] -> [B, N, W, H, K]; keys get one more block on either side.
    q_pads = op.Concat([0, 0, 0, 0, 0], rest, [0, 0], axis=0)
    q_shape = op.Concat(batch, blocks, width, heads, [-1], axis=0)
    k_pads = op.Concat([0], width, [0, 0, 0], rest + width, [0, 0], axis=0)
    k_shape = op.Concat(batch, blocks + 2, width, heads, [-1], axis=0)
    q_BNWHK = op.Reshape(op.Pad(q * scale, q_pads), q_shape)
    k_BNWHK = op.Reshape(op.Pad(k, k_pads), k_shape)
    v_BNWHK = op.Reshape(op.Pad(v, k_pads), k_shape)
    k_BNLHK = op.Concat(k_BNWHK[:, :-2], k_BNWHK[:, 1:-1], k_BNWHK[:, 2:], axis=2)
    v_BNLHK = op.Concat(v_BNWHK[:, :-2], v_BNWHK[:, 1:-1], v_BNWHK[:, 2:], axis=2)

    bias_pads = op.Concat([0], width, [0], rest + width, axis=0)
    bias_shape = op.Concat(batch, blocks + 2, [1, 1], width, axis=0)
    bias_BN11W = op.Reshape(op.Pad(key_bias, bias_pads, HIDDEN_KEY), bias_shape)
    bias_BN11L = op.Concat(bias_BN11W[:, :-2], bias_BN11W[:, 1:-1], bias_BN11W[:, 2:], axis=4)
    # Query i of a block stands at offset i + W of the three blocks of keys.
    rank = op.Range(0, op.Squeeze(width) * 3, 1)
    offset_WL = (rank - width) - op.Unsqueeze(rank[: op.Squeeze(width)], [1])
    far_WL = op.Cast(op.Abs(offset_WL) > width, to=1) * HIDDEN_KEY
    bias_BN1WL = bias_BN11L + op.CastLike(far_WL, key_bias)

    scores_BNHWL = op.MatMul(op.Transpose(q_BNWHK, perm=[0, 1, 3, 2, 4]), op.Transpose(k_BNLHK, perm=[0, 1, 3, 4, 2]))
    weights_BNHWL = op.Softmax(scores_BNHWL + bias_BN1WL, axis=-1)
    y_BNHWK = op.MatMul(weights_BNHWL, op.Transpose(v_BNLHK, perm=[0, 1, 3, 2, 4]))
    y_shape = op.Concat(batch, blocks * width, heads, [-1], axis=0)
    y_BSHK = op.Reshape(op.Transpose(y_BNHWK, perm=[0, 1, 3, 2, 4]), y_shape)
    return op.Slice(y_BSHK, [0], length, [1])


LOCAL_ATTENTION = GraphOp(
    name="ModernBertLocalAttention",
    torch_op=torch.ops.modernbert.local_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes=("num_heads", "scale", "radius"),
    bodies={"portable": ModernBertLocalAttention},
)
