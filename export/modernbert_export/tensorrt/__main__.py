"""`python -m modernbert_export.tensorrt BUNDLE`: builds its TensorRT plans on the machine that is to run them."""

from __future__ import annotations

import sys
from pathlib import Path

from modernbert.errors import InputError
from modernbert_export.tensorrt.build import plan_bundle
from modernbert_runtime.errors import ModernBertRuntimeError


def main(arguments: list[str]) -> int:
    """Exit code: 0, or 2 with one line that says what is wrong."""
    if len(arguments) != 1:
        print("usage: python -m modernbert_export.tensorrt BUNDLE", file=sys.stderr)
        return 2
    try:
        for plans in plan_bundle(Path(arguments[0]), progress=lambda message: print(message, file=sys.stderr)):
            print(plans)
    except (InputError, ModernBertRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
