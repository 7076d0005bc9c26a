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
from modernbert_export.ops.blocks import ModernBertBlocks, ModernBertJoined
from modernbert_export.ops.op import HIDDEN_KEY, OPSET, PADDED_TARGETS, GraphOp


@torch.library.custom_op("modernbert::local_attention_with_globals", mutates_args=())
def local_attention_with_globals(
    q_BSHK: Tensor,
    plain_q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    global_k_BGHK: Tensor,
    global_v_BGHK: Tensor,
    key_bias_BS: Tensor,
    scale: float,
    radius: int,
) -> Tensor:
    """Softmax attention [B, S, H, K] of queries, rotated and not; `key_bias_BS` is 0 or `HIDDEN_KEY`."""
    tokens = (x.transpose(1, 2) for x in (scale * q_BSHK, scale * plain_q_BSHK, k_BSHK, v_BSHK))
    q_BHSK, plain_q_BHSK, k_BHSK, v_BHSK = tokens
    global_k_BHGK, global_v_BHGK = global_k_BGHK.transpose(1, 2), global_v_BGHK.transpose(1, 2)
    position = torch.arange(q_BHSK.shape[2], device=q_BHSK.device)
    far_SS = (position[:, None] - position).abs() > radius
    bias_BSS = key_bias_BS[:, None, :] + HIDDEN_KEY * far_SS.to(q_BHSK.dtype)
    scores_BHSS = q_BHSK @ k_BHSK.mT + bias_BSS[:, None]
    weights = torch.cat((scores_BHSS, plain_q_BHSK @ global_k_BHGK.mT), dim=-1).softmax(-1)
    return (weights @ torch.cat((v_BHSK, global_v_BHGK), dim=2)).transpose(1, 2).contiguous()


@local_attention_with_globals.register_fake
def _(
    q_BSHK: Tensor,
    plain_q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    global_k_BGHK: Tensor,
    global_v_BGHK: Tensor,
    key_bias_BS: Tensor,
    scale: float,
    radius: int,
) -> Tensor:
    return torch.empty_like(q_BSHK, memory_format=torch.contiguous_format)


def _node(q, plain_q, k, v, global_k, global_v, key_bias, scale, radius):
    return OPSET.ModernBertLocalAttentionWithGlobals(
        q, plain_q, k, v, global_k, global_v, key_bias, num_heads=v.shape[2], scale=scale, radius=radius
    )


@script(OPSET)
def ModernBertLocalAttentionWithGlobals(
    q, plain_q, k, v, global_k, global_v, key_bias, num_heads: int, scale: float, radius: int
):
    """Banded. Scores of the window and of the global keys stand side by side for the softmax only."""
    query_NW, key_NL, bias_B1NWL = ModernBertBand(key_bias, radius=radius)
    factor = op.CastLike(op.Constant(value_float=scale), q)  # engines make it a part of the products
    q_BHNWK = ModernBertBlocks(q, query_NW, [0], num_heads=num_heads) * factor
    plain_BHNWK = ModernBertBlocks(plain_q, query_NW, [0], num_heads=num_heads) * factor
    k_BHNLK = ModernBertBlocks(k, key_NL, [0], num_heads=num_heads)
    v_BHNLK = ModernBertBlocks(v, key_NL, [0], num_heads=num_heads)
    global_k_BH1KG = op.Unsqueeze(op.Transpose(global_k, perm=[0, 2, 3, 1]), [2])
    global_v_BH1GK = op.Unsqueeze(op.Transpose(global_v, perm=[0, 2, 1, 3]), [2])
    # In the bias's precision, which stays fp32 where q is fp16.
    scores_BHNWL = op.CastLike(op.MatMul(q_BHNWK, op.Transpose(k_BHNLK, perm=[0, 1, 2, 4, 3])), key_bias) + bias_B1NWL
    scores_BHNWG = op.CastLike(op.MatMul(plain_BHNWK, global_k_BH1KG), key_bias)
    weights = op.CastLike(op.Softmax(op.Concat(scores_BHNWL, scores_BHNWG, axis=-1), axis=-1), v)
    met = op.Shape(key_NL, start=1)
    all_met = met + op.Shape(global_k, start=1, end=2)
    from_window = op.MatMul(op.Slice(weights, [0], met, [4]), v_BHNLK)
    from_globals = op.MatMul(op.Slice(weights, met, all_met, [4]), global_v_BH1GK)
    return ModernBertJoined(from_window + from_globals, query_NW, op.Shape(key_bias, start=1), num_heads=num_heads)


LOCAL_ATTENTION_WITH_GLOBALS = GraphOp(
    name="ModernBertLocalAttentionWithGlobals",
    torch_op=torch.ops.modernbert.local_attention_with_globals.default,
    node=_node,
    inputs=("q", "plain_q", "k", "v", "global_k", "global_v", "key_bias"),
    attributes={"num_heads": int, "scale": float, "radius": int},
    bodies=dict.fromkeys(PADDED_TARGETS, ModernBertLocalAttentionWithGlobals),
    float_inputs=("key_bias",),
)
