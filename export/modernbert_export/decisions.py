"""Does an artifact with a head still decide as its checkpoint does? What integers must prove without an embedding.

One decision a text: its label, or where there are logits for every token that of the middle one, which fill-mask hides.
The highest logit should be the same; where there is a single one, such as a reranker's score, the order of the texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modernbert_export.tasks import Task
from modernbert_export.texts import Ids, Rows, middle

MIN_AGREEMENT = MIN_RANK_CORRELATION = 0.95


@dataclass(frozen=True, kw_only=True)
class DecisionFidelity:
    """How an artifact's decisions on `texts` texts compare with the checkpoint's.

    `agreement` is the share of decisions that are the same, or with a single logit `rank_correlation` Spearman's of the
    texts' order; the other one is None.
    """

    source: str
    texts: int
    agreement: float | None
    rank_correlation: float | None

    @property
    def passed(self) -> bool:
        """Whether the artifact can stand in for the checkpoint."""
        if self.agreement is not None:
            return self.agreement >= MIN_AGREEMENT
        return self.rank_correlation is not None and self.rank_correlation >= MIN_RANK_CORRELATION

    def summary(self) -> dict[str, float]:
        """The figure, for a manifest."""
        figures = {"text_agreement": self.agreement, "text_rank_correlation": self.rank_correlation}
        return {name: value for name, value in figures.items() if value is not None}

    def to_markdown(self) -> str:
        """One line."""
        what, value, least = (
            ("same decisions", self.agreement, MIN_AGREEMENT)
            if self.agreement is not None
            else ("rank correlation", self.rank_correlation, MIN_RANK_CORRELATION)
        )
        verdict = "" if self.passed else " FAILED"
        return (
            f"On {self.texts} texts of {self.source}, against the checkpoint in fp32: {what} {value:.5f}, at least "
            f"{least:g}.{verdict}"
        )


def decisions(task: Task, logits: NDArray[np.floating], mask_BS: Ids) -> Rows:
    """Of each text the logits [B, width] that decide: [B, width] or [B, S, width], texts padded right."""
    if not task.per_token:
        return logits
    picked: Rows = logits[np.arange(len(logits)), [middle(tokens) for tokens in mask_BS.sum(1)]]
    return picked


def compare_decisions(source: str, got: Rows, want: Rows) -> DecisionFidelity:
    """Compares an artifact's logits [texts, width] with the checkpoint's."""
    single = want.shape[1] == 1
    return DecisionFidelity(
        source=source,
        texts=len(got),
        agreement=None if single else float((got.argmax(1) == want.argmax(1)).mean()),
        rank_correlation=_rank_correlation(got[:, 0], want[:, 0]) if single else None,
    )


def _rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(float) for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])
