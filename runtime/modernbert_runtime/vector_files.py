"""Files of vectors that grow by windows of rows and can be cut back to a row that is known to be on the disk.

`.npy` is one array [rows, dimension], `.jsonl` an object a line with the kept fields and `embedding`, `.parquet` a
table of the same columns. A file is built in a directory of its own; `bulk` decides when it takes its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import InputError
from modernbert_runtime.files import import_pyarrow

WRITES = (".npy", ".jsonl", ".parquet")
EMBEDDING = "embedding"  # the field or column of the vectors

Kept = Mapping[str, Sequence[Any]]  # name of a kept field -> its value of each row

# Rows of a row group of the finished parquet file, at least: readers skip and share work by these.
_ROW_GROUP = 8192


class VectorFile(Protocol):
    """A file under construction. `position` says how much of it is good; it means nothing to anyone else."""

    def append(self, vectors: NDArray[Any], kept: Kept) -> int:
        """Add rows, [rows, dimension]; they are on the disk when this returns the new position."""

    def finish(self, rows: int) -> Path:
        """Close, and return the path of the whole file; may be called again after a crash."""

    def close(self) -> None:
        """Close what is open; nothing else."""


def check_output(path: Path, *, keep: Sequence[str] = ()) -> None:
    """Refuse an output that could not be written, before any work.

    Raises:
        InputError: it is of an unknown kind, exists, cannot hold the fields to keep, or its directory is missing.
    """
    if path.suffix not in WRITES:
        raise InputError(f"out {str(path)!r} must end in one of {', '.join(WRITES)}")
    if keep and path.suffix == ".npy":
        raise InputError(f"keep: out {str(path)!r} holds vectors and no field {keep[0]!r}: use .jsonl or .parquet")
    if EMBEDDING in keep:
        raise InputError(f"keep: {EMBEDDING!r} is what the vectors will be called: rename the field in the input")
    if len(set(keep)) < len(keep):
        raise InputError(f"keep: each field once, not {', '.join(keep)}")
    if path.suffix == ".parquet":
        import_pyarrow()
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


def open_vector_file(
    directory: Path, suffix: str, *, empty: NDArray[Any], position: int, kept_types: Mapping[str, Any]
) -> VectorFile:
    """The file in `directory`, cut back to `position`; 0 begins it.

    Args:
        directory: holds this file and nothing that is called like its parts.
        suffix: one of `WRITES`.
        empty: [0, dimension], of the type of the vectors.
        position: what the last `append` that counts returned.
        kept_types: field to keep -> its Arrow type, or None where the values tell; only .parquet asks.
    """
    if suffix == ".npy":
        return _NpyFile(directory, empty, position)
    if suffix == ".jsonl":
        return _JsonlFile(directory, position)
    return _ParquetFile(directory, empty, position, kept_types)


class _NpyFile:
    """Vectors behind a header whose length does not depend on the number of rows, which is known last."""

    def __init__(self, directory: Path, empty: NDArray[Any], position: int) -> None:
        self._path = directory / "data.npy"
        self._empty = empty
        self._file = _open_at(self._path, position)
        if position == 0:
            self._write_header(0)

    def append(self, vectors: NDArray[Any], kept: Kept) -> int:
        self._file.write(np.ascontiguousarray(vectors).data)
        return _durable(self._file)

    def finish(self, rows: int) -> Path:
        self._file.seek(0)
        self._write_header(rows)
        _durable(self._file)
        self.close()
        return self._path

    def close(self) -> None:
        self._file.close()

    def _write_header(self, rows: int) -> None:
        # numpy leaves room for the first axis to grow, for files that are written like this one.
        header = np.lib.format.header_data_from_array_1_0(self._empty)
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (rows, *self._empty.shape[1:])})


class _JsonlFile:
    def __init__(self, directory: Path, position: int) -> None:
        self._path = directory / "data.jsonl"
        self._file = _open_at(self._path, position)

    def append(self, vectors: NDArray[Any], kept: Kept) -> int:
        for index, vector in enumerate(vectors.tolist()):
            row = {name: values[index] for name, values in kept.items()}
            try:
                line = json.dumps({**row, EMBEDDING: vector}, ensure_ascii=False, allow_nan=False)
                self._file.write(line.encode() + b"\n")
            except (TypeError, ValueError) as error:  # dates, bytes, NaN, lone surrogates
                raise InputError(f"keep: JSON cannot hold {row!r:.200} ({error}): write .parquet") from error
        return _durable(self._file)

    def finish(self, rows: int) -> Path:
        self.close()
        return self._path

    def close(self) -> None:
        self._file.close()


class _ParquetFile:
    """A parquet file cannot grow, for its index comes last: a part for each window, joined at the end.

    Parts are Arrow's own files, which keep types exactly. The last part's types are those of all rows so far.
    """

    def __init__(self, directory: Path, empty: NDArray[Any], position: int, kept_types: Mapping[str, Any]) -> None:
        self._directory = directory
        self._arrow, self._parquet = import_pyarrow()
        self._kept_types = kept_types
        self._num_parts = position
        pa = self._arrow
        vector = pa.list_(pa.from_numpy_dtype(empty.dtype), empty.shape[1])
        self._vector = pa.field(EMBEDDING, vector, nullable=False)
        kept = [pa.field(name, kind or pa.null()) for name, kind in kept_types.items()]
        self._schema = pa.schema([*kept, self._vector])
        if position:
            try:
                self._schema = self._read(position - 1).schema
                sizes = [self._part(index).stat().st_size for index in range(position)]
                if not all(sizes):
                    raise OSError("a part is empty")
            except (pa.ArrowException, OSError) as error:
                raise _lost(directory) from error

    def append(self, vectors: NDArray[Any], kept: Kept) -> int:
        pa = self._arrow
        try:
            columns = [pa.array(values, type=self._kept_types[name]) for name, values in kept.items()]
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
            fields = [pa.field(name, column.type) for name, column in zip(kept, columns, strict=False)]
            window = pa.schema([*fields, self._vector])
            self._schema = pa.unify_schemas([self._schema, window], promote_options="permissive")
            table = pa.table(columns, schema=window).cast(self._schema)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise InputError(
                f"keep: the values of a field are not all of one type ({' '.join(str(error).split())}): write .jsonl"
            ) from error
        with open(self._part(self._num_parts), "wb") as file:
            with pa.ipc.new_file(file, self._schema) as writer:
                writer.write_table(table)
            _durable(file)
        self._num_parts += 1
        return self._num_parts

    def finish(self, rows: int) -> Path:
        path = self._directory / "data.parquet"
        with open(path, "wb") as file:
            with self._parquet.ParquetWriter(file, self._schema) as writer:
                tables, num_rows = [], 0
                for index in range(self._num_parts):
                    tables.append(self._read(index).cast(self._schema))
                    num_rows += len(tables[-1])
                    if num_rows >= _ROW_GROUP or index + 1 == self._num_parts:
                        writer.write_table(self._arrow.concat_tables(tables))
                        tables, num_rows = [], 0
            _durable(file)
        return path

    def close(self) -> None:
        pass

    def _read(self, index: int) -> Any:
        with self._arrow.ipc.open_file(self._part(index)) as reader:
            return reader.read_all()

    def _part(self, index: int) -> Path:
        return self._directory / f"part-{index:07}.arrow"


def _open_at(path: Path, position: int) -> Any:
    """The file, to be written on from byte `position`; what a crash left behind it goes away."""
    if position and (not path.is_file() or path.stat().st_size < position):
        raise _lost(path.parent)
    file = open(path, "r+b" if position else "w+b")  # noqa: SIM115 - the caller keeps it open
    file.truncate(position)
    file.seek(position)
    return file


def _lost(directory: Path) -> InputError:
    return InputError(f"the unfinished work in {str(directory)!r} lacks rows that it had: remove that directory")


def _durable(file: Any) -> int:
    """Have the disk take what was written; returns the position."""
    file.flush()
    os.fsync(file.fileno())
    position: int = file.tell()
    return position
