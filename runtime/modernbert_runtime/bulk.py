"""Embed a file that may be larger than memory, so that a kill at any moment loses and repeats no row.

Rows are taken in windows: read, embedded, put on the disk, noted in a journal, forgotten. What is unfinished lies in a
directory beside the output (`.<name>.partial`), and takes the output's name when it is whole. The same call after a
crash goes on behind the last row that the journal notes; a call with another bundle, other options or an input whose
rows so far are others is refused. Windows do not depend on where a run began, hence neither do vectors, to the last
bit.

`ray_pool` computes the same windows on many machines. This is not the place for file formats (`files`, `vector_files`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modernbert_runtime.embedder import Embedder
from modernbert_runtime.errors import InputError, ModernBertRuntimeError, one_line
from modernbert_runtime.files import Row, Rows, open_rows
from modernbert_runtime.manifest import MANIFEST_NAME, sha256_file
from modernbert_runtime.vector_files import check_output, open_vector_file

# A window ends at either: some ten batches, enough texts to find others of their length, seconds of work to lose.
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 1 << 18

# Arguments of Embedder.load that change how fast vectors come, not what they are.
_NOT_IN_VECTORS = {"threads", "batch_tokens", "max_memory", "max_waiting_tokens", "verify_hashes"}

JOURNAL_NAME = "journal.json"
_JOURNAL_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class BulkProgress:
    """How far a file is, told after each window.

    Args:
        rows: rows whose vectors are on the disk.
        resumed_rows: rows of these that an earlier run computed.
        tokens: tokens that this run computed.
        truncated: rows of all so far that were cut to the bundle's max_length.
        position: how far the input has been read, as a share of `total`.
        resumed_position: where this run began, on the same scale.
        total: None where the end is not known.
        dimension: length of one vector.
    """

    rows: int
    resumed_rows: int
    tokens: int
    truncated: int
    position: int
    resumed_position: int
    total: int | None
    dimension: int


@dataclass(frozen=True)
class Window:
    """Consecutive rows that are computed and noted together.

    Args:
        first_row: counted from 0.
        texts: at least one.
        kept: name -> a value per row.
        digest: of all rows from the first of the file to the last of this window, 64 hex digits.
        position: see `Rows.position`, when the last row had been read.
    """

    first_row: int
    texts: list[str]
    kept: dict[str, list[Any]]
    digest: str
    position: int

    @property
    def end_row(self) -> int:
        """The row after the last."""
        return self.first_row + len(self.texts)


@dataclass(frozen=True)
class Computed:
    """What a window became: vectors [rows, dimension], tokens read, rows that were cut."""

    vectors: NDArray[Any]
    num_tokens: int
    num_truncated: int


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What is known to be on the disk, and of what job.

    Args:
        job: everything that decides the vectors, as name -> JSON value.
        rows: how many are done.
        digest: `Window.digest` of the last window that is done; "" for none.
        file_position: of the vector file.
        input_position: see `Window.position`.
        truncated: see `BulkProgress`.
    """

    job: Mapping[str, Any]
    rows: int = 0
    digest: str = ""
    file_position: int = 0
    input_position: int = 0
    truncated: int = 0
    format: int = field(default=_JOURNAL_FORMAT)


def embed_file(
    bundle: str | Path,
    source: str | Path | None,
    out: str | Path,
    *,
    field: str = "text",
    keep: Sequence[str] = (),
    prompt_name: str | None = None,
    load: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
    window_rows: int = WINDOW_ROWS,
    ray_actors: int | None = None,
    progress: Callable[[BulkProgress], None] = lambda _: None,
) -> BulkProgress:
    """Embed every row of a file, in its order, into another; go on where a killed run left off.

    Args:
        bundle: directory that `modernbert export` wrote.
        source: .txt, .jsonl, .csv or .parquet; None is standard input, a text a line.
        out: .npy, .jsonl or .parquet; must not exist.
        field: field of the rows that holds the text.
        keep: fields to write beside the vectors (from .jsonl, .csv and .parquet into .jsonl and .parquet).
        prompt_name: see `Embedder.embed`.
        load: arguments of `Embedder.load`.
        output: arguments of `Embedder.embed` that shape the vectors.
        window_rows: most rows that are computed and noted at a time, and that a kill can cost.
        ray_actors: compute with this many Ray Data actors in place of this process; see `ray_pool`.
        progress: called after each window, and once before the first.

    Returns:
        The last progress: all rows are in `out`.

    Raises:
        InputError: the input, the output, an argument, or unfinished work beside the output that is of another job.
        BundleError, TextTooLong, EngineError: as `Embedder.load` and `Embedder.embed`; rows are named, from 1.
    """
    source, out = None if source is None else Path(source), Path(out)
    load, output = dict(load or {}), dict(output or {})
    if window_rows < 1:
        raise InputError(f"window_rows must be at least 1, not {window_rows}")
    if ray_actors is not None:
        from modernbert_runtime.ray_pool import check_ray

        check_ray(ray_actors, source)
    directory = out.absolute().with_name(f".{out.name}.partial")
    _remove_if_finished(directory, out)
    check_output(out, keep=keep)
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(open_rows(source, field=field, keep=keep))
        embedder = stack.enter_context(Embedder.load(bundle, **load))
        empty = embedder.embed([], prompt_name=prompt_name, **output)
        job = {
            "bundle": sha256_file(Path(bundle) / MANIFEST_NAME),
            "field": field,
            "keep": list(keep),
            "prompt_name": prompt_name,
            "window_rows": window_rows,
            **{name: value for name, value in load.items() if name not in _NOT_IN_VECTORS},
            **output,
        }
        unfinished = stack.enter_context(_Unfinished(directory, out, job))
        windows = cut_windows(rows, keep=keep, window_rows=window_rows)
        windows = unfinished.skip_done(windows)
        if ray_actors is None:
            computed = _compute_here(embedder, windows, prompt_name, output)
        else:
            from modernbert_runtime.ray_pool import RayJob

            embedder.close()  # it has shown that the bundle is good; the actors load their own
            ray_job = RayJob(
                bundle=str(Path(bundle).resolve()),
                source=str(Path(source).resolve()) if source else "",
                field=field,
                keep=tuple(keep),
                window_rows=window_rows,
                prompt_name=prompt_name,
                load=load,
                output=output,
            )
            computed = ray_job.compute(windows, actors=ray_actors, first_row=unfinished.journal.rows)
        stack.enter_context(contextlib.closing(computed))
        kept_types = dict(zip(keep, rows.kept_types or (None,) * len(keep), strict=True))
        return _write(unfinished, computed, empty, kept_types, rows, progress)


def _write(
    unfinished: _Unfinished,
    computed: Iterator[tuple[Window, Computed]],
    empty: NDArray[Any],
    kept_types: Mapping[str, Any],
    rows: Rows,
    progress: Callable[[BulkProgress], None],
) -> BulkProgress:
    """The loop: a window to the file, then to the journal, then to whoever watches."""
    begin = journal = unfinished.journal
    tokens = 0

    def state() -> BulkProgress:
        return BulkProgress(
            rows=journal.rows,
            resumed_rows=begin.rows,
            tokens=tokens,
            truncated=journal.truncated,
            position=journal.input_position,
            resumed_position=begin.input_position,
            total=rows.total,
            dimension=empty.shape[1],
        )

    with unfinished.writing():
        file = open_vector_file(
            unfinished.directory,
            unfinished.out.suffix,
            empty=empty,
            position=journal.file_position,
            kept_types=kept_types,
        )
    with contextlib.closing(file):
        progress(state())
        for window, result in computed:
            with unfinished.writing():
                position = file.append(result.vectors, window.kept)
                journal = Journal(
                    job=journal.job,
                    rows=window.end_row,
                    digest=window.digest,
                    file_position=position,
                    input_position=window.position,
                    truncated=journal.truncated + result.num_truncated,
                )
                unfinished.note(journal)
            tokens += result.num_tokens
            progress(state())
        with unfinished.writing():
            unfinished.publish(file.finish(journal.rows))
    return state()


def cut_windows(rows: Rows, *, keep: Sequence[str], window_rows: int) -> Iterator[Window]:
    """The rows in windows, the same for the same rows."""
    digest = hashlib.sha256()
    batch: list[Row] = []
    first_row = num_characters = 0

    def window() -> Window:
        texts = [row.text for row in batch]
        kept = {name: [row.kept[index] for row in batch] for index, name in enumerate(keep)}
        return Window(first_row, texts, kept, digest.hexdigest(), rows.position())

    for row in rows.rows:
        digest.update(json.dumps([row.text, *row.kept], default=repr).encode() + b"\n")
        batch.append(row)
        num_characters += len(row.text)
        if len(batch) == window_rows or num_characters >= WINDOW_CHARACTERS:
            yield window()
            first_row, batch, num_characters = first_row + len(batch), [], 0
    if batch:
        yield window()


def compute(embedder: Embedder, window: Window, tokens: list[Any], output: Mapping[str, Any]) -> Computed:
    """One window, of which `tokens` are what `tokenize` made; for `output` see `embed_file`."""
    with naming_rows(window.first_row):
        vectors = embedder.embed_tokens(tokens, **output)
    num_truncated = sum(text.num_dropped > 0 for text in tokens)
    return Computed(vectors, sum(len(text.input_ids) for text in tokens), num_truncated)


def tokenize(embedder: Embedder, window: Window, prompt_name: str | None) -> list[Any]:
    """The tokens of a window."""
    with naming_rows(window.first_row):
        return list(embedder.tokenize(window.texts, prompt_name=prompt_name))


@contextlib.contextmanager
def naming_rows(first_row: int) -> Iterator[None]:
    """Errors about texts[i] or pairs[i] of a window become errors about a row of the file."""
    try:
        yield
    except ModernBertRuntimeError as error:
        message = re.sub(r"(?:texts|pairs)\[(\d+)\]", lambda found: f"row {first_row + int(found[1]) + 1}", str(error))
        raise type(error)(message) from error


def _compute_here(
    embedder: Embedder, windows: Iterator[Window], prompt_name: str | None, output: Mapping[str, Any]
) -> Generator[tuple[Window, Computed]]:
    """Windows in order; the next one is tokenized while the engine works."""
    with ThreadPoolExecutor(1, "tokenize") as pool:

        def read() -> tuple[Window, Future[list[Any]]] | None:
            window = next(windows, None)
            return (window, pool.submit(tokenize, embedder, window, prompt_name)) if window else None

        ready = read()
        while ready is not None:
            window, tokens = ready
            tokens.result()  # a bad row of this window before one of the next
            ready = read()
            yield window, compute(embedder, window, tokens.result(), output)


class _Unfinished:
    """The directory beside the output: its lock, its journal, and its end. A context manager.

    Args:
        directory: where; made if absent.
        out: what it will become.
        job: see `Journal`.

    Raises:
        InputError: it cannot be made, is of another job, or another process works in it.
    """

    def __init__(self, directory: Path, out: Path, job: Mapping[str, Any]) -> None:
        self.directory = directory
        self.out = out
        self._where = f"out {str(out)!r}: the unfinished work beside it, {directory.name!r},"
        with self.writing():
            directory.mkdir(exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY)
        try:
            self._take_lock()
            self.journal = self._read_journal() or Journal(job=job)
            for name in {*job, *self.journal.job}:
                if self.journal.job.get(name) != job.get(name):
                    raise InputError(
                        f"{self._where} is of another {name} ({self.journal.job.get(name)!r}, not {job.get(name)!r}): "
                        "repeat the command that began it, or remove that directory"
                    )
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs with one output are the user's to avoid
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self._where} is in the hands of another process: wait for it") from error

    def _read_journal(self) -> Journal | None:
        try:
            data = json.loads((self.directory / JOURNAL_NAME).read_text(encoding="utf-8"))
            journal = Journal(**data)
            if journal.format != _JOURNAL_FORMAT:
                raise ValueError(f"format {journal.format}")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"{self._where} cannot be resumed ({one_line(error)}): remove that directory") from error
        return journal

    def skip_done(self, windows: Iterator[Window]) -> Iterator[Window]:
        """The windows that the journal does not note, after comparing those that it does."""
        journal = self.journal
        last = None
        if journal.rows:
            last = next((window for window in windows if window.end_row >= journal.rows), None)
        if journal.rows and (last is None or (last.end_row, last.digest) != (journal.rows, journal.digest)):
            raise InputError(
                f"{self._where} is of another input: one of the first {journal.rows} rows is not what it was; give "
                "the input that it began with, or remove that directory"
            )
        return windows

    def note(self, journal: Journal) -> None:
        """Replace the journal in one step."""
        path = self.directory / JOURNAL_NAME
        new = path.with_suffix(".new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump(asdict(journal), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        os.fsync(self._lock)
        self.journal = journal

    def publish(self, whole: Path) -> None:
        """Give the file its name, never over another."""
        os.link(whole, self.out)
        _remove(self.directory)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Errors of the disk in the block become InputError."""
        try:
            yield
        except OSError as error:
            raise InputError(f"out {str(self.out)!r} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> _Unfinished:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.journal.rows == 0:
            _remove(self.directory)
        os.close(self._lock)


def _remove_if_finished(directory: Path, out: Path) -> None:
    """A run may be killed between the two steps of `publish`."""
    with contextlib.suppress(OSError):
        if os.path.samefile(directory / f"data{out.suffix}", out):
            _remove(directory)


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / JOURNAL_NAME).unlink()  # first: without it, the rest is nothing
    shutil.rmtree(directory, ignore_errors=True)
