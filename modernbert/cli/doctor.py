"""`modernbert doctor`. Starts without torch; with it, engines are tried on a small model that is made in place."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json as json_module
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from modernbert.cli.common import progress, sizes
from modernbert.errors import InputError

if TYPE_CHECKING:
    from modernbert_runtime.bundle import Bundle
    from modernbert_runtime.doctor import Check, Facts, Reference

NEEDED = ("torch", "transformers", "onnx", "onnxscript")


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="What to run; default: a small model with random weights, by torch."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a text.")] = "64,65,512,8192",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Try every engine on this machine against a reference: exit 1 when one that runs here computes something else."""
    from modernbert_runtime.bundle import Bundle
    from modernbert_runtime.doctor import examine, find_candidates, gather_facts
    from modernbert_runtime.doctor.examine import make_cases

    if bundle is None and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        raise InputError(
            f"without a BUNDLE a small model is made, which needs {', '.join(missing)}: give a bundle, or "
            "pip install 'modernbert-deploy[export]'"
        )
    facts, wanted = gather_facts(), sizes(lengths)
    with progress() as tell, contextlib.ExitStack() as stack:
        reference, build_error = None, ""
        if bundle is not None:
            opened = Bundle.open(bundle)
            cases = make_cases(_vocab_size(opened), opened.manifest.max_length, wanted)
        else:
            from modernbert_export.small_bundle import MAX_LENGTH, VOCAB_SIZE, torch_reference

            cases = make_cases(VOCAB_SIZE, MAX_LENGTH, wanted)
            opened, build_error = stack.enter_context(_small_bundle(facts, tell))
            tell("computing the reference")
            reference = torch_reference(cases)
        candidates = find_candidates(opened, facts.no_gpu)
        checks, reference = examine(opened, candidates, cases, reference, progress=tell)
    if build_error:
        checks = [
            dataclasses.replace(check, state="fails", why=build_error)
            if check.candidate.engine == "tensorrt"
            else check
            for check in checks
        ]
    if json:
        print(_to_json(facts, reference, checks))
    else:
        _print(facts, reference, checks, what=str(bundle) if bundle else "a small model with random weights")
    if any(check.state == "fails" for check in checks):
        raise typer.Exit(1)


@contextlib.contextmanager
def _small_bundle(facts: Facts, tell: Callable[[str], None]) -> Iterator[tuple[Bundle, str]]:
    """A bundle of the small model, with TensorRT plans where they can be built, or why that failed.

    Everything goes into a temporary directory, the plans and the engines of ONNX Runtime too: the user's cache is set
    to it meanwhile, here and for the processes that try the engines.
    """
    from modernbert_export.small_bundle import build_small_plans, write_small_bundle
    from modernbert_runtime.errors import EngineError
    from modernbert_runtime.tensorrt_engine import require_tensorrt

    with tempfile.TemporaryDirectory(prefix="modernbert-doctor-") as scratch:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        try:
            root = Path(scratch) / "bundle"
            root.mkdir()
            bundle, error = write_small_bundle(root, tensorrt=bool(facts.gpus), progress=tell), ""
            with contextlib.suppress(EngineError):  # no TensorRT: the table says so
                require_tensorrt()
                try:
                    build_small_plans(bundle, tell)
                except InputError as refusal:
                    error = str(refusal)
            yield bundle, error
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def _vocab_size(bundle: Bundle) -> int:
    """Of the bundle's model, from its config.json."""
    try:
        size = json_module.loads(bundle.path_of("config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("config.json of the bundle must have vocab_size: export it again") from error
    if not isinstance(size, int) or size < 1:
        raise InputError(f"vocab_size in config.json must be at least 1, not {size!r}: export the bundle again")
    return size


def _to_json(facts: Facts, reference: Reference, checks: list[Check]) -> str:
    content = {
        "facts": dataclasses.asdict(facts),
        "reference": reference.name,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    return json_module.dumps(content, indent=2)


def _print(facts: Facts, reference: Reference, checks: list[Check], *, what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from modernbert_runtime.doctor.facts import INSTRUCTION_SETS

    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    out.print(f"CPU: {facts.cpu}, {facts.usable_cores} of {facts.cores} logical cores usable")
    for has, title in ((True, "has"), (False, "lacks")):
        names = [INSTRUCTION_SETS[flag] for flag, present in facts.instruction_sets.items() if present == has]
        out.print(f"  {title}: {'; '.join(names) or 'none of the instruction sets that matter here'}")
    for gpu in facts.gpus:
        size = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        out.print(f"GPU: {gpu.name}, compute capability {gpu.compute_capability}, {size}, driver for CUDA {gpu.cuda}")
    if facts.no_gpu:
        out.print(f"GPU: none, {facts.no_gpu}")
    out.print(f"Packages: {', '.join(f'{name} {version}' for name, version in facts.packages.items())}\n")
    lengths = sorted({length for check in checks for length in check.seconds})
    table = Table(title=f"{what}, against {reference.name}")
    table.add_column("engine")
    table.add_column("parity")
    for heading in ("lowest cosine", "max abs error", *(f"{length:,} tokens" for length in lengths), "peak memory"):
        table.add_column(heading, justify="right")
    for check in checks:
        if check.min_cosine is not None and check.max_abs_error is not None and check.peak_bytes is not None:
            table.add_row(
                check.candidate.name,
                "[green]holds" if check.state == "holds" else "[red]lost",
                f"{check.min_cosine:.7f}",
                f"{check.max_abs_error:.1e}",
                *(f"{1000 * check.seconds[length]:,.1f} ms" for length in lengths),
                f"{check.peak_bytes / 1e9:.2f} GB",
            )
    out.print(table)
    for why in dict.fromkeys(check.why for check in checks if check.state == "unchecked"):
        names = [check.candidate.name for check in checks if check.state == "unchecked" and check.why == why]
        out.print(f"Not checked: {', '.join(names)}: {escape(why)}")
    for check in checks:
        if check.state == "fails":
            out.print(f"[red]{check.candidate.name} fails[/red]: {escape(check.why)}")
        if check.layers:
            fused = [name for name in check.layers if "+" in name or "ForeignNode" in name]
            out.print(
                f"{check.candidate.name}: {(check.device_bytes or 0) / 1e9:.2f} GB on the GPU for plans and buffers; "
                f"{len(check.layers)} layers, {len(fused)} of them fused of several:"
            )
            for name in fused:
                out.print(f"  {escape(name)}")
    out.print(
        "Times are of one batch, the fastest of few, of 2 texts up to 512 tokens and of 1 beyond; peak memory is the "
        "process's own, the GPU's not counted. `modernbert bench` measures well."
    )
