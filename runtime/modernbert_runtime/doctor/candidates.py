"""Every engine, provider and precision that a bundle could run on, and for those that cannot be tried here: why."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import BundleError, EngineError, one_line
from modernbert_runtime.gpu_engines import bundle_plans
from modernbert_runtime.onnxruntime_engine import load_onnxruntime
from modernbert_runtime.onnxruntime_providers import CPU, CUDA, TENSORRT


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the bundle.

    Args:
        name: for people, such as "onnxruntime CUDA fp32".
        engine: as `Embedder.load` takes it.
        precision: what it computes in.
        providers: of onnxruntime.
        missing: why it cannot be tried on this machine; "" where it can.
    """

    name: str
    engine: str
    precision: str
    providers: tuple[str, ...] | None = None
    missing: str = ""


def find_candidates(bundle: Bundle, no_gpu: str) -> list[Candidate]:
    """What `examine` tries on a bundle, the reference of `Reference.of_bundle` first.

    Args:
        bundle: what to run.
        no_gpu: why there is no GPU; "" where there is one.
    """
    return [*_onnxruntime(bundle, no_gpu), *_openvino(bundle), *_tensorrt(bundle, no_gpu)]


def _onnxruntime(bundle: Bundle, no_gpu: str) -> Iterator[Candidate]:
    try:
        available = load_onnxruntime().get_available_providers()
        missing = ""
    except EngineError as error:
        available, missing = [], str(error)
    for provider in (CPU, CUDA, TENSORRT):
        lacking = missing or (no_gpu if provider != CPU else "")
        if not lacking and provider not in available:
            lacking = f"this onnxruntime has no {provider}: pip install onnxruntime-gpu in place of onnxruntime"
        targets = {CPU: ("portable",), CUDA: ("ort-cuda", "portable"), TENSORRT: ("tensorrt", "portable")}[provider]
        for precision in _precisions(bundle, targets):
            yield Candidate(
                name=f"onnxruntime {provider.removesuffix('ExecutionProvider')} {precision}",
                engine="onnxruntime",
                precision=precision,
                providers=(TENSORRT, CUDA) if provider == TENSORRT else (provider,),
                missing=lacking,
            )


def _openvino(bundle: Bundle) -> Iterator[Candidate]:
    installed = importlib.util.find_spec("openvino") is not None
    missing = "" if installed else 'openvino is not installed: pip install "modernbert-deploy[openvino]"'
    for precision in _precisions(bundle, ("openvino", "portable")):
        yield Candidate(name=f"openvino CPU {precision}", engine="openvino", precision=precision, missing=missing)


def _tensorrt(bundle: Bundle, no_gpu: str) -> Iterator[Candidate]:
    for precision in _precisions(bundle, ("tensorrt-dense",)) or ["fp16"]:
        missing = no_gpu
        if not missing:
            try:
                bundle_plans(bundle, precision)
            except (BundleError, EngineError) as error:
                missing = one_line(error)
        yield Candidate(name=f"tensorrt {precision}", engine="tensorrt", precision=precision, missing=missing)


def _precisions(bundle: Bundle, targets: tuple[str, ...]) -> list[str]:
    artifacts = bundle.manifest.artifacts
    return list(dict.fromkeys(one.precision for target in targets for one in artifacts if one.target == target))
