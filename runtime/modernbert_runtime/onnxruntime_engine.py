"""The ONNX Runtime engine. Imports onnxruntime when one is made, not before.

The CPU provider is the default; others are passed by name and must exist: ONNX Runtime would otherwise fall back to
the CPU without a word.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import EngineError, InputError, one_line

# Tokens of one text from which on a run takes seconds, so that getting its memory anew costs nothing.
LONG_LENGTH = 2048


class OnnxRuntimeEngine:
    """Runs one output of an ONNX model with the inputs `input_ids` and `attention_mask`.

    Args:
        path: the .onnx file; external weights lie beside it.
        output: name of the output that `run` returns.
        providers: ONNX Runtime execution providers, the preferred one first.
        threads: threads within one operator; None leaves it to ONNX Runtime (one per physical core).

    Raises:
        InputError: threads below 1.
        EngineError: onnxruntime or a provider is not installed, or the file is not a model of this signature.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        output: str,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}: pass None to let ONNX Runtime choose")
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise EngineError(
                f'onnxruntime cannot be imported ({one_line(error)}): pip install "modernbert-deploy[cpu]"'
            ) from error
        if missing := set(providers) - set(ort.get_available_providers()):
            raise EngineError(
                f"providers: this onnxruntime has no {', '.join(sorted(missing))}, only "
                f"{', '.join(ort.get_available_providers())}: choose one of these, or install onnxruntime-gpu"
            )

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions, and once is enough
        options.intra_op_num_threads = threads or 0
        try:
            session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has an exception type per status code, without a common base
            raise EngineError(
                f"onnxruntime cannot load {Path(path).name!r} ({one_line(error)}): export the bundle again"
            ) from error
        inputs = {value.name for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        if inputs != {"input_ids", "attention_mask"} or output not in outputs:
            raise EngineError(
                f"{Path(path).name!r} must take input_ids and attention_mask and give {output}, not take "
                f"{', '.join(sorted(inputs))} and give {', '.join(outputs)}: export it again for this task"
            )
        self._session: Any = session
        # The arena reuses memory within a run, but it keeps what it took: long runs hand it back.
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._output = output
        self.name = f"onnxruntime ({', '.join(session.get_providers())})"

    def run(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[Any]:
        """See `Engine.run`."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed: load the bundle again")
        try:
            feed = {"input_ids": input_ids, "attention_mask": attention_mask}
            options = self._shrink if input_ids.shape[1] >= LONG_LENGTH else None
            (result,) = session.run([self._output], feed, options)
        except Exception as error:  # as above
            rows, length = input_ids.shape
            raise EngineError(
                f"onnxruntime failed on a batch of {rows} x {length} tokens ({one_line(error)})"
            ) from error
        return np.asarray(result)

    def close(self) -> None:
        """Drop the session; runs under way finish."""
        self._session = None
