"""`ModernBertLocalAttentionWithGlobals`: a token sees the tokens in its window and all global tokens, in one softmax.

For models with global tokens (`modernbert.global_tokens`). These have no position, so a token meets other tokens with
its rotated query and global ones with the query as it is. What the global tokens themselves see, and everything in
global layers, `ModernBertGlobalAttention` computes.

No engine has a fused kernel for this, so one body, of standard operators, serves all targets.

Shapes: B batch, H heads, S sequence, G global tokens, K size of a head, N blocks, W queries of a block, L keys that it
meets.
"""

import torch
from onnxscript import opset20 as op
from onnxscript import script
from torch import Tensor

from modernbert_export.ops.band import ModernBertBand
from modernbert_export.ops.op import HIDDEN_KEY, OPSET, PADDED_TARGETS, GraphOp


@torch.library.custom_op("modernbert::local_attention_with_globals", mutates_args=())
def local_attention_with_globals(
    q_BHSK: Tensor,
    plain_q_BHSK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    global_k_BHGK: Tensor,
    global_v_BHGK: Tensor,
    key_bias_BS: Tensor,
    radius: int,
) -> Tensor:
    """Softmax attention [B, H, S, K] of scaled queries, rotated and not; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    position = torch.arange(q_BHSK.shape[2], device=q_BHSK.device)
    far_SS = (position[:, None] - position).abs() > radius
    bias_BSS = key_bias_BS[:, None, :] + HIDDEN_KEY * far_SS.to(q_BHSK.dtype)
    scores_BHSS = q_BHSK @ k_BHSK.mT + bias_BSS[:, None]
    weights = torch.cat((scores_BHSS, plain_q_BHSK @ global_k_BHGK.mT), dim=-1).softmax(-1)
    return (weights @ torch.cat((v_BHSK, global_v_BHGK), dim=2)).contiguous()


@local_attention_with_globals.register_fake
def _(
    q_BHSK: Tensor,
    plain_q_BHSK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    global_k_BHGK: Tensor,
    global_v_BHGK: Tensor,
    key_bias_BS: Tensor,
    radius: int,
) -> Tensor:
    return torch.empty_like(q_BHSK, memory_format=torch.contiguous_format)


def _node(q, plain_q, k, v, global_k, global_v, key_bias, radius):
    return OPSET.ModernBertLocalAttentionWithGlobals(
        q, plain_q, k, v, global_k, global_v, key_bias, num_heads=q.shape[1], radius=radius
    )


@script(OPSET)
def ModernBertLocalAttentionWithGlobals(q, plain_q, k, v, global_k, global_v, key_bias, num_heads: int, radius: int):
    """Banded. Scores of the window and of the global keys stand side by side for the softmax only."""
    query_NW, key_NL, bias_B1NWL = ModernBertBand(key_bias, radius=radius)
    q_BHNWK = op.Gather(q, query_NW, axis=2)
    plain_BHNWK = op.Gather(plain_q, query_NW, axis=2)
    k_BHNLK = op.Gather(k, key_NL, axis=2)
    v_BHNLK = op.Gather(v, key_NL, axis=2)
    global_k_BH1KG = op.Unsqueeze(op.Transpose(global_k, perm=[0, 1, 3, 2]), [2])
    # In the bias's precision, which stays fp32 where q is fp16.
    scores_BHNWL = op.CastLike(op.MatMul(q_BHNWK, op.Transpose(k_BHNLK, perm=[0, 1, 2, 4, 3])), key_bias) + bias_B1NWL
    scores_BHNWG = op.CastLike(op.MatMul(plain_BHNWK, global_k_BH1KG), key_bias)
    weights = op.CastLike(op.Softmax(op.Concat(scores_BHNWL, scores_BHNWG, axis=-1), axis=-1), v)
    met = op.Shape(key_NL, start=1)
    all_met = met + op.Shape(global_k, start=2, end=3)
    from_window = op.MatMul(op.Slice(weights, [0], met, [4]), v_BHNLK)
    from_globals = op.MatMul(op.Slice(weights, met, all_met, [4]), op.Unsqueeze(global_v, [2]))
    batch, length = op.Split(op.Shape(key_bias), num_outputs=2)
    heads = op.Reshape(op.Constant(value_int=num_heads), [1])
    y_shape = op.Concat(batch, heads, op.Reshape(op.Size(query_NW), [1]), [-1], axis=0)
    return op.Slice(op.Reshape(from_window + from_globals, y_shape), [0], length, [2])


LOCAL_ATTENTION_WITH_GLOBALS = GraphOp(
    name="ModernBertLocalAttentionWithGlobals",
    torch_op=torch.ops.modernbert.local_attention_with_globals.default,
    node=_node,
    inputs=("q", "plain_q", "k", "v", "global_k", "global_v", "key_bias"),
    attributes=("num_heads", "radius"),
    bodies=dict.fromkeys(PADDED_TARGETS, ModernBertLocalAttentionWithGlobals),
    float_inputs=("key_bias",),
)
