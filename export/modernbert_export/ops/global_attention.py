"""`ModernBertGlobalAttention`: every query sees every key. There may be more keys than queries.

The portable body takes the queries in blocks, so that memory stays bounded; the others leave that to their engine.

Shapes: B batch, H heads, Q queries, S keys, K size of a head, N blocks, W queries in a block.
"""

import torch
import torch.nn.functional as F
from onnxscript import BOOL, INT64, graph, script
from onnxscript import opset20 as op
from onnxscript import opset23 as op23
from torch import Tensor

from modernbert_export.ops.op import HIDDEN_KEY_HALF, MICROSOFT, OPSET, GraphOp

# Scores of one block take B * H * QUERY_BLOCK * S values: 100 MB for the base model at 8,192 tokens.
QUERY_BLOCK = 256


@torch.library.custom_op("modernbert::global_attention", mutates_args=())
def global_attention(q_BHQK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, key_bias_BS: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, K] over all keys, of scaled queries; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    bias_B11S = key_bias_BS[:, None, None, :]
    return F.scaled_dot_product_attention(q_BHQK, k_BHSK, v_BHSK, attn_mask=bias_B11S, scale=1.0).contiguous()


@global_attention.register_fake
def _(q_BHQK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, key_bias_BS: Tensor) -> Tensor:
    return torch.empty_like(q_BHQK, memory_format=torch.contiguous_format)


def _node(q, k, v, key_bias):
    return OPSET.ModernBertGlobalAttention(q, k, v, key_bias, num_heads=q.shape[1])


@script(OPSET)
def ModernBertQueryBlocks(q, k, v, key_bias, num_heads: int):
    """A Loop over blocks of at most `QUERY_BLOCK` queries, all of one size, so that short inputs are not padded.

    The bias enters as one more component of the keys, against a 1 in the queries: adding it to the scores afterwards
    would be a pass over the largest tensor of all.
    """
    batch = op.Shape(key_bias, start=0, end=1)
    length = op.Shape(q, start=2, end=3)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    blocks = (length + (QUERY_BLOCK - 1)) / QUERY_BLOCK
    width = (length + blocks - 1) / blocks
    pads = op.Concat([0, 0, 0, 0, 0, 0], blocks * width - length, [1], axis=0)
    q_shape = op.Concat(batch, heads, blocks, width, [-1], axis=0)
    q_BHNWK = op.Reshape(op.Pad(q, pads, op.CastLike(1.0, q)), q_shape)
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    bias_BH1S = op.Expand(op.Unsqueeze(bias_BS, [1, 2]), op.Concat([1], heads, [1, 1], axis=0))
    k_BHKS = op.Concat(op.Transpose(k, perm=[0, 1, 3, 2]), bias_BH1S, axis=2)

    @graph()
    def attend(block: INT64, condition: BOOL):
        scores_BHWS = op.MatMul(op.Gather(q_BHNWK, block, axis=2), k_BHKS)
        y_BHWK = op.MatMul(op.Softmax(scores_BHWS, axis=-1), v)
        return op.Identity(condition), y_BHWK

    y_NBHWK = op.Loop(op.Squeeze(blocks), op.Cast(1, to=9), body=attend)
    y_shape = op.Concat(batch, heads, blocks * width, [-1], axis=0)
    y_BHQK = op.Reshape(op.Transpose(y_NBHWK, perm=[1, 2, 0, 3, 4]), y_shape)
    return op.Slice(y_BHQK, [0], length, [2])


@script(OPSET)
def plain(q, k, v, key_bias, num_heads: int):
    """All scores at once. OpenVINO fuses this very pattern, and keeps it small by itself."""
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    scores_BHQS = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])) + op.Unsqueeze(bias_BS, [1, 2])
    return op.MatMul(op.Softmax(scores_BHQS, axis=-1), v)


@script(OPSET)
def multi_head(q, k, v, key_bias, num_heads: int):
    """ONNX Runtime's fused operator. With a bias and not a key mask, which on CUDA would cost B * H * Q * S scores."""
    length = op.Shape(q, start=2, end=3)
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    bias_B1QS = op.Expand(op.Unsqueeze(bias_BS, [1, 2]), op.Concat([1, 1], length, [1], axis=0))
    q_BQD = op.Reshape(op.Transpose(q, perm=[0, 2, 1, 3]), [0, 0, -1])
    k_BSD = op.Reshape(op.Transpose(k, perm=[0, 2, 1, 3]), [0, 0, -1])
    v_BSD = op.Reshape(op.Transpose(v, perm=[0, 2, 1, 3]), [0, 0, -1])
    y_BQD = MICROSOFT.MultiHeadAttention(q_BQD, k_BSD, v_BSD, None, None, bias_B1QS, num_heads=num_heads, scale=1.0)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    y_BQHK = op.Reshape(y_BQD, op.Concat([0, 0], heads, [-1], axis=0))
    return op.Transpose(y_BQHK, perm=[0, 2, 1, 3])


@script(OPSET)
def native(q, k, v, key_bias, num_heads: int):
    """The operator of opset 23, as the TensorRT parser takes it: 4-D, a 4-D bias, finite in fp16."""
    length = op23.Shape(q, start=2, end=3)
    bias_BS = op23.CastLike(op23.Max(key_bias, op23.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    bias_B1QS = op23.Expand(op23.Unsqueeze(bias_BS, [1, 2]), op23.Concat([1, 1], length, [1], axis=0))
    return op23.Attention(q, k, v, bias_B1QS, scale=1.0)


GLOBAL_ATTENTION = GraphOp(
    name="ModernBertGlobalAttention",
    torch_op=torch.ops.modernbert.global_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes=("num_heads",),
    bodies={
        "portable": ModernBertQueryBlocks,
        "openvino": plain,
        "ort-cuda": multi_head,
        "tensorrt": native,
        "tensorrt-dense": native,
    },
    float_inputs=("key_bias",),
)
