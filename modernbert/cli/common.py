"""What commands share: arguments of one meaning, and how progress is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(stderr=True)

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that `modernbert export` wrote.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current step on a terminal; each new step on a line of its own elsewhere."""
    with console.status("starting") as status:
        last = ""

        def tell(message: str) -> None:
            nonlocal last
            status.update(message)
            step = message.partition(",")[0]
            if step != last and not console.is_terminal:
                console.print(step)
            last = step

        yield tell


def quiet_libraries() -> None:
    """transformers reports the heads that an encoder has no use for, and draws bars of its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def sizes(text: str) -> list[int]:
    """Numbers of at least 1 between commas."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise typer.BadParameter(f"sizes must be numbers of at least 1 between commas, not {part!r}")
    return [int(part) for part in parts]
