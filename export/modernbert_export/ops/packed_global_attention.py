"""`ModernBertPackedGlobalAttention`: every query sees every key of its own document, of documents packed in a row.

Three ways to the same result, chosen by the documents' lengths when the graph runs:

- No document reaches further than the window: seeing all of it is seeing what is in the window, so the band serves.
- One document: the padded operator's body, for there is nothing to keep apart.
- Else a Loop over blocks of queries. A block meets the keys from the start of its first document to the end of its
  last, so the work is the sum of the squares of the lengths and a little, and memory stays bounded.

Shapes: H heads, T packed tokens, K size of a head, C = documents + 1, N blocks, W queries of a block, S keys that it
meets.
"""

import torch
from onnxscript import BOOL, INT64, graph, script
from onnxscript import opset20 as op
from torch import Tensor

from modernbert_export.ops.global_attention import QUERY_BLOCK, ModernBertQueryBlocks
from modernbert_export.ops.op import HIDDEN_KEY, OPSET, TARGETS, GraphOp
from modernbert_export.ops.packed_local_attention import ModernBertPackedLocalAttention, attend_where


@torch.library.custom_op("modernbert::packed_global_attention", mutates_args=())
def packed_global_attention(
    q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, document_T: Tensor, cu_seqlens_C: Tensor, radius: int
) -> Tensor:
    """Softmax attention [1, H, T, K] of scaled queries within the document; `radius` changes how, not what."""
    return attend_where(q_1HTK, k_1HTK, v_1HTK, document_T[:, None] == document_T)


@packed_global_attention.register_fake
def _(q_1HTK: Tensor, k_1HTK: Tensor, v_1HTK: Tensor, document_T: Tensor, cu_seqlens_C: Tensor, radius: int) -> Tensor:
    return torch.empty_like(q_1HTK, memory_format=torch.contiguous_format)


def _node(q, k, v, document, cu_seqlens, radius):
    return OPSET.ModernBertPackedGlobalAttention(q, k, v, document, cu_seqlens, num_heads=q.shape[1], radius=radius)


@script(OPSET)
def ModernBertPackedBlocks(q, k, v, document, cu_seqlens, num_heads: int):
    """Blocks of at most `QUERY_BLOCK` queries, all of one size, against the documents that they touch."""
    length = op.Shape(document)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    blocks = (length + (QUERY_BLOCK - 1)) / QUERY_BLOCK
    width = (length + blocks - 1) / blocks
    q_shape = op.Concat([1], heads, blocks, width, [-1], axis=0)
    q_1HNWK = op.Reshape(op.Pad(q, op.Concat([0, 0, 0, 0, 0, 0], blocks * width - length, [0], axis=0)), q_shape)
    first_N = op.Range(0, op.Squeeze(length), op.Squeeze(width))
    last_N = op.Min(first_N + (op.Squeeze(width) - 1), op.Squeeze(length) - 1)
    start_N1 = op.Unsqueeze(op.Gather(cu_seqlens, op.Gather(document, first_N)), [1])
    end_N1 = op.Unsqueeze(op.Gather(cu_seqlens, op.Gather(document, last_N) + 1), [1])
    # What pads the last block belongs to the last document: it sees something, and is cut off.
    token_NW = op.Min(op.Unsqueeze(first_N, [1]) + op.Range(0, op.Squeeze(width), 1), op.Squeeze(length) - 1)
    document_NW = op.Gather(document, token_NW)
    hidden = op.Cast(HIDDEN_KEY, to=1)
    k_1HKT = op.Transpose(k, perm=[0, 1, 3, 2])

    @graph()
    def attend(block: INT64, condition: BOOL):
        start = op.Gather(start_N1, block)
        end = op.Gather(end_N1, block)
        mine_W1 = op.Unsqueeze(op.Gather(document_NW, block), [1])
        bias_WS = op.Where(op.Equal(mine_W1, op.Slice(document, start, end)), 0.0, hidden)
        scores_1HWS = op.MatMul(op.Gather(q_1HNWK, block, axis=2), op.Slice(k_1HKT, start, end, [3]))
        weights_1HWS = op.Softmax(op.CastLike(scores_1HWS, bias_WS) + bias_WS, axis=-1)
        y_1HWK = op.MatMul(op.CastLike(weights_1HWS, v), op.Slice(v, start, end, [2]))
        return op.Identity(condition), y_1HWK

    y_N1HWK = op.Loop(op.Squeeze(blocks), op.Cast(1, to=9), body=attend)
    y_shape = op.Concat([1], heads, blocks * width, [-1], axis=0)
    y_1HTK = op.Reshape(op.Transpose(y_N1HWK, perm=[1, 2, 0, 3, 4]), y_shape)
    return op.Slice(y_1HTK, [0], length, [2])


@script(OPSET)
def ModernBertPackedGlobalAttention(q, k, v, document, cu_seqlens, num_heads: int, radius: int):
    """The way that the documents' lengths allow."""
    length_B = op.Slice(cu_seqlens, [1], [2147483647]) - op.Slice(cu_seqlens, [0], [-1])
    within = op.ReduceMax(length_B, keepdims=0) <= op.Constant(value_int=radius) + 1
    alone = op.Squeeze(op.Size(length_B)) <= 1
    if within:
        y = ModernBertPackedLocalAttention(q, k, v, document, cu_seqlens, num_heads=num_heads, radius=radius)
    else:
        if alone:
            no_bias_1T = op.Unsqueeze(op.CastLike(document * 0, q), [0])
            y = ModernBertQueryBlocks(q, k, v, no_bias_1T, num_heads=num_heads)
        else:
            y = ModernBertPackedBlocks(q, k, v, document, cu_seqlens, num_heads=num_heads)
    return y


PACKED_GLOBAL_ATTENTION = GraphOp(
    name="ModernBertPackedGlobalAttention",
    torch_op=torch.ops.modernbert.packed_global_attention.default,
    node=_node,
    inputs=("q", "k", "v", "document", "cu_seqlens"),
    attributes=("num_heads", "radius"),
    bodies=dict.fromkeys(TARGETS, ModernBertPackedGlobalAttention),
    integer_inputs=("document", "cu_seqlens"),
)
