"""`modernbert bench`. Starts without torch; `--against` starts others that need it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modernbert.cli.common import BundleArgument, console, progress
from modernbert.errors import InputError

if TYPE_CHECKING:
    from modernbert_runtime.bench.report import Report


def bench(
    bundle: BundleArgument,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a text, for latency; default: 16,128,512,2048 or what fits in.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Texts of a call, for throughput; default: 1,8,32 or what fits in.")
    ] = None,
    batch_length: Annotated[int | None, typer.Option(help="Tokens of each of these texts; default: 128.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each candidate; default: its own choice.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for everything, about.")] = 55.0,
    against: Annotated[
        str, typer.Option(help="Other tools on the same model: sentence-transformers, transformers, or both.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="File to make: a page with plots.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, raw samples included.")] = False,
) -> None:
    """Measure every engine and precision that runs here: exit 1 when the vectors of one are not those of the others."""
    from modernbert.cli.bench_peers import peer_candidates
    from modernbert_runtime.bench.page import as_html
    from modernbert_runtime.bench.run import bench as run

    if html is not None:
        _check_page(html)
    peers = peer_candidates(against, bundle, threads=threads)
    with progress() as tell:
        report = run(
            bundle,
            lengths=None if lengths is None else _numbers("lengths", lengths),
            batches=None if batch is None else _numbers("batch", batch),
            batch_length=batch_length,
            threads=threads,
            seconds=seconds,
            peers=peers,
            progress=tell,
        )
    if html is not None:
        try:
            with html.open("x", encoding="utf-8") as file:
                file.write(as_html(report))
        except OSError as error:
            raise InputError(f"html {str(html)!r} cannot be written: {error.strerror}") from error
    if json:
        print(report.to_json())
    else:
        _print_tables(report)
    if report.disagreeing:
        raise typer.Exit(1)


def _print_tables(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from modernbert_runtime.bench import report as text

    out = Console(width=None if sys.stdout.isatty() else 120)
    for title, headings, rows, cells in (
        ("Latency of one text", text.LATENCY_HEADINGS, report.latency, text.latency_cells),
        ("Throughput", text.THROUGHPUT_HEADINGS, report.throughput, text.throughput_cells),
    ):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "candidate" else "right")
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            end = following is None or (row.tokens, row.batch) != (following.tokens, following.batch)
            table.add_row(*cells(report, row), end_section=end)
        out.print(table)
    for name, seconds in report.load_seconds.items():
        cosine = f", lowest cosine {report.cosines[name]:.6f}" if name in report.cosines else ""
        out.print(f"{name}: cold start {seconds:.2f} s, from its process to the first vector{cosine}", highlight=False)
    for name, why in report.disagreeing.items():
        out.print(f"[red]{name}: not timed: {why}", highlight=False)
    for name, why in report.absent.items():
        out.print(f"{name}: not run: {why}", highlight=False)
    for name, why in report.skipped.items():
        out.print(f"{name}: skipped: {why}", highlight=False)
    out.print(text.caption(report), highlight=False)
    if report.machine["load_average"] > 0.3:
        console.print(
            f"The machine is busy (load {report.machine['load_average']:.1f}): publish no times from this run"
        )


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name} must be numbers with commas between them, not {text!r}") from error


def _check_page(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"html {str(path)!r} exists; remove it or choose another name")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"html {str(path)!r} cannot be written: its directory is missing or not writable")
