"""Texts from files and vectors into files, for the command line.

Reads .txt (a text a line), .jsonl and .csv (one field of each row); writes .npy (float32 [n, dim]) and .jsonl. A file
is written whole or not at all, and never over another.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import InputError

READS = (".txt", ".jsonl", ".csv")
WRITES = (".npy", ".jsonl")


def read_texts(path: Path | None, *, field: str) -> list[str]:
    """Reads the texts of a file, or of standard input, a text a line, when there is no path.

    Raises:
        InputError: the file is missing, of an unknown kind, not UTF-8, or a row lacks the field; the row is named.
    """
    if path is None:
        try:
            return [line.rstrip("\n") for line in sys.stdin]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 (byte {error.start}); convert it first") from error
    if path.suffix not in READS:
        raise InputError(f"input {str(path)!r} must end in one of {', '.join(READS)}")
    try:
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            return [line.rstrip("\n") for line in file] if path.suffix == ".txt" else list(_rows(file, path, field))
    except OSError as error:
        raise InputError(f"input {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"input {str(path)!r} is not UTF-8 (byte {error.start}); convert it first") from error


def check_output(path: Path) -> None:
    """Refuses an output that could not be written, before any work.

    Raises:
        InputError: it is of an unknown kind, exists, or its directory is missing.
    """
    if path.suffix not in WRITES:
        raise InputError(f"out {str(path)!r} must end in one of {', '.join(WRITES)}")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"out {str(path)!r} cannot be written: {error.strerror}") from error
    else:
        raise InputError(f"out {str(path)!r} exists; remove it or choose another name")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"out {str(path)!r} cannot be written: its directory is missing or not writable")


def write_vectors(path: Path, vectors: NDArray[np.float32]) -> None:
    """Writes vectors [n, dim]: one array in .npy, one list a line in .jsonl.

    Raises:
        InputError: as `check_output`, or the disk is full.
    """
    check_output(path)
    with _whole(path) as file:
        if path.suffix == ".npy":
            np.save(file, vectors)
        else:
            for vector in vectors:
                file.write(json.dumps({"embedding": vector.tolist()}).encode() + b"\n")


def _rows(file: TextIO, path: Path, field: str) -> Iterator[str]:
    for number, row in enumerate(_records(file, path), start=1):
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f"input {str(path)!r}: row {number} has no text in field {field!r}; name it with --field")
        yield text


def _records(file: TextIO, path: Path) -> Iterator[Any]:
    if path.suffix == ".csv":
        try:
            csv.field_size_limit(2**31 - 1)
            yield from csv.DictReader(file, strict=True)
        except csv.Error as error:
            raise InputError(f"input {str(path)!r} is not valid CSV: {error}") from error
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"input {str(path)!r}: line {number} is not JSON: {error}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with open(partial, "xb") as file:
                yield file
            os.link(partial, path)  # unlike a rename, never over a file that appeared meanwhile
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"out {str(path)!r} cannot be written: {error.strerror}") from error
