"""The TensorRT engine: plans built on this machine, one execution context per profile, all in one device buffer.

Imports tensorrt and cuda.bindings when one is made, not before. It opens only plans that may be trusted (`plan_store`)
and whose bytes are those of their record, and only for the very GPU and TensorRT version that they were built for.
What can be decided without a GPU (which profile, which pieces, which length to pad to) stands in `tensorrt_plan`; this
file is calls.

Written against TensorRT 11.4; the names it uses exist in 10.8 too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.cuda_memory import DeviceBuffer, PinnedBuffer, check, load_cudart
from modernbert_runtime.errors import EngineError, one_line
from modernbert_runtime.plan_store import Plans
from modernbert_runtime.tensorrt_plan import PlanKey, PlanRecord, Profile, plan_runs, round_length

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask")
# A captured graph takes some MiB on the device; these many shapes keep theirs, the one used longest ago goes first.
# A shape gets one when it comes again within as many others: where more of them take turns, capturing each would cost
# more than it saves.
MAX_CUDA_GRAPHS = 32


# Profile, rows, padded length and output: what a captured graph is of.
_Case = tuple[int, int, int, str]


class _Buffer(Protocol):
    address: int


class _Closable(Protocol):
    def close(self) -> None: ...


_C = TypeVar("_C", bound=_Closable)


def require_tensorrt() -> None:
    """Sees to it that `import tensorrt` works.

    Raises:
        EngineError: it is not installed, or its libraries do not load.
    """
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError) as error:
        raise EngineError(
            f"tensorrt cannot be imported ({one_line(error)}): pip install tensorrt, where NVIDIA's package index is "
            'in reach, or use engine="onnxruntime"'
        ) from error


def key_here(
    onnx_sha256: str, precision: str, *, profiles: tuple[Profile, ...] = (), flags: tuple[str, ...] = ()
) -> PlanKey:
    """The key of plans that are built of these graphs on this machine now.

    Raises:
        EngineError: TensorRT or a GPU is missing.
    """
    require_tensorrt()
    import tensorrt as trt

    gpu, capability = device_here()
    return PlanKey(
        onnx_sha256=onnx_sha256,
        tensorrt=trt.__version__,
        gpu=gpu,
        compute_capability=capability,
        precision=precision,
        profiles=profiles,
        flags=flags,
    )


def device_here() -> tuple[str, str]:
    """Name and compute capability of the current GPU.

    Raises:
        EngineError: there is none.
    """
    cudart = load_cudart()
    device = check(cudart.cudaGetDevice(), "find a GPU")
    properties = check(cudart.cudaGetDeviceProperties(device), "ask for the GPU's name")
    return properties.name.decode(), f"{properties.major}.{properties.minor}"


class TensorRtEngine:
    """Runs one output of a model on its TensorRT plans.

    Args:
        plans: from `plan_store.find_plans`, which decides whom to trust.
        onnx_sha256: of the graphs and weights that they must have been built from.
        output: name of the output that `run` returns unless asked for another.

    Raises:
        EngineError: TensorRT or a GPU is missing, a plan is stale or altered, or does not load.
    """

    def __init__(self, plans: Plans, *, onnx_sha256: str, output: str = "sentence_embedding") -> None:
        record = plans.record
        here = key_here(onnx_sha256, record.key.precision)
        if stale := record.key.differences(here, ignore=("profiles", "flags")):
            raise EngineError(
                f"the TensorRT plans in {str(plans.directory)!r} are stale: {'; '.join(stale)}; build them again"
            )
        import tensorrt as trt

        self._cudart = load_cudart()
        self._device = check(self._cudart.cudaGetDevice(), "find a GPU")
        self._lock = threading.Lock()
        self._profiles = record.key.profiles
        self._output = output
        self._open: list[_Closable] = []  # what close() frees
        self._contexts: list[trt.IExecutionContext] = []
        self._engines: list[trt.ICudaEngine] = []  # of each profile
        self._captured: OrderedDict[_Case, _Captured] = OrderedDict()
        self._seen: OrderedDict[_Case, None] = OrderedDict()
        self._capturing = True
        self.name = f"tensorrt {trt.__version__} ({record.key.gpu}, {record.key.precision})"
        try:
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            self._load(plans)
        except BaseException:
            self.close()
            raise

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """See `Engine.run`. Calls take turns."""
        rows, length = input_ids.shape
        output = output or self._output
        with self._lock:
            if not self._open:
                raise EngineError("the engine is closed: load the bundle again")
            self._check_output(output)
            index, pieces = plan_runs(rows, length, self._profiles)
            with self._own_device():
                parts = [self._run(index, input_ids[piece], attention_mask[piece], output) for piece in pieces]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU for plans and buffers, not for CUDA itself and captured graphs; 0 when closed."""
        buffers = [buffer.nbytes for buffer in self._open if isinstance(buffer, DeviceBuffer)]
        return self._plan_bytes + sum(buffers) if buffers else 0

    def layers(self) -> list[str]:
        """What the plans compute, as TensorRT's inspector names it; a layer that was fused of several has a + in it.

        Plans that were built to be inspected name the nodes of the graph, too: "kernel = node + node".

        Raises:
            EngineError: the engine is closed.
        """
        import tensorrt as trt

        names: list[str] = []
        with self._lock:
            if not self._open:
                raise EngineError("the engine is closed: load the bundle again")
            for engine in dict.fromkeys(self._engines):
                inspector = engine.create_engine_inspector()
                described = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
                names += map(_name_of_layer, described["Layers"])
        return names

    def close(self) -> None:
        """Frees device and host memory; a run under way ends first."""
        with self._lock:
            for captured in self._captured.values():
                captured.close()
            self._captured.clear()
            self._contexts, self._engines = [], []
            for buffer in self._open:
                buffer.close()
            self._open = []

    def _load(self, plans: Plans) -> None:
        import tensorrt as trt

        loaded = {}
        self._plan_bytes = 0
        for name in dict.fromkeys(PlanRecord.file_of(profile.graph) for profile in self._profiles):
            plan = plans.load(name)
            self._plan_bytes += len(plan)
            loaded[name] = self._runtime.deserialize_cuda_engine(plan)
            if loaded[name] is None:
                raise EngineError(f"TensorRT cannot load {name!r}: build the plans again")
        self._engines = [loaded[PlanRecord.file_of(profile.graph)] for profile in self._profiles]
        engine = self._engines[0]
        self._outputs = {
            name: np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        }
        self._check_output(self._output)
        self._managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED

        stream = _Stream(self._cudart)
        self._open.append(stream)
        self._stream = stream.handle
        scratch = max(engine.device_memory_size_v2 for engine in self._engines)
        self._scratch = self._keep(DeviceBuffer(self._cudart, scratch))
        tokens = max(profile.max_batch * profile.max_length for profile in self._profiles)
        self._host_in = {name: self._keep(PinnedBuffer(self._cudart, 8 * tokens)) for name in INPUTS}
        self._device_in = {name: self._keep(DeviceBuffer(self._cudart, 8 * tokens)) for name in INPUTS}
        sizes = dict.fromkeys(self._outputs, 0)
        self._device_out: dict[str, DeviceBuffer] = {}
        for index, profile in enumerate(self._profiles):
            context = self._context(index)
            self._set_shapes(context, profile.shapes[2])
            for name, dtype in self._outputs.items():
                sizes[name] = max(sizes[name], math.prod(context.get_tensor_shape(name)) * dtype.itemsize)
            self._contexts.append(context)
        self._device_out = {name: self._keep(DeviceBuffer(self._cudart, size)) for name, size in sizes.items()}
        self._host_out = self._keep(PinnedBuffer(self._cudart, max(sizes.values())))
        for context in self._contexts:
            self._set_addresses(context)

    def _check_output(self, output: str) -> None:
        if output not in self._outputs:
            raise EngineError(f"the plans give {', '.join(self._outputs)}, not {output}: export for this task")

    @contextlib.contextmanager
    def _own_device(self) -> Iterator[None]:
        """CUDA's current device is each thread's own, and runs come from any thread."""
        before = check(self._cudart.cudaGetDevice(), "find a GPU")
        check(self._cudart.cudaSetDevice(self._device), "choose the GPU of the plans")
        try:
            yield
        finally:
            check(self._cudart.cudaSetDevice(before), "choose the GPU of before")

    def _context(self, index: int) -> trt.IExecutionContext:
        """A context for a profile, in the device buffer that all share: runs take turns."""
        context = self._engines[index].create_execution_context(self._managed)
        if context is None:
            raise EngineError(f"TensorRT cannot run {self._profiles[index]}: see its log, and `nvidia-smi` for memory")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        if not context.set_optimization_profile_async(self._index_in_plan(index), self._stream):
            raise EngineError(f"TensorRT refuses {self._profiles[index]}: build the plans again")
        check(self._cudart.cudaStreamSynchronize(self._stream), "select a profile")
        self._set_addresses(context)
        return context

    def _set_addresses(self, context: trt.IExecutionContext) -> None:
        for name, buffer in (self._device_in | self._device_out).items():
            if not context.set_tensor_address(name, buffer.address):
                raise EngineError(f"TensorRT refuses the memory of {name!r}: build the plans again")

    def _keep(self, buffer: _C) -> _C:
        self._open.append(buffer)
        return buffer

    def _index_in_plan(self, index: int) -> int:
        """Profiles are numbered within the plan of their graph."""
        graph = self._profiles[index].graph
        return [i for i, profile in enumerate(self._profiles) if profile.graph == graph].index(index)

    def _set_shapes(self, context: trt.IExecutionContext, shape: tuple[int, int]) -> None:
        accepted = [context.set_input_shape(name, shape) for name in INPUTS]
        if not all(accepted) or (lacking := context.infer_shapes()):
            raise EngineError(f"TensorRT refuses the shape {shape}, lacking {lacking if all(accepted) else INPUTS}")

    def _run(
        self, index: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str
    ) -> NDArray[Any]:
        rows, length = input_ids.shape
        shape = (rows, round_length(length, self._profiles[index]))
        for name, values in zip(INPUTS, (input_ids, attention_mask), strict=True):
            padded = self._host_in[name].array(shape, np.int64)
            padded[:, :length] = values
            padded[:, length:] = 0
        case = (index, *shape, output)
        captured = self._captured.get(case)
        if captured is not None:
            self._captured.move_to_end(case)
            context = captured.context
            check(self._cudart.cudaGraphLaunch(captured.graph, self._stream), "launch a CUDA graph")
        elif self._recurs(case):
            context = self._run_and_capture(case)
        else:
            context = self._contexts[index]
            self._set_shapes(context, shape)
            self._enqueue(context, shape, output)
        check(self._cudart.cudaStreamSynchronize(self._stream), "run the engine")
        shape_out = tuple(context.get_tensor_shape(output))
        result = self._host_out.array(shape_out, self._outputs[output]).copy()
        return result[:, :length] if result.ndim == 3 else result

    def _recurs(self, case: _Case) -> bool:
        """Whether a case came up lately, so that a graph of it will pay."""
        if case in self._seen:
            del self._seen[case]
            return self._capturing
        self._seen[case] = None
        if len(self._seen) > MAX_CUDA_GRAPHS:
            self._seen.popitem(last=False)
        return False

    def _enqueue(self, context: trt.IExecutionContext, shape: tuple[int, int], output: str) -> None:
        """Copies in, runs, copies out: all in the stream, none awaited."""
        cudart, nbytes = self._cudart, 8 * shape[0] * shape[1]
        for name in INPUTS:
            self._copy(self._device_in[name], self._host_in[name], nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed on a batch of {shape[0]} x {shape[1]} tokens: see its log")
        size = math.prod(context.get_tensor_shape(output)) * self._outputs[output].itemsize
        back = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(self._host_out, self._device_out[output], size, back)

    def _copy(self, to: _Buffer, source: _Buffer, nbytes: int, kind: Any) -> None:
        check(self._cudart.cudaMemcpyAsync(to.address, source.address, nbytes, kind, self._stream), "copy a batch")

    def _run_and_capture(self, case: _Case) -> trt.IExecutionContext:
        """Runs a case, and keeps it as a CUDA graph, in a context of its own: other shapes would spoil it.

        TensorRT allocates when it first meets a shape, which a capture must not; hence the run before, whose results
        are what the caller gets, for a capture computes nothing. An engine that cannot be captured goes on without.

        Returns:
            The context.
        """
        while len(self._captured) >= MAX_CUDA_GRAPHS:
            self._captured.popitem(last=False)[1].close()
        index, rows, length, output = case
        context, shape = self._context(index), (rows, length)
        self._set_shapes(context, shape)
        self._enqueue(context, shape, output)
        check(self._cudart.cudaStreamSynchronize(self._stream), "run the engine")
        try:
            self._captured[case] = _Captured(self._cudart, context, self._capture(context, shape, output))
        except EngineError as error:
            self._capturing = False
            self._cudart.cudaGetLastError()  # nobody shall find it and take it for his own
            logger.warning("going on without CUDA graphs, which makes short batches slower: %s", error)
        return context

    def _capture(self, context: trt.IExecutionContext, shape: tuple[int, int], output: str) -> Any:
        """What a run enqueues, as an executable graph."""
        cudart = self._cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may allocate meanwhile
        check(cudart.cudaStreamBeginCapture(self._stream, mode), "begin the capture of a CUDA graph")
        try:
            self._enqueue(context, shape, output)
        except EngineError:
            cudart.cudaStreamEndCapture(self._stream)  # fails too, and must be called to leave the capture
            raise
        graph = check(cudart.cudaStreamEndCapture(self._stream), "capture a CUDA graph")
        try:
            return check(cudart.cudaGraphInstantiate(graph, 0), "instantiate a CUDA graph")
        finally:
            cudart.cudaGraphDestroy(graph)


def _name_of_layer(described: Any) -> str:
    """A layer as the inspector's JSON has it: its name alone, or an object in plans that were built to be inspected."""
    if not isinstance(described, dict):
        return str(described)
    # As the ONNX parser notes them: "[ONNX Layer: <node> | <functions around it>]", one for each node.
    nodes = re.findall(r"\[ONNX Layer: ([^|\]]+)", described.get("Metadata") or "")
    return " = ".join([described["Name"], *([" + ".join(map(str.strip, nodes))] if nodes else [])])


class _Captured:
    """A CUDA graph that is ready to run, and the context that it was captured from."""

    def __init__(self, cudart: Any, context: trt.IExecutionContext, graph: Any) -> None:
        self._cudart, self.context, self.graph = cudart, context, graph

    def close(self) -> None:
        self._cudart.cudaGraphExecDestroy(self.graph)


class _Stream:
    """A stream of its own, so that others on the GPU are not waited for."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        flags = cudart.cudaStreamNonBlocking
        self.handle = int(check(cudart.cudaStreamCreateWithFlags(flags), "make a stream"))

    def close(self) -> None:
        if self.handle:
            self._cudart.cudaStreamDestroy(self.handle)
            self.handle = 0
