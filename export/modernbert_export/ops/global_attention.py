"""`ModernBertGlobalAttention`: every token sees every token, in blocks of queries so that memory stays bounded.

Shapes: B batch, S sequence, H heads, K size of a head, N blocks, W queries in a block.
"""

import torch
import torch.nn.functional as F
from onnxscript import BOOL, INT64, graph, script
from onnxscript import opset20 as op
from torch import Tensor

from modernbert_export.ops.op import OPSET, GraphOp

# Scores of one block take B * H * QUERY_BLOCK * S values: 100 MB for the base model at 8,192 tokens.
QUERY_BLOCK = 256


@torch.library.custom_op("modernbert::global_attention", mutates_args=())
def global_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor) -> Tensor:
    """Softmax attention [B, S, H, K] over all keys; `key_bias_BS` is 0 on tokens, `HIDDEN_KEY` on padding."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    y_BHSK = F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias_BS[:, None, None, :])
    return y_BHSK.transpose(1, 2).contiguous()


@global_attention.register_fake
def _(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor) -> Tensor:
    return torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)


def _node(q, k, v, key_bias):
    return OPSET.ModernBertGlobalAttention(q, k, v, key_bias, num_heads=q.shape[2], scale=q.shape[3] ** -0.5)


@script(OPSET)
def ModernBertGlobalAttention(q, k, v, key_bias, num_heads: int, scale: float):
    """A Loop over blocks of at most `QUERY_BLOCK` queries, all of one size, so that short inputs are not padded."""
    batch, length = op.Split(op.Shape(key_bias), num_outputs=2)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    blocks = (length + (QUERY_BLOCK - 1)) / QUERY_BLOCK
    width = (length + blocks - 1) / blocks
    pads = op.Concat([0, 0, 0, 0, 0], blocks * width - length, [0, 0], axis=0)
    q_BNWHK = op.Reshape(op.Pad(q * scale, pads), op.Concat(batch, blocks, width, heads, [-1], axis=0))
    q_NBHWK = op.Transpose(q_BNWHK, perm=[1, 0, 3, 2, 4])
    k_BHKS = op.Transpose(k, perm=[0, 2, 3, 1])
    v_BHSK = op.Transpose(v, perm=[0, 2, 1, 3])
    bias_B11S = op.Unsqueeze(key_bias, [1, 2])

    @graph()
    def attend(block: INT64, condition: BOOL):
        scores_BHWS = op.MatMul(op.Gather(q_NBHWK, block, axis=0), k_BHKS)
        y_BHWK = op.MatMul(op.Softmax(scores_BHWS + bias_B11S, axis=-1), v_BHSK)
        y_BWHK = op.Transpose(y_BHWK, perm=[0, 2, 1, 3])
        return op.Identity(condition), y_BWHK

    y_NBWHK = op.Loop(op.Squeeze(blocks), op.Cast(1, to=9), body=attend)
    y_shape = op.Concat(batch, blocks * width, heads, [-1], axis=0)
    y_BSHK = op.Reshape(op.Transpose(y_NBWHK, perm=[1, 0, 2, 3, 4]), y_shape)
    return op.Slice(y_BSHK, [0], length, [1])


GLOBAL_ATTENTION = GraphOp(
    name="ModernBertGlobalAttention",
    torch_op=torch.ops.modernbert.global_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes=("num_heads", "scale"),
    bodies={"portable": ModernBertGlobalAttention},
)
