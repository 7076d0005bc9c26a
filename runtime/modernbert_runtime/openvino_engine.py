"""The OpenVINO engine. Imports openvino when one is made, not before.

Left alone, OpenVINO computes in bfloat16 on CPUs that have it, and says nothing. Here it computes in fp32: in bfloat16
2026.4 cannot count beyond 256 when it makes rotary angles, which loses the positions of a text (cosines of 0.995 at 512
tokens).

`release_memory` hands memory back after a spike, but not from graphs with loops, which portable ones are: there the
next run reads and writes where it must not (2026.4: NaN now and then, or the process ends by a signal). These keep
their memory; the graph lowered for OpenVINO has no loop.

Artifacts of precision bf16 are lowered for it, with the angles' cosines and sines as constants, and proven in bfloat16:
those it computes so, where the CPU can. Weights in 8 bits (`int8-weights`) stay integers in memory; CPUs with VNNI
round the inputs of linear layers to 8 bits too (DYNAMIC_QUANTIZATION_GROUP_SIZE, 0 for not).
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.errors import EngineError, one_line
from modernbert_runtime.machine import return_free_memory, usable_threads
from modernbert_runtime.openvino_core import openvino_core
from modernbert_runtime.spikes import Spikes

logger = logging.getLogger(__name__)

_NAMES = {"f32": "fp32", "f16": "fp16"}
_LOOPS = {"Loop", "TensorIterator"}


class OpenVinoEngine:
    """Runs an ONNX model with the inputs `input_ids` and `attention_mask` on the CPU.

    Args:
        path: the .onnx file; external weights lie beside it.
        output: name of the output that `run` returns unless asked for another.
        precision: of the artifact; "bf16" computes in bfloat16 where the CPU has it, all others in fp32.
        threads: None leaves it to OpenVINO (all physical cores), except that a container's CPU limit is kept.
        options: OpenVINO's properties by their names, such as {"NUM_STREAMS": "2"}, {"ENABLE_CPU_PINNING": "NO"} or
            {"SCHEDULING_CORE_TYPE": "PCORE_ONLY"}.

    Raises:
        InputError: threads below 1.
        EngineError: openvino is not installed, an option is unknown, or the file is not a model of this signature.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        output: str,
        precision: str = "fp32",
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        if threads is not None:
            check_count("threads", threads, remedy=": pass None to let OpenVINO choose")
        try:
            core = openvino_core()
        except ImportError as error:
            raise EngineError(
                f'openvino cannot be imported ({one_line(error)}): pip install "modernbert-deploy[openvino]"'
            ) from error
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all cores: batches are planned here already
            **dict(options or {}),
        }
        if count := threads or usable_threads():
            properties["INFERENCE_NUM_THREADS"] = str(count)
        try:
            model = core.read_model(str(path))
            self._keeps_memory = any(operator.get_type_name() in _LOOPS for operator in model.get_ops())
            self._compiled: Any = core.compile_model(model, "CPU", properties)
        except Exception as error:  # openvino raises plain RuntimeError
            raise EngineError(
                f"openvino cannot load {Path(path).name!r} ({one_line(error)}): export the bundle again, or use "
                "engine='onnxruntime'"
            ) from error
        inputs = {value.any_name for value in self._compiled.inputs}
        self._outputs = {value.any_name: index for index, value in enumerate(self._compiled.outputs)}
        if inputs != {"input_ids", "attention_mask"} or output not in self._outputs:
            raise EngineError(
                f"{Path(path).name!r} must take input_ids and attention_mask and give {output}, not take "
                f"{', '.join(sorted(inputs))} and give {', '.join(self._outputs)}: export it again for this task"
            )
        self._output = output
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # requests; each serves one run at a time
        self._spikes = Spikes()
        self._change = threading.Condition()  # of the two below
        self._running = 0
        self._let_go = False  # of the memory, once nothing runs
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        used = _NAMES.get(used, used)
        self.name = f"openvino (CPU, {used})"
        if properties["INFERENCE_PRECISION_HINT"] == "bf16" != used:
            logger.warning("%s: openvino computes in %s, for this CPU has no bf16", Path(path).name, used)

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """See `Engine.run`."""
        compiled = self._compiled
        if compiled is None:
            raise EngineError("the engine is closed: load the bundle again")
        if output is not None and output not in self._outputs:
            raise EngineError(f"this model gives {', '.join(self._outputs)}, not {output}: export it again")
        try:
            with self._running_on(compiled):
                try:
                    request = self._idle.get_nowait()
                except queue.Empty:
                    request = compiled.create_infer_request()
                request.infer({"input_ids": input_ids, "attention_mask": attention_mask})
                result = np.array(request.get_output_tensor(self._outputs[output or self._output]).data)
                self._idle.put(request)
                if self._spikes.passed_with(*input_ids.shape) and not self._keeps_memory:
                    self._let_go = True
            return result
        except Exception as error:  # as above
            rows, length = input_ids.shape
            raise EngineError(f"openvino failed on a batch of {rows} x {length} tokens ({one_line(error)})") from error

    @contextlib.contextmanager
    def _running_on(self, compiled: Any) -> Iterator[None]:
        """Around a run: memory is handed back when no other is under way, and none begins before it is.

        OpenVINO refuses to release memory while a request computes, and frees what others have not read yet.
        """
        with self._change:
            self._change.wait_for(lambda: not self._let_go)
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                if self._let_go and not self._running:
                    self._let_go = False
                    self._change.notify_all()
                    compiled.release_memory()
                    return_free_memory()

    def close(self) -> None:
        """Drop the model; runs under way finish."""
        self._compiled = None
        self._idle = queue.SimpleQueue()
