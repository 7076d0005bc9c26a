"""Attention backends: one function each, same inputs, same result, different cost.

    eager    every pair of packed tokens, written out; the reference for all others
    sdpa     padded scores in torch's scaled_dot_product_attention; O(n^2) in local layers too
    banded   local layers in blocks of one window radius against three, O(n * radius); global layers unpadded
    flex     FlexAttention kernels that skip blocks nobody sees (`modernbert.attention_flex`); no gradients on a CPU
    varlen   flash attention over packed tokens (`modernbert.attention_varlen`); CUDA, float16 or bfloat16

A backend takes packed, rotated q, k, v [T, H, K], the packing, the window radius (None in a global layer), the
dropout probability and keys shared by a whole sequence, and gives [T, H, K]. Sequences never see each other.

Shapes: T packed tokens, H heads, K size of a head, B sequences, S longest sequence, N blocks, W window radius,
G shared keys per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modernbert.attention_flex import flex, flex_plan
from modernbert.attention_varlen import varlen, varlen_plan, varlen_rows
from modernbert.packing import Packing, SharedKeys, uncompiled

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Packing, "int | None", float, "SharedKeys | None"], Tensor]
# Rows of G queries per sequence [B, G, H, K] that see all of it: q, k, v, packing, dropout, shared keys.
RowsBackend = Callable[[Tensor, Tensor, Tensor, Packing, float, SharedKeys], Tensor]


def rotary_tables(position_S: Tensor, theta: float, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 1, K / 2] of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    Angles are fp32 whatever the model computes in: bf16 cannot count to 8,192, and fp32 is what checkpoints saw in
    training. Positions are token offsets, theta the base of the frequencies.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_S.device) / head_dim
    angle = position_S.to(torch.float32)[:, None, None] * (1.0 / theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, split-half: component i turns with component i + K / 2. Computed in the tables' precision."""
    first, second = x_THK.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_THK.dtype)


def rotated(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, values as they are, apart from the matrix that they are views of.

    The backward pass of attention keeps all three. Were the values still a view, it would keep the queries and keys
    from before their rotation too.
    """
    if not v_THK.requires_grad:
        return rotate(q_THK, cos, sin), rotate(k_THK, cos, sin), v_THK
    if torch.compiler.is_compiling():
        return rotate(q_THK, cos, sin), rotate(k_THK, cos, sin), v_THK.contiguous()
    x_3THK: Tensor = _Rotated.apply(q_THK, k_THK, v_THK, cos, sin)  # type: ignore[no-untyped-call]
    return x_3THK[0], x_3THK[1], x_3THK[2]


class _Rotated(torch.autograd.Function):
    """q, k, v to one new tensor [3, T, H, K] without temporaries; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        x_3THK = torch.empty(3, *q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
        _turn(q_THK, cos, sin, x_3THK[0])
        _turn(k_THK, cos, sin, x_3THK[1])
        x_3THK[2].copy_(v_THK)
        return x_3THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_3THK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back_3THK = torch.empty_like(grad_3THK)
        _turn(grad_3THK[0], cos, -sin, back_3THK[0])
        _turn(grad_3THK[1], cos, -sin, back_3THK[1])
        back_3THK[2].copy_(grad_3THK[2])
        return back_3THK[0], back_3THK[1], back_3THK[2], None, None


def _turn(x_THK: Tensor, cos: Tensor, sin: Tensor, out_THK: Tensor) -> None:
    """`rotate` into `out`, in the tables' precision."""
    first, second = x_THK.to(cos.dtype).chunk(2, dim=-1)
    exact_THK = out_THK if out_THK.dtype == cos.dtype else torch.empty_like(out_THK, dtype=cos.dtype)
    new_first, new_second = exact_THK.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    if exact_THK is not out_THK:
        out_THK.copy_(exact_THK)


def eager(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    packing: Packing,
    radius: int | None,
    dropout: float,
    shared: SharedKeys | None = None,
) -> Tensor:
    """Softmax over all visible keys, one matrix for everything. Memory: H * T * T."""
    visible = packing.sequence_T[:, None] == packing.sequence_T
    if radius is not None:
        visible &= (packing.position_T[:, None] - packing.position_T).abs() <= radius
    if shared is not None:
        visible = torch.cat((visible, packing.sequence_T[:, None] == shared.sequence_X), dim=1)
        k_THK, v_THK = torch.cat((k_THK, shared.k_XHK)), torch.cat((v_THK, shared.v_XHK))
    scores_HQK = torch.einsum("qhd,khd->hqk", q_THK * q_THK.shape[-1] ** -0.5, k_THK)
    weights_HQK = scores_HQK.masked_fill_(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", F.dropout(weights_HQK, dropout) if dropout else weights_HQK, v_THK)


def sdpa(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    packing: Packing,
    radius: int | None,
    dropout: float,
    shared: SharedKeys | None = None,
) -> Tensor:
    """Sequences side by side at the longest one's length, with a dense mask [B, 1, S, S]."""
    rank_T, visible_BSS = sdpa_plan(packing, radius)
    q, k, v = (_side_by_side(x, packing, rank_T, visible_BSS).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    if shared is not None:
        k, v = (torch.cat((x, y.transpose(1, 2)), dim=2) for x, y in ((k, shared.k_BGHK), (v, shared.v_BGHK)))
        visible_BSS = F.pad(visible_BSS, (0, shared.k_BGHK.shape[1]), value=True)
    y_BHSK = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BSS[:, None], dropout_p=dropout)
    return y_BHSK.transpose(1, 2)[packing.sequence_T, rank_T]


def _side_by_side(x_TX: Tensor, packing: Packing, rank_T: Tensor, like_BSX: Tensor) -> Tensor:
    """[T, ...] -> [B, S, ...], every sequence from the left, zeros after its end."""
    return x_TX.new_zeros(like_BSX.shape[:2] + x_TX.shape[1:]).index_put((packing.sequence_T, rank_T), x_TX)


def sdpa_plan(packing: Packing, radius: int | None, shared_keys: int = 0) -> tuple[Tensor, Tensor]:
    """The rank of each token in its sequence [T], and which pairs [B, S, S] see each other."""
    return packing.once(("sdpa", radius), lambda: _dense_mask(packing, radius))


def _dense_mask(packing: Packing, radius: int | None) -> tuple[Tensor, Tensor]:
    device = packing.sequence_T.device
    length_B = torch.tensor(packing.lengths, dtype=torch.int64, device=device)
    rank_T = torch.arange(len(packing.sequence_T), device=device) - (length_B.cumsum(0) - length_B)[packing.sequence_T]
    valid_BS = torch.arange(max(packing.lengths, default=0), device=device) < length_B[:, None]
    # A query that is padding sees everything: its row is dropped, and a row that sees nothing would be NaN.
    visible_BSS = valid_BS[:, None, :] | ~valid_BS[:, :, None]
    if radius is not None:
        position_BS = _side_by_side(packing.position_T, packing, rank_T, valid_BS)
        near_BSS = (position_BS[:, :, None] - position_BS[:, None, :]).abs() <= radius
        visible_BSS &= near_BSS | ~valid_BS[:, :, None]
    return rank_T, visible_BSS


def banded(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    packing: Packing,
    radius: int | None,
    dropout: float,
    shared: SharedKeys | None = None,
) -> Tensor:
    """Local layers touch only the band around the diagonal; global layers run sequence by sequence, without a mask.

    A block of W queries sees at most the W keys before it, its own W and the W after it. Sequences lie one behind
    the other, so a block may straddle two; the mask keeps them apart. With shared keys every sequence begins a block
    of its own, so that a block has one set of them.
    """
    if not len(q_THK):
        return v_THK
    if radius is None:
        return _by_sequence(q_THK, k_THK, v_THK, packing, dropout, shared)
    slot_T, sequence_N, mask = banded_plan(packing, radius, 0 if shared is None else shared.k_BGHK.shape[1])
    if shared is None:
        return _band(q_THK, k_THK, v_THK, mask, dropout)
    slots = len(sequence_N) * radius
    q, k, v = (x.new_zeros(slots, *x.shape[1:]).index_copy(0, slot_T, x) for x in (q_THK, k_THK, v_THK))
    return _band(q, k, v, mask, dropout, shared.k_BGHK[sequence_N], shared.v_BGHK[sequence_N])[slot_T]


def banded_plan(packing: Packing, radius: int | None, shared_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's slot among those of the blocks [T], each block's sequence [N], which keys are seen [N, W, 3 W].

    Slots and sequences are empty where there are no shared keys, and all three in a global layer.
    """
    none = packing.sequence_T[:0]
    if radius is None:
        return none, none, none
    if shared_keys:
        return packing.once(("aligned band", radius), lambda: _aligned_band(packing, radius))
    return packing.once(
        ("band", radius), lambda: (none, none, _band_mask(packing.sequence_T, packing.position_T, radius))
    )


def _band(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    visible_NWL: Tensor,
    dropout: float,
    more_k_NGHK: Tensor | None = None,
    more_v_NGHK: Tensor | None = None,
) -> Tensor:
    """Blocks of W queries against three of keys, and against G more keys per block that all of its queries see."""
    radius = visible_NWL.shape[1]
    q_NWHK, k_NLHK, v_NLHK = _one_block(q_THK, radius), _three_blocks(k_THK, radius), _three_blocks(v_THK, radius)
    if more_k_NGHK is not None and more_v_NGHK is not None:
        k_NLHK, v_NLHK = torch.cat((k_NLHK, more_k_NGHK), dim=1), torch.cat((v_NLHK, more_v_NGHK), dim=1)
        visible_NWL = F.pad(visible_NWL, (0, more_k_NGHK.shape[1]), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q_NWHK, k_NLHK, v_NLHK))
    y_NHWK = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_NWL[:, None], dropout_p=dropout)
    return y_NHWK.transpose(1, 2).flatten(0, 1)[: len(q_THK)]


def _band_mask(sequence_T: Tensor, position_T: Tensor, radius: int) -> Tensor:
    """Which of its L = 3 W keys each of the W queries of a block sees: [N, W, L]."""
    near = (_one_block(position_T, radius)[:, :, None] - _three_blocks(position_T, radius)[:, None]).abs() <= radius
    # The filling of queries and keys belongs to the sequence -1, which sees itself: no row is ever empty.
    return near & (_one_block(sequence_T, radius, -1)[:, :, None] == _three_blocks(sequence_T, radius, -1)[:, None])


def _aligned_band(packing: Packing, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """The plan with every sequence from the start of a block."""
    device = packing.sequence_T.device
    length_B = torch.tensor(packing.lengths, dtype=torch.int64, device=device)
    blocks_B = (length_B + radius - 1) // radius
    first_block_B, first_token_B = blocks_B.cumsum(0) - blocks_B, length_B.cumsum(0) - length_B
    shift_B = first_block_B * radius - first_token_B
    slot_T = torch.arange(len(packing.sequence_T), device=device) + shift_B[packing.sequence_T]
    sequence_N = torch.repeat_interleave(blocks_B)
    slots = len(sequence_N) * radius
    sequence = torch.full((slots,), -1, device=device).index_copy(0, slot_T, packing.sequence_T)
    position = torch.zeros(slots, dtype=packing.position_T.dtype, device=device)
    return slot_T, sequence_N, _band_mask(sequence, position.index_copy(0, slot_T, packing.position_T), radius)


def _one_block(x_TX: Tensor, radius: int, fill: int = 0) -> Tensor:
    """[T, ...] -> [N, W, ...], filled to whole blocks."""
    blocks = -(-len(x_TX) // radius)
    widths = (0, 0) * (x_TX.dim() - 1) + (0, blocks * radius - len(x_TX))
    return F.pad(x_TX, widths, value=fill).unflatten(0, (blocks, radius))


def _three_blocks(x_TX: Tensor, radius: int, fill: int = 0) -> Tensor:
    """[T, ...] -> [N, 3 W, ...]: each block between the one before and the one after it.

    The blocks are overlapping views of one filled copy, so the backward pass keeps every key once and not three times.
    """
    blocks = max(-(-len(x_TX) // radius), 1)  # unfold wants one, even of no tokens
    widths = (0, 0) * (x_TX.dim() - 1) + (radius, (blocks + 1) * radius - len(x_TX))
    return F.pad(x_TX, widths, value=fill).unfold(0, 3 * radius, radius).movedim(-1, 1)


@uncompiled("one call per sequence")
def rows_by_sequence(
    q_BGHK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, dropout: float, shared: SharedKeys
) -> Tensor:
    """Attention of G queries per sequence over all of its tokens and shared keys: [B, G, H, K]. O(G * T)."""
    if not len(q_BGHK):
        return q_BGHK
    q_groups = [q_BGHK] if packing.full else [x[None] for x in q_BGHK]
    k_groups, v_groups = _groups(k_THK, packing, shared.k_BGHK), _groups(v_THK, packing, shared.v_BGHK)
    return _attend_groups(q_groups, k_groups, v_groups, dropout).unflatten(0, q_BGHK.shape[:2])


@uncompiled("one call per sequence")
def _by_sequence(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, dropout: float, shared: SharedKeys | None
) -> Tensor:
    """Attention of all tokens over their sequence and its shared keys: [T, H, K]."""
    more_k, more_v = (None, None) if shared is None else (shared.k_BGHK, shared.v_BGHK)
    k_groups, v_groups = _groups(k_THK, packing, more_k), _groups(v_THK, packing, more_v)
    return _attend_groups(_groups(q_THK, packing), k_groups, v_groups, dropout)


def _groups(x_THK: Tensor, packing: Packing, more_BGHK: Tensor | None = None) -> Sequence[Tensor]:
    """Sequences of one length as one [B, S, H, K], others as [1, S, H, K] each; `more` is appended to each along S."""
    if packing.full:
        groups: Sequence[Tensor] = [x_THK.unflatten(0, (len(packing.lengths), packing.lengths[0]))]
    else:
        groups = [x[None] for x in x_THK.split(packing.lengths)]
    if more_BGHK is None:
        return groups
    more = [more_BGHK] if packing.full else [x[None] for x in more_BGHK]
    return [torch.cat(pair, dim=1) for pair in zip(groups, more, strict=True)]


def _attend_groups(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], dropout: float) -> Tensor:
    """Attention without a mask within each group [b, s, H, K]; the results one behind the other [T, H, K]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1)

    results = [attend(*group) for group in zip(q, k, v, strict=True) if group[0].shape[1]]
    return results[0] if len(results) == 1 else torch.cat(results)  # cat copies, and the backward pass would keep both


BACKENDS: Mapping[str, AttentionBackend] = {
    "eager": eager,
    "sdpa": sdpa,
    "banded": banded,
    "flex": flex,
    "varlen": varlen,
}
# What the layers of a forward pass share: made before the first of them, by packing, radius and number of shared keys.
PLANS: Mapping[str, Callable[[Packing, int | None, int], object]] = {
    "sdpa": sdpa_plan,
    "banded": banded_plan,
    "flex": flex_plan,
    "varlen": varlen_plan,
}
# Who computes the rows of global tokens: they are few and see everything, which needs no mask and no band.
ROWS: Mapping[str, RowsBackend] = dict.fromkeys(BACKENDS, rows_by_sequence) | {"varlen": varlen_rows}
