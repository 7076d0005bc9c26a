"""`python -m modernbert_export.tensorrt BUNDLE`: builds its TensorRT plans on the machine that is to run them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from modernbert.errors import InputError
from modernbert_export.tensorrt.build import plan_bundle
from modernbert_runtime.errors import ModernBertRuntimeError
from modernbert_runtime.memory import parse_bytes


class _OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with its arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{' '.join(self.format_usage().split())}: {message}\n")


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 with one line that says what is wrong, or 130 after Ctrl-C."""
    parser = _OneLineParser(prog="python -m modernbert_export.tensorrt", description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory that `modernbert export` wrote")
    parser.add_argument("--workspace", help="most scratch memory of the GPU, such as 4GB; default: TensorRT's choice")
    options = parser.parse_args(arguments)
    try:
        workspace = None if options.workspace is None else parse_bytes("workspace", options.workspace)
        for plans in plan_bundle(options.bundle, workspace_bytes=workspace, progress=_tell):
            print(plans)
    except (InputError, ModernBertRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; plans that were not finished were not written", file=sys.stderr)
        return 130
    return 0


def _tell(message: str) -> None:
    """On a terminal the steps of one build write over each other; elsewhere each build is a line."""
    step, _, rest = message.partition(", ")
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="" if rest else "\n", file=sys.stderr, flush=True)
    elif not rest:
        print(step, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
