"""`ModernBertPackedLocalAttention`: sliding-window attention over documents packed one behind the other.

The band of `ops.band` over all tokens of all documents at once: a token sees those of its own document within the
window, wherever a block begins. No token looks further than its document reaches, so short documents make the band
narrower than the window.

q and k may be one tensor of both, see `ops.heads`.

Shapes: H heads, J heads of q or k, T packed tokens, K size of a head, C = documents + 1, N blocks, W queries of a
block, L keys that it meets.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.blocks import ModernBertBlocks, ModernBertJoined
from modernbert_export.ops.heads import like_values, queries_and_keys
from modernbert_export.ops.op import HIDDEN_KEY, OPSET, GraphOp

# Blocks are never narrower: smaller matrix products cost more per element than they save.
NARROWEST = 32


@torch.library.custom_op("modernbert::packed_local_attention", mutates_args=())
def packed_local_attention(
    q_1TJK: Tensor,
    k_1TJK: Tensor,
    v_1THK: Tensor,
    document_T: Tensor,
    cu_seqlens_C: Tensor,
    scale: float,
    radius: int,
) -> Tensor:
    """Softmax attention [1, T, H, K] within the window and the document.

    `document_T` numbers each token's document, from 0 on; `cu_seqlens_C` are the documents' offsets.
    """
    token_T = torch.arange(v_1THK.shape[1], device=v_1THK.device)
    seen_TT = (token_T[:, None] - token_T).abs() <= radius
    return attend_where(q_1TJK, k_1TJK, v_1THK, scale, seen_TT & (document_T[:, None] == document_T))


def attend_where(q_1TJK: Tensor, k_1TJK: Tensor, v_1THK: Tensor, scale: float, seen_TT: Tensor) -> Tensor:
    """The reference of both packed operators: softmax attention over the keys that each query may see."""
    q_1HTK, k_1HTK, v_1HTK = (x.transpose(1, 2) for x in (*queries_and_keys(q_1TJK, k_1TJK, v_1THK), v_1THK))
    scores_1HTT = (scale * q_1HTK @ k_1HTK.mT).masked_fill(~seen_TT, float("-inf"))
    return (scores_1HTT.softmax(-1) @ v_1HTK).transpose(1, 2).contiguous()


packed_local_attention.register_fake(like_values)


def _node(q, k, v, document, cu_seqlens, scale, radius):
    return OPSET.ModernBertPackedLocalAttention(
        q, k, v, document, cu_seqlens, num_heads=v.shape[2], scale=scale, radius=radius
    )


@script(OPSET)
def ModernBertPackedBand(document, cu_seqlens, radius: int):
    """Tokens of queries [N, W] and of keys [N, L], and what is added to their scores [N, W, L]."""
    tokens = op.Squeeze(op.Shape(document))
    longest = op.ReduceMax(op.Slice(cu_seqlens, [1], [2147483647]) - op.Slice(cu_seqlens, [0], [-1]), keepdims=0)
    reach = op.Max(op.Min(longest - 1, radius), 0)
    usual = op.Max(reach, NARROWEST)
    # One block of everything where that is less work than blocks with neighbours.
    single = op.Cast(tokens <= usual + reach * 2, to=7)
    width = single * tokens + (1 - single) * usual
    beside = (1 - single) * reach
    start_N1 = op.Unsqueeze(op.Range(0, (tokens + width - 1) / width, 1) * width, [1])
    offset_L = op.Range(op.Neg(beside), width + beside, 1)
    offset_W = op.Range(0, width, 1)
    # Beyond the ends the nearest token is taken: hidden as a key, cut off as a query.
    key_NL = start_N1 + offset_L
    nearest_NL = op.Min(op.Max(key_NL, 0), tokens - 1)
    query_NW = op.Min(start_N1 + offset_W, tokens - 1)
    beyond_NL = op.Not(op.Equal(key_NL, nearest_NL))
    far_WL = op.Abs(offset_L - op.Unsqueeze(offset_W, [1])) > radius
    key_document_NL = op.Where(beyond_NL, -1, op.Gather(document, nearest_NL))
    other_NWL = op.Not(op.Equal(op.Unsqueeze(key_document_NL, [1]), op.Unsqueeze(op.Gather(document, query_NW), [2])))
    return query_NW, nearest_NL, op.Where(op.Or(other_NWL, far_WL), HIDDEN_KEY, 0.0)


@script(OPSET)
def ModernBertPackedLocalAttention(q, k, v, document, cu_seqlens, num_heads: int, scale: float, radius: int):
    """Banded, standard operators."""
    query_NW, key_NL, bias_NWL = ModernBertPackedBand(document, cu_seqlens, radius=radius)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    q_1HNWK = ModernBertBlocks(q, query_NW, [0], num_heads=num_heads)
    k_1HNLK = ModernBertBlocks(k, key_NL, op.Shape(k, start=2, end=3) - heads, num_heads=num_heads)
    v_1HNLK = ModernBertBlocks(v, key_NL, [0], num_heads=num_heads)
    q_1HNWK = q_1HNWK * op.CastLike(op.Constant(value_float=scale), q)  # ONNX Runtime makes it a part of the product
    # Scores in the bias's precision, fp32.
    scores_1HNWL = op.CastLike(op.MatMul(q_1HNWK, op.Transpose(k_1HNLK, perm=[0, 1, 2, 4, 3])), bias_NWL) + bias_NWL
    y_1HNWK = op.MatMul(op.CastLike(op.Softmax(scores_1HNWL, axis=-1), v), v_1HNLK)
    return ModernBertJoined(y_1HNWK, query_NW, op.Shape(document), num_heads=num_heads)


PACKED_LOCAL_ATTENTION = GraphOp(
    name="ModernBertPackedLocalAttention",
    torch_op=torch.ops.modernbert.packed_local_attention.default,
    node=_node,
    inputs=("q", "k", "v", "document", "cu_seqlens"),
    attributes={"num_heads": int, "scale": float, "radius": int},
    bodies={"packed": ModernBertPackedLocalAttention},
    integer_inputs=("document", "cu_seqlens"),
)
