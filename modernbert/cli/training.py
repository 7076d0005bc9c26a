"""`modernbert demo`, and what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import quiet_libraries


def demo(
    out: Annotated[Path, typer.Option(help="Directory to make for what the demo trains and exports.")] = Path(
        "demo-output"
    ),
) -> None:
    """Train, export, verify and search, on text that ships with Python, in minutes."""
    quiet_libraries()
    from modernbert.demo import run

    run(out)
