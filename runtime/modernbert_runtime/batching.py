"""Which texts go through the model together: pure functions on token counts.

No tokenizer, no engine, no clock: the same lengths always give the same plan.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Down to this many tokens a row costs little more than a call does, so padding it is cheaper than a batch of its own.
_SHORT = 64


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[NDArray[np.intp]]:
    """Split items into batches of similar length under a token budget.

    Items are taken longest first, ties in the order given, so memory peaks in the first batch and not in the last.
    A batch ends before rows * longest row would exceed `max_tokens`, or before a row shorter than half of its
    longest: above 64 tokens padding is at most half of the work, for at most log2(longest / 64) + 1 more batches.

    Args:
        lengths: tokens of each item, at least 1.
        max_tokens: budget of one batch, padding included; an item above it gets a batch of its own.

    Returns:
        Indices into `lengths`, one int array per batch; each index appears exactly once.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    for end in range(1, len(order) + 1):
        longest = lengths[order[start]]
        if (
            end == len(order)
            or longest * (end + 1 - start) > max_tokens
            or (longest > _SHORT and 2 * lengths[order[end]] < longest)
        ):
            batches.append(order[start:end])
            start = end
    return batches
