"""What the benchmarks' command lines share: bad usage in one line and exit code 2, numbers, and lists of names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Say it and end."""
        sys.exit(complain(message, 2))


def complain(message: object, status: int) -> int:
    """Print one line of error and return the exit code."""
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    return status


def positive(text: str) -> int:
    """An option's value."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)
