"""Global tokens: a few learned tokens per sequence that see all of it and that all of it sees, in every layer.

    Ainslie et al. 2020, "ETC: Encoding Long and Structured Inputs in Transformers" (arXiv:2004.08483)

They share the layers' weights and run through them behind the tokens: [T + B * G, D]. They have no position, so a score
with one on either side is of queries and keys that are not rotated. A token of a local layer has one softmax over the
keys in its window and the global ones.

Shapes: T packed tokens, B sequences, G global tokens of each, H heads, K size of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.attention import AttentionBackend, RowsBackend, rotate
from modernbert.packing import Packing, SharedKeys


def attend_with_globals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_global_tokens: int,
    tables: tuple[Tensor, Tensor],
    packing: Packing,
    radius: int | None,
    dropout: float,
    backend: AttentionBackend,
    rows: RowsBackend,
) -> Tensor:
    """Attention of tokens and global tokens, [T + B * G, H, K], none of them rotated yet.

    A backend knows one query per token, yet a token meets other tokens rotated and global ones as it is. So its query
    is both, one behind the other, and each key has zeros where it is not met: (rotated, 0) or (0, as it is). Values get
    zeros too, because the fused kernels want one size.
    """
    tokens, size = len(packing.sequence_T), q.shape[-1]
    (q_THK, q_BGHK), (k_THK, k_BGHK), (v_THK, v_BGHK) = (
        (x[:tokens], x[tokens:].unflatten(0, (len(packing.lengths), num_global_tokens))) for x in (q, k, v)
    )
    y_BGHK = rows(q_BGHK, k_THK, v_THK, packing, dropout, SharedKeys(k_BGHK=k_BGHK, v_BGHK=v_BGHK))

    # Backends divide scores by the root of the size that they see, which is twice that of a head.
    both_THJ = math.sqrt(2) * torch.cat((rotate(q_THK, *tables), q_THK), dim=-1)
    shared = SharedKeys(k_BGHK=F.pad(k_BGHK, (size, 0)), v_BGHK=F.pad(v_BGHK, (0, size)))
    met_THJ, v_THJ = F.pad(rotate(k_THK, *tables), (0, size)), F.pad(v_THK, (0, size))
    y_THJ = backend(both_THJ, met_THJ, v_THJ, packing, radius, dropout, shared)
    return torch.cat((y_THJ[..., :size], y_BGHK.flatten(0, 1)))
