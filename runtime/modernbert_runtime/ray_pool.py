"""The windows of `bulk` on many machines: a Ray Data pool of actors with an `Embedder` each.

The driver reads the input twice: its own windows say what to note and to keep, and a read task on the same machine
feeds the texts to the pool. Results come back in order and carry the digest of what they were made from, so a row can
neither be lost nor swapped. Ray starts an actor that died anew and repeats its window.

Connects to the cluster that RAY_ADDRESS names, or starts one on this machine. Every machine needs the bundle at the
same path; the input is read only here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_runtime import errors
from modernbert_runtime.bulk import Computed, Window, compute, cut_windows, tokenize
from modernbert_runtime.embedder import Embedder
from modernbert_runtime.errors import EngineError, InputError, ModernBertRuntimeError, one_line
from modernbert_runtime.files import open_rows


def check_ray(actors: int, source: Path | None) -> None:
    """Refuse what cannot work, before any work. Raises InputError."""
    if actors < 1:
        raise InputError(f"ray must be at least 1 actor, not {actors}")
    if source is None:
        raise InputError("ray: standard input can be read only once: write it to a file first")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ray: Ray Data cannot be imported ({one_line(error)}): pip install 'modernbert-deploy[ray]'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What is computed, in values that travel. See `bulk.embed_file`."""

    bundle: str
    source: str
    field: str
    keep: tuple[str, ...]
    window_rows: int
    prompt_name: str | None
    load: Mapping[str, Any]
    output: Mapping[str, Any]

    @property
    def cpus(self) -> int:
        """CPUs that Ray sets aside for an actor."""
        return self.load.get("threads") or 1

    def compute(self, windows: Iterator[Window], *, actors: int, first_row: int) -> Generator[tuple[Window, Computed]]:
        """Each of `windows`, which begin at `first_row`, with what the pool made of it.

        Raises:
            ModernBertRuntimeError: what went wrong in an actor, as it would have come from this process.
            EngineError: Ray itself failed.
        """
        import ray
        import ray.data

        own_cluster = not ray.is_initialized()
        if own_cluster:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        # A cluster of many machines may grow; this one alone does not, and Ray would wait forever.
        have = int(ray.cluster_resources().get("CPU", 0))
        if len(ray.nodes()) == 1 and actors * self.cpus > have:
            raise InputError(
                f"ray: {actors} actors of {self.cpus} CPUs each need more than the {have} that Ray has here"
            )
        context = ray.data.DataContext.get_current()
        before = copy.deepcopy(context)
        try:
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            context.target_max_block_size = 1  # bytes: a block for each window, so that the pool shares them
            for window, result in zip(windows, self._results(actors, first_row), strict=True):
                if result["error"]:
                    raise getattr(errors, result["error"])(result["message"])
                if result["digest"] != window.digest:
                    raise InputError(f"input {self.source!r} changed while it was read: start again")
                vectors = np.frombuffer(result["vectors"], result["dtype"]).reshape(len(window.texts), -1)
                yield window, Computed(vectors, result["num_tokens"], result["num_truncated"])
        except ray.exceptions.RayError as error:
            message = f"ray failed ({one_line(error)}): see its logs, or embed without --ray"
            raise EngineError(message) from error
        finally:
            ray.data.DataContext._set_current(before)
            if own_cluster:
                ray.shutdown()

    def _results(self, actors: int, first_row: int) -> Iterator[dict[str, Any]]:
        import ray
        import ray.data

        dataset = ray.data.read_datasource(
            _window_source(self, first_row),
            override_num_blocks=1,
            num_cpus=0,  # reading takes next to nothing, and must run where the actors have taken every core
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        ).map_batches(
            EmbedWindows,
            fn_constructor_args=(self,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=self.cpus,
        )
        for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield from table.to_pylist()


class EmbedWindows:
    """One actor of the pool: a table of windows in, a table of vectors out."""

    def __init__(self, job: RayJob) -> None:
        self._job = job
        self._embedder = Embedder.load(job.bundle, **job.load)

    def __call__(self, table: Any) -> Any:
        """A row of `texts` becomes a row of `vectors`, as bytes of one array."""
        import pyarrow as pa

        (row,) = table.to_pylist()
        window = Window(row["first_row"], row["texts"], {}, row["digest"], 0)
        result: dict[str, Any] = {"digest": window.digest, "error": "", "message": ""}
        result |= {"vectors": b"", "dtype": "", "num_tokens": 0, "num_truncated": 0}
        try:
            tokens = tokenize(self._embedder, window, self._job.prompt_name)
            made = compute(self._embedder, window, tokens, self._job.output)
        except ModernBertRuntimeError as error:  # as a value: Ray would repeat, log and wrap an exception
            result |= {"error": type(error).__name__, "message": str(error)}
        else:
            result |= {"vectors": made.vectors.tobytes(), "dtype": made.vectors.dtype.str}
            result |= {"num_tokens": made.num_tokens, "num_truncated": made.num_truncated}
        return pa.Table.from_pylist([result])


def _window_source(job: RayJob, first_row: int) -> Any:
    """A Ray datasource of one task that reads windows lazily, a block each."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def read() -> Iterator[Any]:
        import pyarrow as pa

        with open_rows(Path(job.source), field=job.field, keep=job.keep) as rows:
            for window in cut_windows(rows, keep=job.keep, window_rows=job.window_rows):
                if window.first_row >= first_row:
                    row = {"first_row": window.first_row, "texts": window.texts, "digest": window.digest}
                    yield pa.Table.from_pylist([row])

    class WindowSource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            nothing_known = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, nothing_known)]

    return WindowSource()
