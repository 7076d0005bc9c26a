"""The backend `varlen`: torch's flash attention over packed tokens, with a window in local layers.

The kernels ask for CUDA, float16 or bfloat16, and heads of a multiple of 8 up to 256. Their window counts packed
tokens, not positions, so padding may stand at the ends of a sequence but not inside it. Each is an error here.

Shared keys lie outside of the window. Their part of the softmax is computed beside the kernel's and both are joined by
their log-sum-exp, which the kernel returns but gives no gradient; `_LogSumExp` does.

Shapes: T packed tokens, H heads, K size of a head, B sequences, G shared keys per sequence, X = B * G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from modernbert.errors import InputError
from modernbert.packing import Packing, SharedKeys


def varlen(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    packing: Packing,
    radius: int | None,
    dropout: float,
    shared: SharedKeys | None = None,
) -> Tensor:
    """Flash attention over packed sequences.

    Raises:
        InputError: the device, the precision, the size of a head, dropout, or padding inside a sequence.
    """
    require_kernel(q_THK, dropout)
    offset_B, longest = varlen_plan(packing, radius)
    if not len(q_THK):
        return v_THK
    window = (-1, -1) if radius is None else (radius, radius)

    def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return varlen_attn(q, k, v, offset_B, offset_B, longest, longest, window_size=window, **more)

    if shared is None:
        y_THK: Tensor = attend(q_THK, k_THK, v_THK)
        return y_THK
    y_THK, sum_HT = attend(q_THK, k_THK, v_THK, return_aux=AuxRequest(lse=True))
    assert sum_HT.shape == q_THK.shape[1::-1]
    sum_TH = _LogSumExp.apply(q_THK, k_THK, sum_HT.mT, attend)  # type: ignore[no-untyped-call]
    return _join(y_THK, sum_TH, q_THK, packing, shared)


def varlen_plan(packing: Packing, radius: int | None, shared_keys: int = 0) -> tuple[Tensor, int]:
    """Offsets [B + 1] of the sequences, int32 as the kernel takes them, and the longest one's length.

    Raises:
        InputError: padding inside a sequence.
    """
    return packing.once("varlen", lambda: _checked_offsets(packing))


def varlen_rows(
    q_BGHK: Tensor, k_THK: Tensor, v_THK: Tensor, packing: Packing, dropout: float, shared: SharedKeys
) -> Tensor:
    """Attention of G queries per sequence over all of its tokens and shared keys: [B, G, H, K]."""
    require_kernel(q_BGHK, dropout)
    batch, rows = q_BGHK.shape[:2]
    if not batch:
        return q_BGHK
    lengths = tuple(length + rows for length in packing.lengths)
    # Behind every sequence its shared keys.
    order = torch.cat((packing.sequence_T, shared.sequence_X)).argsort(stable=True)
    k, v = torch.cat((k_THK, shared.k_XHK))[order], torch.cat((v_THK, shared.v_XHK))[order]
    offset_q, offset_k = (_offsets(x, q_BGHK.device) for x in ((rows,) * batch, lengths))
    y_XHK: Any = varlen_attn(q_BGHK.flatten(0, 1), k, v, offset_q, offset_k, rows, max(lengths))
    rows_BGHK: Tensor = y_XHK.unflatten(0, (batch, rows))
    return rows_BGHK


def require_kernel(q: Tensor, dropout: float) -> None:
    """Checks what the kernels ask for.

    Raises:
        InputError: they cannot run this.
    """
    if q.device.type != "cuda":
        raise InputError(f"attention 'varlen' needs a CUDA device, not {q.device.type!r}; take 'banded'")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"attention 'varlen' needs float16 or bfloat16, not {q.dtype}; use autocast, or take 'banded'")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise InputError(
            f"attention 'varlen' needs heads of a multiple of 8 up to 256, not {q.shape[-1]}; take 'banded'"
        )
    if dropout:
        raise InputError(
            f"attention 'varlen' has no dropout; set attention_dropout to 0, not {dropout}, or take 'banded'"
        )


def _checked_offsets(packing: Packing) -> tuple[Tensor, int]:
    step = packing.position_T.diff()
    inside = packing.sequence_T.diff() == 0
    if bool((inside & (step != 1)).any()):
        raise InputError("attention 'varlen' takes padding at the ends of a sequence only, not inside; take 'banded'")
    return _offsets(packing.lengths, packing.sequence_T.device), max(packing.lengths, default=0)


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int64, device=device).cumsum(0, dtype=torch.int32)


class _LogSumExp(torch.autograd.Function):
    """Passes on the log-sum-exp [T, H] of scaled scores, and gives it the gradient that the kernel does not.

    Its derivative by a score is the attention weight p: d q_i = scale * sum_j p_ij k_j is attention with the keys as
    values, and d k_j = scale * sum_i p_ij q_i is that attention's gradient by its values.
    """

    @staticmethod
    def forward(ctx: Any, q_THK: Tensor, k_THK: Tensor, sum_TH: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(q_THK, k_THK)
        ctx.attend = attend
        return sum_TH.clone()

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_THK, k_THK = ctx.saved_tensors
        scaled_TH1 = grad_TH[:, :, None] * q_THK.shape[-1] ** -0.5
        with torch.enable_grad():
            values = k_THK.detach().requires_grad_()
            mean_THK = ctx.attend(q_THK.detach(), k_THK.detach(), values)
        (grad_k,) = torch.autograd.grad(mean_THK, values, (scaled_TH1 * q_THK).to(q_THK.dtype))
        return (scaled_TH1 * mean_THK.detach()).to(q_THK.dtype), grad_k, None, None


def _join(y_THK: Tensor, sum_TH: Tensor, q_THK: Tensor, packing: Packing, shared: SharedKeys) -> Tensor:
    """One softmax over the kernel's keys, whose part is `y_THK`, and the shared ones; in fp32 as the kernel does."""
    scaled_THK = q_THK.float() * q_THK.shape[-1] ** -0.5
    k_GBHK, v_GBHK = shared.k_BGHK.transpose(0, 1), shared.v_BGHK.transpose(0, 1)
    scores = [(scaled_THK * k_BHK[packing.sequence_T]).sum(-1) for k_BHK in k_GBHK]
    weights_THX = torch.stack((sum_TH, *scores), dim=-1).softmax(-1)
    joined_THK = weights_THX[..., :1] * y_THK
    for index, v_BHK in enumerate(v_GBHK, start=1):
        joined_THK = joined_THK + weights_THX[..., index, None] * v_BHK[packing.sequence_T]
    return joined_THK.to(y_THK.dtype)
