"""How a bundle's engines for NVIDIA GPUs are made: TensorRT plans, and ONNX Runtime's TensorRT provider."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.cuda_device import find_gpus
from modernbert_runtime.engine import Engine
from modernbert_runtime.errors import InputError
from modernbert_runtime.manifest import Artifact
from modernbert_runtime.onnxruntime_engine import load_onnxruntime
from modernbert_runtime.onnxruntime_providers import CUDA, TENSORRT, cuda_options, tensorrt_options
from modernbert_runtime.onnxruntime_tensorrt import ProfiledEngine
from modernbert_runtime.plan_store import PLAN_GRAPHS, Plans, PlanSource, find_plans, private_directory, user_cache
from modernbert_runtime.tensorrt_engine import TensorRtEngine, key_here
from modernbert_runtime.tensorrt_plan import Profile, plan_profiles

Session = Callable[[Artifact, Mapping[str, Mapping[str, str]]], Engine]


@dataclass(frozen=True, kw_only=True)
class FoundPlans:
    """Plans that fit this machine, and the graphs that they were built from."""

    source: PlanSource
    plans: Plans


def bundle_plans(bundle: Bundle, precision: str | None, *, trust_bundle: bool = False) -> FoundPlans:
    """The plans of a bundle that this machine may run.

    Raises:
        BundleError: the bundle has no graphs for TensorRT in this precision.
        EngineError: TensorRT, a GPU or plans that fit are missing.
    """
    source = PlanSource.of(bundle, precision)
    here = key_here(source.sha256, source.precision)
    return FoundPlans(source=source, plans=find_plans(bundle, source, here, trust_bundle=trust_bundle))


def open_plans(
    bundle: Bundle, *, output: str, precision: str | None, options: Mapping[str, str] | None, found: FoundPlans | None
) -> tuple[Engine, Artifact]:
    """The TensorRT engine and an artifact that its plans were built from.

    Args:
        bundle, output, precision: see `engines.open_engine`.
        options: "trust_bundle_plans" -> "1" runs plans that the bundle brings; see `plan_store`.
        found: plans, where they were looked up already.

    Raises:
        InputError: another option.
        BundleError, EngineError: as for `bundle_plans`, or a plan does not load.
    """
    options = dict(options or {})
    trust = options.pop("trust_bundle_plans", "0")
    if options or trust not in ("0", "1"):
        name, value = next(iter(options.items()), ("trust_bundle_plans", trust))
        raise InputError(f"engine_options of tensorrt are trust_bundle_plans '0' or '1', not {name!r}: {value!r}")
    found = found or bundle_plans(bundle, precision, trust_bundle=trust == "1")
    engine = TensorRtEngine(found.plans, onnx_sha256=found.source.sha256, output=output)
    return engine, next(iter(found.source.artifacts.values()))


def open_profiled(bundle: Bundle, artifact: Artifact, session: Session) -> Engine:
    """ONNX Runtime's TensorRT provider: a session per profile, each on the graph for its lengths.

    Args:
        bundle: holds the artifacts.
        artifact: the graph for all lengths, unless it is of a target that has one per length.
        session: opens one with these options of each provider.
    """
    graphs = PlanSource.of(bundle, artifact.precision).artifacts if artifact.target in PLAN_GRAPHS else {}
    ort = load_onnxruntime().__version__
    gpu = re.sub("[^a-z0-9]+", "-", find_gpus()[0].name.lower())
    built = user_cache() / "onnxruntime" / f"{gpu}-ort{ort}"

    def open_profile(profile: Profile) -> Engine:
        file = graphs.get(profile.graph, artifact)
        # Neither the graph's hash nor that of its weights says alone what an engine computes.
        hashes = [bundle.manifest.files[name][:16] for name in (file.file, file.data_file) if name]
        cache = private_directory(built / "-".join(hashes))
        return session(file, {TENSORRT: tensorrt_options(profile, cache), CUDA: cuda_options()})

    return ProfiledEngine(plan_profiles(bundle.manifest.max_length), open_profile)
