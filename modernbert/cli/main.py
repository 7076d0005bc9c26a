"""The list of commands, and what their errors become.

Every command imports what it needs when it runs, so `modernbert embed` starts without torch. Exit codes: 0 fine,
1 the check failed, 2 bad usage or input, said in one line on standard error.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from modernbert.cli.bench import bench
from modernbert.cli.doctor import doctor
from modernbert.cli.embed import embed
from modernbert.cli.evaluate import evaluate
from modernbert.cli.export import export, verify
from modernbert.cli.finetune import finetune
from modernbert.cli.predict import predict
from modernbert.cli.tokenizer import tokenizer
from modernbert.cli.training import demo, pretrain
from modernbert.cli.triton import triton
from modernbert.errors import InputError, ParityError, TrainingError
from modernbert_runtime.errors import ModernBertRuntimeError

app = typer.Typer(
    help="Train a ModernBERT, export it with proven parity, embed text without torch.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _InterruptedError(Exception):
    """Ctrl-C; the message says what was kept, where something was."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """typer turns KeyboardInterrupt into an exit code and loses what it says."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _InterruptedError(*error.args) from error

    return run


for command in (demo, pretrain, finetune, evaluate, export, verify, embed, predict, bench, doctor, triton):
    app.command()(_interruptible(command))
app.add_typer(tokenizer, name="tokenizer")

# Unknown options and missing or malformed values. typer brings its own click, and exports only what derives from it.
UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point: turns the errors of all packages into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes away
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "modernbert"
        _fail(f"{' '.join(error.format_message().split()).rstrip('.')}; see {where} --help", 2)
    except _InterruptedError as error:
        _fail(str(error) or "interrupted; the output was not written", 130)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; the output was not written", 130)
    except (InputError, ModernBertRuntimeError) as error:
        _fail(str(error), 2)
    except ImportError as error:
        if error.name in (
            "torch",
            "transformers",
            "onnx",
            "onnxscript",
            "onnx_ir",
            "datasets",
            "sentence_transformers",
            "scipy",
            "accelerate",
            "optimi",
            "pyarrow",
            "tensorboard",
        ):
            _fail(f"this command needs {error.name}: pip install 'modernbert-deploy[export,train]'", 2)
        raise
    except (ParityError, TrainingError) as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"modernbert: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
