"""Builds TensorRT plans from the two TensorRT graphs of a bundle. The one file of the exporter that talks to TensorRT.

Written against TensorRT 11.4. The graphs are opset 24, which its parser reads from 10.15 on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from modernbert.errors import InputError
from modernbert.output import whole_directory
from modernbert_export.source_lines import read_sources
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import EngineError
from modernbert_runtime.plan_store import (
    FOLDER,
    PLAN_GRAPHS,
    PlanSource,
    find_plans,
    private_directory,
    remember,
    user_cache,
    write_whole,
)
from modernbert_runtime.tensorrt_engine import INPUTS, key_here
from modernbert_runtime.tensorrt_plan import RECORD_NAME, PlanKey, PlanRecord, Profile, plan_profiles

if TYPE_CHECKING:
    import tensorrt as trt

BAR = 20  # characters

Progress = Callable[[str], None]
T = TypeVar("T")


def plan_bundle(root: Path, *, workspace_bytes: int | None = None, progress: Progress = lambda _: None) -> list[Path]:
    """Builds the plans of a bundle for the GPU and TensorRT of this machine, in directories below it.

    Plans that are there already and were built of the same graphs, for the same machine, with the same settings, stay;
    others of the same name are built again. What a build measures of kernels the next one finds in the user's cache.

    Up to `max_length` of the artifact `tensorrt-dense` they come from that graph, above it from the banded one. That
    length is chosen by counting work, not yet by measuring (`tensorrt_plan.DENSE_LENGTH`).

    Args:
        root: the bundle.
        workspace_bytes: see `build_plans`.
        progress: is told what is being done.

    Returns:
        The directories, one for each precision that the bundle has graphs in.

    Raises:
        BundleError: the bundle has no graphs for TensorRT, or is not whole.
        EngineError, InputError: as for `build_plans`.
    """
    bundle = Bundle.open(root)
    graphs = [artifact for artifact in bundle.manifest.artifacts if artifact.target == PLAN_GRAPHS[0]]
    sources = [PlanSource.of(bundle, artifact.precision) for artifact in graphs] or [PlanSource.of(bundle)]
    return [_plan_source(bundle, source, workspace_bytes, progress) for source in sources]


def _plan_source(bundle: Bundle, source: PlanSource, workspace_bytes: int | None, progress: Progress) -> Path:
    profiles = plan_profiles(bundle.manifest.max_length)
    key = key_here(source.sha256, source.precision, profiles=profiles, flags=_flags(workspace_bytes))
    if (current := _current_plans(bundle, source, key)) is not None:
        progress(f"{current} is up to date")
        return current
    out = bundle.root / FOLDER / key.folder
    if (out / RECORD_NAME).exists():
        shutil.rmtree(out)  # stale, or not this user's
    graphs = {target: bundle.onnx_path(artifact) for target, artifact in source.artifacts.items()}
    for artifact in source.artifacts.values():
        if artifact.data_file:
            bundle.path_of(artifact.data_file)
    build_plans(
        graphs,
        out,
        profiles=profiles,
        precision=source.precision,
        onnx_sha256=source.sha256,
        workspace_bytes=workspace_bytes,
        timing_cache=private_directory(user_cache() / "tensorrt-timing") / key.folder,
        progress=progress,
    )
    return out


def _current_plans(bundle: Bundle, source: PlanSource, key: PlanKey) -> Path | None:
    """Where whole plans lie that were built with exactly this key."""
    try:
        plans = find_plans(bundle, source, key)
        for name in plans.record.files:
            plans.load(name)
    except EngineError:
        return None
    return None if plans.record.key.differences(key) else plans.directory


def _flags(workspace_bytes: int | None) -> tuple[str, ...]:
    return () if workspace_bytes is None else (f"workspace={workspace_bytes}",)


def build_plans(
    graphs: Mapping[str, Path],
    out: Path,
    *,
    profiles: tuple[Profile, ...],
    precision: str,
    onnx_sha256: str,
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    inspectable: bool = False,
    progress: Progress = lambda _: None,
) -> PlanRecord:
    """Builds a plan from each graph that a profile needs, and their record, for the GPU and TensorRT of this machine.

    The record is kept in the user's cache, too, without which no engine of this user loads the plans (`plan_store`).

    Args:
        graphs: target -> ONNX file, as `Profile.graph` names them.
        out: directory to make: whole, or absent when the build fails or is cancelled.
        profiles: what the plans must serve.
        precision: what the graphs are in, for the record.
        onnx_sha256: of graphs and weights: `PlanSource.sha256`.
        workspace_bytes: most scratch memory of the GPU; None leaves it to TensorRT.
        timing_cache: file to take measured kernels from and to write them to; another build is then much faster.
        inspectable: keeps in the plans which nodes each of their layers was made of, for `TensorRtEngine.layers`.
        progress: is told what is being done.

    Raises:
        EngineError: TensorRT or a GPU is missing.
        InputError: TensorRT refuses a graph (each of its errors is listed), or `out` exists.
        KeyboardInterrupt: the build was cancelled.
    """
    key = key_here(onnx_sha256, precision, profiles=profiles, flags=_flags(workspace_bytes))
    files = {}
    with whole_directory(out) as partial:
        for graph in dict.fromkeys(limits.graph for limits in profiles):
            served = [limits for limits in profiles if limits.graph == graph]
            settings = _Settings(workspace=workspace_bytes, timing_cache=timing_cache, inspectable=inspectable)
            plan = _build(graphs[graph], served, settings, progress)
            name = PlanRecord.file_of(graph)
            (partial / name).write_bytes(plan)
            files[name] = hashlib.sha256(plan).hexdigest()
        record = PlanRecord(key=key, files=files)
        (partial / RECORD_NAME).write_text(record.to_json(), encoding="utf-8")
    remember(record)
    return record


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Of one build; see `build_plans`."""

    workspace: int | None
    timing_cache: Path | None
    inspectable: bool


def _build(file: Path, profiles: list[Profile], settings: _Settings, progress: Progress) -> bytes:
    import tensorrt as trt

    label = f"building {profiles[0].graph}"
    progress(label)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Version 11 knows no other kind and ignores the flag; before, networks were weakly typed without it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        sources = read_sources(file)
        errors = [describe(parser.get_error(index), sources) for index in range(parser.num_errors)]
        raise InputError(f"TensorRT {trt.__version__} refuses {file.name!r}: {'; '.join(errors) or 'see its log'}")
    allow_decomposition(network)

    config = builder.create_builder_config()
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.inspectable:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for limits in profiles:
        profile = builder.create_optimization_profile()
        for name in INPUTS:
            profile.set_shape(name, *limits.shapes)
        if config.add_optimization_profile(profile) < 0:
            raise InputError(f"TensorRT {trt.__version__} refuses {limits} of {file.name!r}: see its log")
    cache_file = settings.timing_cache
    known = cache_file.read_bytes() if cache_file is not None and cache_file.exists() else b""
    timing_cache = _timing_cache(config, known) or _timing_cache(config, b"")
    monitor = _monitor(lambda steps: progress(f"{label}, {steps}"))
    config.progress_monitor = monitor
    plan = run_cancellable(lambda: builder.build_serialized_network(network, config), monitor.cancel)
    if plan is None:
        raise InputError(f"TensorRT {trt.__version__} cannot build {file.name!r}: see the errors of its log above")
    if cache_file is not None and timing_cache is not None:
        write_whole(cache_file, bytes(timing_cache.serialize()))
    return bytes(plan)


def _timing_cache(config: trt.IBuilderConfig, known: bytes) -> trt.ITimingCache | None:
    """The measurements of earlier builds, in use for this one; None where TensorRT does not take them."""
    timing_cache = config.create_timing_cache(known)
    # Of another GPU or version: a mismatch that is ignored would choose kernels by what was fast elsewhere.
    if timing_cache is None or not config.set_timing_cache(timing_cache, ignore_mismatch=False):
        return None
    return timing_cache


def describe(error: trt.ParserError, sources: Mapping[str, str]) -> str:
    """One error of the parser: the node, its operator, where it stands, and the line of ours that it comes from."""
    stack = " in ".join(reversed(error.local_function_stack())) if error.local_function_stack_size() else ""
    details = [f"node {error.node()}", *([f"in {stack}"] if stack else [])]
    if source := sources.get(error.node_name()):
        details.append(f"from {source}")
    return f"{error.node_operator()} {error.node_name()!r} ({', '.join(details)}): {' '.join(error.desc().split())}"


def allow_decomposition(network: trt.INetworkDefinition) -> int:
    """Lets TensorRT compute an attention by smaller kernels where it has no fused one; without, such a build fails.

    Returns:
        How many attentions the network has.
    """
    import tensorrt as trt

    found = 0
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # get_layer gives the base class whatever the layer is, and a class is assigned to see the rest of it: the
            # bindings know no other way.
            layer.__class__ = trt.IAttentionInputLayer
            attention = cast("trt.IAttentionInputLayer", layer).attention
            attention.decomposable = True
            found += 1
    return found


def run_cancellable(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Runs in a thread what leaves Python for minutes and would not hear Ctrl-C; tells it to stop, and waits for it.

    Raises:
        KeyboardInterrupt: after the work has ended.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            cancel()
            raise


def _monitor(progress: Progress) -> Any:
    """Shows the steps of a build, and stops it at the next one after `cancel`.

    TensorRT calls it from its own threads. Phases nest: the bar is of the outermost, behind it stands the innermost.
    """

    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self._cancelled = False
            self._steps: dict[str, tuple[int, int]] = {}  # phase -> done and all, outermost first

        def cancel(self) -> None:
            self._cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = (0, num_steps)
            self._show()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._steps[phase_name] = (step + 1, self._steps[phase_name][1])
            self._show()
            return not self._cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _show(self) -> None:
            phases = list(self._steps.items())
            for _, (done, steps) in phases[:1]:
                filled = BAR * min(done, steps) // max(steps, 1)
                name, (step, of) = phases[-1]
                progress(f"{'█' * filled}{'░' * (BAR - filled)} {name} {step} of {of}")

    return Monitor()
