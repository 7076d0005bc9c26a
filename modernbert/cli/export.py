"""`modernbert export` and `modernbert verify`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from modernbert.cli.common import BundleArgument, ModelArgument, progress, quiet_libraries
from modernbert.cli.triton import write_and_tell
from modernbert.errors import InputError

TextOption = Annotated[
    Path | None, typer.Option(help="One text a line, to compare embeddings on; default: a built-in set, for int8.")
]


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory to make: the bundle.")],
    target: Annotated[
        str,
        typer.Option(
            help="What the graphs are for: portable, openvino, ort-cuda, tensorrt, or several with commas between; "
            "the first is the preferred one. triton adds a model repository for Triton Inference Server."
        ),
    ] = "portable",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, int8, int8-weights, int4-weights, int8-qdq, fp8, or several with commas between, "
            "of which each target gets those that it has; default: fp16 for tensorrt, else fp32."
        ),
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, cls or global; default: what the checkpoint says.")] = None,
    task: Annotated[
        str, typer.Option(help="embedding, fill-mask, text-classification or token-classification: the head to export.")
    ] = "embedding",
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a text; default: what it says.")] = None,
    text: TextOption = None,
    reduce_range: Annotated[
        bool | None,
        typer.Option(help="7-bit weights in int8, for CPUs without VNNI; default: if this one has none."),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Portable graphs for packed tokens too, which `embed` prefers on a CPU.")
    ] = False,
    keep_functions: Annotated[
        bool,
        typer.Option("--keep-functions", help="Leave attention and rotation as nodes of their own, with their bodies."),
    ] = False,
    workspace: Annotated[
        str | None,
        typer.Option(help="Most scratch memory of the GPU for TensorRT's plans, such as 4GB; default: its choice."),
    ] = None,
) -> None:
    """Export a ModernBERT to ONNX and prove that it computes what PyTorch does."""
    began = time.monotonic()
    quiet_libraries()
    from modernbert_export.export import Exported
    from modernbert_export.export import export as export_model
    from modernbert_export.variants import split_targets
    from modernbert_runtime.memory import parse_bytes

    targets, for_triton = split_targets(_names(target))
    workspace_bytes = None if workspace is None else parse_bytes("workspace", workspace)
    if workspace_bytes is not None and "tensorrt" not in targets:
        raise InputError(f"workspace is for target tensorrt, not {target}; leave it out")
    if for_triton and task != "embedding":
        raise InputError(f"target triton serves embeddings; leave it out with task {task}")
    artifacts: list[Exported] = []
    with progress() as tell:
        manifest = export_model(
            model,
            out,
            targets=targets,
            precisions=None if precision is None else _names(precision),
            task=task,
            pooling=pooling,
            max_length=max_length,
            text=text,
            reduce_range=reduce_range,
            packed=packed,
            keep_functions=keep_functions,
            progress=tell,
            proven=artifacts.append,
        )
    what = (
        f"{manifest.pooling} pooling, {manifest.dimension} dimensions"
        if manifest.task == "embedding"
        else ", ".join((manifest.task, *([f"labels {', '.join(manifest.labels)}"] if manifest.labels else [])))
    )
    print(f"{out}: {what}, up to {manifest.max_length} tokens; proven against PyTorch:")
    for artifact in artifacts:
        figures = artifact.report.summary()
        print(
            f"\n{artifact.file}: {artifact.variant.target}, {artifact.variant.precision}, "
            f"max abs error {figures['max_abs_error']:.1e}, min cosine {figures['min_cosine']:.7f}, "
            f"pooled {figures['min_pooled_cosine']:.7f}"
        )
        if artifact.report.text is not None:
            print(f"\n{artifact.report.text.to_markdown()}")
        print(f"\n{artifact.contents.to_markdown('in the graph')}", end="")
    planned = "tensorrt" in targets and build_plans_or_say_why(out, workspace_bytes)
    if for_triton:
        write_repository_or_say_why(out, targets, planned=planned)
    print(f"\nTook {time.monotonic() - began:.0f} s{_peak_memory()}.")


def build_plans_or_say_why(bundle: Path, workspace_bytes: int | None = None) -> bool:
    """Prints where the TensorRT plans of this machine are, or why there are none: the bundle is whole without them.

    Returns:
        Whether there are any.
    """
    from modernbert_export.tensorrt.build import plan_bundle
    from modernbert_runtime.errors import EngineError

    command = f"python -m modernbert_export.tensorrt {bundle}"
    try:
        with progress() as tell:
            plans = plan_bundle(bundle, workspace_bytes=workspace_bytes, progress=tell)
        print(f"\nTensorRT plans for this machine: {', '.join(map(str, plans))}")
        return True
    except EngineError as error:
        print(f"\nNo TensorRT plans were built: {error}. On the machine that is to run them: {command}")
        return False
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"interrupted; {bundle} is whole without the plans: {command} builds them") from stopped


def write_repository_or_say_why(bundle: Path, targets: list[str], *, planned: bool) -> None:
    """Writes `triton/` in the bundle: of its TensorRT plans if there are any, else of a graph for ONNX Runtime."""
    out = bundle / "triton"
    print()
    if planned:
        write_and_tell(bundle, out, encoder="tensorrt")
    elif {"portable", "ort-cuda"} & set(targets):
        write_and_tell(bundle, out, device="gpu" if "ort-cuda" in targets else "cpu")
    else:
        print(
            "No Triton repository was written: it holds the plans. Once they are built: "
            f"modernbert triton {bundle} --encoder tensorrt --out {out}"
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _peak_memory() -> str:
    """What this process needed at most, where the system says (Linux)."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return f" and {int(found[1]) * 1024 / 1e9:.1f} GB of memory at most" if found else ""


def verify(
    bundle: BundleArgument,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint to compare with; default: the bundle's own.")
    ] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Compare this one, such as onnx/model.onnx; may be repeated. Default: all."),
    ] = None,
    text: TextOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a bundle with PyTorch again: exit 1 and a table when parity is lost."""
    quiet_libraries()
    from modernbert_export.verify import verify_bundle

    with progress() as tell:
        reports = verify_bundle(bundle, reference, files=artifact, text=text, progress=tell)
    passed = all(report.passed for report in reports)
    if as_json:
        print(json.dumps({"passed": passed, "artifacts": [report.to_dict() for report in reports]}, indent=2))
    else:
        print("\n".join(report.to_markdown() for report in reports))
    if not passed:
        raise typer.Exit(1)
