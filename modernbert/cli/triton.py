"""`modernbert triton`. Needs neither torch nor Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.common import BundleArgument


def triton(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="Directory to make: the model repository.")],
    name: Annotated[str, typer.Option(help="Name of the model that clients call.")] = "modernbert",
    encoder: Annotated[
        str, typer.Option(help="onnxruntime, or tensorrt: plans built on this machine.")
    ] = "onnxruntime",
    device: Annotated[str, typer.Option(help="Where ONNX Runtime computes: cpu or gpu.")] = "cpu",
    precision: Annotated[str | None, typer.Option(help="Of the artifact; default: the bundle's first.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of the bundle to put before every text.")] = None,
    truncation: Annotated[str, typer.Option(help="What happens to longer texts: right, left or error.")] = "right",
    max_batch: Annotated[int | None, typer.Option(help="Most texts that run together.")] = None,
) -> None:
    """Write a model repository for Triton Inference Server: text in, embeddings out."""
    write_and_tell(
        bundle,
        out,
        name=name,
        encoder=encoder,
        device=device,
        precision=precision,
        prompt_name=prompt,
        truncation=truncation,
        max_batch=max_batch,
    )


def write_and_tell(bundle: Path, out: Path, *, name: str = "modernbert", **options: Any) -> None:
    """Writes the repository of a bundle and prints how to serve it; options are those of `write_repository`."""
    from modernbert_export.triton import write_repository
    from modernbert_runtime.bundle import Bundle

    write_repository(Bundle.open(bundle), out, name=name, **options)
    print(
        f"{out}: models {name} (text -> embedding), {name}_tokenizer, {name}_encoder. The server's Python needs "
        f"modernbert-deploy:\n  pip install modernbert-deploy && tritonserver --model-repository {out}"
    )
