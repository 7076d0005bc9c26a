"""Text pairs to fine-tune on and scored pairs to evaluate on: read from a file and checked before any work.

    anchor, positive                    texts that belong together
    negative, negative_2, negative_3    optional: hard negatives, texts that look right for the anchor and are wrong

Files are .jsonl, .json, .csv or .parquet. Other columns are left out.
"""

from __future__ import annotations

import contextlib
import csv
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets

from modernbert.errors import InputError

COLUMNS = ("anchor", "positive")
_NEGATIVE = re.compile(r"negative(_\d+)?")
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_rows(path: Path) -> datasets.Dataset:
    """Reads a table with named columns from a .jsonl, .json, .csv or .parquet file. All of a .csv file is text.

    Raises:
        InputError: the file is missing, of another kind, empty, or cannot be read.
    """
    if path.suffix not in (*_READERS, ".csv"):
        raise InputError(f"pairs file {str(path)!r} must end in {', '.join(_READERS)} or .csv")
    if not path.is_file():
        raise InputError(f"pairs file {str(path)!r} does not exist")
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                _READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
    except (datasets.exceptions.DatasetGenerationError, csv.Error, ValueError, OSError, StopIteration) as error:
        # The readers run out of lines on an empty file.
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"pairs file {str(path)!r} cannot be read: {reason or 'it is empty'}") from error


def _read_csv(path: Path) -> datasets.Dataset:
    # datasets' own reader guesses types, which turns texts such as "007" and "null" into something else.
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines)
        columns: list[list[str]] = [[] for _ in header]
        for line in lines:
            if len(line) != len(header):
                raise ValueError(f"line {lines.line_num} has {len(line)} fields, the first line {len(header)}")
            for column, text in zip(columns, line, strict=True):
                column.append(text)
    return datasets.Dataset.from_dict(dict(zip(header, columns, strict=True)))


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hides datasets' bars, and its account of a broken file, which becomes one line here."""
    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def read_pairs(path: Path) -> datasets.Dataset:
    """Reads pairs, or tuples with hard negatives, to fine-tune on.

    Returns:
        Columns `anchor`, `positive` and, in the order of the file's numbers, `negative_1`, `negative_2`, ...

    Raises:
        InputError: the file cannot be read, lacks a column, or a row holds no text.
    """
    return checked_pairs(read_rows(path))


def checked_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    """The columns that training uses, each row of them text: `anchor`, `positive`, `negative_1`, `negative_2`, ...

    Raises:
        InputError: a column is missing, a row holds no text, or there are fewer than two rows.
    """
    if len(pairs) < 2:
        raise InputError(f"pairs must be at least 2, so that one is wrong for the other; there are {len(pairs)}")
    _require_columns(pairs, COLUMNS)
    if "negatives" in pairs.column_names:
        raise InputError("pairs have a column 'negatives'; name it 'negative', or 'negative_1', 'negative_2', ...")
    negatives = sorted(filter(_NEGATIVE.fullmatch, pairs.column_names), key=lambda name: int(name[9:] or 0))
    columns = [*COLUMNS, *negatives]
    pairs = pairs.select_columns(columns)
    _require_text(pairs, columns)
    # sentence-transformers tells columns by prefix: `negative` would take what belongs to `negative_2`.
    numbered = [*COLUMNS, *(f"negative_{number}" for number in range(1, len(negatives) + 1))]
    return pairs.rename_columns(dict(zip(columns, numbered, strict=True)))


def read_scored_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """Reads pairs with people's judgement of their likeness, in the columns `sentence1`, `sentence2` and `score`.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds fewer than two different scores.
    """
    pairs = read_rows(path)
    _require_columns(pairs, ("sentence1", "sentence2", "score"))
    _require_text(pairs, ["sentence1", "sentence2"])
    scores = []
    for row, value in enumerate(pairs["score"], start=1):
        try:
            scores.append(float(value))
        except (TypeError, ValueError):
            scores.append(float("nan"))
        if scores[-1] != scores[-1]:
            raise InputError(f"pairs must hold numbers: row {row}, column 'score' is {value!r}")
    if len(set(scores)) < 2:
        raise InputError(f"pairs must have at least two different scores to rank by; there are {len(set(scores))}")
    return list(pairs["sentence1"]), list(pairs["sentence2"]), scores


def _require_columns(pairs: datasets.Dataset, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in pairs.column_names]
    if missing:
        raise InputError(
            f"pairs have no column {' or '.join(map(repr, missing))}, only {', '.join(pairs.column_names)}; rename them"
        )


def _require_text(pairs: datasets.Dataset, columns: list[str]) -> None:
    for column in columns:
        for row, text in enumerate(pairs[column], start=1):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"pairs must hold text: row {row}, column {column!r} is {text!r}")
