"""How well vectors find what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modernbert.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Shares of queries whose document comes first, or among the first ten; the mean of 1 / rank; and blind luck."""

    recall_at_1: float
    recall_at_10: float
    mean_reciprocal_rank: float
    chance: float


def retrieval_scores(queries: NDArray[np.float32], documents: NDArray[np.float32]) -> RetrievalScores:
    """Scores the search for document i by query i among all documents, by dot product; a tie counts as lost.

    Args:
        queries: vectors [n, dim], of length 1 for cosine similarity.
        documents: vectors [n, dim].

    Raises:
        InputError: there are none, or their shapes differ.
    """
    if queries.shape != documents.shape or queries.ndim != 2 or not len(queries):
        raise InputError(f"queries and documents must be [n, dim] alike, not {queries.shape} and {documents.shape}")
    scores = queries @ documents.T
    own = np.diagonal(scores)[:, None]
    ranks = (scores >= own).sum(axis=1)
    return RetrievalScores(
        recall_at_1=float((ranks == 1).mean()),
        recall_at_10=float((ranks <= 10).mean()),
        mean_reciprocal_rank=float((1 / ranks).mean()),
        chance=1 / len(queries),
    )


def top(query: NDArray[np.float32], documents: NDArray[np.float32], count: int) -> Sequence[tuple[int, float]]:
    """The `count` documents nearest to one query [dim]: their indices and scores, best first."""
    scores = documents @ query
    return [(int(index), float(scores[index])) for index in np.argsort(-scores)[:count]]
