"""Best-fit decreasing: which pieces share a bin of a fixed number of tokens.

    Johnson 1973, "Near-optimal bin packing algorithms"; for language models Ding et al. 2024 (arXiv:2404.10830).

The longest piece first, each into the fullest bin that still has room. Rooms are small integers, so the bins wait in
one list per room, and an integer whose bit r says whether room r has any finds the best one at once: 10 million pieces
take seconds, whatever the number of bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modernbert.errors import InputError


def best_fit(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Distributes pieces over as few bins as the heuristic finds; equal input gives equal bins.

    Args:
        lengths: tokens of each piece, from 1 to `capacity`.
        capacity: tokens of a bin.

    Returns:
        The indices of the pieces of every bin. Every piece is in exactly one.

    Raises:
        InputError: a piece is longer than a bin, or empty.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise InputError(f"lengths must be from 1 to the capacity {capacity}: {lengths.min()} to {lengths.max()}")
    bins: list[list[int]] = []
    waiting: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            chosen = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(index)
        if left := room - length:
            waiting[left].append(chosen)
            rooms |= 1 << left
    return bins


def fill(lengths: Sequence[int] | NDArray[np.integer], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the bins' tokens that are not empty."""
    return float(np.asarray(lengths).sum() / (len(bins) * capacity)) if bins else 1.0
