"""Where the chunks of a text begin and end, and late pooling. Pure functions on arrays; no model, no tokenizer."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class TextChunks:
    """The chunks of one text.

    Args:
        spans: int64 [chunks, 2]: chunk i is text[spans[i, 0] : spans[i, 1]].
        vectors: [chunks, dimensions], in the format asked for.
        num_dropped: tokens of the text that truncation cut off, which are in no chunk; 0 unless late.
    """

    spans: NDArray[np.int64]
    vectors: NDArray[Any]
    num_dropped: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenVectors:
    """The tokens of one text.

    Args:
        input_ids: int32 [tokens], special tokens and prompt included.
        spans: int64 [tokens, 2]: token i is text[spans[i, 0] : spans[i, 1]]; -1, -1 for special tokens and the prompt.
        vectors: float32 [tokens, hidden size], the model's last hidden state.
        num_dropped: tokens that truncation cut off.
    """

    input_ids: NDArray[np.int32]
    spans: NDArray[np.int64]
    vectors: NDArray[np.float32]
    num_dropped: int


def check_windows(size: int, overlap: int) -> None:
    """Refuse windows that are empty or that do not advance. Raises InputError."""
    check_count("size", size, unit=" token")
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < size:
        raise InputError(f"overlap must be from 0 to {size - 1} tokens (size - 1), not {overlap!r}")


def token_windows(
    starts_word: NDArray[np.bool_], *, size: int, overlap: int, starts_character: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Cut a row of tokens into windows that overlap.

    A window ends before a word that does not fit, and the next begins where a word does, so that words stay whole;
    only a word longer than a window is cut, between characters if that can be, for one may have several tokens. So
    windows have at most `size` tokens, and share at least `overlap` with the one before unless that would keep them
    from advancing; with an overlap of 0 they share nothing.

    Args:
        starts_word: [tokens], whether a word begins at this token.
        size: most tokens of a window.
        overlap: tokens that neighbours share, less than `size`.
        starts_character: [tokens], whether no token before holds a part of this one's first character; None for all.

    Returns:
        [windows, 2], first token and the one after the last. Every token is in at least one window; none repeats
        another's end.
    """
    total = len(starts_word)
    starts = [starts_word] if starts_character is None else [starts_word, starts_character]
    windows: list[tuple[int, int]] = []
    start = end = 0
    while end < total:
        stop = min(start + size, total)
        if stop < total:
            stop = _start_at_or_before(starts, stop, above=max(start, end))
        windows.append((start, stop))
        end = stop
        start = _start_at_or_before(starts, max(end - overlap, start + 1), above=start)
    return np.array(windows, dtype=np.int64).reshape(-1, 2)


def chunk_spans(spans: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The characters of windows over tokens with these spans: [windows, 2]."""
    return np.stack([spans[windows[:, 0], 0], spans[windows[:, 1] - 1, 1]], axis=-1).reshape(-1, 2)


def check_spans(spans: Sequence[Sequence[tuple[int, int]]], texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """The callers' spans as one array [chunks, 2] per text. Raises InputError, which names the first bad one."""
    spans = _items("spans", spans)
    if len(spans) != len(texts):
        raise InputError(f"spans must hold a list of spans per text: there are {len(spans)} for {len(texts)} texts")
    checked = []
    for index, (chunks, text) in enumerate(zip(spans, texts, strict=True)):
        chunks = _items(f"spans[{index}]", chunks)
        for number, chunk in enumerate(chunks):
            try:
                start, end = (operator.index(bound) for bound in chunk)
            except (TypeError, ValueError):  # no pair, or not of whole numbers
                start, end = -1, -1
            if not 0 <= start < end <= len(text):
                raise InputError(
                    f"spans[{index}][{number}] must be (start, end) with 0 <= start < end <= {len(text)}, the "
                    f"characters of texts[{index}], not {chunk!r:.100}"
                )
        checked.append(np.array(chunks, dtype=np.int64).reshape(-1, 2))
    return checked


def _items(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise InputError(f"{name} must be a list of (start, end), not {type(value).__name__}") from None


def pool_spans(tokens: TokenVectors, spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """Late chunking (arXiv:2409.04701): the mean of the vectors of the tokens that share a character with each span.

    Args:
        tokens: of the whole text, which each vector has seen.
        spans: [chunks, 2] characters.

    Returns:
        [chunks, hidden size]; NaN for a span without tokens.
    """
    begin, end = tokens.spans.T
    pooled = np.full((len(spans), tokens.vectors.shape[1]), np.nan, dtype=np.float32)
    for row, (start, stop) in enumerate(spans):
        inside = (begin < stop) & (end > start)  # -1, -1 is inside none
        if inside.any():
            pooled[row] = tokens.vectors[inside].mean(axis=0, dtype=np.float64)
    return pooled


def _start_at_or_before(starts: Sequence[NDArray[np.bool_]], token: int, *, above: int) -> int:
    """The last token after `above` and up to `token` that the first of `starts` marks, else the next; else `token`."""
    for marked in starts:
        candidates = np.flatnonzero(marked[above + 1 : token + 1])
        if len(candidates):
            return above + 1 + int(candidates[-1])
    return token
