"""Attention backends: one function each, same inputs, same result, different cost.

    eager    every pair of packed tokens, written out; the reference for all others
    sdpa     padded scores in torch's scaled_dot_product_attention; O(n^2) in local layers too
    banded   local layers in blocks of one window radius against three, O(n * radius); global layers unpadded

A backend takes packed, rotated q, k, v [T, H, K], the packing, the window radius (None in a global layer) and the
dropout probability, and gives [T, H, K]. Sequences never see each other.

Shapes: T packed tokens, H heads, K size of a head, B sequences, S longest sequence, N blocks, W window radius.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.packing import Packing

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Packing, int | None, float], Tensor]


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


def eager(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, radius: int | None, dropout: float) -> Tensor:
    """Softmax over all visible keys, one matrix for everything. Memory: H * T * T."""
    visible_TT = packing.sequence_T[:, None] == packing.sequence_T
    if radius is not None:
        visible_TT &= (packing.position_T[:, None] - packing.position_T).abs() <= radius
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THK * q_THK.shape[-1] ** -0.5, k_THK)
    weights_HTT = scores_HTT.masked_fill_(~visible_TT, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", F.dropout(weights_HTT, dropout) if dropout else weights_HTT, v_THK)


def sdpa(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, radius: int | None, dropout: float) -> Tensor:
    """Sequences side by side at the longest one's length, with a dense mask [B, 1, S, S]."""
    length_B = torch.tensor(packing.lengths, device=q_THK.device)
    rank_BS = torch.arange(max(packing.lengths, default=0), device=q_THK.device).expand(len(length_B), -1)
    valid_BS = rank_BS < length_B[:, None]

    def pad(x_TX: Tensor) -> Tensor:
        return x_TX.new_zeros(valid_BS.shape + x_TX.shape[1:]).masked_scatter(
            valid_BS.view(valid_BS.shape + (1,) * (x_TX.dim() - 1)), x_TX
        )

    # A query that is padding sees everything: its row is dropped, and a row that sees nothing would be NaN.
    visible_BSS = valid_BS[:, None, :] | ~valid_BS[:, :, None]
    if radius is not None:
        position_BS = pad(packing.position_T)
        near_BSS = (position_BS[:, :, None] - position_BS[:, None, :]).abs() <= radius
        visible_BSS &= near_BSS | ~valid_BS[:, :, None]
    q, k, v = (pad(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    y_BHSK = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BSS[:, None], dropout_p=dropout)
    return y_BHSK.transpose(1, 2)[valid_BS]


def banded(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, radius: int | None, dropout: float) -> Tensor:
    """Local layers touch only the band around the diagonal; global layers run sequence by sequence, without a mask.

    A block of W queries sees at most the W keys before it, its own W and the W after it. Sequences lie one behind
    the other, so a block may straddle two; the mask keeps them apart.
    """
    if radius is None:
        return _by_sequence(q_THK, k_THK, v_THK, packing, dropout)
    tokens = q_THK.shape[0]
    blocks = -(-tokens // radius)
    rest = blocks * radius - tokens

    def three_blocks(x_TX: Tensor, fill: int) -> Tensor:
        widths = (0, 0) * (x_TX.dim() - 1) + (radius, rest + radius)
        x_NWX = F.pad(x_TX, widths, value=fill).unflatten(0, (blocks + 2, radius))
        return torch.cat((x_NWX[:-2], x_NWX[1:-1], x_NWX[2:]), dim=1)

    def one_block(x_TX: Tensor, fill: int) -> Tensor:
        return F.pad(x_TX, (0, 0) * (x_TX.dim() - 1) + (0, rest), value=fill).unflatten(0, (blocks, radius))

    sequence, position = packing.sequence_T, packing.position_T
    near = (one_block(position, 0)[:, :, None] - three_blocks(position, 0)[:, None, :]).abs() <= radius
    # The filling of queries and keys belongs to the sequence -1, which sees itself: no row is ever empty.
    mask_N1WL = (near & (one_block(sequence, -1)[:, :, None] == three_blocks(sequence, -1)[:, None, :]))[:, None]
    q_NHWK = one_block(q_THK, 0).transpose(1, 2)
    k_NHLK, v_NHLK = (three_blocks(x, 0).transpose(1, 2) for x in (k_THK, v_THK))
    y_NHWK = F.scaled_dot_product_attention(q_NHWK, k_NHLK, v_NHLK, attn_mask=mask_N1WL, dropout_p=dropout)
    return y_NHWK.transpose(1, 2).flatten(0, 1)[:tokens]


def _by_sequence(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, dropout: float) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(-3, -2)

    if packing.full:
        shape = (len(packing.lengths), packing.lengths[0])
        return attend(*(x.unflatten(0, shape) for x in (q_THK, k_THK, v_THK))).flatten(0, 1)
    parts = zip(*(x.split(packing.lengths) for x in (q_THK, k_THK, v_THK)), strict=True)
    rows = [attend(*(x[None] for x in part))[0] for part in parts if len(part[0])]
    return torch.cat(rows) if rows else v_THK


BACKENDS: Mapping[str, AttentionBackend] = {"eager": eager, "sdpa": sdpa, "banded": banded}
