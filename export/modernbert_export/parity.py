"""How close an artifact came to its references: one comparison a row, and what all of them had to reach.

The report is data, with a JSON and a Markdown form; `verify` makes it, `plot` draws it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_export.on_text import Fidelity
from modernbert_export.precision.audit import LayerRange
from modernbert_export.variants import QUANTISED

SEED = 20_240_519


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What every comparison of the grid must reach, on valid tokens; None where a figure is reported only."""

    max_abs_error: float | None
    min_cosine: float | None
    min_pooled_cosine: float

    def holds(self, *, max_abs_error: float, min_cosine: float, min_pooled_cosine: float) -> bool:
        """Whether these figures are within it. NaN never is, not even where there is no limit."""
        return (
            max_abs_error <= (np.inf if self.max_abs_error is None else self.max_abs_error)
            and min_cosine >= (-np.inf if self.min_cosine is None else self.min_cosine)
            and min_pooled_cosine >= self.min_pooled_cosine
        )

    def __str__(self) -> str:
        limits = (
            f"max abs error <= {self.max_abs_error:g}" if self.max_abs_error is not None else None,
            f"cosine >= {self.min_cosine:g} per token" if self.min_cosine is not None else None,
            f"cosine >= {self.min_pooled_cosine:g} pooled",
        )
        return ", ".join(filter(None, limits))


# Of one forward pass against exact arithmetic. The grid's tokens are random, which no promise of integers is about:
# there they must only not be broken, and `OnText` says whether they are good.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(max_abs_error=1e-4, min_cosine=0.999999, min_pooled_cosine=0.999999),
    "fp16": Tolerance(max_abs_error=None, min_cosine=0.9999, min_pooled_cosine=0.99995),
    "bf16": Tolerance(max_abs_error=None, min_cosine=0.999, min_pooled_cosine=0.9995),  # why: precision.half
    **dict.fromkeys(QUANTISED, Tolerance(max_abs_error=None, min_cosine=None, min_pooled_cosine=0.9)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of the grid: a seeded batch [batch, length] with its padding.

    All cases of one length hold the same two texts, one of that length and one of half of it: a row must come out the
    same whatever stands beside it and wherever its padding is, so one reference serves them all. Packed with texts of
    other cases, `padding` says in which order.
    """

    batch: int
    length: int
    padding: str

    def texts(self, vocab_size: int) -> list[NDArray[np.int64]]:
        """Token ids of each row without its padding; a row of nothing but padding is empty."""
        generator = np.random.default_rng([SEED, self.length])
        lengths = (self.length, max(1, self.length // 2), 0)
        return [generator.integers(0, vocab_size, length) for length in lengths[: self.batch]]

    def inputs(self, vocab_size: int) -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `attention_mask`, int64 [batch, length]. Padding holds any token, as a caller's may."""
        ids = np.random.default_rng([SEED, self.length, self.batch]).integers(0, vocab_size, (self.batch, self.length))
        mask = np.zeros_like(ids)
        for row, text in enumerate(self.texts(vocab_size)):
            where = self._where(len(text))
            ids[row, where], mask[row, where] = text, 1
        return {"input_ids": ids, "attention_mask": mask}

    def place(self, rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Puts token vectors [tokens, dim] of each text where the text stands: [batch, length, dim], else zeros."""
        placed = np.zeros((self.batch, self.length, rows[0].shape[-1]), rows[0].dtype)
        for row, vectors in enumerate(rows):
            placed[row, self._where(len(vectors))] = vectors
        return placed

    def _where(self, tokens: int) -> slice:
        return slice(self.length - tokens, None) if self.padding == "left" else slice(0, tokens)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the artifact is from one reference on one case; the cosines are the worst over tokens and texts."""

    case: Case
    reference: str
    max_abs_error: float
    min_cosine: float
    min_pooled_cosine: float


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All comparisons of one artifact, and what they had to reach.

    `text` says how it does on real text, where that was asked for; `ranges` what the layers' values are, and `notes`
    how its precision was chosen.
    """

    artifact: str
    precision: str
    comparisons: tuple[Comparison, ...]
    first_difference: str | None = None
    text: Fidelity | None = None
    ranges: tuple[LayerRange, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tolerance(self) -> Tolerance:
        """What every comparison must reach."""
        return TOLERANCES[self.precision]

    @property
    def failures(self) -> list[Comparison]:
        """Comparisons outside the tolerance, NaN among them."""
        return [row for row in self.comparisons if not self._holds(row)]

    @property
    def passed(self) -> bool:
        """Whether the artifact may be written: the grid holds, and so does the text where there is one."""
        return not self.failures and (self.text is None or self.text.passed)

    def _holds(self, row: Comparison) -> bool:
        return self.tolerance.holds(
            max_abs_error=row.max_abs_error, min_cosine=row.min_cosine, min_pooled_cosine=row.min_pooled_cosine
        )

    def summary(self) -> dict[str, float]:
        """The worst of each figure over all comparisons."""
        grid = {
            "max_abs_error": float(np.max([row.max_abs_error for row in self.comparisons])),
            "min_cosine": float(np.min([row.min_cosine for row in self.comparisons])),
            "min_pooled_cosine": float(np.min([row.min_pooled_cosine for row in self.comparisons])),
        }
        return grid | (self.text.summary() if self.text else {})

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines: JSON's types only, null for NaN."""
        fields = {
            **asdict(self),
            "tolerance": asdict(self.tolerance),
            "summary": self.summary(),
            "passed": self.passed,
        }
        cleaned: dict[str, Any] = _without_nan(fields)
        return cleaned

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The same as tables."""
        lines = [
            f"# Parity of {self.artifact}",
            "",
            f"Tolerance ({self.precision}): {self.tolerance}, on valid tokens. "
            f"Result: {'passed' if self.passed else 'FAILED'}.",
            *([f"First layer that differs: {self.first_difference}."] if self.first_difference else []),
            *(f"{note}" for note in self.notes),
            *(["", self.text.to_markdown()] if self.text else []),
            "",
            "| reference | batch | length | padding | max abs error | min cosine | min pooled cosine | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.comparisons:
            lines.append(
                f"| {row.reference} | {row.case.batch} | {row.case.length} | {row.case.padding} "
                f"| {row.max_abs_error:.2e} | {row.min_cosine:.8f} | {row.min_pooled_cosine:.8f} "
                f"| {'' if self._holds(row) else 'FAILED'} |"
            )
        if self.ranges:
            lines += ["", *LayerRange.table(self.ranges)]
        return "\n".join(lines) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
