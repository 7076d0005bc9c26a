"""`ModernBertPackedGlobalAttention`: every query sees every key of its own document, of documents packed in a row.

Two ways to the same result, chosen by the documents' lengths when the graph runs:

- No document reaches further than the window: seeing all of it is seeing what is in the window, so the band serves.
- Else a Loop over documents with ONNX Runtime's fused operator. Without bias and mask that computes in tiles
  (FlashAttention) where ONNX Runtime knows the size of the CPU's second-level cache. Elsewhere, as on ARM under Linux,
  it stores scores: long documents are cut into blocks of queries, so that memory stays bounded there, too.

q and k may be one tensor of both, see `ops.heads`.

Shapes: H heads, J heads of q or k, T packed tokens, K size of a head, D = H * K, E = J * K, C = documents + 1, N
blocks, W queries of a block.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.heads import like_values
from modernbert_export.ops.op import MICROSOFT, OPSET, GraphOp
from modernbert_export.ops.packed_local_attention import ModernBertPackedLocalAttention, attend_where

# Each block copies the keys and values of its document: few blocks. Scores, where they are stored, are 403 MB for the
# base model at 8,192 tokens.
QUERY_BLOCK = 1024


@torch.library.custom_op("modernbert::packed_global_attention", mutates_args=())
def packed_global_attention(
    q_1TJK: Tensor,
    k_1TJK: Tensor,
    v_1THK: Tensor,
    document_T: Tensor,
    cu_seqlens_C: Tensor,
    scale: float,
    radius: int,
) -> Tensor:
    """Softmax attention [1, T, H, K] within the document; `radius` changes how, not what."""
    return attend_where(q_1TJK, k_1TJK, v_1THK, scale, document_T[:, None] == document_T)


packed_global_attention.register_fake(like_values)


def _node(q, k, v, document, cu_seqlens, scale, radius):
    return OPSET.ModernBertPackedGlobalAttention(
        q, k, v, document, cu_seqlens, num_heads=v.shape[2], scale=scale, radius=radius
    )


@script(OPSET)
def ModernBertPackedBlocks(q, k, v, document, cu_seqlens, num_heads: int, scale: float):
    """Every document in blocks of `QUERY_BLOCK` queries from its first token on, each against all of its keys."""
    q_1TE, k_1TE, v_1TD = op.Reshape(q, [0, 0, -1]), op.Reshape(k, [0, 0, -1]), op.Reshape(v, [0, 0, -1])
    width, k_width = op.Shape(v_1TD, start=2), op.Shape(k_1TE, start=2)
    token_T = op.Range(0, op.Squeeze(op.Shape(document)), 1)
    place_T = token_T - op.Gather(cu_seqlens, document)
    first_N = op.Compress(token_T, op.Equal(op.Mod(place_T, QUERY_BLOCK), 0))
    blocks_1WD = op.SequenceConstruct(op.Slice(v_1TD, [0], [0], [1]))
    for block in range(op.Squeeze(op.Shape(first_N))):
        first = op.Gather(first_N, op.Reshape(block, [1]))
        mine = op.Gather(document, first)
        start, end = op.Gather(cu_seqlens, mine), op.Gather(cu_seqlens, mine + 1)
        last = op.Min(first + QUERY_BLOCK, end)
        y_1WD = MICROSOFT.MultiHeadAttention(
            op.Slice(q_1TE, op.Concat(first, [0], axis=0), op.Concat(last, width, axis=0), [1, 2]),
            op.Slice(k_1TE, op.Concat(start, k_width - width, axis=0), op.Concat(end, k_width, axis=0), [1, 2]),
            op.Slice(v_1TD, start, end, [1]),
            num_heads=num_heads,
            scale=scale,
        )
        blocks_1WD = op.SequenceInsert(blocks_1WD, y_1WD)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    return op.Reshape(op.ConcatFromSequence(blocks_1WD, axis=1), op.Concat([0, 0], heads, [-1], axis=0))


@script(OPSET)
def ModernBertPackedGlobalAttention(q, k, v, document, cu_seqlens, num_heads: int, scale: float, radius: int):
    """The way that the documents' lengths allow."""
    length_B = op.Slice(cu_seqlens, [1], [2147483647]) - op.Slice(cu_seqlens, [0], [-1])
    if op.ReduceMax(length_B, keepdims=0) <= op.Constant(value_int=radius) + 1:
        y = ModernBertPackedLocalAttention(
            q, k, v, document, cu_seqlens, num_heads=num_heads, scale=scale, radius=radius
        )
    else:
        y = ModernBertPackedBlocks(q, k, v, document, cu_seqlens, num_heads=num_heads, scale=scale)
    return y


PACKED_GLOBAL_ATTENTION = GraphOp(
    name="ModernBertPackedGlobalAttention",
    torch_op=torch.ops.modernbert.packed_global_attention.default,
    node=_node,
    inputs=("q", "k", "v", "document", "cu_seqlens"),
    attributes={"num_heads": int, "scale": float, "radius": int},
    bodies={"packed": ModernBertPackedGlobalAttention},
    integer_inputs=("document", "cu_seqlens"),
)
