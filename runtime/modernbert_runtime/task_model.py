"""What the classes for classification and fill-mask share: loading, scheduling, counting, closing.

Batches are planned and run as the Embedder's are, by the same `Pipeline`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.async_batcher import MAX_WAITING_TOKENS
from modernbert_runtime.batching import BATCH_TOKENS
from modernbert_runtime.engines import EngineName
from modernbert_runtime.loading import OpenedBundle, open_bundle
from modernbert_runtime.pipeline import Pipeline
from modernbert_runtime.runner import BatchRunner
from modernbert_runtime.stats import EmbedderStats
from modernbert_runtime.tokenizer import Truncation

OUTPUT = "logits"

M = TypeVar("M", bound="TaskModel")


class TaskModel:
    """A bundle with a head. Make it with `load` of a subclass; safe to use from several threads.

    Args:
        opened: the bundle.
        batch_tokens: most tokens of one batch, padding included. A longer text still goes through, on its own.
        max_waiting_tokens: most tokens that wait for their batch, in classes with methods that are awaited.

    Raises:
        InputError: one of these is below 1.
    """

    task: ClassVar[str]

    def __init__(
        self,
        opened: OpenedBundle,
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
    ) -> None:
        check_count("max_waiting_tokens", max_waiting_tokens)
        self._max_waiting_tokens = max_waiting_tokens
        self._tokenizer, self._manifest = opened.tokenizer, opened.manifest
        self._runner = BatchRunner(
            opened.engine,
            dimension=len(opened.manifest.labels),
            pad_id=opened.pad_id,
            batch_tokens=batch_tokens,
            memory=opened.memory,
            sequence_output=OUTPUT,
        )
        self._pipeline = Pipeline(opened.tokenizer, self._runner)

    @classmethod
    def load(
        cls: type[M],
        path: str | Path,
        *,
        engine: EngineName = "auto",
        precision: str | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        truncation: Truncation = "right",
        batch_tokens: int = BATCH_TOKENS,
        max_memory: int | str | None = None,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        engine_options: Mapping[str, str] | None = None,
        verify_hashes: bool = True,
    ) -> M:
        """Load a bundle that was exported for this task. Arguments and errors are those of `Embedder.load`."""
        opened = open_bundle(
            path,
            task=cls.task,
            output=OUTPUT,
            engine=engine,
            precision=precision,
            providers=providers,
            threads=threads,
            truncation=truncation,
            max_memory=max_memory,
            engine_options=engine_options,
            verify_hashes=verify_hashes,
        )
        return cls(opened, batch_tokens=batch_tokens, max_waiting_tokens=max_waiting_tokens)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classifier's outputs, in order."""
        return self._manifest.labels

    @property
    def max_length(self) -> int:
        """Most tokens of one input, special tokens included."""
        return self._manifest.max_length

    def stats(self) -> EmbedderStats:
        """What this model has done since it was loaded: texts, tokens, padding, batches, speed."""
        return self._runner.counters.snapshot(waiting_tokens=0)

    def close(self) -> None:
        """Close the engine; later calls raise EngineError."""
        self._runner.engine.close()

    def __enter__(self: M) -> M:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_top_k(top_k: int | None) -> None:
    """Refuse a number of results that is none. Raises InputError."""
    if top_k is not None:
        check_count("top_k", top_k)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shares that add up to 1 along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each between 0 and 1, by itself; written so that no exponential overflows."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
