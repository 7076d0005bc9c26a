"""Which engine runs which artifact of a bundle: the choice, its reason, and the engine itself."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.cuda_device import find_gpus
from modernbert_runtime.engine import Engine, PackedEngine
from modernbert_runtime.errors import BundleError, EngineError, InputError, one_line
from modernbert_runtime.gpu_engines import FoundPlans, bundle_plans, open_plans, open_profiled
from modernbert_runtime.machine import multiplies_int8_exactly
from modernbert_runtime.manifest import PACKED, Artifact
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine, PackedOnnxRuntimeEngine, load_onnxruntime
from modernbert_runtime.onnxruntime_providers import CPU, CUDA, TENSORRT, cuda_options, provider_names
from modernbert_runtime.openvino_engine import OpenVinoEngine
from modernbert_runtime.plan_store import PLAN_GRAPHS

EngineName = Literal["auto", "onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class OpenedEngine:
    """An engine that is ready, what it runs, and why this one.

    Args:
        reason: part of a sentence, for the log.
    """

    engine: Engine | PackedEngine
    artifact: Artifact
    reason: str


def open_engine(
    bundle: Bundle,
    *,
    output: str,
    engine: EngineName = "auto",
    precision: str | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    bounded_memory: bool = False,
    options: Mapping[str, str] | None = None,
    packed: bool | None = False,
) -> OpenedEngine:
    """Choose an engine and an artifact, and load them. For the arguments see `Embedder.load`.

    Args:
        bundle: holds the artifacts.
        output: name of the model's output that `Engine.run` returns unless asked for another.
        bounded_memory: whether a memory limit must hold, which only onnxruntime keeps: OpenVINO packs the weights anew
            for batches of other sizes and keeps the copies.
        packed: whether the engine shall be a `PackedEngine`; None where that is possible.

    Raises:
        InputError: an unknown engine, or options that do not go together.
        BundleError: the bundle lacks the precision, or a file of it is not whole.
        EngineError: the engine is not installed or cannot load the model.
    """
    if engine not in get_args(EngineName):
        raise InputError(f"engine must be one of {', '.join(get_args(EngineName))}, not {engine!r}")
    if engine != "onnxruntime" and engine != "auto":
        if bounded_memory:
            raise InputError("max_memory is kept by engine='onnxruntime' only: leave it out, or choose that engine")
        if providers is not None:
            raise InputError("providers belong to engine='onnxruntime': leave them out, or choose that engine")
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"engine_options must map str to str, not be {options!r:.100}")
    chosen = _choose(bundle, engine, precision, providers, bounded_memory)
    if packed and (chosen.engine != "onnxruntime" or provider_names(chosen.providers) != (CPU,)):
        raise InputError("packed=True runs with engine='onnxruntime' on the CPU only: choose that, or leave it out")
    opened: Engine | PackedEngine
    if chosen.engine == "tensorrt":
        opened, artifact = open_plans(bundle, output=output, precision=precision, options=options, found=chosen.plans)
    elif chosen.engine == "openvino":
        artifact = _artifact(bundle, ("openvino", "portable"), precision)
        opened = OpenVinoEngine(
            bundle.onnx_path(artifact), output=output, precision=artifact.precision, threads=threads, options=options
        )
    else:
        names = provider_names(chosen.providers)
        artifact = _onnxruntime_artifact(bundle, names, precision, packed)
        if overflows_here(artifact):
            raise EngineError(
                f"{artifact.file!r} has 8-bit weights, whose products overflow on CPUs without VNNI, such as this one: "
                "export the bundle with --reduce-range, or choose another precision"
            )

        def session(file: Artifact, provider_options: Mapping[str, Mapping[str, str]]) -> Any:
            engine_class = PackedOnnxRuntimeEngine if file.target == PACKED else OnnxRuntimeEngine
            return engine_class(
                bundle.onnx_path(file),
                output=output,
                providers=names,
                provider_options=provider_options,
                threads=threads,
                keep_little_memory=bounded_memory,
                options=options,
            )

        if TENSORRT in names:
            opened = open_profiled(bundle, artifact, session)
        else:
            opened = session(artifact, {CUDA: cuda_options()} if CUDA in names else {})
    return OpenedEngine(engine=opened, artifact=artifact, reason=chosen.reason)


def overflows_here(artifact: Artifact) -> bool:
    """Whether it has 8-bit weights, on a CPU where their products overflow: see `machine.multiplies_int8_exactly`."""
    return artifact.precision == "int8" and not artifact.reduced_range and not multiplies_int8_exactly()


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What shall run, and why; `plans` are those of tensorrt where they were looked up already."""

    engine: Literal["onnxruntime", "openvino", "tensorrt"]
    reason: str
    providers: Sequence[str] = (CPU,)
    plans: FoundPlans | None = None


def _choose(
    bundle: Bundle, engine: EngineName, precision: str | None, providers: Sequence[str] | None, bounded_memory: bool
) -> _Choice:
    """For "auto" in this order: what the caller's other arguments need, a GPU, an artifact for openvino, the CPU."""
    if engine != "auto":
        return _Choice(engine=engine, reason="as asked", providers=(CPU,) if providers is None else providers)
    if providers is not None:
        return _Choice(engine="onnxruntime", reason="providers are given", providers=providers)
    if bounded_memory:
        return _Choice(engine="onnxruntime", reason="max_memory is given")
    on_gpu, lacking = _choose_gpu(bundle, precision)
    if on_gpu is not None:
        return on_gpu
    have_ort, have_openvino = _installed("onnxruntime"), _installed("openvino")
    # Of this precision: the portable int8 graph, which it would take otherwise, is as slow as fp32 there.
    if have_openvino and any(
        artifact.target == "openvino" and precision in (None, artifact.precision)
        for artifact in bundle.manifest.artifacts
    ):
        chosen: Literal["onnxruntime", "openvino"] = "openvino"
        reason = "it is installed and the bundle has an artifact for it"
    elif have_openvino and not have_ort:
        chosen, reason = "openvino", "onnxruntime is not installed"
    else:
        chosen = "onnxruntime"
        what = f" in {precision}" if precision is not None else ""
        reason = f"the bundle has no artifact for openvino{what}" if have_openvino else "openvino is not installed"
    return _Choice(engine=chosen, reason="; ".join([reason, *lacking]))


def _choose_gpu(bundle: Bundle, precision: str | None) -> tuple[_Choice | None, list[str]]:
    """What runs on this machine's GPU, else why nothing does; on a machine without one there is nothing to tell."""
    try:
        gpu = find_gpus()[0].name
    except EngineError:
        return None, []
    try:
        plans = bundle_plans(bundle, precision)
        return _Choice(engine="tensorrt", reason=f"plans for this {gpu} were built here", plans=plans), []
    except (BundleError, EngineError) as error:
        lacking = [f"not tensorrt: {one_line(error)}"]
    if not _installed("onnxruntime") or CUDA not in load_onnxruntime().get_available_providers():
        return None, [*lacking, f"not on the {gpu}: onnxruntime has no {CUDA}, which onnxruntime-gpu has"]
    return _Choice(engine="onnxruntime", reason="; ".join([f"a {gpu} is here", *lacking]), providers=(CUDA, CPU)), []


def _onnxruntime_artifact(
    bundle: Bundle, providers: Sequence[str], precision: str | None, packed: bool | None
) -> Artifact:
    """The artifact for these providers; on the CPU the packed one wherever there is one, unless `packed` forbids it.

    It computes less where texts are few and unlike, and about the same elsewhere. Padded over packed CPU time of the
    base model, fp32 / int8 (benchmarks/packed_batches.py; a shared machine, where a few percent are noise): 16 queries
    1.73 / 1.71, 300 queries 1.04 / 1.09, 8 texts of 20 to 1,000 tokens 1.20 / 0.96, one text of 2,048 tokens 1.09 /
    1.10.
    """
    if providers[0] == TENSORRT:
        targets: tuple[str, ...] = (PLAN_GRAPHS[-1], "portable")
    else:
        targets = ("ort-cuda", "portable") if tuple(providers) != (CPU,) else ("portable",)
    padded = _artifact(bundle, targets, precision)
    if packed is False or tuple(providers) != (CPU,):
        return padded
    try:
        return bundle.artifact(target=PACKED, precision=padded.precision)
    except BundleError:
        if packed:
            raise BundleError(
                f"packed=True needs a packed artifact in {padded.precision}, which this bundle lacks: export it again "
                "with --packed, or leave packed out"
            ) from None
        return padded


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked by None in sys.modules
        return False


def _artifact(bundle: Bundle, targets: Sequence[str], precision: str | None) -> Artifact:
    """The first artifact of the first target that has one of this precision."""
    for target in targets[:-1]:
        try:
            return bundle.artifact(target=target, precision=precision)
        except BundleError:
            continue
    return bundle.artifact(target=targets[-1], precision=precision)
