"""The backend `flex`: FlexAttention, compiled, over packed tokens, with blocks that nobody sees left out.

The block mask is built from the blocks' ranges of sequences, never from all pairs of tokens, so its cost is
(T / 128)^2 bits and not T^2.

Limits of torch (2.11 to 2.13) are errors here: no dropout, no heads below 16, no gradients on a CPU. On a CPU it is
there to be checked, not to be fast: its kernel takes long to build and fails to for some shapes, so torch's plain form
runs, which holds all T * T scores.

Shapes: T packed tokens, X = T + shared keys, N and M blocks of queries and of keys, H heads, K size of a head.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modernbert.errors import InputError
from modernbert.packing import Packing, SharedKeys

BLOCK = 128


def flex(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    packing: Packing,
    radius: int | None,
    dropout: float,
    shared: SharedKeys | None = None,
) -> Tensor:
    """FlexAttention as one sequence of T tokens under a block mask.

    Raises:
        InputError: dropout, a head below 16, or gradients on a CPU.
    """
    on_cpu = q_THK.device.type == "cpu"
    if dropout:
        raise InputError(
            f"attention 'flex' has no dropout; set attention_dropout to 0, not {dropout}, or take 'banded'"
        )
    if q_THK.shape[-1] < 16 and not on_cpu:
        raise InputError(f"attention 'flex' needs heads of at least 16, not {q_THK.shape[-1]}; take 'banded'")
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q_THK, k_THK, v_THK)):
        raise InputError("attention 'flex' has no gradients on a CPU; take 'banded', or run it under torch.no_grad()")
    if not len(q_THK):
        return v_THK
    if shared is not None:
        k_THK, v_THK = torch.cat((k_THK, shared.k_XHK)), torch.cat((v_THK, shared.v_XHK))
    mask = flex_plan(packing, radius, 0 if shared is None else shared.k_BGHK.shape[1])
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_THK, v_THK))
    if not on_cpu:
        return run_kernel(q, k, v, mask)[0].transpose(0, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        # Detached: torch refuses views of what requires gradients even where none are recorded.
        y = flex_attention(q.detach(), k.detach(), v.detach(), block_mask=mask)
    return y[0].transpose(0, 1)


def flex_plan(packing: Packing, radius: int | None, shared_keys: int) -> BlockMask | None:
    """The block mask; none where there is no token."""
    if not len(packing.sequence_T):
        return None
    return packing.once(("flex", radius, shared_keys), lambda: block_mask(packing, radius, shared_keys))


def run_kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, backend: str = "inductor") -> Tensor:
    """FlexAttention through torch.compile, unless that is at work already."""
    if torch.compiler.is_compiling():
        y: Any = flex_attention(q, k, v, block_mask=mask)
        return y
    # One form for each precision, radius and kind of shape, with gradients and without; torch gives up after eight.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _kernel(backend)(q, k, v, block_mask=mask)


@functools.cache
def _kernel(backend: str) -> Callable[..., Tensor]:
    # fullgraph: where it cannot be compiled, an error; torch would go on with all scores in memory.
    kernel: Any = torch.compile(flex_attention, fullgraph=True, backend=backend)
    return kernel


def block_mask(packing: Packing, radius: int | None, shared_keys: int) -> BlockMask:
    """Blocks that some pair may see, with the exact rule inside; blocks where all pairs see each other need no rule.

    Keys are the tokens, then `shared_keys` per sequence, which stand nowhere: every token of the sequence sees them.
    """
    sequence_T, position_T, tokens = packing.sequence_T, packing.position_T, len(packing.sequence_T)
    owner = torch.arange(len(packing.lengths), device=sequence_T.device).repeat_interleave(shared_keys)
    sequence_X, position_X = torch.cat((sequence_T, owner)), torch.cat((position_T, torch.zeros_like(owner)))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence_T[query] == sequence_X[key]
        if radius is None:
            return same
        return same & (((position_T[query] - position_X[key]).abs() <= radius) | (key >= tokens))

    (low_N, high_N, whole_N), (low_M, high_M, whole_M) = _ranges(sequence_T), _ranges(sequence_X)
    some_NM = (low_N[:, None] <= high_M) & (low_M <= high_N[:, None])
    one_N, one_M = whole_N & (low_N == high_N), whole_M & (low_M == high_M)
    all_NM = one_N[:, None] & one_M & (low_N[:, None] == low_M)
    if radius is not None:
        block_N, block_M = (torch.arange(len(x), device=sequence_T.device) for x in (low_N, low_M))
        # Tokens lie at least as far apart in positions as they do in the packed order.
        gap_NM = ((block_N[:, None] - block_M).abs() - 1) * BLOCK + 1
        some_NM &= (gap_NM <= radius) | ((block_M + 1) * BLOCK > tokens if shared_keys else False)
        all_NM = torch.zeros_like(all_NM)
    return BlockMask.from_kv_blocks(
        *_listed(some_NM & ~all_NM),
        *_listed(all_NM),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, len(sequence_X)),
    )


def _ranges(sequence_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest sequence of every block, and whether it is full of tokens."""
    blocks = -(-len(sequence_T) // BLOCK)
    rest = sequence_T[-1:].expand(blocks * BLOCK - len(sequence_T))
    filled = torch.cat((sequence_T, rest)).unflatten(0, (blocks, BLOCK))
    whole = torch.arange(1, blocks + 1, device=sequence_T.device) * BLOCK <= len(sequence_T)
    return filled.amin(1), filled.amax(1), whole


def _listed(wanted_NM: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys a block of queries has [1, 1, N], and which, those first [1, 1, N, M]."""
    number_N = wanted_NM.sum(1, dtype=torch.int32)
    order_NM = wanted_NM.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return number_N[None, None].contiguous(), order_NM[None, None].contiguous()
