"""Text in, labels with scores out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.async_batcher import AsyncBatcher
from modernbert_runtime.loading import OpenedBundle
from modernbert_runtime.outputs import OutputFormat
from modernbert_runtime.stats import EmbedderStats
from modernbert_runtime.task_model import TaskModel, sigmoid, softmax
from modernbert_runtime.tokenizer import TokenizedText, check_texts


class LabelScore(NamedTuple):
    """A label of a text, and how sure the model is of it."""

    label: str
    score: float


class TextClassifier(TaskModel):
    """Classifies texts, or pairs of texts, with a bundle of `modernbert export --task text-classification`.

    Scores are what transformers' pipeline gives: shares of all labels where a text has one of them (softmax), each
    from 0 to 1 where it may have several or there is only one (sigmoid), the plain numbers of a regression.
    """

    task = "text-classification"

    def __init__(self, opened: OpenedBundle, **options: Any) -> None:
        super().__init__(opened, **options)
        self._batcher = AsyncBatcher(
            self._runner.vectors,
            lambda text, index: self._runner.finite_vectors([text], [index])[0],
            dimension=len(self.labels),
            batch_tokens=self._runner.batch_tokens,
            max_waiting_tokens=self._max_waiting_tokens,
            max_rows=opened.memory.max_rows if opened.memory is not None else None,
        )

    def classify(self, texts: Sequence[str], *, progress: bool = False) -> list[list[LabelScore]]:
        """Every label of each text with its score, the highest first.

        A text's scores do not depend on the others beyond rounding.

        Args:
            texts: a list of str; "" is a valid text.
            progress: show a progress bar on stderr.

        Raises:
            InputError: bad texts; the message names the first bad item.
            TextTooLong: a text exceeds max_length and truncation is "error", or it would exceed max_memory.
            EngineError: the engine failed or returned values that are not finite.
        """
        return self._ranked(self.scores(texts, progress=progress))

    def classify_pairs(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> list[list[LabelScore]]:
        """As `classify`, of two texts at a time, such as premise and hypothesis or query and passage.

        A pair above max_length loses tokens of its longer text first; see `TextTokenizer.encode_pairs`.
        """
        return self._ranked(self.pair_scores(pairs, progress=progress))

    async def aclassify(self, texts: Sequence[str], *, timeout: float | None = None) -> list[list[LabelScore]]:
        """As `classify`, without blocking the event loop, and in batches that concurrent callers share.

        Order, cancellation, limits and their errors are those of `Embedder.aembed`.

        Args:
            texts: a list of str, not to be changed meanwhile.
            timeout: seconds from the call to the result; None waits as long as it takes.
        """
        return self._ranked(await self.ascores(texts, timeout=timeout))

    async def aclassify_pairs(
        self, pairs: Sequence[tuple[str, str]], *, timeout: float | None = None
    ) -> list[list[LabelScore]]:
        """As `classify_pairs`, and as `aclassify`."""
        return self._ranked(await self.apair_scores(pairs, timeout=timeout))

    def scores(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.float32]:
        """As `classify`, as float32 [texts, labels], in the order of `labels`."""
        check_texts(texts)
        return self._score(self._pipeline.embed(texts, "", self._format(), progress=progress))

    def pair_scores(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> NDArray[np.float32]:
        """As `classify_pairs`, as float32 [pairs, labels], in the order of `labels`."""
        tokens = self._tokenizer.encode_pairs(pairs)
        self._pipeline.report_truncation([pair.num_dropped for pair in tokens])
        return self._score(self._pipeline.embed_tokens(tokens, self._format(), progress=progress))

    async def ascores(self, texts: Sequence[str], *, timeout: float | None = None) -> NDArray[np.float32]:
        """As `scores`, and as `aclassify`."""
        return await self._ascore(lambda: self._tokenizer.encode(texts), timeout)

    async def apair_scores(
        self, pairs: Sequence[tuple[str, str]], *, timeout: float | None = None
    ) -> NDArray[np.float32]:
        """As `pair_scores`, and as `aclassify`."""
        return await self._ascore(lambda: self._tokenizer.encode_pairs(pairs), timeout)

    def stats(self) -> EmbedderStats:
        """What this model has done since it was loaded: texts, tokens, padding, batches, speed."""
        return self._runner.counters.snapshot(waiting_tokens=self._batcher.waiting_tokens)

    def close(self) -> None:
        """Close the engine; later calls raise EngineError, and so do awaited ones that have texts waiting.

        Waits for a batch of theirs that is running; in an event loop use `aclose`.
        """
        self._batcher.close()
        super().close()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop; for `contextlib.aclosing`."""
        import asyncio  # as in async_batcher

        await asyncio.to_thread(self.close)

    async def _ascore(self, encode: Callable[[], list[TokenizedText]], timeout: float | None) -> NDArray[np.float32]:
        def tokenize() -> list[TokenizedText]:
            tokens = encode()
            self._pipeline.report_truncation([text.num_dropped for text in tokens])
            self._runner.check_room(tokens)
            return tokens

        return await self._batcher.embed(tokenize, finish=self._score, timeout=timeout)

    def _format(self) -> OutputFormat:
        return OutputFormat(dimensions=len(self.labels), dtype="float32", rescale=False)

    def _score(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._manifest.score_function == "identity":
            return logits
        return softmax(logits) if self._manifest.score_function == "softmax" else sigmoid(logits)

    def _ranked(self, scores: NDArray[np.float32]) -> list[list[LabelScore]]:
        orders = np.argsort(-scores, axis=1, kind="stable")
        return [
            [LabelScore(self.labels[index], float(row[index])) for index in order]
            for row, order in zip(scores, orders.tolist(), strict=True)
        ]
