"""Does an artifact still find the same texts? What int8 must prove, on the user's own text or on a built-in one.

Every text is embedded by the checkpoint in fp32 and by the artifact. Then each text in turn is the query: the ten
nearest of the others, and the order of all others, should be the same in both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]

TOP = 10
MIN_COSINE, MIN_OVERLAP, MIN_RANK_CORRELATION = 0.99, 0.95, 0.95


@dataclass(frozen=True, kw_only=True)
class TextFidelity:
    """How an artifact's embeddings of `texts` texts compare with the checkpoint's.

    `min_cosine` and `mean_cosine` are between the two vectors of a text; `top_overlap` is the mean share of the ten
    nearest texts that both name; `rank_correlation` Spearman's, over all other texts, mean of the queries.
    """

    source: str
    texts: int
    min_cosine: float
    mean_cosine: float
    top_overlap: float
    rank_correlation: float

    @property
    def passed(self) -> bool:
        """Whether the artifact can stand in for the checkpoint."""
        return (
            self.min_cosine >= MIN_COSINE
            and self.top_overlap >= MIN_OVERLAP
            and self.rank_correlation >= MIN_RANK_CORRELATION
        )

    def summary(self) -> dict[str, float]:
        """The figures, for a manifest."""
        return {f"text_{name}": value for name, value in asdict(self).items() if isinstance(value, float)}

    def to_markdown(self) -> str:
        """One table."""
        rows = (
            ("lowest cosine", self.min_cosine, MIN_COSINE),
            ("mean cosine", self.mean_cosine, None),
            (f"top-{TOP} overlap", self.top_overlap, MIN_OVERLAP),
            ("rank correlation", self.rank_correlation, MIN_RANK_CORRELATION),
        )
        return "\n".join(
            [
                f"On {self.texts} texts of {self.source}, pooled, against the checkpoint in fp32:",
                "",
                "| figure | value | at least | |",
                "|---|---|---|---|",
                *(
                    f"| {name} | {value:.5f} | {'' if least is None else f'{least:g}'} "
                    f"| {'FAILED' if least is not None and not value >= least else ''} |"
                    for name, value, least in rows
                ),
            ]
        )


def compare_text(source: str, got: Vectors, want: Vectors) -> TextFidelity:
    """Compares an artifact's vectors [texts, dim] with the checkpoint's."""
    got, want = _unit(got), _unit(want)
    cosine = (got * want).sum(-1)
    others = ~np.eye(len(got), dtype=bool)
    mine, theirs = ((x @ x.T)[others].reshape(len(got), -1) for x in (got, want))
    top = min(TOP, mine.shape[1])
    nearest = [np.argsort(-x, axis=1, kind="stable")[:, :top] for x in (mine, theirs)]
    overlap = [len(np.intersect1d(a, b)) / top for a, b in zip(*nearest, strict=True)]
    ranks = [np.argsort(np.argsort(x, axis=1, kind="stable"), axis=1).astype(float) for x in (mine, theirs)]
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    return TextFidelity(
        source=source,
        texts=len(got),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        top_overlap=float(np.mean(overlap)),
        rank_correlation=float(np.mean(correlation)),
    )


def _unit(x: Vectors) -> Vectors:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
