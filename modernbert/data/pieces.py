"""Tokenised documents, cut to the context length and kept on disk, memory-mapped.

The policy for long documents: they are cut every `room` tokens, wherever that falls, so that nothing is lost and every
piece but the last is full. `Counts` says how many were cut.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from modernbert.data.documents import Document
from modernbert.data.sentences import sentence_starts
from modernbert.errors import InputError

_TABLE, _COUNTS = "pieces.arrow", "counts.json"
_SCHEMA = pa.schema({"document": pa.string(), "input_ids": pa.list_(pa.int32()), "sentences": pa.list_(pa.int32())})
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the documents. `tokens` are without special tokens, and none of them is lost."""

    documents: int
    empty: int
    cut: int
    pieces: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens in {self.pieces:,} pieces; "
            f"{self.cut:,} documents were longer than the context and cut, {self.empty:,} were empty and left out"
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of one document: token ids [n] without special tokens, and where in it sentences begin."""

    document: str
    input_ids: NDArray[np.int64]
    sentences: NDArray[np.int64]


class Pieces:
    """The pieces that `write_pieces` left in a directory, read from the memory-mapped file when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.counts = Counts(**json.loads((directory / _COUNTS).read_text(encoding="utf-8")))
        self._table = datasets.Dataset.from_file(str(directory / _TABLE)).with_format("numpy")

    def __len__(self) -> int:
        return self.counts.pieces

    def __getitem__(self, index: int) -> Piece:
        row = self._table[index]
        return Piece(
            document=str(row["document"]),
            input_ids=np.asarray(row["input_ids"], dtype=np.int64),
            sentences=np.asarray(row["sentences"], dtype=np.int64),
        )

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and sentences of every piece."""
        table = self._table.data.table
        tokens, sentences = (
            np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table.column(name).chunks] or [[]])
            for name in ("input_ids", "sentences")
        )
        return tokens.astype(np.int64), sentences.astype(np.int64)


def write_pieces(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    *,
    room: int,
    enough: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> Counts:
    """Tokenises documents into `directory`; `Pieces` reads it. Whole when `counts.json` is there.

    Args:
        documents: read once.
        tokenizer: a fast one, which tells where in the text a token stands.
        directory: must exist.
        room: most tokens of a piece, special tokens not included.
        enough: stop reading after so many tokens; all documents when absent.
        tell: told what has been done so far.

    Raises:
        InputError: there is no text, or a document cannot be read.
    """
    documents_read = empty = cut = pieces = tokens = 0
    remaining = iter(documents)
    with pa.OSFile(str(directory / _TABLE), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        while (enough is None or tokens < enough) and (group := list(islice(remaining, _DOCUMENTS_AT_ONCE))):
            rows: list[dict[str, Any]] = []
            for document, (ids, sentences) in zip(group, _tokenise(group, tokenizer), strict=True):
                rows += ({"document": document.id, **piece} for piece in _cut(ids, sentences, room))
                empty += not len(ids)
                cut += len(ids) > room
                tokens += len(ids)
            documents_read += len(group)
            pieces += len(rows)
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            tell(f"reading, {documents_read:,} documents, {tokens:,} tokens")
    counts = Counts(documents=documents_read, empty=empty, cut=cut, pieces=pieces, tokens=tokens)
    if not pieces:
        raise InputError(f"there is no text to train on: the corpus is empty ({counts.documents} documents, no words)")
    (directory / _COUNTS).write_text(json.dumps(dataclasses.asdict(counts)), encoding="utf-8")
    return counts


def _tokenise(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Token ids of each document, and the index of every sentence's first token."""
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
        # The token that covers a character is the first to end after it.
        first = np.searchsorted(ends, sentence_starts(document.text), side="right")
        yield np.asarray(ids, dtype=np.int32), np.unique(first[first < len(ids)])


def _cut(
    ids: NDArray[np.int32], sentences: NDArray[np.int64], room: int
) -> Iterator[dict[str, NDArray[np.int32] | NDArray[np.int64]]]:
    for begin in range(0, len(ids), room):
        end = begin + room
        inside = sentences[np.searchsorted(sentences, begin) : np.searchsorted(sentences, end)]
        yield {"input_ids": ids[begin:end], "sentences": inside - begin}
