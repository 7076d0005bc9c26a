"""`modernbert export` and `modernbert verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import BundleArgument, ModelArgument, progress, quiet_libraries


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory to make: the bundle.")],
    pooling: Annotated[str | None, typer.Option(help="mean or cls; default: what the checkpoint says.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a text; default: what it says.")] = None,
) -> None:
    """Export a ModernBERT to ONNX and prove that it computes what PyTorch does."""
    quiet_libraries()
    from modernbert_export.export import export as export_model

    with progress() as tell:
        manifest = export_model(model, out, pooling=pooling, max_length=max_length, progress=tell)
    parity = manifest.artifacts[0].parity
    print(
        f"{out}: {manifest.pooling} pooling, {manifest.dimension} dimensions, up to {manifest.max_length} tokens; "
        f"max abs error {parity['max_abs_error']:.1e}, min cosine {parity['min_cosine']:.7f} against PyTorch"
    )


def verify(
    bundle: BundleArgument,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint to compare with; default: the bundle's own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a bundle with PyTorch again: exit 1 and a table when parity is lost."""
    quiet_libraries()
    from modernbert_export.verify import verify_bundle

    with progress() as tell:
        reports = verify_bundle(bundle, reference, progress=tell)
    for report in reports:
        print(report.to_json() if json else report.to_markdown())
    if any(report.failures for report in reports):
        raise typer.Exit(1)
