"""`ModernBertLocalAttention`: sliding-window attention, |q - k| <= radius, as a band of blocks.

The sequence is cut into blocks of one radius; a block of queries meets the keys of its own block and of its two
neighbours, so time and memory grow with S * radius.

Shapes: B batch, H heads, S sequence, K size of a head, N blocks, W queries of a block, L keys that it meets.
"""

import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.op import HIDDEN_KEY, OPSET, GraphOp


@torch.library.custom_op("modernbert::local_attention", mutates_args=())
def local_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, key_bias_BS: Tensor, radius: int) -> Tensor:
    """Softmax attention [B, H, S, K] within the window, of scaled queries; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    position = torch.arange(q_BHSK.shape[2], device=q_BHSK.device)
    far_SS = (position[:, None] - position).abs() > radius
    bias_BSS = key_bias_BS[:, None, :] + HIDDEN_KEY * far_SS.to(q_BHSK.dtype)
    y_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=bias_BSS[:, None], scale=1.0)
    return y_BHSK.contiguous()


@local_attention.register_fake
def _(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, key_bias_BS: Tensor, radius: int) -> Tensor:
    return torch.empty_like(q_BHSK, memory_format=torch.contiguous_format)


def _node(q, k, v, key_bias, radius):
    return OPSET.ModernBertLocalAttention(q, k, v, key_bias, num_heads=q.shape[1], radius=radius)


@script(OPSET)
def ModernBertLocalAttention(q, k, v, key_bias, num_heads: int, radius: int):
    """Banded, standard operators. What depends on `key_bias` alone is the same in all layers, and merged there."""
    batch, length = op.Split(op.Shape(key_bias), num_outputs=2)
    tokens = op.Squeeze(length)
    # Up to three radii, one block of everything is less work than blocks with neighbours.
    short = op.Cast(tokens <= radius * 3, to=7)
    width = short * tokens + (1 - short) * radius
    beside = (1 - short) * radius
    blocks = (tokens + width - 1) / width
    # Where a block's keys stand, from its left neighbour on. Beyond the ends the nearest token is taken, and hidden;
    # so is every query beyond the end, until it is cut off.
    start_N1 = op.Unsqueeze(op.Range(0, blocks, 1) * width, [1])
    offset_L = op.Range(op.Neg(beside), width + beside, 1)
    offset_W = op.Range(0, width, 1)
    key_NL = start_N1 + offset_L
    nearest_NL = op.Clip(key_NL, 0, tokens - 1)
    query_NW = op.Min(start_N1 + offset_W, tokens - 1)
    beyond_NL = op.Cast(op.Not(op.Equal(key_NL, nearest_NL)), to=1)
    far_WL = op.Cast(op.Abs(offset_L - op.Unsqueeze(offset_W, [1])) > radius, to=1)
    hidden_NWL = op.CastLike((op.Unsqueeze(beyond_NL, [1]) + far_WL) * HIDDEN_KEY, key_bias)
    bias_B1NWL = op.Unsqueeze(op.Gather(key_bias, nearest_NL, axis=1), [1, 3]) + hidden_NWL

    q_BHNWK = op.Gather(q, query_NW, axis=2)
    k_BHNLK = op.Gather(k, nearest_NL, axis=2)
    v_BHNLK = op.Gather(v, nearest_NL, axis=2)
    scores_BHNWL = op.MatMul(q_BHNWK, op.Transpose(k_BHNLK, perm=[0, 1, 2, 4, 3])) + bias_B1NWL
    y_BHNWK = op.MatMul(op.Softmax(scores_BHNWL, axis=-1), v_BHNLK)
    y_shape = op.Concat(
        batch, op.Reshape(op.Constant(value_int=num_heads), [1]), op.Reshape(blocks * width, [1]), [-1], axis=0
    )
    return op.Slice(op.Reshape(y_BHNWK, y_shape), [0], length, [2])


LOCAL_ATTENTION = GraphOp(
    name="ModernBertLocalAttention",
    torch_op=torch.ops.modernbert.local_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes=("num_heads", "radius"),
    bodies={"portable": ModernBertLocalAttention},
)
