"""The builder on a machine without TensorRT: what it tells the library, over a stand-in that notes it.

That the real library has these names and signatures is what test_tensorrt_bindings.py proves.
"""

import signal
import threading
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from modernbert.errors import InputError
from modernbert_export.source_lines import SOURCE
from modernbert_export.tensorrt import build
from modernbert_export.tensorrt.build import build_plans, run_cancellable
from modernbert_runtime import tensorrt_engine
from modernbert_runtime.plan_store import plan_directory
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


class TensorRt:
    """Notes what it is told; `errors` are the parser's, `plan` is what a build gives."""

    __version__ = "11.4.0"
    Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, severity: None})
    NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=3)
    MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    LayerType = types.SimpleNamespace(ATTENTION_INPUT="attention")
    IProgressMonitor = object

    def __init__(self, *, errors: tuple[Error, ...] = (), plan: bytes | None = b"plan", before: Any = None) -> None:
        self.errors, self.plan, self.before = errors, plan, before
        self.flags: list[int] = []
        self.parsed: list[str] = []
        self.limits: list[tuple[str, int]] = []
        self.shapes: list[list[tuple[Any, ...]]] = []
        self.caches: list[bytes] = []
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
        layers = [
            types.SimpleNamespace(type="other"),
            types.SimpleNamespace(type="attention", attention=self.attention),
        ]
        return types.SimpleNamespace(num_layers=2, get_layer=layers.__getitem__)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return types.SimpleNamespace(
            parse_from_file=lambda path: self.parsed.append(path) or not self.errors,
            num_errors=len(self.errors),
            get_error=self.errors.__getitem__,
        )

    def create_config(self) -> Any:
        return types.SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.limits.append((pool, size)),
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=lambda known: (
                self.caches.append(known) or types.SimpleNamespace(serialize=lambda: b"new")
            ),
            set_timing_cache=lambda cache, ignore_mismatch: True,
        )

    def build(self, network: Any, config: Any) -> bytes | None:
        if self.before is not None:
            self.before(config.progress_monitor)
        return self.plan


def make(trt: TensorRt, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PlanRecord:
    monkeypatch.setattr(build, "load_tensorrt", lambda: trt)
    monkeypatch.setattr(tensorrt_engine, "load_tensorrt", lambda: trt)
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
    assert "building, tactics 1 of 1000" in steps


def test_failure_of_the_work_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cancellable(lambda: 1 // 0, lambda: None)
