"""The TensorRT engine on a machine without a GPU: its own code, over a stand-in for the two libraries it calls.

The stand-in keeps "device" memory on the host and computes with ONNX Runtime, from the addresses it is given: what
reaches the wrong place, or is copied too late, gives wrong numbers. A captured graph is a list of calls, replayed. That
the real libraries have these names and signatures is what test_tensorrt_bindings.py proves.
"""

import copy
import ctypes
import dataclasses
import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import TINY

from modernbert.model import load_model
from modernbert.pooling import EmbeddingHead
from modernbert_export.lower import lower
from modernbert_runtime import tensorrt_engine
from modernbert_runtime.errors import EngineError, InputError
from modernbert_runtime.plan_store import Plans
from modernbert_runtime.tensorrt_engine import TensorRtEngine
from modernbert_runtime.tensorrt_plan import RECORD_NAME, PlanKey, PlanRecord, Profile

PROFILES = (
    Profile(max_batch=4, max_length=16),
    Profile(max_batch=3, max_length=40),
    Profile(max_batch=2, max_length=600),
)
HASH = "0" * 64


class Invalidated(int):
    name = "cudaErrorStreamCaptureInvalidated"


INVALIDATED = Invalidated(901)
KEY = PlanKey(
    onnx_sha256=HASH, tensorrt="11.4.0", gpu="Test GPU", compute_capability="9.0", precision="fp16", profiles=PROFILES
)


class Cuda:
    """Device memory is host memory; work in the stream happens at once, or is recorded."""

    cudaHostAllocDefault = cudaStreamNonBlocking = 0
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.recording: list[Any] | None = None
        self.device = 0
        self.captures = True  # whether the engine can be captured
        self.launches = 0
        self.graphs = 0

    def enqueue(self, work: Any) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        buffer = (ctypes.c_ubyte * size)(*b"\xff" * min(size, 64))
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, self.device

    def cudaSetDevice(self, device: int) -> tuple[int]:
        self.device = device
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, types.SimpleNamespace(name=b"Test GPU", major=9, minor=0)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.recording is None, "nothing may be awaited during a capture"
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        self.enqueue(lambda: ctypes.memmove(to, source, nbytes))
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        recorded, self.recording = self.recording, None
        return (0, recorded) if self.captures else (INVALIDATED, None)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        self.graphs += 1
        return 0, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.graphs -= 1
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for work in graph:
            work()
        return (0,)


class TensorRt:
    """An "engine" is an ONNX model; a context checks shapes against its profile and reads and writes by address."""

    __version__ = "11.4.0"
    TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user")
    LayerInformationFormat = types.SimpleNamespace(JSON="json")

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None: ...

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def Runtime(self, logger: Any) -> Any:
        return types.SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine(plan, self.cuda))

    @staticmethod
    def nptype(kind: Any) -> Any:
        return kind


class Engine:
    device_memory_size_v2 = 1 << 10

    def __init__(self, plan: bytes, cuda: Cuda) -> None:
        self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        self.cuda, self.device = cuda, cuda.device
        self.modes = {value.name: "input" for value in self.session.get_inputs()}
        self.modes |= {value.name: "output" for value in self.session.get_outputs()}
        self.num_io_tensors = len(self.modes)
        self.dense = not any(node.op_type == "Pad" for node in onnx.load_from_string(plan).graph.node)

    def get_tensor_name(self, index: int) -> str:
        return list(self.modes)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return np.float32

    def create_engine_inspector(self) -> Any:
        layers: list[Any] = ["gemm + gelu", "norm"]
        if not self.dense:
            metadata = "[ONNX Layer: node_3 | n0 (function)]\x1e[ONNX Layer: node_4]"
            layers = [{"Name": "attention", "LayerType": "kgen", "Metadata": metadata}, {"Name": "copy"}]
        return types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))

    def create_execution_context(self, strategy: str) -> "Context":
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses = engine, {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert address in self.engine.cuda.memory
        assert size >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = [profile for profile in PROFILES if (profile.graph == "tensorrt-dense") == self.engine.dense][
            index
        ]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        if shape[0] > self.profile.max_batch or shape[1] > self.profile.max_length:
            return False
        self.shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.modes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        width = TINY["hidden_size"]
        return {"last_hidden_state": (*self.shape, width), "sentence_embedding": (self.shape[0], width)}.get(
            name, self.shape
        )

    def execute_async_v3(self, stream: int) -> bool:
        shape, addresses = self.shape, dict(self.addresses)
        assert self.engine.cuda.device == self.engine.device, "another GPU than that of the plan is current"
        if self.engine.cuda.recording is not None and not self.engine.cuda.captures:
            return False

        def work() -> None:
            assert self.shape == shape, "the context of a captured graph was given another shape"
            feed = {}
            for name in ("input_ids", "attention_mask"):
                count = int(np.prod(shape))
                values = (ctypes.c_int64 * count).from_address(addresses[name])
                feed[name] = np.frombuffer(values, np.int64).reshape(shape)
            names = ["last_hidden_state", "sentence_embedding"]
            for name, result in zip(names, self.engine.session.run(names, feed), strict=True):
                flat = np.ascontiguousarray(result)
                ctypes.memmove(addresses[name], flat.ctypes.data, flat.nbytes)

        self.engine.cuda.enqueue(work)
        return True


@pytest.fixture(scope="module")
def plans(half_traced: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of "plans" with their record. Leave it as it is."""
    directory, files = tmp_path_factory.mktemp("plans"), {}
    for target in ("tensorrt-dense", "tensorrt"):
        graph = ir.from_proto(half_traced)
        plan = ir.to_proto(lower(graph, target)).SerializeToString()
        name = PlanRecord.file_of(target)
        (directory / name).write_bytes(plan)
        files[name] = hashlib.sha256(plan).hexdigest()
    (directory / RECORD_NAME).write_text(PlanRecord(key=KEY, files=files).to_json())
    return directory


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The stand-ins in the place of both libraries."""
    stand_in = Cuda()
    monkeypatch.setattr(tensorrt_engine, "load_cudart", lambda: stand_in)
    monkeypatch.setitem(sys.modules, "tensorrt", TensorRt(stand_in))
    return stand_in


def at(directory: Path) -> Plans:
    return Plans(record=PlanRecord.read(directory), directory=directory)


@pytest.fixture
def engine(cuda: Cuda, plans: Path) -> Iterator[TensorRtEngine]:
    with_plans = TensorRtEngine(at(plans), onnx_sha256=HASH)
    yield with_plans
    with_plans.close()


def batch(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng([rows, length]).integers(0, TINY["vocab_size"], (rows, length))
    mask = np.ones_like(ids)
    mask[-1, max(1, length // 2) :] = 0
    return ids, mask


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    model = copy.deepcopy(load_model(checkpoint)).double()
    model.set_attention("eager")
    head = EmbeddingHead("mean", normalize=True)

    def embed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
            return head(hidden, torch.from_numpy(mask)).numpy()

    return embed


def test_engine_gives_the_vectors_of_pytorch(engine: TensorRtEngine, exact: Any, cuda: Cuda) -> None:
    # Both sides of every profile's edges, and more rows than it takes; thrice: plain, captured, replayed.
    shapes = [(1, 1), (4, 16), (9, 15), (1, 17), (3, 40), (7, 33), (1, 41), (1, 512), (1, 513), (3, 600)]
    for turn in range(3):
        for rows, length in shapes:
            ids, mask = batch(rows, length)
            ids = (ids + turn) % TINY["vocab_size"]  # a graph that replays old inputs shows
            got, want = engine.run(ids, mask), exact(ids, mask)
            assert got.shape == want.shape
            cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1)
            assert cosine.min() >= 0.99995, f"turn {turn}, {rows} x {length}: {cosine.min():.6f}"
    assert cuda.launches >= 2 * len(shapes)


def test_number_of_cuda_graphs_is_bounded(engine: TensorRtEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "MAX_CUDA_GRAPHS", 2)
    for rows in (1, 2, 3, 4):
        for _ in range(3):
            engine.run(*batch(rows, 5))
    assert cuda.graphs == 2


def test_shapes_that_are_too_many_to_keep_are_not_captured_over_and_over(
    engine: TensorRtEngine, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "MAX_CUDA_GRAPHS", 2)
    for _ in range(3):
        for rows in (1, 2, 3):
            engine.run(*batch(rows, 5))
    assert (cuda.graphs, cuda.launches) == (0, 0)


def test_engine_that_cannot_be_captured_goes_on_without(
    engine: TensorRtEngine, exact: Any, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.captures = False
    ids, mask = batch(3, 5)
    for _ in range(4):
        np.testing.assert_allclose(engine.run(ids, mask), exact(ids, mask), atol=0.01)
    assert cuda.recording is None
    (message,) = caplog.messages
    assert message.startswith("going on without CUDA graphs")


def test_runs_from_a_thread_with_another_gpu_are_on_that_of_the_plans(
    engine: TensorRtEngine, exact: Any, cuda: Cuda
) -> None:
    cuda.device = 1
    ids, mask = batch(2, 5)
    for _ in range(3):
        np.testing.assert_allclose(engine.run(ids, mask), exact(ids, mask), atol=0.01)
    assert cuda.device == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((Engine, "create_execution_context", None), "TensorRT cannot run Profile"),
        ((Context, "set_tensor_address", False), "refuses the memory of 'input_ids'"),
        ((Context, "set_optimization_profile_async", False), "TensorRT refuses Profile"),
        ((Context, "infer_shapes", ["attention_mask"]), "refuses the shape .* lacking .'attention_mask'"),
    ],
    ids=lambda value: str(value)[:8],
)
def test_what_tensorrt_refuses_is_an_error_and_frees_everything(
    cuda: Cuda, plans: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[type, str, Any], message: str
) -> None:
    owner, name, answer = broken
    monkeypatch.setattr(owner, name, lambda *_: answer)
    with pytest.raises(EngineError, match=message):
        TensorRtEngine(at(plans), onnx_sha256=HASH)
    assert not cuda.memory


def test_close_gives_everything_back(cuda: Cuda, plans: Path) -> None:
    engine = TensorRtEngine(at(plans), onnx_sha256=HASH)
    for _ in range(2):
        engine.run(*batch(1, 5))
    assert cuda.memory
    plan_bytes = sum(path.stat().st_size for path in plans.glob("*.plan"))
    # Ids and mask, 8 bytes each, and both outputs in fp32, of the largest batch; the stand-in's scratch.
    tokens, width = 2 * 600, TINY["hidden_size"]
    assert engine.device_bytes == plan_bytes + 2 * 8 * tokens + 4 * (tokens + 4) * width + (1 << 10)
    engine.close()
    assert engine.device_bytes == 0
    engine.close()
    assert not cuda.memory
    assert cuda.graphs == 0
    with pytest.raises(EngineError, match="closed"):
        engine.run(*batch(1, 5))


def test_tokens_come_without_the_padding_of_the_engine(cuda: Cuda, plans: Path) -> None:
    engine = TensorRtEngine(at(plans), onnx_sha256=HASH, output="last_hidden_state")
    assert engine.run(*batch(3, 5)).shape == (3, 5, TINY["hidden_size"])
    engine.close()


def test_either_output_is_given_when_asked_for(engine: TensorRtEngine, exact: Any) -> None:
    ids, mask = batch(3, 5)
    for _ in range(3):  # plain, captured, replayed: a graph of one output must not serve the other
        hidden = engine.run(ids, mask, "last_hidden_state")
        pooled = (hidden * mask[:, :, None]).sum(1)
        for vectors in (pooled, engine.run(ids, mask)):
            cosine = (vectors * exact(ids, mask)).sum(1) / np.linalg.norm(vectors, axis=1)
            assert cosine.min() >= 0.9999
    with pytest.raises(EngineError, match="give last_hidden_state, sentence_embedding, not logits"):
        engine.run(ids, mask, "logits")


def test_layers_are_those_of_every_plan_once(engine: TensorRtEngine) -> None:
    assert engine.layers() == ["gemm + gelu", "norm", "attention = node_3 + node_4", "copy"]


def test_text_beyond_every_profile_is_refused(engine: TensorRtEngine) -> None:
    with pytest.raises(InputError, match="at most 600"):
        engine.run(*batch(1, 601))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(onnx_sha256="1" * 64), "onnx_sha256 was 1"),
        (dict(gpu="Other GPU"), "gpu was Other GPU, here it is Test GPU"),
        (dict(compute_capability="8.0"), "compute_capability was 8.0"),
        (dict(tensorrt="10.8.0"), "tensorrt was 10.8.0, here it is 11.4.0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_stale_plan_is_refused_with_the_reason(
    cuda: Cuda, plans: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    record = PlanRecord.read(plans)
    stale = dataclasses.replace(record, key=dataclasses.replace(record.key, **change))
    (tmp_path / RECORD_NAME).write_text(stale.to_json())
    with pytest.raises(EngineError, match=message):
        TensorRtEngine(at(tmp_path), onnx_sha256=HASH)
    assert not cuda.memory


def test_altered_plan_is_never_loaded(cuda: Cuda, plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in plans.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "tensorrt.plan", "ab") as file:
        file.write(b"\0")
    loaded: list[int] = []
    monkeypatch.setattr(Engine, "__init__", lambda self, plan, cuda: loaded.append(len(plan)))
    with pytest.raises(EngineError, match=r"tensorrt\.plan.*sha256 differs"):
        TensorRtEngine(at(tmp_path), onnx_sha256=HASH)
    assert (tmp_path / "tensorrt.plan").stat().st_size not in loaded


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt cannot be imported.*onnxruntime") as caught:
        tensorrt_engine.require_tensorrt()
    assert "\n" not in str(caught.value)
