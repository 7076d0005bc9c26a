"""Texts in chunks: each embedded by itself, or pooled out of one pass over the whole text (late chunking)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.chunking import TextChunks, chunk_spans, pool_spans, token_windows
from modernbert_runtime.errors import EngineError, InputError
from modernbert_runtime.outputs import OutputFormat, unit_length
from modernbert_runtime.pipeline import Pipeline
from modernbert_runtime.tokenizer import SpannedText, TextTokenizer

Spans = NDArray[np.int64]  # [chunks, 2]: first character and the one after the last


def plain_chunks(
    pipeline: Pipeline,
    texts: Sequence[str],
    prefix: str,
    spans: list[Spans] | None,
    output: OutputFormat,
    *,
    size: int,
    overlap: int,
    progress: bool,
) -> list[TextChunks]:
    """Chunks that have the vectors of their own texts. For arguments and errors see `Embedder.embed_chunks`."""
    if spans is None:
        _check_fits(pipeline.tokenizer, size, prefix)
        whole = pipeline.tokenizer.encode_with_spans(texts, whole=True)
        spans = [_window_spans(item, size=size, overlap=overlap) for item in whole]
    chunks = [text[start:end] for text, ends in zip(texts, spans, strict=True) for start, end in ends]
    vectors = pipeline.embed(chunks, prefix, output, progress=progress)
    firsts = np.cumsum([0, *(len(item) for item in spans)])
    return [
        TextChunks(item, vectors[first : first + len(item)], 0)
        for item, first in zip(spans, firsts[:-1].tolist(), strict=True)
    ]


def late_chunks(
    pipeline: Pipeline,
    texts: Sequence[str],
    prefix: str,
    spans: list[Spans] | None,
    output: OutputFormat,
    *,
    size: int,
    overlap: int,
    normalized: bool,
    progress: bool,
) -> list[TextChunks]:
    """Chunks that have seen the whole text. For arguments and errors see `Embedder.embed_chunks`.

    Args:
        normalized: whether the vectors of this bundle have unit length, so that those of its chunks get it too.
    """
    whole = pipeline.tokenizer.encode_with_spans(texts, prefix=prefix)
    pipeline.report_truncation([item.tokens.num_dropped for item in whole])
    chunks: dict[int, TextChunks] = {}
    for index, tokens in pipeline.token_vectors(whole, progress=progress):
        wanted = _window_spans(whole[index], size=size, overlap=overlap) if spans is None else spans[index]
        pooled = pool_spans(tokens, wanted)
        _check_pooled(pooled, wanted, index, tokens.num_dropped)
        if normalized:
            pooled = unit_length(pooled)
        chunks[index] = TextChunks(wanted, output.convert(pooled), tokens.num_dropped)
    return [chunks[index] for index in range(len(texts))]


def _window_spans(item: SpannedText, *, size: int, overlap: int) -> Spans:
    own = item.spans[:, 1] > 0  # neither special tokens nor the prompt
    spans = item.spans[own]
    starts_character = np.append(True, spans[1:, 0] >= spans[:-1, 1])[: len(spans)]
    windows = token_windows(item.starts_word[own], size=size, overlap=overlap, starts_character=starts_character)
    return chunk_spans(spans, windows)


def _check_fits(tokenizer: TextTokenizer, size: int, prefix: str) -> None:
    (prompt,) = tokenizer.encode_with_spans([prefix], whole=True)
    most = tokenizer.max_length - len(prompt.tokens.input_ids)
    if size > most:
        raise InputError(
            f"size must be at most {most} tokens, not {size}: max_length is {tokenizer.max_length}, and the prompt and "
            "special tokens count"
        )


def _check_pooled(pooled: NDArray[Any], spans: Spans, index: int, num_dropped: int) -> None:
    empty = np.flatnonzero(np.isnan(pooled).all(axis=1))
    if len(empty):
        start, end = spans[empty[0]].tolist()
        raise InputError(
            f"spans[{index}][{empty[0]}] ({start}, {end}) has no tokens of texts[{index}]"
            + (f", of which truncation dropped {num_dropped}: use late=False" if num_dropped else ": drop it")
        )
    if not np.isfinite(pooled).all():
        raise EngineError(f"the vectors of texts[{index}] are not finite: choose another precision")
