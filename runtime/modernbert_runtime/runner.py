"""Token ids to the bundle's own vectors: plans, pads, runs, checks and counts. Knows no text and no output format.

One runner serves every way into an `Embedder`, so all of them keep to one token budget and one memory limit.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.batching import plan_batches
from modernbert_runtime.engine import Engine, PackedEngine
from modernbert_runtime.errors import EngineError, TextTooLong
from modernbert_runtime.memory import MemoryBudget, in_gb
from modernbert_runtime.stats import Counters
from modernbert_runtime.tokenizer import TokenizedText


class BatchRunner:
    """Runs batches of tokenized texts on one engine. May be used from several threads.

    Args:
        engine: gives `sentence_embedding` [batch, dimension], and `last_hidden_state` if asked.
        dimension: of one vector.
        pad_id: token id that fills short rows; the attention mask hides it.
        batch_tokens: most tokens of one batch, padding included; a longer text runs alone.
        memory: what batches may take; None sets no limit. With a limit, one batch runs at a time.
        sequence_output: name of the output that has a row for each token.
    """

    def __init__(
        self,
        engine: Engine | PackedEngine,
        *,
        dimension: int,
        pad_id: int,
        batch_tokens: int,
        memory: MemoryBudget | None,
        sequence_output: str = "last_hidden_state",
    ) -> None:
        check_count("batch_tokens", batch_tokens)
        self.engine = engine
        self.packed = isinstance(engine, PackedEngine)
        self.pad_id = pad_id
        self.batch_tokens = batch_tokens
        self.memory = memory
        self.counters = Counters()
        self._dimension = dimension
        self._sequence_output = sequence_output
        self._turn: contextlib.AbstractContextManager[object] = (
            memory.turn if memory is not None else contextlib.nullcontext()
        )

    def plan(self, tokens: Sequence[TokenizedText]) -> list[NDArray[np.intp]]:
        """Which texts run together, as indices into `tokens`; see `plan_batches`."""
        max_rows = self.memory.max_rows if self.memory is not None else None
        lengths = [len(text.input_ids) for text in tokens]
        return plan_batches(lengths, self.batch_tokens, max_rows=max_rows, packed=self.packed)

    def check_room(self, tokens: Sequence[TokenizedText], first: int = 0) -> None:
        """Refuse texts that could not run even alone; `first` is what errors call the first of them.

        Raises:
            TextTooLong: for one of them the memory limit has no room.
        """
        if self.memory is None:
            return
        for index, text in enumerate(tokens, first):
            if len(text.input_ids) > self.memory.max_length:
                raise TextTooLong(
                    f"texts[{index}] has {len(text.input_ids)} tokens and would take about "
                    f"{in_gb(self.memory.estimate(len(text.input_ids)))}; max_memory leaves "
                    f"{in_gb(self.memory.room)}, enough for {self.memory.max_length} tokens: raise it, split the text, "
                    "or use embed_chunks"
                )

    def vectors(self, tokens: Sequence[TokenizedText]) -> NDArray[Any]:
        """One batch: [len(tokens), dimension] in the engine's precision, perhaps with NaN.

        Raises:
            EngineError: the engine failed, or returned another shape than the manifest promises.
        """
        vectors = self._run(tokens, None)
        if vectors.shape != (len(tokens), self._dimension):
            raise EngineError(
                f"{self.engine.name} returned shape {vectors.shape}, the manifest promises "
                f"{(len(tokens), self._dimension)}: export the bundle again"
            )
        return vectors

    def finite_vectors(
        self, tokens: Sequence[TokenizedText], indices: Sequence[int] | NDArray[np.intp]
    ) -> NDArray[Any]:
        """One batch, as `vectors`, without NaN; `indices` are what errors call its texts."""
        vectors = self.vectors(tokens)
        self._check_finite(np.isfinite(vectors).all(axis=1), indices)
        return vectors

    def token_rows(
        self,
        tokens: Sequence[TokenizedText],
        indices: Sequence[int] | NDArray[np.intp],
        positions: Sequence[NDArray[np.intp]] | None = None,
        *,
        picked: bool = False,
    ) -> list[NDArray[np.float32]]:
        """One batch: for each text what the model gives for its tokens, float32 [its tokens, width], without NaN.

        Args:
            tokens: the texts of the batch.
            indices: what errors call them.
            positions: for each text the tokens that are wanted; None takes all.
            picked: whether the engine gives these alone, text by text, [1, all positions, width].

        Raises:
            EngineError: as `vectors`, or the model has no such output.
        """
        padded = self._run(tokens, self._sequence_output)
        if positions is None:
            positions = [np.arange(len(text.input_ids)) for text in tokens]
        if picked:
            ends = np.cumsum([len(wanted) for wanted in positions])
            found = np.split(padded[0], ends[:-1])
        else:
            found = [row[wanted] for row, wanted in zip(padded, positions, strict=True)]
        rows = [np.asarray(row, dtype=np.float32) for row in found]
        self._check_finite(np.array([np.isfinite(row).all() for row in rows]), indices)
        return rows

    def _run(self, tokens: Sequence[TokenizedText], output: str | None) -> NDArray[Any]:
        """One output of one batch, its first axis the texts."""
        if isinstance(self.engine, PackedEngine):
            return self._run_packed(self.engine, tokens, output)
        length = max(len(text.input_ids) for text in tokens)
        input_ids = np.full((len(tokens), length), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, text in enumerate(tokens):
            input_ids[row, : len(text.input_ids)] = text.input_ids
            attention_mask[row, : len(text.input_ids)] = 1
        used = int(attention_mask.sum())
        with self._counted(len(tokens), used, attention_mask.size - used):
            return (
                self.engine.run(input_ids, attention_mask)
                if output is None
                else self.engine.run(input_ids, attention_mask, output=output)
            )

    def _run_packed(self, engine: PackedEngine, tokens: Sequence[TokenizedText], output: str | None) -> Any:
        """As `_run`; of an output with a row for each token a list, for each text its own."""
        input_ids = np.concatenate([np.asarray(text.input_ids, dtype=np.int64) for text in tokens])
        bounds = np.cumsum([0, *(len(text.input_ids) for text in tokens)], dtype=np.int64)
        with self._counted(len(tokens), len(input_ids), 0):
            result = engine.run_packed(input_ids, bounds, output)
        return result if output is None else np.split(result, bounds[1:-1])

    @contextlib.contextmanager
    def _counted(self, texts: int, tokens: int, padding_tokens: int) -> Iterator[None]:
        """Where the engine runs: one batch at a time if memory is limited, and counted when it is done."""
        with self._turn:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        self.counters.add_batch(texts=texts, tokens=tokens, padding_tokens=padding_tokens, seconds=seconds)

    def _check_finite(self, finite: NDArray[np.bool_], indices: Sequence[int] | NDArray[np.intp]) -> None:
        if not finite.all():
            raise EngineError(
                f"{self.engine.name} returned NaN or infinity for texts[{np.asarray(indices)[~finite].min()}]: "
                "run `modernbert verify` on the bundle, or choose another precision"
            )
