"""The builder on a machine without TensorRT: what it tells the library, over a stand-in that notes it.

That the real library has these names and signatures is what test_tensorrt_bindings.py proves.
"""

import signal
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from test_runtime_tiny_bundle import write_tiny_bundle

from modernbert.cli.export import build_plans_or_say_why
from modernbert.errors import InputError
from modernbert_export.source_lines import SOURCE
from modernbert_export.tensorrt.__main__ import main as build_main
from modernbert_export.tensorrt.build import build_plans, plan_bundle, run_cancellable
from modernbert_runtime import tensorrt_engine
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.plan_store import PLAN_GRAPHS, plan_directory
from modernbert_runtime.tensorrt_plan import PlanRecord, plan_profiles

PROFILES = plan_profiles(2048)


class Error:
    def __init__(self, node: int, stack: list[str]) -> None:
        self._node, self._stack = node, stack

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return f"name{self._node}"

    def node_operator(self) -> str:
        return "Attention"

    def desc(self) -> str:
        return "is not\n supported"

    def local_function_stack(self) -> list[str]:
        return self._stack

    def local_function_stack_size(self) -> int:
        return len(self._stack)


class Layer:
    """What get_layer gives: the base class, which knows its type and not what only such layers have."""

    def __init__(self, kind: str, attention: Any) -> None:
        self.type, self.held = kind, attention


class AttentionLayer(Layer):
    @property
    def attention(self) -> Any:
        return self.held


class TensorRt:
    """Notes what it is told; `errors` are the parser's, `plan` is what a build gives.

    A cache of another machine is `foreign`, one that cannot be read `broken`.
    """

    __version__ = "11.4.0"
    Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, severity: None})
    NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=3)
    MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    LayerType = types.SimpleNamespace(ATTENTION_INPUT="attention")
    ProfilingVerbosity = types.SimpleNamespace(DETAILED="detailed")
    IProgressMonitor = object
    IAttentionInputLayer = AttentionLayer

    def __init__(self, *, errors: tuple[Error, ...] = (), plan: bytes | None = b"plan", before: Any = None) -> None:
        self.errors, self.plan, self.before = errors, plan, before
        self.flags: list[int] = []
        self.parsed: list[str] = []
        self.limits: list[tuple[str, int]] = []
        self.shapes: list[list[tuple[Any, ...]]] = []
        self.caches: list[bytes] = []
        self.configs: list[Any] = []
        self.first_profile = 0
        self.attention = types.SimpleNamespace(decomposable=False)

    def Builder(self, logger: Any) -> Any:
        return types.SimpleNamespace(
            create_network=self.create_network,
            create_builder_config=self.create_config,
            create_optimization_profile=lambda: types.SimpleNamespace(
                shapes=[], set_shape=lambda *arguments: self.shapes[-1].append(arguments)
            ),
            build_serialized_network=self.build,
        )

    def create_network(self, flags: int) -> Any:
        self.flags.append(flags)
        self.shapes.append([])
        layers = [Layer("other", None), Layer("attention", self.attention)]
        return types.SimpleNamespace(num_layers=2, get_layer=layers.__getitem__)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return types.SimpleNamespace(
            parse_from_file=lambda path: self.parsed.append(path) or not self.errors,
            num_errors=len(self.errors),
            get_error=self.errors.__getitem__,
        )

    def create_config(self) -> Any:
        def create_timing_cache(known: bytes) -> Any:
            self.caches.append(known)
            return None if known == b"broken" else types.SimpleNamespace(known=known, serialize=lambda: b"new")

        config = types.SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.limits.append((pool, size)),
            add_optimization_profile=lambda profile: self.first_profile,
            create_timing_cache=create_timing_cache,
            set_timing_cache=lambda cache, ignore_mismatch: ignore_mismatch or cache.known != b"foreign",
        )
        self.configs.append(config)
        return config

    def build(self, network: Any, config: Any) -> bytes | None:
        if self.before is not None:
            self.before(config.progress_monitor)
        return self.plan


def make(trt: TensorRt, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PlanRecord:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt_engine, "device_here", lambda: ("Test GPU", "9.0"))
    monkeypatch.setenv("XDG_CACHE_HOME", f"{out.parent}-cache")
    graphs = {"tensorrt": Path("long.onnx"), "tensorrt-dense": Path("short.onnx")}
    return build_plans(graphs, out, profiles=PROFILES, precision="fp16", onnx_sha256="0" * 64, **options)


def test_each_graph_becomes_a_plan_with_its_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt, cache = TensorRt(), tmp_path / "timing.cache"
    cache.write_bytes(b"old")
    record = make(trt, tmp_path / "plans", monkeypatch, workspace_bytes=123, timing_cache=cache)
    assert PlanRecord.read(tmp_path / "plans") == record
    assert record.load(tmp_path / "plans", "tensorrt.plan") == b"plan"
    assert PlanRecord.read(plan_directory(record.key)) == record
    assert (record.key.gpu, record.key.compute_capability, record.key.flags) == ("Test GPU", "9.0", ("workspace=123",))
    assert trt.parsed == ["short.onnx", "long.onnx"]
    assert trt.flags == [1 << 3] * 2
    assert trt.limits == [("workspace", 123)] * 2
    # Lengths 128 and 512 from the dense graph, 2,048 from the banded one; each for both inputs.
    lengths = [[(name, most[1]) for name, _, _, most in shapes] for shapes in trt.shapes]
    inputs = ("input_ids", "attention_mask")
    assert lengths == [[(name, length) for length in (128, 512) for name in inputs], [(name, 2048) for name in inputs]]
    assert trt.attention.decomposable
    assert (trt.caches, cache.read_bytes()) == ([b"old", b"new"], b"new")
    assert not any(hasattr(config, "profiling_verbosity") for config in trt.configs)


@pytest.mark.parametrize("known", [b"foreign", b"broken"])
def test_timing_cache_of_another_machine_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bytes
) -> None:
    trt, cache = TensorRt(), tmp_path / "timing.cache"
    cache.write_bytes(known)
    make(trt, tmp_path / "plans", monkeypatch, timing_cache=cache, inspectable=True)
    assert (trt.caches[:2], cache.read_bytes()) == ([known, b""], b"new")
    assert {config.profiling_verbosity for config in trt.configs} == {"detailed"}


def test_refused_profile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = TensorRt()
    trt.first_profile = -1
    with pytest.raises(InputError, match=r"refuses Profile\(max_batch=128, max_length=128\) of 'short.onnx'"):
        make(trt, tmp_path / "plans", monkeypatch)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for TensorRT, on a machine that has it."""

    def with_graphs(manifest: Manifest) -> Manifest:
        artifacts = [replace(manifest.artifacts[0], target=target, precision="fp16") for target in PLAN_GRAPHS]
        return replace(manifest, artifacts=(manifest.artifacts[0], *artifacts))

    monkeypatch.setattr(tensorrt_engine, "device_here", lambda: ("Test GPU", "9.0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny_bundle(tmp_path / "bundle", change=with_graphs)


def install(trt: TensorRt, monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


def test_plans_are_built_once_and_again_when_anything_changes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = install(TensorRt(), monkeypatch)
    told: list[str] = []
    (out,) = plan_bundle(bundle, progress=told.append)
    assert out == bundle / "tensorrt/test-gpu-sm90-trt11.4.0-fp16"
    assert (len(trt.parsed), trt.limits) == (1, [])  # 16 tokens: the dense graph is enough
    (timing,) = (bundle.parent / "cache/modernbert-deploy/tensorrt-timing").iterdir()
    assert timing.read_bytes() == b"new"
    assert plan_bundle(bundle, progress=told.append) == [out]
    assert (len(trt.parsed), told[-1]) == (1, f"{out} is up to date")
    plan_bundle(bundle, workspace_bytes=5)
    assert (len(trt.parsed), trt.limits, trt.caches) == (2, [("workspace", 5)], [b"", b"new"])
    (out / "tensorrt-dense.plan").write_bytes(b"altered")
    plan_bundle(bundle, workspace_bytes=5)
    assert len(trt.parsed) == 3
    newer = install(TensorRt(), monkeypatch)
    newer.__version__ = "11.5.0"  # type: ignore[misc]
    assert plan_bundle(bundle) == [bundle / "tensorrt/test-gpu-sm90-trt11.5.0-fp16"]
    assert out.exists()


@pytest.mark.parametrize(
    ("trt", "arguments", "code", "message"),
    [
        (TensorRt(), [], 0, "building tensorrt-dense\n"),
        (TensorRt(), ["--workspace", "1GB"], 0, "building tensorrt-dense\n"),
        (TensorRt(), ["--workspace", "much"], 2, "error: workspace must be"),
        (TensorRt(errors=(Error(3, []),)), [], 2, "Attention 'name3' (node 3): is not supported"),
        (TensorRt(before=lambda monitor: signal.raise_signal(signal.SIGINT)), [], 130, "interrupted; plans that"),
    ],
    ids=["plain", "workspace", "bad workspace", "parser", "ctrl-c"],
)
def test_command_line_of_the_builder(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trt: TensorRt,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    install(trt, monkeypatch)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert build_main([str(bundle), *arguments]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.replace("building tensorrt-dense\n", "").splitlines()) == (code != 0)
    assert bool(said.out) == any((bundle / "tensorrt").glob("*")) == (code == 0)


def test_ctrl_c_after_the_export_says_what_is_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(monitor: Any) -> None:
        raise KeyboardInterrupt

    install(TensorRt(before=interrupted), monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=f"{bundle} is whole without the plans: python -m modernbert_export"):
        build_plans_or_say_why(bundle)


def test_all_errors_of_the_parser_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = TensorRt(errors=(Error(3, []), Error(8, ["outer", "inner"])))
    node = helper.make_node("Attention", [], ["y"], name="name8")
    node.metadata_props.add(key=SOURCE, value="layers.0.attn, modernbert/model.py:7")
    onnx.save(helper.make_model(helper.make_graph([node], "graph", [], [])), tmp_path / "short.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        make(trt, tmp_path / "plans", monkeypatch)
    message = str(caught.value)
    assert "refuses 'short.onnx'" in message
    assert "Attention 'name3' (node 3): is not supported" in message
    assert (
        "Attention 'name8' (node 8, in inner in outer, from layers.0.attn, modernbert/model.py:7): is not supported"
    ) in message
    assert not (tmp_path / "plans").exists()


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot build"):
        make(TensorRt(plan=None), tmp_path / "plans", monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_build_at_its_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def busy(monitor: Any) -> None:
        monitor.phase_start("tactics", None, 1000)
        signal.raise_signal(signal.SIGINT)  # heard by the main thread
        for step in range(1000):
            if not monitor.step_complete("tactics", step):
                return
            threading.Event().wait(0.01)
        pytest.fail("the build went on to its end")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            make(TensorRt(plan=None, before=busy), tmp_path / "plans", monkeypatch, progress=steps.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
    assert f"building tensorrt-dense, {'░' * 20} tactics 1 of 1000" in steps


def test_bar_is_of_the_outermost_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def phases(monitor: Any) -> None:
        monitor.phase_start("build", None, 4)
        assert monitor.step_complete("build", 0)
        monitor.phase_start("tactics", "build", 10)
        assert monitor.step_complete("tactics", 6)
        monitor.phase_finish("tactics")
        assert monitor.step_complete("build", 1)
        monitor.phase_finish("build")

    make(TensorRt(before=phases), tmp_path / "plans", monkeypatch, progress=steps.append)
    assert f"building tensorrt-dense, {'█' * 5}{'░' * 15} tactics 7 of 10" in steps
    assert f"building tensorrt-dense, {'█' * 10}{'░' * 10} build 2 of 4" in steps


def test_failure_of_the_work_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cancellable(lambda: 1 // 0, lambda: None)
