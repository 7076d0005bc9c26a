"""The command line: `modernbert COMMAND`.

Every command imports what it needs when it runs, so `modernbert embed` starts without torch. Exit codes: 0 fine,
1 the check failed, 2 bad usage or input, said in one line on standard error.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modernbert.errors import InputError, ParityError
from modernbert_runtime.errors import ModernBertRuntimeError

app = typer.Typer(
    help="Train a ModernBERT, export it with proven parity, embed text without torch.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
# Unknown options and missing or malformed values. typer brings its own click, and exports only what derives from it.
UsageError: Any = typer.BadParameter.__base__

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that `modernbert export` wrote.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to make for what the demo trains and exports.")] = Path(
        "demo-output"
    ),
) -> None:
    """Train, export, verify and search, on text that ships with Python, in minutes."""
    _quiet_libraries()
    from modernbert.demo import run

    run(out)


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory to make: the bundle.")],
    pooling: Annotated[str | None, typer.Option(help="mean or cls; default: what the checkpoint says.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a text; default: what it says.")] = None,
) -> None:
    """Export a ModernBERT to ONNX and prove that it computes what PyTorch does."""
    _quiet_libraries()
    from modernbert_export.export import export as export_model

    with _progress() as progress:
        manifest = export_model(model, out, pooling=pooling, max_length=max_length, progress=progress)
    parity = manifest.artifacts[0].parity
    print(
        f"{out}: {manifest.pooling} pooling, {manifest.dimension} dimensions, up to {manifest.max_length} tokens; "
        f"max abs error {parity['max_abs_error']:.1e}, min cosine {parity['min_cosine']:.7f} against PyTorch"
    )


@app.command()
def verify(
    bundle: BundleArgument,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint to compare with; default: the bundle's own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a bundle with PyTorch again: exit 1 and a table when parity is lost."""
    _quiet_libraries()
    from modernbert_export.verify import verify_bundle

    with _progress() as progress:
        reports = verify_bundle(bundle, reference, progress=progress)
    for report in reports:
        print(report.to_json() if json else report.to_markdown())
    if any(report.failures for report in reports):
        raise typer.Exit(1)


@app.command()
def embed(
    bundle: BundleArgument,
    input: Annotated[  # noqa: A002  named as users see it
        Path | None, typer.Argument(metavar="[INPUT]", help=".txt, .jsonl or .csv; standard input when absent.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to make: .npy or .jsonl.")] = Path("embeddings.npy"),
    field: Annotated[str, typer.Option(help="Field of .jsonl and .csv rows that holds the text.")] = "text",
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the bundle, such as query.")] = None,
    truncation: Annotated[str, typer.Option(help="Texts that are too long: right, left or error.")] = "right",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; default: its own choice.")] = None,
) -> None:
    """Embed the texts of a file, one vector each, in their order."""
    from modernbert_runtime.embedder import Embedder
    from modernbert_runtime.files import check_output, read_texts, write_vectors

    check_output(out)
    texts = read_texts(input, field=field)
    with Embedder.load(bundle, truncation=truncation, threads=threads) as embedder:  # type: ignore[arg-type]
        vectors = embedder.embed(texts, prompt_name=prompt_name, progress=True)
    write_vectors(out, vectors)
    print(f"{out}: {vectors.shape[0]} vectors of {vectors.shape[1]} dimensions")


def main() -> None:
    """Entry point: turns the errors of all packages into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes away
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "modernbert"
        _fail(f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written", 130)
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
        ):
            _fail(f"this command needs {error.name}: pip install 'modernbert-deploy[export,train]'", 2)
        raise
    except ParityError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"modernbert: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
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


def _quiet_libraries() -> None:
    """transformers reports the heads that an encoder has no use for, and draws bars of its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
