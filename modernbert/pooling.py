"""From token vectors to one vector per text: the head of an embedding model.

Shapes: B sequences, S padded length, G global tokens of each, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.errors import InputError

POOLINGS = ("mean", "cls", "global")


class EmbeddingHead(nn.Module):
    """Pools token vectors and, if asked to, scales the result to length 1. It has no weights.

    Args:
        pooling: "mean" over the tokens that are not padding; "cls", the first position; or "global", the first global
            token of a model that has some.
        normalize: whether vectors get length 1.

    Raises:
        InputError: there is no pooling of that name.
    """

    def __init__(self, pooling: str, *, normalize: bool) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        self.pooling, self.normalize = pooling, normalize

    def forward(self, x_BSD: Tensor, attention_mask_BS: Tensor, x_BGD: Tensor | None = None) -> Tensor:
        """[B, S, D], the mask [B, S] and, for "global", [B, G, D] -> [B, D].

        Under "mean" a row of nothing but padding gives zeros.

        Raises:
            InputError: "global" without global tokens.
        """
        if self.pooling == "global":
            if x_BGD is None:
                raise InputError("pooling 'global' needs a model with num_global_tokens of 1 or above; take 'mean'")
            y_BD = x_BGD[:, 0]
        elif self.pooling == "cls":
            y_BD = x_BSD[:, 0]
        else:
            mask_BS1 = attention_mask_BS.to(x_BSD.dtype)[:, :, None]
            y_BD = (x_BSD * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1)
        return F.normalize(y_BD, dim=-1, eps=1e-12) if self.normalize else y_BD
