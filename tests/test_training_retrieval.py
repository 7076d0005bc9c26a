import numpy as np
import pytest

from modernbert.errors import InputError
from modernbert.training.retrieval import retrieval_scores, top

EYE = np.eye(20, dtype=np.float32)


def test_scores_of_known_ranks() -> None:
    documents = EYE.copy()
    queries = EYE.copy()
    queries[0] += 2 * EYE[1]  # its own document comes second
    queries[1] += 2 * EYE[2:12].sum(0)  # eleventh
    scores = retrieval_scores(queries, documents)
    assert scores.recall_at_1 == 18 / 20
    assert scores.recall_at_10 == 19 / 20
    assert scores.mean_reciprocal_rank == pytest.approx((18 + 1 / 2 + 1 / 11) / 20)
    assert scores.chance == 1 / 20


def test_vectors_that_are_all_alike_find_nothing() -> None:
    assert retrieval_scores(np.ones_like(EYE), np.ones_like(EYE)).recall_at_10 == 0


def test_top_is_sorted() -> None:
    assert top(np.arange(20, dtype=np.float32), EYE, 3) == [(19, 19.0), (18, 18.0), (17, 17.0)]


def test_bad_shapes_are_refused() -> None:
    for queries, documents in ((EYE, EYE[:5]), (EYE[:0], EYE[:0]), (EYE[0], EYE[0])):
        with pytest.raises(InputError, match="alike"):
            retrieval_scores(queries, documents)
