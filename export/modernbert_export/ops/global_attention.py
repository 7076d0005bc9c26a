"""`ModernBertGlobalAttention`: every query sees every key. There may be more keys than queries.

The portable body makes few scores at a time, so that memory stays bounded and a CPU's cache holds them; the others
leave that to their engine. q and k may be one tensor of both, see `ops.heads`.

Shapes: B batch, H heads, J heads of q or k, Q queries, S keys, K size of a head, D = H * K, E = J * K; R rows, a vector
of K for each head of each token; P pairs of a text and a head, X groups of G pairs, N blocks of W queries.
"""

import torch
import torch.nn.functional as F
from onnxscript import BOOL, INT64, graph, script
from onnxscript import opset20 as op
from onnxscript import opset23 as op23
from torch import Tensor

from modernbert_export.ops.heads import ModernBertQueriesAndKeys, queries_and_keys
from modernbert_export.ops.op import HIDDEN_KEY_HALF, MICROSOFT, OPSET, GraphOp

# Queries of a block, at most: enough to make it worth while to pack the keys for the product.
QUERY_BLOCK = 256
# Up to so many scores (8 MB) a step takes all texts, for fewer tokens than LONG; else the heads of one.
MOST_SCORES = 1 << 21
# From so many keys on, heads go two by two, so that a CPU's cache holds the scores of a block of queries. Measured on
# two cores, twelve heads: 0.9 of the time that all together take for 2,048 tokens, 0.75 for 8,192.
LONG = 1024


@torch.library.custom_op("modernbert::global_attention", mutates_args=())
def global_attention(q_BQJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, Q, H, K] over all keys; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    q_BHQK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (*queries_and_keys(q_BQJK, k_BSJK, v_BSHK), v_BSHK))
    bias_B11S = key_bias_BS[:, None, None, :]
    y_BHQK = F.scaled_dot_product_attention(q_BHQK, k_BHSK, v_BHSK, attn_mask=bias_B11S, scale=scale)
    return y_BHQK.transpose(1, 2).contiguous()


@global_attention.register_fake
def _(q_BQJK: Tensor, k_BSJK: Tensor, v_BSHK: Tensor, key_bias_BS: Tensor, scale: float) -> Tensor:
    return v_BSHK.new_empty(*q_BQJK.shape[:2], *v_BSHK.shape[2:])


def _node(q, k, v, key_bias, scale):
    return OPSET.ModernBertGlobalAttention(q, k, v, key_bias, num_heads=v.shape[2], scale=scale)


@script(OPSET)
def ModernBertSteps(queries, key_bias, q_heads, k_heads, num_heads: int):
    """Rows of queries [X, N, G, W], keys and values [X, G, S] of each step, and where its results [B, Q, H] stand.

    Of `q_heads` [1] the first count, of `k_heads` [1] the last. All blocks have one size, so that short inputs are not
    padded; places beyond the last query repeat it. What is made here depends on shapes alone: it is the same in all
    layers, and merged there.
    """
    batch, keys = op.Split(op.Shape(key_bias), num_outputs=2)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    pairs = batch * heads
    blocks = (queries + (QUERY_BLOCK - 1)) / QUERY_BLOCK
    width = (queries + blocks - 1) / blocks
    # Pairs of a group: all, or those of one text, or two (one where the number of heads is odd).
    short = op.Where(pairs * width * keys <= MOST_SCORES, pairs, heads)
    group = op.Where(keys < LONG, short, 2 - op.Mod(heads, 2))
    groups = pairs / group
    pair_P1 = op.Unsqueeze(op.Range(0, op.Squeeze(pairs), 1), [1])
    text_P1, head_P1 = pair_P1 / heads, op.Mod(pair_P1, heads)
    key_S = op.Range(0, op.Squeeze(keys), 1)
    token_PS, of_group = text_P1 * keys + key_S, op.Concat(groups, group, [-1], axis=0)
    key_XGS = op.Reshape(token_PS * k_heads + (k_heads - heads + head_P1), of_group)
    value_XGS = op.Reshape(token_PS * heads + head_P1, of_group)
    place = op.Min(op.Range(0, op.Squeeze(blocks * width), 1), queries - 1)
    query_XGNW = op.Reshape(
        (text_P1 * queries + place) * q_heads + head_P1, op.Concat(groups, group, blocks, width, axis=0)
    )
    query_Q = op.Range(0, op.Squeeze(queries), 1)
    block_PQ = (pair_P1 / group * blocks + query_Q / width) * group + op.Mod(pair_P1, group)
    result_PQ = block_PQ * width + op.Mod(query_Q, width)
    result_BQH = op.Transpose(op.Reshape(result_PQ, op.Concat(batch, heads, queries, axis=0)), perm=[0, 2, 1])
    return op.Transpose(query_XGNW, perm=[0, 2, 1, 3]), key_XGS, value_XGS, result_BQH


@script(OPSET)
def ModernBertQueryBlocks(q, k, v, key_bias, num_heads: int, scale: float):
    """A Loop over groups of heads, and in it one over blocks of queries.

    A step picks the rows that it needs, which puts heads in front at the same time. Without a hidden key no bias is
    added, which would be one more pass over the largest tensor of all. An If around the Loops would save short texts a
    percent; in bf16, its default where the CPU has it, OpenVINO 2026.4 then computes garbage below 32 tokens.
    """
    queries, q_heads, k_heads = op.Shape(q, start=1, end=2), op.Shape(q, start=2, end=3), op.Shape(k, start=2, end=3)
    query_XNGW, key_XGS, value_XGS, result_BQH = ModernBertSteps(queries, key_bias, q_heads, k_heads, num_heads)
    rows = op.Concat([-1], op.Shape(v, start=3), axis=0)
    q_RK, k_RK, v_RK = op.Reshape(q, rows), op.Reshape(k, rows), op.Reshape(v, rows)
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    bias_BHS = op.Expand(op.Unsqueeze(bias_BS, [1]), op.Concat([1], heads, [1], axis=0))
    bias_XG1S = op.Unsqueeze(op.Reshape(bias_BHS, op.Shape(key_XGS)), [2])
    factor = op.CastLike(op.Constant(value_float=scale), q)  # engines make it a part of the product
    some_hidden = op.Cast(op.ReduceMin(key_bias, keepdims=0), to=9)

    @graph()
    def attend_group(x: INT64, x_condition: BOOL):
        k_GSK = op.Gather(k_RK, op.Gather(key_XGS, x))
        v_GSK = op.Gather(v_RK, op.Gather(value_XGS, x))
        bias_G1S = op.Gather(bias_XG1S, x)
        query_NGW = op.Gather(query_XNGW, x)

        @graph()
        def attend_block(n: INT64, n_condition: BOOL):
            q_GWK = op.Gather(q_RK, op.Gather(query_NGW, n))
            if some_hidden:
                scores_GWS = op.MatMul(q_GWK * factor, op.Transpose(k_GSK, perm=[0, 2, 1])) + bias_G1S
            else:
                scores_GWS = op.MatMul(q_GWK * factor, op.Transpose(k_GSK, perm=[0, 2, 1]))
            y_GWK = op.MatMul(op.Softmax(scores_GWS, axis=-1), v_GSK)
            return op.Identity(n_condition), y_GWK

        y_NGWK = op.Loop(op.Squeeze(op.Shape(query_XNGW, start=1, end=2)), op.Cast(1, to=9), body=attend_block)
        return op.Identity(x_condition), y_NGWK

    y_XNGWK = op.Loop(op.Squeeze(op.Shape(key_XGS, start=0, end=1)), op.Cast(1, to=9), body=attend_group)
    return op.Gather(op.Reshape(y_XNGWK, rows), result_BQH)


@script(OPSET)
def plain(q, k, v, key_bias, num_heads: int, scale: float):
    """All scores at once. OpenVINO fuses this very pattern, and keeps it small by itself."""
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    q_BHQK, k_BHSK = ModernBertQueriesAndKeys(q, k, num_heads=num_heads)
    q_BHQK = q_BHQK * op.CastLike(op.Constant(value_float=scale), q)
    scores_BHQS = op.MatMul(q_BHQK, op.Transpose(k_BHSK, perm=[0, 1, 3, 2])) + op.Unsqueeze(bias_BS, [1, 2])
    y_BHQK = op.MatMul(op.Softmax(scores_BHQS, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
    return op.Transpose(y_BHQK, perm=[0, 2, 1, 3])


@script(OPSET)
def multi_head(q, k, v, key_bias, num_heads: int, scale: float):
    """ONNX Runtime's fused operator. With a bias and not a key mask, which on CUDA would cost B * H * Q * S scores."""
    length = op.Shape(q, start=1, end=2)
    bias_BS = op.CastLike(op.Max(key_bias, op.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    bias_B1QS = op.Expand(op.Unsqueeze(bias_BS, [1, 2]), op.Concat([1, 1], length, [1], axis=0))
    q_BQE, k_BSE, v_BSD = op.Reshape(q, [0, 0, -1]), op.Reshape(k, [0, 0, -1]), op.Reshape(v, [0, 0, -1])
    width, k_width = op.Shape(v_BSD, start=2), op.Shape(k_BSE, start=2)
    q_BQD, k_BSD = op.Slice(q_BQE, [0], width, [2], [1]), op.Slice(k_BSE, k_width - width, k_width, [2], [1])
    y_BQD = MICROSOFT.MultiHeadAttention(q_BQD, k_BSD, v_BSD, None, None, bias_B1QS, num_heads=num_heads, scale=scale)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    return op.Reshape(y_BQD, op.Concat([0, 0], heads, [-1], axis=0))


@script(OPSET)
def native(q, k, v, key_bias, num_heads: int, scale: float):
    """The operator of opset 23, as the TensorRT parser takes it: 4-D, a 4-D bias, finite in fp16."""
    length = op23.Shape(q, start=1, end=2)
    bias_BS = op23.CastLike(op23.Max(key_bias, op23.CastLike(HIDDEN_KEY_HALF, key_bias)), q)
    bias_B1QS = op23.Expand(op23.Unsqueeze(bias_BS, [1, 2]), op23.Concat([1, 1], length, [1], axis=0))
    q_BHQK, k_BHSK = ModernBertQueriesAndKeys(q, k, num_heads=num_heads)
    v_BHSK = op23.Transpose(v, perm=[0, 2, 1, 3])
    y_BHQK = op23.Attention(q_BHQK, k_BHSK, v_BHSK, bias_B1QS, scale=scale)
    return op23.Transpose(y_BHQK, perm=[0, 2, 1, 3])


GLOBAL_ATTENTION = GraphOp(
    name="ModernBertGlobalAttention",
    torch_op=torch.ops.modernbert.global_attention.default,
    node=_node,
    inputs=("q", "k", "v", "key_bias"),
    attributes={"num_heads": int, "scale": float},
    bodies={
        "portable": ModernBertQueryBlocks,
        "openvino": plain,
        "ort-cuda": multi_head,
        "tensorrt": native,
        "tensorrt-dense": native,
    },
    float_inputs=("key_bias",),
)
