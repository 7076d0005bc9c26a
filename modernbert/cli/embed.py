"""`modernbert embed`. Starts without torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modernbert.cli.common import BundleArgument, console

if TYPE_CHECKING:
    from modernbert_runtime.bulk import BulkProgress

# Where nobody watches a bar, a line for the log every so often.
_LOG_SECONDS = 30.0


def embed(
    bundle: BundleArgument,
    input: Annotated[  # noqa: A002  named as users see it
        Path | None,
        typer.Argument(metavar="[INPUT]", help=".txt, .jsonl, .csv or .parquet; standard input when absent."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to make: .npy, .jsonl or .parquet.")] = Path("embeddings.npy"),
    field: Annotated[str, typer.Option(help="Field of the rows that holds the text.")] = "text",
    keep: Annotated[
        list[str] | None, typer.Option(help="Field to write beside the vectors, such as id; may be repeated.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the bundle, such as query.")] = None,
    truncation: Annotated[str, typer.Option(help="Texts that are too long: right, left or error.")] = "right",
    dimensions: Annotated[
        int | None, typer.Option(help="Values to keep of each vector, of models trained for it (Matryoshka).")
    ] = None,
    output_dtype: Annotated[
        str | None, typer.Option(help="float32, float16, int8 or binary; default: float32.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale vectors to unit length; default: as the bundle does.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What computes: auto, onnxruntime, openvino or tensorrt.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Such as int8; default: the bundle's first.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; default: its own choice.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch, padding included.")] = 1024,
    max_memory: Annotated[str | None, typer.Option(help="Most that the process may hold, such as 2GB.")] = None,
    window_rows: Annotated[
        int, typer.Option(help="Most rows in memory at a time, and most that a kill can cost.")
    ] = 4096,
    ray: Annotated[int | None, typer.Option(metavar="ACTORS", help="Compute with this many Ray actors.")] = None,
) -> None:
    """Embed every row of a file of any size, in order. The same command after a kill goes on where it was."""
    from modernbert_runtime.bulk import embed_file

    output = {"dimensions": dimensions, "output_dtype": output_dtype, "normalize": normalize}
    with _watching() as tell:
        done = embed_file(
            bundle,
            input,
            out,
            field=field,
            keep=keep or (),
            prompt_name=prompt_name,
            load={
                "engine": engine,
                "precision": precision,
                "truncation": truncation,
                "threads": threads,
                "batch_tokens": batch_tokens,
                "max_memory": max_memory,
            },
            output={name: value for name, value in output.items() if value is not None},
            window_rows=window_rows,
            ray_actors=ray,
            progress=tell,
        )
    if done.truncated:
        console.print(f"{done.truncated:,} of {done.rows:,} texts were too long and were cut", soft_wrap=True)
    print(f"{out}: {done.rows} vectors of {done.dimension} dimensions")


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[BulkProgress], None]]:
    """A bar on a terminal, a line now and then elsewhere, and a word about what an interruption leaves."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(bar_width=30), TextColumn("{task.description}")
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("reading", total=None)
    begin = last = time.monotonic()
    rows = 0

    def tell(done: BulkProgress) -> None:
        nonlocal begin, last, rows
        now, first = time.monotonic(), rows == 0
        rows = done.rows
        if first and done.rows == done.resumed_rows:
            begin = now  # loading is not work on rows
            if done.resumed_rows:
                console.print(f"going on after row {done.resumed_rows:,}")
        message = describe(done, now - begin)
        bar.update(task, completed=done.position, total=done.total, description=message)
        if not console.is_terminal and now - last >= _LOG_SECONDS:
            console.print(message, soft_wrap=True, highlight=False)
            last = now

    try:
        with bar:
            yield tell
    except KeyboardInterrupt:
        if not rows:
            raise
        console.print(f"modernbert: interrupted; the first {rows} rows are kept, the same command goes on from there")
        raise typer.Exit(130) from None


def describe(done: BulkProgress, seconds: float) -> str:
    """How far, how fast, how long to go; `seconds` are those of this run."""
    fresh = done.rows - done.resumed_rows
    parts = [f"{done.rows:,} rows"]
    if fresh and seconds > 0:
        parts += [f"{fresh / seconds:,.1f} rows/s", f"{done.tokens / seconds:,.0f} tokens/s"]
        read = done.position - done.resumed_position
        if done.total and read > 0:
            left = max(done.total - done.position, 0) / read * seconds
            parts.append(f"{int(left // 3600)}:{int(left // 60) % 60:02}:{int(left) % 60:02} left")
    return ", ".join(parts)
