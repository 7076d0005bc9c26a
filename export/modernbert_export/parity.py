"""How close an artifact came to its references: one comparison a row, and what all of them had to reach.

The report is data, with a JSON and a Markdown form; `verify` makes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of one forward pass in fp32 against exact arithmetic, on valid tokens.
MAX_ABS_ERROR = {"fp32": 1e-4}
MIN_COSINE = {"fp32": 0.999999}
SEED = 20_240_519


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of the grid: a seeded batch [batch, length] with its padding."""

    batch: int
    length: int
    padding: str

    def inputs(self, vocab_size: int) -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `attention_mask`, int64 [batch, length]; rows of one batch differ in length."""
        generator = np.random.default_rng([SEED, self.batch, self.length])
        ids = generator.integers(0, vocab_size, (self.batch, self.length))
        mask = np.ones_like(ids)
        kept = max(1, self.length // 2)
        if self.padding == "right":
            mask[1, kept:] = 0
        elif self.padding == "left":
            mask[1, : self.length - kept] = 0
            mask[2] = 0
        return {"input_ids": ids, "attention_mask": mask}


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
    """All comparisons of one artifact, and what they had to reach."""

    artifact: str
    precision: str
    comparisons: tuple[Comparison, ...]
    first_difference: str | None = None

    @property
    def failures(self) -> list[Comparison]:
        """Comparisons outside the tolerance, NaN among them."""
        return [row for row in self.comparisons if not self._holds(row)]

    def _holds(self, row: Comparison) -> bool:
        return row.max_abs_error <= MAX_ABS_ERROR[self.precision] and all(
            cosine >= MIN_COSINE[self.precision] for cosine in (row.min_cosine, row.min_pooled_cosine)
        )

    def summary(self) -> dict[str, float]:
        """The worst of each figure over all comparisons."""
        return {
            "max_abs_error": float(np.max([row.max_abs_error for row in self.comparisons])),
            "min_cosine": float(np.min([row.min_cosine for row in self.comparisons])),
            "min_pooled_cosine": float(np.min([row.min_pooled_cosine for row in self.comparisons])),
        }

    def to_json(self) -> str:
        """Everything, for machines."""
        tolerance = {"max_abs_error": MAX_ABS_ERROR[self.precision], "min_cosine": MIN_COSINE[self.precision]}
        fields = {**asdict(self), "tolerance": tolerance, "summary": self.summary(), "passed": not self.failures}
        return json.dumps(_without_nan(fields), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The same as a table."""
        lines = [
            f"# Parity of {self.artifact}",
            "",
            f"Tolerance ({self.precision}): max abs error <= {MAX_ABS_ERROR[self.precision]:g} and cosine >= "
            f"{MIN_COSINE[self.precision]:g} on valid tokens. Result: {'FAILED' if self.failures else 'passed'}.",
            *([f"First layer that differs: {self.first_difference}."] if self.first_difference else []),
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
        return "\n".join(lines) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
