"""Batches for pretraining: pieces packed into bins, drawn in a random order, masked and reordered anew at every visit.

Everything random about a bin follows from the seed, the visit and the bin's number. So a batch is the same whichever
rank or worker makes it, and whether or not the run was interrupted before.

Shapes: T tokens of all pieces of a batch, B pieces, M tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerFast

from modernbert.data.bins import best_fit, fill
from modernbert.data.masking import IGNORED, Masking
from modernbert.data.ordering import reorder
from modernbert.data.pieces import Piece, Pieces

Visit = tuple[int, int]  # how often all bins were visited before, and the bin's number


@dataclass(frozen=True)
class Bin:
    """The pieces that share a bin, with the visit that brought them here."""

    visit: Visit
    pieces: list[Piece]


class PackedPieces(Dataset[Bin]):
    """Pieces in bins of `capacity` tokens, special tokens included, by best fit.

    Args:
        pieces: what to pack.
        capacity: tokens of a bin, at least `room` of the pieces plus their special tokens.
        segments: of sentence ordering, 0 when it is off.
    """

    def __init__(self, pieces: Pieces, capacity: int, segments: int) -> None:
        self._pieces = pieces
        tokens, sentences = pieces.sizes()
        # A piece of too few sentences stays in one, and most pieces begin with a sentence; counting one segment too
        # many where a piece begins in the middle of a sentence would cost a token, one too few would overflow.
        lengths = tokens + special_tokens(segments)
        if segments:
            lengths[sentences < segments - 1] = tokens[sentences < segments - 1] + special_tokens(0)
        self.bins = best_fit(lengths, capacity)
        self.fill = fill(lengths, self.bins, capacity)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, visit: Visit) -> Bin:
        return Bin(visit, [self._pieces[index] for index in self.bins[visit[1]]])


def special_tokens(segments: int) -> int:
    """How many a piece gets: [CLS], and a [SEP] behind every segment."""
    return 1 + max(segments, 1)


class Visits(Sampler[Visit]):
    """Visits all bins in a random order, then all of them in another, until there were `total` visits."""

    def __init__(self, bins: int, total: int, seed: int) -> None:
        self._bins, self._total, self._seed = bins, total, seed

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Visit]:
        left = self._total
        for number in count():
            order = np.random.default_rng([self._seed, number]).permutation(self._bins)[:left]
            yield from ((number, int(index)) for index in order)
            left -= len(order)
            if not left:
                return


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns bins into a packed batch for `modernbert.sentence_order.ModernBertForPreTraining`.

    The batch: `input_ids`, `labels` [T] and `cu_seqlens` [B + 1]; `order_labels` [B], -100 where a piece has too few
    sentences, if `segments` is not 0; and `documents`, where the pieces come from.
    """

    masking: Masking
    cls_id: int
    sep_id: int
    segments: int
    seed: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, *, mlm_probability: float, segments: int, seed: int) -> Collator:
        """The collator for a tokenizer."""
        masking = Masking.of(tokenizer, mlm_probability)
        return cls(
            masking=masking, cls_id=tokenizer.cls_token_id, sep_id=tokenizer.sep_token_id, segments=segments, seed=seed
        )

    def __call__(self, bins: Sequence[Bin]) -> dict[str, Any]:
        """Makes the batch."""
        ids, labels, order_labels, documents = [], [], [], []
        for packed in bins:
            random = np.random.default_rng([self.seed, *packed.visit, 1])
            for piece in packed.pieces:
                whole, order = self._arrange(piece, random)
                hidden, label = self.masking(whole, random)
                ids.append(hidden)
                labels.append(label)
                order_labels.append(order)
                documents.append(piece.document)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate(ids)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "cu_seqlens": torch.from_numpy(np.cumsum([0, *map(len, ids)], dtype=np.int32)),
            "documents": documents,
        }
        if self.segments:
            batch["order_labels"] = torch.tensor(order_labels)
        return batch

    def _arrange(self, piece: Piece, random: np.random.Generator) -> tuple[NDArray[np.int64], int]:
        """Special tokens and segments of a piece [M], and the label of its order."""
        arranged = reorder(piece.input_ids, piece.sentences, self.segments, random) if self.segments else None
        segments, label = arranged or ([piece.input_ids], IGNORED)
        parts = [np.array([self.cls_id])]
        for segment in segments:
            parts += (segment, np.array([self.sep_id]))
        return np.concatenate(parts), label
