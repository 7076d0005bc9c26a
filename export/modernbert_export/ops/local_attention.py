"""`ModernBertLocalAttention`: sliding-window attention, |q - k| <= radius, as a band of blocks (`ops.band`).

q and k may be one tensor of both, see `ops.heads`.

Shapes: B batch, S sequence, H heads, J heads of q or k, K size of a head, N blocks, W queries of a block, L keys that
it meets, M = N + 2, X = B * N.
"""

import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import opset23 as op23
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.band import ModernBertBand
from modernbert_export.ops.blocks import ModernBertBlocks, ModernBertJoined
from modernbert_export.ops.heads import ModernBertQueriesAndKeys, like_values, queries_and_keys
from modernbert_export.ops.op import HIDDEN_KEY, HIDDEN_KEY_HALF, OPSET, GraphOp


@torch.library.custom_op("modernbert::local_attention", mutates_args=())
def local_attention(
    q_BSJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor, scale: float, radius: int
) -> Tensor:
    """Softmax attention [B, S, H, K] within the window; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    position = torch.arange(v_BSHK.shape[1], device=v_BSHK.device)
    far_SS = (position[:, None] - position).abs() > radius
    bias_BSS = key_bias_BS[:, None, :] + HIDDEN_KEY * far_SS.to(v_BSHK.dtype)
    q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (*queries_and_keys(q_BSJK, k_BSJK, v_BSHK), v_BSHK))
    y_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=bias_BSS[:, None], scale=scale)
    return y_BHSK.transpose(1, 2).contiguous()


local_attention.register_fake(like_values)


def _node(q, k, v, key_bias, scale, radius):
    return OPSET.ModernBertLocalAttention(q, k, v, key_bias, num_heads=v.shape[2], scale=scale, radius=radius)


@script(OPSET)
def ModernBertLocalAttention(q, k, v, key_bias, num_heads: int, scale: float, radius: int):
    """Banded, standard operators."""
    query_NW, key_NL, bias_B1NWL = ModernBertBand(key_bias, radius=radius)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    q_BHNWK = ModernBertBlocks(q, query_NW, [0], num_heads=num_heads)
    k_BHNLK = ModernBertBlocks(k, key_NL, op.Shape(k, start=2, end=3) - heads, num_heads=num_heads)
    v_BHNLK = ModernBertBlocks(v, key_NL, [0], num_heads=num_heads)
    q_BHNWK = q_BHNWK * op.CastLike(op.Constant(value_float=scale), q)  # engines make it a part of the product
    # In the bias's precision, which stays fp32 where q is fp16.
    scores_BHNWL = op.CastLike(op.MatMul(q_BHNWK, op.Transpose(k_BHNLK, perm=[0, 1, 2, 4, 3])), key_bias) + bias_B1NWL
    y_BHNWK = op.MatMul(op.CastLike(op.Softmax(scores_BHNWL, axis=-1), v), v_BHNLK)
    return ModernBertJoined(y_BHNWK, query_NW, op.Shape(key_bias, start=1), num_heads=num_heads)


@script(OPSET)
def native_banded(q, k, v, key_bias, num_heads: int, scale: float, radius: int):
    """One native Attention over all blocks of all sequences, [B * N, H, W or L, K].

    Blocks of keys are cut and joined, not gathered, and what is added at the ends is hidden. Head count and block sizes
    are static, as the TensorRT parser wants them. A padded query sees at least its own block: no row is empty.
    """
    q_BHSK, k_BHSK = ModernBertQueriesAndKeys(q, k, num_heads=num_heads)
    batch, length = op23.Split(op23.Shape(key_bias), num_outputs=2)
    heads = op23.Reshape(op23.Constant(value_int=num_heads), [1])
    size = op23.Shape(v, start=3)
    width = op23.Reshape(op23.Constant(value_int=radius), [1])
    blocks = (length + width - 1) / width
    rest = blocks * width - length

    q_pads = op23.Concat([0, 0, 0, 0, 0, 0], rest, [0], axis=0)
    k_pads = op23.Concat([0, 0], width, [0, 0, 0], rest + width, [0], axis=0)
    q_shape = op23.Concat(batch, heads, blocks, width, size, axis=0)
    k_shape = op23.Concat(batch, heads, blocks + 2, width, size, axis=0)
    q_BHNWK = op23.Reshape(op23.Pad(q_BHSK, q_pads), q_shape)
    k_BHMWK = op23.Reshape(op23.Pad(k_BHSK, k_pads), k_shape)
    v_BHMWK = op23.Reshape(op23.Pad(op23.Transpose(v, perm=[0, 2, 1, 3]), k_pads), k_shape)
    k_BHNLK = op23.Concat(
        op23.Slice(k_BHMWK, [0], blocks, [2]),
        op23.Slice(k_BHMWK, [1], blocks + 1, [2]),
        op23.Slice(k_BHMWK, [2], blocks + 2, [2]),
        axis=3,
    )
    v_BHNLK = op23.Concat(
        op23.Slice(v_BHMWK, [0], blocks, [2]),
        op23.Slice(v_BHMWK, [1], blocks + 1, [2]),
        op23.Slice(v_BHMWK, [2], blocks + 2, [2]),
        axis=3,
    )

    hidden = op23.CastLike(HIDDEN_KEY_HALF, key_bias)
    bias_pads = op23.Concat([0], width, [0], rest + width, axis=0)
    bias_BS = op23.Pad(op23.Max(key_bias, hidden), bias_pads, hidden)
    bias_BMW = op23.Reshape(bias_BS, op23.Concat(batch, blocks + 2, width, axis=0))
    bias_BNL = op23.Concat(
        op23.Slice(bias_BMW, [0], blocks, [1]),
        op23.Slice(bias_BMW, [1], blocks + 1, [1]),
        op23.Slice(bias_BMW, [2], blocks + 2, [1]),
        axis=2,
    )
    offset_W1 = op23.Unsqueeze(op23.Range(0, op23.Squeeze(width), 1), [1])
    offset_L = op23.Range(op23.Neg(op23.Squeeze(width)), op23.Squeeze(width) * 2, 1)
    band_WL = op23.Where(op23.Abs(offset_L - offset_W1) > radius, hidden, op23.CastLike(0.0, key_bias))
    bias_X11L = op23.Reshape(bias_BNL, op23.Concat([-1, 1, 1], width * 3, axis=0))
    bias_X1WL = op23.CastLike(op23.Min(bias_X11L, band_WL), q)

    q_XHWK = op23.Reshape(op23.Transpose(q_BHNWK, perm=[0, 2, 1, 3, 4]), op23.Concat([-1], heads, width, size, axis=0))
    kv_shape = op23.Concat([-1], heads, width * 3, size, axis=0)
    k_XHLK = op23.Reshape(op23.Transpose(k_BHNLK, perm=[0, 2, 1, 3, 4]), kv_shape)
    v_XHLK = op23.Reshape(op23.Transpose(v_BHNLK, perm=[0, 2, 1, 3, 4]), kv_shape)
    y_XHWK = op23.Attention(q_XHWK, k_XHLK, v_XHLK, bias_X1WL, scale=scale)
    y_BNHWK = op23.Reshape(y_XHWK, op23.Concat(batch, blocks, heads, width, size, axis=0))
    y_shape = op23.Concat(batch, heads, blocks * width, size, axis=0)
    y_BHSK = op23.Reshape(op23.Transpose(y_BNHWK, perm=[0, 2, 1, 3, 4]), y_shape)
    return op23.Transpose(op23.Slice(y_BHSK, [0], length, [2]), perm=[0, 2, 1, 3])


@script(OPSET)
def native_dense(q, k, v, key_bias, num_heads: int, scale: float, radius: int):
    """One native Attention with the window in its bias: S * S work, and the better bargain while S is short."""
    q_BHSK, k_BHSK = ModernBertQueriesAndKeys(q, k, num_heads=num_heads)
    length = op23.Shape(key_bias, start=1)
    hidden = op23.CastLike(HIDDEN_KEY_HALF, key_bias)
    position_S = op23.Range(0, op23.Squeeze(length), 1)
    distance_SS = op23.Abs(position_S - op23.Unsqueeze(position_S, [1]))
    band_SS = op23.Where(distance_SS > radius, hidden, op23.CastLike(0.0, key_bias))
    bias_B1SS = op23.Min(op23.Unsqueeze(op23.Max(key_bias, hidden), [1, 2]), band_SS)
    v_BHSK = op23.Transpose(v, perm=[0, 2, 1, 3])
    y_BHSK = op23.Attention(q_BHSK, k_BHSK, v_BHSK, op23.CastLike(bias_B1SS, q), scale=scale)
    return op23.Transpose(y_BHSK, perm=[0, 2, 1, 3])


LOCAL_ATTENTION = GraphOp(
    name="ModernBertLocalAttention",
    torch_op=torch.ops.modernbert.local_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes={"num_heads": int, "scale": float, "radius": int},
    bodies={
        "portable": ModernBertLocalAttention,
        "openvino": ModernBertLocalAttention,
        "ort-cuda": ModernBertLocalAttention,
        "tensorrt": native_banded,
        "tensorrt-dense": native_dense,
    },
    float_inputs=("key_bias",),
)
