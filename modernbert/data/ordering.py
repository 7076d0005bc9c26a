"""Sentence ordering prediction: a piece is cut between sentences, its segments change places, which way is the label.

    Lan et al. 2019, ALBERT (arXiv:1909.11942), for two segments. With k segments the label is one of k! permutations.

A piece with fewer sentences than segments has no label. Nothing is filled in from another document.
"""

from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from modernbert.errors import InputError

SEGMENTS = (2, 3, 4)


def require_segments(segments: int) -> None:
    """Checks the number of segments.

    Raises:
        InputError: it is not 0 (off) or among `SEGMENTS`.
    """
    if segments and segments not in SEGMENTS:
        raise InputError(f"sop_segments must be 0 (off), 2, 3 or 4, not {segments}")


def orders(segments: int) -> tuple[tuple[int, ...], ...]:
    """All permutations; the label of a piece is an index into them, and label 0 is the order of the text."""
    return tuple(permutations(range(segments)))


def num_orders(segments: int) -> int:
    """How many labels there are."""
    return factorial(segments)


def reorder(
    input_ids: NDArray[np.int64], sentences: NDArray[np.int64], segments: int, random: np.random.Generator
) -> tuple[list[NDArray[np.int64]], int] | None:
    """Cuts a piece at random sentence starts and permutes what comes of it, every order as likely as another.

    Args:
        input_ids: [n].
        sentences: where sentences begin, rising.
        segments: how many to make.
        random: decides on the cuts and the order.

    Returns:
        The segments in their new order and the label, or None where there are fewer sentences than segments.
    """
    # What stands before the first start is the end of a sentence that began in the piece before.
    cuts = sentences[sentences > 0]
    if len(cuts) < segments - 1:
        return None
    parts = np.split(input_ids, np.sort(random.choice(cuts, segments - 1, replace=False)))
    label = int(random.integers(num_orders(segments)))
    return [parts[index] for index in orders(segments)[label]], label
