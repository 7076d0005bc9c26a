"""Rows from files, one after another, so that a file may be larger than memory.

Reads .txt (a text a line), .jsonl, .csv and .parquet (a field of each row holds the text, others may be kept), and
standard input as .txt. Knows nothing of vectors; `vector_files` writes those.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from modernbert_runtime.errors import InputError

READS = (".txt", ".jsonl", ".csv", ".parquet")

# Rows that a parquet file is decoded by.
_PARQUET_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input.

    Args:
        text: what to embed; always valid Unicode.
        kept: the values of the fields to keep, in the order asked for.
    """

    text: str
    kept: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows of one input, to be read once.

    Args:
        rows: the rows, in the order of the file. Raises InputError naming the row that is wrong.
        position: how far the file has been read, as a share of `total`.
        total: bytes of a text file, rows of a parquet file; None for standard input, whose end is not known.
        kept_types: the Arrow types of the fields to keep, where the file says (parquet).
    """

    rows: Iterator[Row]
    position: Callable[[], int]
    total: int | None
    kept_types: tuple[Any, ...] | None = None


@contextlib.contextmanager
def open_rows(path: Path | None, *, field: str, keep: Sequence[str] = ()) -> Iterator[Rows]:
    """Open an input, standard input where there is no path.

    Args:
        path: the file; its suffix says how to read it.
        field: the field that holds the text, where rows have fields.
        keep: fields whose values come along.

    Raises:
        InputError: the file is missing, of an unknown kind, not what its suffix says, or has no fields to keep.
    """
    name = "standard input" if path is None else f"input {str(path)!r}"
    if path is not None and path.suffix not in READS:
        raise InputError(f"{name} must end in one of {', '.join(READS)}")
    if keep and (path is None or path.suffix == ".txt"):
        raise InputError(f"keep: {name} has lines and no field {keep[0]!r}: use .jsonl, .csv or .parquet")
    with contextlib.ExitStack() as stack:
        with _readable(name):
            rows = _open(path, name, field, keep, stack)
        yield rows


def _open(path: Path | None, name: str, field: str, keep: Sequence[str], stack: contextlib.ExitStack) -> Rows:
    if path is None:
        return Rows(rows=_lines(sys.stdin, name), position=lambda: 0, total=None)
    if path.suffix == ".parquet":
        return _open_parquet(path, name, field, keep, stack)
    binary = stack.enter_context(path.open("rb"))
    newline = "" if path.suffix == ".csv" else None
    file = stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline))
    if path.suffix == ".txt":
        rows = _lines(file, name)
    else:
        records = _json_records(file, name) if path.suffix == ".jsonl" else _csv_records(file, name)
        rows = _rows(records, name, field, keep)
    return Rows(rows=rows, position=binary.tell, total=os.fstat(binary.fileno()).st_size)


def _open_parquet(path: Path, name: str, field: str, keep: Sequence[str], stack: contextlib.ExitStack) -> Rows:
    pyarrow, parquet = import_pyarrow()
    source = stack.enter_context(path.open("rb"))  # its errors are plainer than Arrow's
    try:
        file = stack.enter_context(parquet.ParquetFile(source))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name} is not a parquet file: {' '.join(str(error).split())}") from error
    schema = file.schema_arrow
    for column in (field, *keep):
        if column not in schema.names:
            option = "--field" if column == field else "--keep"
            raise InputError(f"{name} has no column {column!r}, only {', '.join(schema.names)}; name one with {option}")

    done = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal done
        columns = list(dict.fromkeys((field, *keep)))
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                for record in batch.to_pylist():
                    done += 1
                    yield record
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} is damaged after row {done}: {' '.join(str(error).split())}") from error

    types = tuple(schema.field(column).type for column in keep)
    return Rows(
        rows=_rows(records(), name, field, keep),
        position=lambda: done,
        total=file.metadata.num_rows,
        kept_types=types,
    )


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises InputError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install 'modernbert-deploy[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _lines(file: TextIO, name: str) -> Iterator[Row]:
    with _readable(name):
        for line in file:
            yield Row(line.removesuffix("\n"))


def _rows(records: Iterator[Any], name: str, field: str, keep: Sequence[str]) -> Iterator[Row]:
    for number, record in enumerate(records, start=1):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{name}: row {number} has no text in field {field!r}; name it with --field")
        if not text.isascii() and (bad := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
            raise InputError(f"{name}: row {number} has a lone surrogate {bad!a}, which is not valid Unicode")
        if missing := [column for column in keep if column not in record]:
            raise InputError(f"{name}: row {number} has no field {missing[0]!r} to keep; name another with --keep")
        yield Row(text, tuple(record[column] for column in keep))


def _json_records(file: TextIO, name: str) -> Iterator[Any]:
    with _readable(name):
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{name}: line {number} is not JSON: {error}") from error


def _csv_records(file: TextIO, name: str) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    try:
        with _readable(name):
            yield from csv.DictReader(file, strict=True)
    except csv.Error as error:
        raise InputError(f"{name} is not valid CSV: {error}") from error


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # Where in the file is not known: the decoder counts from the start of its buffer.
        raise InputError(f"{name} is not UTF-8 (byte {error.object[error.start]:#x}); convert it first") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
