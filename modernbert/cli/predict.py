"""`modernbert predict`. Starts without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from modernbert.cli.common import BundleArgument, console, progress
from modernbert.errors import InputError
from modernbert.output import require_absent

if TYPE_CHECKING:
    from modernbert_runtime.files import Row
    from modernbert_runtime.task_model import TaskModel

# Rows that are in memory at a time.
_WINDOW_ROWS = 4096


def predict(
    bundle: BundleArgument,
    input: Annotated[  # noqa: A002  named as users see it
        Path | None,
        typer.Argument(metavar="[INPUT]", help=".txt, .jsonl, .csv or .parquet; standard input when absent."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to make: .jsonl, a line for each row.")] = Path("predictions.jsonl"),
    field: Annotated[str, typer.Option(help="Field of the rows that holds the text.")] = "text",
    pair_field: Annotated[
        str | None,
        typer.Option(help="Field with a second text, which a text classifier reads together with the first."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Field to write beside the results, such as id; may be repeated.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Tokens for each gap, of a fill-mask bundle.")] = 5,
    aggregation: Annotated[
        str, typer.Option(help="Tokens to entities, of a token classifier: none, simple or first.")
    ] = "simple",
    truncation: Annotated[str, typer.Option(help="Texts that are too long: right, left or error.")] = "right",
    engine: Annotated[str, typer.Option(help="What computes.")] = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help="Such as fp16; default: the bundle's first.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; default: its own choice.")] = None,
) -> None:
    """Classify every row of a file, label its tokens, or fill its gaps: whatever the bundle was exported for."""
    if out.suffix != ".jsonl":
        raise InputError(f"out {str(out)!r} must end in .jsonl")
    require_absent(out)
    from modernbert_runtime.bulk import naming_rows
    from modernbert_runtime.files import open_rows

    options: dict[str, Any] = {"engine": engine, "precision": precision, "truncation": truncation, "threads": threads}
    kept = list(keep or ())
    with contextlib.ExitStack() as stack:
        model, name, run = _open(bundle, options, paired=pair_field is not None, top_k=top_k, aggregation=aggregation)
        stack.enter_context(model)
        columns = [*kept, *([pair_field] if pair_field else [])]
        rows = stack.enter_context(open_rows(input, field=field, keep=columns)).rows
        file, tell = stack.enter_context(_whole_file(out)), stack.enter_context(progress())
        done = 0
        while window := list(itertools.islice(rows, _WINDOW_ROWS)):
            with naming_rows(done):
                results = run(window)
            for row, result in zip(window, results, strict=True):
                fields = dict(zip(kept, row.kept, strict=False))
                file.write(json.dumps({**fields, name: result}, ensure_ascii=False, default=str) + "\n")
            done += len(window)
            tell(f"predicting, {done:,} rows")
        truncated = model.stats().truncated
    if truncated:
        console.print(f"{truncated:,} of {done:,} texts were too long and were cut", soft_wrap=True)
    print(f"{out}: {name} of {done} rows")


def _open(
    bundle: Path, options: dict[str, Any], *, paired: bool, top_k: int, aggregation: str
) -> tuple[TaskModel, str, Callable[[Sequence[Row]], list[Any]]]:
    """The bundle's model, what its results are called, and how rows become results of JSON's types."""
    from modernbert_runtime import FillMask, TextClassifier, TokenClassifier
    from modernbert_runtime.bundle import Bundle

    task = Bundle.open(bundle).manifest.task
    if paired and task != "text-classification":
        raise InputError(f"pair_field is for text-classification, and this bundle is for {task}; leave it out")
    if task == "fill-mask":
        fill = FillMask.load(bundle, **options)
        return (
            fill,
            "gaps",
            lambda rows: [
                [[token._asdict() for token in gap] for gap in gaps]
                for gaps in fill.fill([row.text for row in rows], top_k=top_k)
            ],
        )
    if task == "token-classification":
        tagger = TokenClassifier.load(bundle, **options)
        return (
            tagger,
            "entities",
            lambda rows: [
                [dataclasses.asdict(entity) for entity in entities]
                for entities in tagger.classify([row.text for row in rows], aggregation=aggregation)  # type: ignore[arg-type]
            ],
        )
    classifier = TextClassifier.load(bundle, **options)  # which says what takes a bundle for embeddings

    def classify(rows: Sequence[Row]) -> list[Any]:
        if paired:
            found = classifier.classify_pairs([(row.text, row.kept[-1]) for row in rows])
        else:
            found = classifier.classify([row.text for row in rows])
        return [[label._asdict() for label in labels] for labels in found]

    return classifier, "labels", classify


@contextlib.contextmanager
def _whole_file(out: Path) -> Iterator[TextIO]:
    """A file beside `out` that takes its name when the block ends well, and is removed otherwise."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    except OSError as error:
        raise InputError(f"out {str(out)!r} cannot be written: {error.strerror}; choose another directory") from error
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp writes for the owner alone
        os.rename(name, out)
    finally:
        Path(name).unlink(missing_ok=True)
