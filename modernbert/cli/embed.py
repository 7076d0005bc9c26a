"""`modernbert embed`. Starts without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import BundleArgument


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
