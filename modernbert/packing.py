"""Where padding leaves and re-enters the model: padded [B, S] on the outside, packed [T] inside.

Every layer works on packed tokens, so padding costs nothing between the edges. A `Packing` says which token belongs
to which sequence; attention backends read it, nothing else does.

Shapes: B sequences, S padded length, T packed tokens, G shared keys per sequence, H heads, K size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Built = TypeVar("Built")


Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(reason: str) -> Callable[[Function], Function]:
    """Keeps a function that depends on lengths out of torch.compile's graphs: each length would be compiled anew."""
    decorator: Callable[[Function], Function] = torch.compiler.disable(reason=reason)
    return decorator


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How T packed tokens form B sequences.

    `position_T` counts from the start of a sequence, padding included, so that positions of a token are the same
    packed and padded. `lengths` may contain 0: a row of nothing but padding holds no token.
    """

    sequence_T: Tensor
    position_T: Tensor
    lengths: tuple[int, ...]
    padded_shape: tuple[int, int] | None = None
    _built: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    @uncompiled("the number of tokens is data")
    def from_mask(cls, attention_mask_BS: Tensor) -> Packing:
        """Packs the tokens whose mask is not 0, wherever the padding stands."""
        sequence_T, position_T = attention_mask_BS.nonzero(as_tuple=True)
        lengths = tuple((attention_mask_BS != 0).sum(-1).tolist())
        batch, length = attention_mask_BS.shape
        return cls(sequence_T=sequence_T, position_T=position_T, lengths=lengths, padded_shape=(batch, length))

    @classmethod
    @uncompiled("the number of tokens is data")
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Packing:
        """Sequences that are packed already: sequence b holds tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`."""
        length_B = cu_seqlens.long().diff()
        sequence_T = torch.repeat_interleave(length_B)
        position_T = torch.arange(len(sequence_T), device=cu_seqlens.device) - cu_seqlens.long()[sequence_T]
        return cls(sequence_T=sequence_T, position_T=position_T, lengths=tuple(length_B.tolist()))

    def once(self, key: Hashable, build: Callable[[], Built]) -> Built:
        """What `build` gives, made for the first layer that asks and kept for the others: masks, above all."""
        if key not in self._built:
            self._built[key] = build()
        built: Built = self._built[key]
        return built

    @property
    def full(self) -> bool:
        """Whether all sequences are of one length, so that packing is a reshape."""
        return len(set(self.lengths)) == 1

    def pack(self, x_BSX: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        return x_BSX[self.sequence_T, self.position_T]

    def unpack(self, x_TX: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...] with zeros in the place of padding; packed input stays packed."""
        if self.padded_shape is None:
            return x_TX
        x_BSX = x_TX.new_zeros(self.padded_shape + x_TX.shape[1:])
        return x_BSX.index_put((self.sequence_T, self.position_T), x_TX)


@dataclass(frozen=True, kw_only=True)
class SharedKeys:
    """G keys and values per sequence that all of its tokens see, wherever they stand: those of its global tokens."""

    k_BGHK: Tensor
    v_BGHK: Tensor

    @property
    def k_XHK(self) -> Tensor:
        """All keys one behind the other, X = B * G."""
        return self.k_BGHK.flatten(0, 1)

    @property
    def v_XHK(self) -> Tensor:
        """All values one behind the other."""
        return self.v_BGHK.flatten(0, 1)

    @property
    def sequence_X(self) -> Tensor:
        """Whose they are."""
        batch, number = self.k_BGHK.shape[:2]
        return torch.arange(batch, device=self.k_BGHK.device)[:, None].expand(-1, number).flatten()
