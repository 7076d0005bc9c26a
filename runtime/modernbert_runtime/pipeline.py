"""From texts to arrays: tokenizes ahead, runs batch after batch, and puts each vector where its text was.

Knows neither bundles nor prompts by name: the Embedder, which callers see, does.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.ahead import one_ahead
from modernbert_runtime.chunking import TokenVectors
from modernbert_runtime.outputs import OutputFormat
from modernbert_runtime.runner import BatchRunner
from modernbert_runtime.tokenizer import SpannedText, TextTokenizer, TokenizedText, slices

logger = logging.getLogger(__name__)

# Texts that are tokenized, sorted by length and run together: many, so that batches are even, and few enough that the
# engine starts soon and that no more than two such groups are in memory.
_GROUP_TEXTS = 4096
_GROUP_CHARACTERS = 8_000_000


class Pipeline:
    """A tokenizer and a runner, joined. May be used from several threads."""

    def __init__(self, tokenizer: TextTokenizer, runner: BatchRunner) -> None:
        self.tokenizer = tokenizer
        self.runner = runner

    def embed(self, texts: Sequence[str], prefix: str, output: OutputFormat, *, progress: bool) -> NDArray[Any]:
        """Vectors of texts that passed `check_texts`, each after `prefix`. For errors see `Embedder.embed`."""
        return self._embed(self._tokenized(texts, prefix), len(texts), output, progress)

    def embed_tokens(self, tokens: Sequence[TokenizedText], output: OutputFormat, *, progress: bool) -> NDArray[Any]:
        """Vectors of tokenized texts."""
        self.runner.check_room(tokens)
        return self._embed([(0, tokens)], len(tokens), output, progress)

    def token_vectors(self, spanned: Sequence[SpannedText], *, progress: bool) -> Iterator[tuple[int, TokenVectors]]:
        """What the model gives for the tokens of each text, with its index; in the order in which they run."""
        tokens = [item.tokens for item in spanned]
        self.runner.check_room(tokens)
        with _progress_bar(len(tokens), shown=progress) as advance:
            for batch in self.runner.plan(tokens):
                states = self.runner.token_rows([tokens[index] for index in batch], batch)
                for index, vectors in zip(batch.tolist(), states, strict=True):
                    text = tokens[index]
                    yield index, TokenVectors(text.input_ids, spanned[index].spans, vectors, text.num_dropped)
                advance(len(batch))

    def rows_at(
        self,
        tokens: Sequence[TokenizedText],
        positions: Sequence[NDArray[np.intp]],
        *,
        progress: bool,
        picked: bool = False,
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `token_vectors`, of some tokens of each text: float32 [positions, width]; see `BatchRunner.token_rows`."""
        self.runner.check_room(tokens)
        with _progress_bar(len(tokens), shown=progress) as advance:
            for batch in self.runner.plan(tokens):
                wanted = [positions[index] for index in batch]
                rows = self.runner.token_rows([tokens[index] for index in batch], batch, wanted, picked=picked)
                yield from zip(batch.tolist(), rows, strict=True)
                advance(len(batch))

    def report_truncation(self, dropped: Sequence[int]) -> None:
        """Count texts that were cut, and log them once; `dropped` holds the tokens that each text lost."""
        cut = [index for index, number in enumerate(dropped) if number]
        if cut:
            self.runner.counters.add_truncated(len(cut))
            logger.warning(
                "truncated %d of %d texts to max_length %d; the first is texts[%d], %d tokens dropped",
                len(cut),
                len(dropped),
                self.tokenizer.max_length,
                cut[0],
                dropped[cut[0]],
            )

    def _tokenized(self, texts: Sequence[str], prefix: str) -> Iterator[tuple[int, Sequence[TokenizedText]]]:
        """Groups of tokenized texts, each with the index of its first; truncation is reported at the end."""

        def tokenize(group: slice) -> list[TokenizedText]:
            tokens = self.tokenizer.encode_checked(texts[group], prefix=prefix, first=group.start)
            self.runner.check_room(tokens, group.start)
            return tokens

        groups = list(slices(texts, max_texts=_GROUP_TEXTS, max_characters=_GROUP_CHARACTERS))
        if self.tokenizer.truncation == "error" or self.runner.memory is not None:
            # A text may be refused for its length: better before hours of work than after them.
            tokenized: Iterable[list[TokenizedText]] = [tokenize(group) for group in groups]
        else:
            tokenized = one_ahead(tokenize, groups)
        return self._reported(groups, tokenized)

    def _reported(
        self, groups: Sequence[slice], tokenized: Iterable[list[TokenizedText]]
    ) -> Iterator[tuple[int, Sequence[TokenizedText]]]:
        dropped: list[int] = []
        for group, tokens in zip(groups, tokenized, strict=True):
            dropped += [text.num_dropped for text in tokens]
            yield group.start, tokens
        self.report_truncation(dropped)

    def _embed(
        self, groups: Iterable[tuple[int, Sequence[TokenizedText]]], total: int, output: OutputFormat, progress: bool
    ) -> NDArray[Any]:
        vectors = output.empty(total)
        with _progress_bar(total, shown=progress) as advance:
            for first, tokens in groups:
                for batch in self.runner.plan(tokens):
                    rows = self.runner.finite_vectors([tokens[index] for index in batch], batch + first)
                    vectors[batch + first] = output.convert(rows)
                    advance(len(batch))
        return vectors


@contextlib.contextmanager
def _progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if wanted; gives what to call with the number of texts that are done."""
    if not shown:
        yield lambda texts: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda texts: bar.advance(task, texts)
