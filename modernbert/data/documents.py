"""Text files, JSON lines, Parquet and hub datasets as one stream of documents, read through `datasets`.

Files are read as a stream, so a corpus may be larger than memory and, on the hub, larger than the disk. What training
needs of it is kept in `modernbert.data.pieces`, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets

from modernbert.errors import InputError

TextUnit = Literal["file", "paragraph", "line"]
# What `datasets` calls them.
_SAMPLE_BY: dict[TextUnit, str] = {"file": "document", "paragraph": "paragraph", "line": "line"}
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSION = {".gz", ".bz2", ".xz", ".zst"}


@dataclass(frozen=True)
class Document:
    """A text and where it comes from, as in `books.jsonl:17` (the row counts from 1)."""

    id: str
    text: str


def in_memory(texts: Iterable[str]) -> list[Document]:
    """Documents of texts at hand."""
    return [Document(f"document {number}", text) for number, text in enumerate(texts, start=1)]


def open_documents(sources: Sequence[str], *, field: str = "text", text_unit: TextUnit = "file") -> Iterator[Document]:
    """Checks that the sources exist, and reads them one behind the other.

    Args:
        sources: .txt, .jsonl, .json or .parquet files (compressed or not), directories with such files below them, read
            in the order of their names, or hub dataset ids (their split `train`), as in `name` or `name:configuration`.
        field: column of JSON lines, Parquet and hub datasets that holds the text.
        text_unit: what a document is in a .txt file: all of it, or what stands between empty lines, or a line.

    Raises:
        InputError: a source does not exist or is of another kind, at once; a file or row that cannot be read, when its
            turn comes.
    """
    if text_unit not in _SAMPLE_BY:
        raise InputError(f"text_unit must be one of {', '.join(get_args(TextUnit))}, not {text_unit!r}")
    opened = [file for source in sources for file in _files(source)]
    return (document for file in opened for document in _read(file, field, text_unit))


class Corpus:
    """The texts of `open_documents`, to be read as often as it takes."""

    def __init__(self, sources: Sequence[str], *, field: str = "text", text_unit: TextUnit = "file") -> None:
        self._sources, self._field, self._text_unit = sources, field, text_unit
        open_documents(sources, field=field, text_unit=text_unit)  # whether they exist

    def __iter__(self) -> Iterator[str]:
        documents = open_documents(self._sources, field=self._field, text_unit=self._text_unit)
        return (document.text for document in documents)


def _files(source: str) -> list[Path | str]:
    """The files of one source; a hub id stays a string."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _builder(file))
        if not found:
            raise InputError(f"data {source!r} has no {', '.join(_BUILDERS)} files in it")
        return list(found)
    if path.is_file():
        if not _builder(path):
            raise InputError(f"data {source!r} must end in {', '.join(_BUILDERS)}, or be a directory or a hub id")
        return [path]
    if _builder(path) or source.count("/") > 1 or source.startswith((".", "/")):
        raise InputError(f"data {source!r} does not exist")
    return [source]


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSION]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _read(source: Path | str, field: str, text_unit: TextUnit) -> Iterator[Document]:
    rows = _rows(source, text_unit)
    column = "text" if isinstance(source, Path) and _builder(source) == "text" else field
    for number, row in enumerate(rows, start=1):
        text = row.get(column)
        if not isinstance(text, str):
            wrong = f"is {text!r:.40}" if column in row else f"is missing; there are {', '.join(map(repr, row))}"
            raise InputError(
                f"data {str(source)!r}, row {number}: field {column!r} must be text, it {wrong}; choose another with "
                "--field, or mend the row"
            )
        yield Document(f"{source}:{number}", text)


def _rows(source: Path | str, text_unit: TextUnit) -> Iterator[dict[str, Any]]:
    """Rows of a file or hub dataset; whatever `datasets` and pyarrow raise on the way becomes one line."""
    count = 0
    try:
        if isinstance(source, Path):
            if source.stat().st_size == 0:
                return  # some builders fail on an empty file, others do not
            builder = _builder(source)
            options: dict[str, Any] = {"sample_by": _SAMPLE_BY[text_unit]} if builder == "text" else {}
            rows = datasets.load_dataset(
                builder, data_files={"train": [str(source)]}, split="train", streaming=True, **options
            )
        else:
            name, _, configuration = source.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows:
            count += 1
            yield row
    except (GeneratorExit, InputError):
        raise
    except Exception as error:  # datasets lets pyarrow's, fsspec's, zlib's and its own errors through
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        what = "" if isinstance(source, Path) else ", no file here and taken for a hub dataset,"
        raise InputError(f"data {str(source)!r}{what} cannot be read after row {count}: {reason}") from error
