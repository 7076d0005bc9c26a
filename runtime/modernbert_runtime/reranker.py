"""Query and documents in, relevance out: a text classifier with one label, read as a cross-encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.batching import BATCH_TOKENS
from modernbert_runtime.errors import BundleError
from modernbert_runtime.loading import OpenedBundle
from modernbert_runtime.task_model import check_top_k
from modernbert_runtime.text_classifier import TextClassifier
from modernbert_runtime.tokenizer import check_texts


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document: its place in the list that was given, its score, and itself."""

    index: int
    score: float
    document: str


class Reranker(TextClassifier):
    """Scores documents against a query, which the model reads together.

    The bundle comes from `modernbert export --task text-classification` of a model with one label, such as a
    sentence-transformers CrossEncoder, whose scores these are.

    Raises:
        BundleError: the model has several labels: none of them is "the" score.
    """

    def __init__(self, opened: OpenedBundle, *, batch_tokens: int = BATCH_TOKENS, **options: Any) -> None:
        if len(opened.manifest.labels) != 1:
            opened.engine.close()
            raise BundleError(
                f"a Reranker needs a model with one label, and this one has {len(opened.manifest.labels)}: "
                f"{', '.join(opened.manifest.labels)}; use TextClassifier.classify_pairs"
            )
        super().__init__(opened, batch_tokens=batch_tokens, **options)

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> NDArray[np.float32]:
        """The relevance of each (query, document), float32 [pairs]. For errors see `TextClassifier.classify`."""
        return self.pair_scores(pairs, progress=progress)[:, 0]

    async def ascore(self, pairs: Sequence[tuple[str, str]], *, timeout: float | None = None) -> NDArray[np.float32]:
        """As `score`, awaited, in batches that concurrent callers share; see `TextClassifier.aclassify`."""
        return (await self.apair_scores(pairs, timeout=timeout))[:, 0]

    def rank(
        self, query: str, documents: Sequence[str], *, top_k: int | None = None, progress: bool = False
    ) -> list[Ranked]:
        """The documents, the most relevant first; of equal ones the first given.

        Args:
            query: what is looked for.
            documents: a list of str.
            top_k: return that many at most; None returns all.
            progress: show a progress bar on stderr.

        Raises:
            InputError: bad texts, or a top_k below 1.
            TextTooLong, EngineError: as for `TextClassifier.classify`.
        """
        pairs = _pairs(query, documents, top_k)
        return _ranked(documents, self.score(pairs, progress=progress), top_k)

    async def arank(
        self, query: str, documents: Sequence[str], *, top_k: int | None = None, timeout: float | None = None
    ) -> list[Ranked]:
        """As `rank`, awaited, in batches that concurrent callers share; see `TextClassifier.aclassify`."""
        pairs = _pairs(query, documents, top_k)
        return _ranked(documents, await self.ascore(pairs, timeout=timeout), top_k)


def _pairs(query: str, documents: Sequence[str], top_k: int | None) -> list[tuple[str, str]]:
    check_texts([query])
    check_texts(documents)
    check_top_k(top_k)
    return [(query, document) for document in documents]


def _ranked(documents: Sequence[str], scores: NDArray[np.float32], top_k: int | None) -> list[Ranked]:
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(index, float(scores[index]), documents[index]) for index in order.tolist()]
