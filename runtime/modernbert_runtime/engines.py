"""Which engine runs which artifact of a bundle: the choice, its reason, and the engine itself."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.engine import Engine
from modernbert_runtime.errors import BundleError, EngineError, InputError
from modernbert_runtime.manifest import Artifact
from modernbert_runtime.onnxruntime_engine import CPU, OnnxRuntimeEngine
from modernbert_runtime.openvino_engine import OpenVinoEngine

EngineName = Literal["auto", "onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class OpenedEngine:
    """An engine that is ready, what it runs, and why this one.

    Args:
        reason: part of a sentence, for the log.
        compute: number format of the arithmetic: the artifact's precision, or "bf16".
    """

    engine: Engine
    artifact: Artifact
    compute: str
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
) -> OpenedEngine:
    """Choose an engine and an artifact, and load them. For the arguments see `Embedder.load`.

    Args:
        bundle: holds the artifacts.
        output: name of the model's output that `Engine.run` returns unless asked for another.
        bounded_memory: whether a memory limit must hold, which only onnxruntime keeps: OpenVINO packs the weights anew
            for batches of other sizes and keeps the copies.

    Raises:
        InputError: an unknown engine, or options that do not go together.
        BundleError: the bundle lacks the precision, or a file of it is not whole.
        EngineError: the engine is not installed or cannot load the model.
    """
    if engine not in get_args(EngineName):
        raise InputError(f"engine must be one of {', '.join(get_args(EngineName))}, not {engine!r}")
    if engine == "tensorrt":
        raise EngineError(
            "engine='tensorrt' is not in this release: use engine='onnxruntime' with "
            "providers=['TensorrtExecutionProvider', 'CUDAExecutionProvider']"
        )
    chosen, reason = _choose(bundle, engine, precision, providers, bounded_memory)
    if chosen == "openvino":
        if bounded_memory:
            raise InputError("max_memory is kept by engine='onnxruntime' only: leave it out, or choose that engine")
        if providers is not None:
            raise InputError("providers belong to engine='onnxruntime': leave them out, or choose that engine")
        artifact, compute = _openvino_artifact(bundle, precision)
        return OpenedEngine(
            engine=OpenVinoEngine(
                bundle.onnx_path(artifact),
                output=output,
                compute="bf16" if compute == "bf16" else "fp32",
                threads=threads,
                options=options,
            ),
            artifact=artifact,
            compute=compute,
            reason=reason,
        )
    providers = (CPU,) if providers is None else providers
    artifact = _artifact(bundle, ("portable",) if tuple(providers) == (CPU,) else ("ort-cuda", "portable"), precision)
    return OpenedEngine(
        engine=OnnxRuntimeEngine(
            bundle.onnx_path(artifact),
            output=output,
            providers=providers,
            threads=threads,
            keep_little_memory=bounded_memory,
            options=options,
        ),
        artifact=artifact,
        compute=artifact.precision,
        reason=reason,
    )


def _choose(
    bundle: Bundle, engine: EngineName, precision: str | None, providers: Sequence[str] | None, bounded_memory: bool
) -> tuple[Literal["onnxruntime", "openvino"], str]:
    if engine in ("onnxruntime", "openvino"):
        return engine, "as asked"
    if providers is not None:
        return "onnxruntime", "providers are given"
    if bounded_memory:
        return "onnxruntime", "max_memory is given"
    have_ort, have_openvino = _installed("onnxruntime"), _installed("openvino")
    if precision == "bf16":
        return "openvino", "precision bf16"
    if have_openvino and any(artifact.target == "openvino" for artifact in bundle.manifest.artifacts):
        return "openvino", "it is installed and the bundle has an artifact for it"
    if have_openvino and not have_ort:
        return "openvino", "onnxruntime is not installed"
    return "onnxruntime", "the bundle has no artifact for openvino" if have_openvino else "openvino is not installed"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked by None in sys.modules
        return False


def _openvino_artifact(bundle: Bundle, precision: str | None) -> tuple[Artifact, str]:
    """The artifact, and the number format to compute in: OpenVINO makes bfloat16 of a float32 file by itself."""
    targets = ("openvino", "portable")
    if precision == "bf16":
        return _artifact(bundle, targets, "fp32"), "bf16"
    artifact = _artifact(bundle, targets, precision)
    return artifact, artifact.precision


def _artifact(bundle: Bundle, targets: Sequence[str], precision: str | None) -> Artifact:
    """The first artifact of the first target that has one of this precision."""
    for target in targets[:-1]:
        try:
            return bundle.artifact(target=target, precision=precision)
        except BundleError:
            continue
    return bundle.artifact(target=targets[-1], precision=precision)
