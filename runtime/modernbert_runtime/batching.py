"""Which texts go through the model together: pure functions on token counts.

No tokenizer, no engine, no clock: the same lengths always give the same plan.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# What a batch holds unless the caller says otherwise. On a CPU the activations of so many tokens stay in its cache, and
# a token costs less than in larger batches. GPUs want more.
BATCH_TOKENS = 1024

# Down to this many tokens a row costs little more than a call does, so padding it is cheaper than a batch of its own.
_SHORT = 64
# From this many tokens on a row keeps every core busy by itself: company would cost memory and win no time.
LONG_LENGTH = 2048
# Most texts of a packed batch: pooling makes a matrix of texts x tokens.
_MOST_PACKED = 512


def plan_batches(
    lengths: Sequence[int], max_tokens: int, *, max_rows: Callable[[int], int] | None = None, packed: bool = False
) -> list[NDArray[np.intp]]:
    """Split items into batches of similar length under a token budget.

    Items are taken longest first, ties in the order given, so memory peaks in the first batch and not in the last.
    A batch ends before rows * longest row would exceed `max_tokens`, before there would be more rows than `max_rows`
    of the longest, or before a row shorter than half of its longest: above 64 tokens padding is at most half of the
    work, for at most log2(longest / 64) + 1 more batches. Rows of 2,048 tokens and more run alone.

    Args:
        lengths: tokens of each item, at least 1.
        max_tokens: budget of one batch, padding included; an item above it gets a batch of its own.
        max_rows: tokens -> the most rows of that many for which there is memory; None means any number. An item for
            which it gives less than 1 gets a batch of its own: whoever cannot have that must refuse it before.
        packed: items run without padding: batches are cut by the sum of their lengths, and for memory count as one row
            of that many tokens.

    Returns:
        Indices into `lengths`, one int array per batch; each index appears exactly once.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    if packed:
        return _plan_packed(order, lengths, max_tokens, max_rows)
    batches = []
    start = 0
    most = 0
    for end in range(1, len(order) + 1):
        longest = int(lengths[order[start]])
        if end == start + 1:
            most = _most_rows(longest, max_tokens, max_rows)
        if end == len(order) or end - start >= most or (longest > _SHORT and 2 * lengths[order[end]] < longest):
            batches.append(order[start:end])
            start = end
    return batches


def _most_rows(longest: int, max_tokens: int, max_rows: Callable[[int], int] | None) -> int:
    if longest >= LONG_LENGTH:
        return 1
    most = max_tokens // longest
    return most if max_rows is None else min(most, max_rows(longest))


def _plan_packed(
    order: NDArray[np.intp], lengths: Sequence[int], max_tokens: int, max_rows: Callable[[int], int] | None
) -> list[NDArray[np.intp]]:
    """Sorted all the same: attention over short texts is cheaper where no long one is among them."""
    batches = []
    start = tokens = 0
    for end, index in enumerate(order):
        length = int(lengths[index])
        full = tokens + length > max_tokens or end - start == _MOST_PACKED or tokens >= LONG_LENGTH
        if end > start and (full or (max_rows is not None and max_rows(tokens + length) < 1)):
            batches.append(order[start:end])
            start, tokens = end, 0
        tokens += length
    if len(order):
        batches.append(order[start:])
    return batches
