"""How much memory a batch needs, and whether it may have it.

Estimates come from the manifest: what one row of a given length needs beside the weights. The limit is on the memory
of the whole process, because that is what a container is killed for. Nothing here allocates or frees anything.
"""

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from modernbert_runtime.errors import BundleError, InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# Batches of many shapes took up to 1.06 times what a single row of their length makes one expect, for memory comes in
# regions of growing size; the rest is for what small batches keep (see `Spikes`).
_SLACK = 1.15
_PAGES = Path("/proc/self/statm")
# Rows from here on are not asked for: no tokenizer makes them, and the search below needs an end.
_MOST_TOKENS = 10**9


def parse_bytes(name: str, value: int | str) -> int:
    """A size as bytes: 2_000_000_000, "2GB" (10**9 each), "2GiB" (2**30 each), "512 MB". Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[KMG]I?)B?\s*", str(value).upper())
    if isinstance(value, bool) or not isinstance(value, int | str) or not match or float(match[1]) == 0:
        raise InputError(f"{name} must be bytes or a size such as '2GB' or '512MiB', not {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def resident_bytes() -> int:
    """Memory that this process holds at this moment. Raises InputError where the system does not tell (not Linux)."""
    try:
        return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError as error:
        raise InputError("max_memory needs /proc/self/statm, so Linux: leave it out and lower batch_tokens") from error


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Memory that batches may take.

    Args:
        limit: bytes that the process may hold while a batch runs.
        resident: bytes that it holds between batches.
        row_bytes: tokens -> bytes that a run on one row of that many needs; at least one entry.
        turn: to be held by whoever takes this memory: there is enough for one at a time.
    """

    limit: int
    resident: int
    row_bytes: Mapping[int, int]
    turn: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @classmethod
    def of(cls, activation_bytes: Mapping[str, int], *, limit: int, resident: int) -> "MemoryBudget":
        """The budget from what an artifact's manifest says.

        Raises:
            BundleError: it says nothing.
            InputError: what is resident leaves no room.
        """
        if not activation_bytes:
            raise BundleError(
                "max_memory needs the artifact's activation_bytes, which this bundle's manifest lacks: export it "
                "again, or leave max_memory out and lower batch_tokens"
            )
        budget = cls(
            limit=limit,
            resident=resident,
            row_bytes={int(tokens): int(_SLACK * size) for tokens, size in activation_bytes.items()},
        )
        if budget.estimate(1) > budget.room:
            raise InputError(
                f"max_memory must exceed {in_gb(resident + budget.estimate(1))}, not be {in_gb(limit)}: the loaded "
                "model and one token need that much; 8 texts of 512 tokens need about "
                f"{in_gb(resident + 8 * budget.estimate(512))}"
            )
        return budget

    @property
    def room(self) -> int:
        """Bytes left for one batch."""
        return self.limit - self.resident

    def estimate(self, length: int) -> int:
        """Bytes for one row of that many tokens, at least 1.

        Between known lengths the straight line; below the shortest in proportion. Beyond the longest with the square
        of the length, which is what attention needs at worst.
        """
        known, sizes = self._known
        if length > known[-1]:
            return int(sizes[-1] * (length / known[-1]) ** 2)
        return int(np.interp(length, [0, *known], [0, *sizes]))

    def max_rows(self, length: int) -> int:
        """The most rows of that many tokens for which there is room; 0 if not even for one."""
        return max(0, self.room) // max(1, self.estimate(length))

    @cached_property
    def max_length(self) -> int:
        """The most tokens of a text for which there is room."""
        return bisect_right(range(1, _MOST_TOKENS), self.room, key=self.estimate)

    @cached_property
    def _known(self) -> tuple[list[int], list[int]]:
        known = sorted(self.row_bytes)
        return known, list(accumulate((self.row_bytes[tokens] for tokens in known), max))  # longer never needs less


def in_gb(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB"
