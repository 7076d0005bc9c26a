"""Engines for NVIDIA GPUs, on a machine without one: which plans are trusted, what is chosen and why, which options
ONNX Runtime's providers get.

Stand-ins take the place of the driver and of the engine itself, whose own tests are in test_tensorrt_engine.py.
"""

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_runtime_tiny_bundle import expected_vector, write_tiny_bundle

from modernbert_runtime import BundleError, Embedder, EngineError, InputError, cuda_device, engines, gpu_engines
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.cuda_device import Gpu, find_gpus
from modernbert_runtime.manifest import MANIFEST_NAME, Manifest, sha256_file
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine
from modernbert_runtime.onnxruntime_providers import CPU, CUDA, TENSORRT, cuda_options, tensorrt_options
from modernbert_runtime.onnxruntime_tensorrt import ProfiledEngine
from modernbert_runtime.plan_store import Plans, PlanSource, find_plans, plan_directory, remember
from modernbert_runtime.tensorrt_plan import RECORD_NAME, PlanKey, PlanRecord, plan_profiles

GPU = Gpu(name="Test GPU", compute_capability="9.0", memory_bytes=1 << 30, cuda="13.0")
PLANS = {"tensorrt-dense.plan": b"dense", "tensorrt.plan": b"banded"}


def for_tensorrt(manifest: Manifest) -> Manifest:
    """Both artifacts are graphs for TensorRT; a third is the portable one."""
    first, second = manifest.artifacts
    dense = replace(second, target="tensorrt-dense", precision="fp16")
    return replace(manifest, artifacts=(first, dense, replace(first, target="tensorrt", precision="fp16")))


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Bundle.open(write_tiny_bundle(tmp_path / "bundle", change=for_tensorrt))


def key(bundle: Bundle, **changes: Any) -> PlanKey:
    source = PlanSource.of(bundle)
    here = PlanKey(
        onnx_sha256=source.sha256,
        tensorrt="11.4.0",
        gpu="Test GPU",
        compute_capability="9.0",
        precision="fp16",
        profiles=plan_profiles(bundle.manifest.max_length),
    )
    return replace(here, **changes)


def write_plans(directory: Path, of: PlanKey) -> PlanRecord:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in PLANS.items():
        (directory / name).write_bytes(content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in PLANS.items()}
    record = PlanRecord(key=of, files=files)
    (directory / RECORD_NAME).write_text(record.to_json())
    return record


def found(bundle: Bundle, **options: Any) -> Plans:
    return find_plans(bundle, PlanSource.of(bundle), key(bundle, profiles=()), **options)


# Trust


def test_hash_is_that_of_graphs_and_weights(bundle: Bundle) -> None:
    files = ["onnx/model_inline.onnx", "onnx/model.onnx", "onnx/model.onnx_data"]  # graphs, then weights
    hashes = [hashlib.sha256((bundle.root / name).read_bytes()).hexdigest() for name in files]
    assert PlanSource.of(bundle).sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_plans_with_this_users_record_are_found_in_the_cache_and_in_the_bundle(bundle: Bundle) -> None:
    cached = plan_directory(key(bundle))
    remember(write_plans(cached, key(bundle)))
    assert found(bundle).directory == cached
    assert found(bundle).load("tensorrt.plan") == b"banded"
    for name in PLANS:
        (cached / name).unlink()
    with pytest.raises(EngineError, match="the plans themselves are gone"):
        found(bundle)
    inside = bundle.root / "tensorrt" / key(bundle).folder
    write_plans(inside, key(bundle))
    assert found(bundle).directory == inside
    (inside / "tensorrt.plan").write_bytes(b"forged")
    with pytest.raises(EngineError, match="sha256 differs"):
        found(bundle).load("tensorrt.plan")


def list_in_manifest(bundle: Bundle) -> Bundle:
    files = {p.relative_to(bundle.root).as_posix(): sha256_file(p) for p in (bundle.root / "tensorrt").glob("*/*")}
    manifest = replace(bundle.manifest, files={**bundle.manifest.files, **files})
    (bundle.root / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle.open(bundle.root)


def test_plans_that_came_with_a_bundle_are_not_run(bundle: Bundle) -> None:
    """A forged plan comes with a forged record, and with a forged manifest: only the user can say that it is fine."""
    write_plans(bundle.root / "tensorrt" / key(bundle).folder, key(bundle))
    with pytest.raises(BundleError, match=r"plans\.json' is not listed"):
        found(bundle, trust_bundle=True)
    bundle = list_in_manifest(bundle)
    with pytest.raises(EngineError, match="not known to be built by this user, and plans are machine code") as caught:
        found(bundle)
    assert "\n" not in str(caught.value)
    assert found(bundle, trust_bundle=True).load("tensorrt.plan") == b"banded"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "Other GPU"}, "gpu was Other GPU, here it is Test GPU"),
        ({"tensorrt": "10.8.0"}, "tensorrt was 10.8.0, here it is 11.4.0"),
        ({"profiles": plan_profiles(8)}, "its profiles end at 8 tokens, the bundle takes 16"),
    ],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_plans_for_another_machine_are_refused_with_the_reason(
    bundle: Bundle, change: dict[str, Any], message: str, trusted: bool
) -> None:
    of = key(bundle, **change)
    if trusted:
        write_plans(bundle.root / "tensorrt" / of.folder, of)
        bundle = list_in_manifest(bundle)
    else:
        remember(write_plans(plan_directory(of), of))
    with pytest.raises(EngineError, match=message):
        found(bundle, trust_bundle=trusted)


def test_record_that_others_could_write_is_refused(bundle: Bundle) -> None:
    directory = remember(write_plans(plan_directory(key(bundle)), key(bundle)))
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    with pytest.raises(EngineError, match="not this user's alone"):
        found(bundle)


# The driver


def driver(*, count: int = 1, status: int = 0) -> Any:
    def put(reference: Any, value: int) -> int:
        reference._obj.value = value
        return 0

    def name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"Test GPU"
        return 0

    class Driver:
        cuInit = staticmethod(lambda flags: status)
        cuDeviceGetCount = staticmethod(lambda out: put(out, count))
        cuDriverGetVersion = staticmethod(lambda out: put(out, 13000))
        cuDeviceGet = staticmethod(put)
        cuDeviceGetName = staticmethod(name)
        cuDeviceTotalMem_v2 = staticmethod(lambda out, device: put(out, 1 << 30))
        cuDeviceGetAttribute = staticmethod(lambda out, which, device: put(out, {75: 9, 76: 0}[which]))

    return Driver


def test_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: driver())
    assert find_gpus() == [GPU]


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [(driver(status=100), r"failed to start \(CUDA error 100\)"), (driver(count=0), "shows this process no GPU")],
)
def test_no_gpu_is_said(stand_in: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: stand_in)
    with pytest.raises(EngineError, match=message):
        find_gpus()


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_LIBRARY", "libno-such-driver.so")
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        find_gpus()


# Choice


class PlanEngine(OnnxRuntimeEngine):
    """Runs the bundle's model in place of the plans."""

    def __init__(self, plans: Plans, *, onnx_sha256: str, output: str) -> None:
        super().__init__(plans.directory.parents[4] / "bundle/onnx/model.onnx", output=output)
        self.name = "tensorrt"


@pytest.fixture
def gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and TensorRT are here."""
    monkeypatch.setattr(engines, "find_gpus", lambda: [GPU])
    monkeypatch.setattr(gpu_engines, "find_gpus", lambda: [GPU])
    monkeypatch.setattr(gpu_engines, "key_here", lambda sha256, precision: key(bundle, precision=precision))
    monkeypatch.setattr(gpu_engines, "TensorRtEngine", PlanEngine)


class Session(onnxruntime.InferenceSession):
    """Notes the providers that it is given and computes on the CPU."""

    asked: list[list[tuple[str, dict[str, str]]]]

    def __init__(
        self, path: str, settings: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> None:
        assert not enable_fallback  # to other providers, which ONNX Runtime would print to stdout
        self.asked.append(providers)
        super().__init__(path, settings, providers=[CPU])

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.asked[-1]]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> type[Session]:
    """onnxruntime-gpu is installed, as it seems."""
    Session.asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr("modernbert_runtime.onnxruntime_engine._DEVICES", {CUDA: "cpu", TENSORRT: "cpu"})
    return Session


def load(bundle: Bundle, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """Embeds with what is chosen, checks the vectors, and returns what the log says."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="modernbert_runtime"), Embedder.load(bundle.root, **options) as embedder:
        np.testing.assert_allclose(embedder.embed(["a b"]), [expected_vector("a b")], atol=1e-6)
    return caplog.messages[-1]


def test_auto_takes_plans_that_were_built_here(bundle: Bundle, gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    remember(write_plans(plan_directory(key(bundle)), key(bundle)))
    message = load(bundle, caplog)
    assert (
        "tensorrt (plans for this Test GPU were built here), onnx/model_inline.onnx, target tensorrt-dense" in message
    )
    assert "precision fp16" in message
    assert "tensorrt (as asked)" in load(bundle, caplog, engine="tensorrt")


def test_auto_takes_cuda_without_plans(
    bundle: Bundle, gpu: None, sessions: type[Session], caplog: pytest.LogCaptureFixture
) -> None:
    message = load(bundle, caplog)
    assert "(a Test GPU is here; not tensorrt: no TensorRT plans of this bundle that fit" in message
    assert "this user has built none" in message
    assert sessions.asked == [[(CUDA, cuda_options()), (CPU, {})]]


def test_auto_says_what_the_gpu_lacks(bundle: Bundle, gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    message = load(bundle, caplog)
    assert "onnxruntime (CPUExecutionProvider)" in message
    assert f"not on the Test GPU: onnxruntime has no {CUDA}, which onnxruntime-gpu has" in message


def test_tensorrt_provider_gets_a_session_per_profile(
    bundle: Bundle, gpu: None, sessions: type[Session], caplog: pytest.LogCaptureFixture
) -> None:
    load(bundle, caplog, providers=[TENSORRT, CUDA], engine="onnxruntime")
    (((name, options), cuda),) = sessions.asked
    assert (name, cuda) == (TENSORRT, (CUDA, cuda_options()))
    assert options["trt_profile_max_shapes"] == "input_ids:256x16,attention_mask:256x16"
    cache = Path(options["trt_engine_cache_path"])
    assert cache.stat().st_mode & 0o777 == 0o700
    assert "/onnxruntime/test-gpu-ort" in str(cache)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "tensorrt"}, EngineError, "no TensorRT plans of this bundle"),
        ({"engine": "tensorrt", "precision": "bf16"}, BundleError, "no artifact tensorrt-dense/bf16"),
        ({"engine": "tensorrt", "providers": [CPU]}, InputError, "providers belong to engine='onnxruntime'"),
        ({"engine": "tensorrt", "max_memory": "9GB"}, InputError, "max_memory is kept by engine='onnxruntime' only"),
        (
            {"engine": "tensorrt", "engine_options": {"x": "1"}},
            InputError,
            "are trust_bundle_plans '0' or '1', not 'x'",
        ),
        ({"engine": "tensorrt", "engine_options": {"trust_bundle_plans": "yes"}}, InputError, "not .*'yes'"),
    ],
)
def test_choices_that_cannot_be(bundle: Bundle, gpu: None, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Embedder.load(bundle.root, **options)
    assert "\n" not in str(caught.value)


# ONNX Runtime's options

# From ONNX Runtime's pages on the CUDA and the TensorRT execution provider (1.22), those with a value of one kind.
FLAG, NUMBER, TEXT, SHAPES = "[01]", "[0-9]+", ".+", r"input_ids:\d+x\d+,attention_mask:\d+x\d+"
DOCUMENTED = {
    CUDA: {
        "device_id": NUMBER,
        "gpu_mem_limit": NUMBER,
        "arena_extend_strategy": "kNextPowerOfTwo|kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE|HEURISTIC|DEFAULT",
        "cudnn_conv_use_max_workspace": FLAG,
        "do_copy_in_default_stream": FLAG,
        "enable_cuda_graph": FLAG,
        "prefer_nhwc": FLAG,
        "use_tf32": FLAG,
    },
    TENSORRT: {
        "device_id": NUMBER,
        "trt_max_workspace_size": NUMBER,
        "trt_fp16_enable": FLAG,
        "trt_engine_cache_enable": FLAG,
        "trt_engine_cache_path": TEXT,
        "trt_engine_cache_prefix": TEXT,
        "trt_timing_cache_enable": FLAG,
        "trt_timing_cache_path": TEXT,
        "trt_builder_optimization_level": NUMBER,
        "trt_cuda_graph_enable": FLAG,
        "trt_profile_min_shapes": SHAPES,
        "trt_profile_opt_shapes": SHAPES,
        "trt_profile_max_shapes": SHAPES,
    },
}


@pytest.mark.parametrize("profile", plan_profiles(8192), ids=lambda profile: str(profile.max_length))
def test_options_are_documented_and_the_profile_is_in_them(profile: Any, tmp_path: Path) -> None:
    options = tensorrt_options(profile, tmp_path)
    for provider, given in ((TENSORRT, options), (CUDA, cuda_options())):
        assert set(given) <= set(DOCUMENTED[provider])
        for name, value in given.items():
            assert re.fullmatch(DOCUMENTED[provider][name], value), f"{name}={value}"
    least, best, most = (options[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max"))
    assert least == "input_ids:1x1,attention_mask:1x1"
    assert f"x{profile.max_length}," in best
    assert most.endswith(f"attention_mask:{profile.max_batch}x{profile.max_length}")


def test_engines_of_profiles_never_share_a_file(tmp_path: Path) -> None:
    prefixes = {tensorrt_options(profile, tmp_path)["trt_engine_cache_prefix"] for profile in plan_profiles(8192)}
    assert len(prefixes) == 4


class Echo:
    """Gives back its inputs, and is told of no more than its profile."""

    name = "echo"

    def __init__(self, profile: Any, log: list[tuple[int, int]]) -> None:
        self.profile, self.log, self.closed = profile, log, False

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray, output: str | None = None) -> np.ndarray:
        rows, length = input_ids.shape
        assert rows <= self.profile.max_batch
        assert length <= self.profile.max_length
        self.log.append((self.profile.max_length, rows))
        return input_ids * attention_mask

    def close(self) -> None:
        self.closed = True


def test_batches_go_to_the_engine_of_their_length_in_pieces() -> None:
    log: list[tuple[int, int]] = []
    made: list[Echo] = []

    def make(profile: Any) -> Echo:
        made.append(Echo(profile, log))
        return made[-1]

    engine = ProfiledEngine(plan_profiles(8192), make)
    assert [echo.profile.max_length for echo in made] == [128]
    for rows, length in ((200, 128), (3, 129), (3, 8192), (1, 5)):
        ids = np.random.default_rng(0).integers(0, 9, (rows, length))
        np.testing.assert_array_equal(engine.run(ids, np.ones_like(ids)), ids)
    assert log == [(128, 128), (128, 72), (512, 3), (8192, 2), (8192, 1), (128, 1)]
    assert len(made) == 3
    with pytest.raises(InputError, match="at most 8192"):
        engine.run(np.ones((1, 8193), np.int64), np.ones((1, 8193), np.int64))
    engine.close()
    assert all(echo.closed for echo in made)
    with pytest.raises(EngineError, match="closed"):
        engine.run(ids, ids)
