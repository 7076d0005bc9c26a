"""The ONNX Runtime engines, for padded and for packed models. Import onnxruntime when one is made, not before.

The CPU provider is the default; others are passed by name and must come up: ONNX Runtime would otherwise fall back to
the CPU without a word.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.arguments import check_count
from modernbert_runtime.errors import EngineError, InputError, one_line
from modernbert_runtime.machine import return_free_memory, usable_threads
from modernbert_runtime.onnxruntime_providers import CPU, CUDA, TENSORRT, provider_names
from modernbert_runtime.spikes import Spikes

# Where each provider wants inputs to lie. Others get NumPy arrays and copy for themselves.
_DEVICES = {CUDA: "cuda", TENSORRT: "cuda"}
# The input of fill-mask graphs that has a default.
_ONLY_TOKEN = "only_token"  # noqa: S105 - no password


class _OnnxRuntimeSession:
    """An ONNX model, opened. What it takes, a subclass says.

    Args:
        path: the .onnx file; external weights lie beside it.
        output: name of the output that `run` returns unless asked for another.
        providers: ONNX Runtime execution providers, the preferred one first.
        provider_options: provider -> its options by ONNX Runtime's names; see `onnxruntime_providers`.
        threads: threads within one operator; None leaves it to ONNX Runtime (one per physical core), except that a
            container's CPU limit is kept.
        keep_little_memory: hand back what a batch took after it, unless it was small; see `Spikes`.
        options: session options of ONNX Runtime by their names, such as {"session.intra_op.allow_spinning": "0"} (idle
            threads sleep: less CPU, later start), {"session.intra_op_thread_affinities": "1-8;..."} (cores of one
            NUMA node), or {"enable_cpu_mem_arena": "0"} (every run gets its memory anew: least memory, slower). ONNX
            Runtime itself ignores names of the form session.* that it does not know.

    Raises:
        InputError: threads below 1, or an option of neither form.
        EngineError: onnxruntime or a provider is not installed, or the file is not a model of this signature.
    """

    inputs: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        path: str | Path,
        *,
        output: str,
        providers: Sequence[str] = (CPU,),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        threads: int | None = None,
        keep_little_memory: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        if threads is not None:
            check_count("threads", threads, remedy=": pass None to let ONNX Runtime choose")
        ort = load_onnxruntime()
        providers = provider_names(providers)
        if missing := set(providers) - set(ort.get_available_providers()):
            raise EngineError(
                f"providers: this onnxruntime has no {', '.join(sorted(missing))}, only "
                f"{', '.join(ort.get_available_providers())}: choose one of these, or install onnxruntime-gpu"
            )

        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # errors come as exceptions, and once is enough
        for name, value in (options or {}).items():
            _set_option(settings, name, value)
        with_options = [(name, dict((provider_options or {}).get(name, {}))) for name in providers]
        try:
            settings.intra_op_num_threads = threads or usable_threads() or 0
            session = ort.InferenceSession(str(path), settings, providers=with_options, enable_fallback=0)
        except Exception as error:  # onnxruntime has an exception type per status code, without a common base
            remedy = "leave engine_options and threads out, or " if options or threads else ""
            raise EngineError(
                f"onnxruntime cannot load {Path(path).name!r} ({one_line(error)}): {remedy}export the bundle again"
            ) from error
        if absent := [name for name in providers if name not in session.get_providers()]:
            raise EngineError(
                f"providers: {', '.join(absent)} did not start: check the driver and its libraries, or use {CPU}"
            )
        inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        if inputs != set(self.inputs) or output not in self._outputs:
            raise EngineError(
                f"{Path(path).name!r} must take {' and '.join(self.inputs)} and give {output}, not take "
                f"{', '.join(sorted(inputs))} and give {', '.join(self._outputs)}: export it again for this task"
            )
        self._session: Any = session
        self._optional = {value.name for value in session.get_overridable_initializers()}
        self._constants: dict[str, NDArray[np.int64]] = {}  # fed in every run
        self._device = _DEVICES.get(providers[0])
        # The arena reuses memory from run to run, and keeps all that it ever took unless told to let go.
        self._shrink = ort.RunOptions()
        if settings.enable_cpu_mem_arena:
            self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._spikes = Spikes(keep_little=keep_little_memory)
        self._output = output
        self.name = f"onnxruntime ({', '.join(session.get_providers())})"

    def _run(self, feed: dict[str, NDArray[np.int64]], rows: int, length: int, output: str | None) -> NDArray[Any]:
        """One run, on as many rows of as many tokens, padding included."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed: load the bundle again")
        if output is not None and output not in self._outputs:
            raise EngineError(f"this model gives {', '.join(self._outputs)}, not {output}: export it again")
        feed = {**feed, **self._constants}
        try:
            let_go = self._spikes.passed_with(rows, length)
            result = np.asarray(self._compute(session, feed, output or self._output, self._shrink if let_go else None))
            if let_go:
                return_free_memory()
            return result
        except Exception as error:  # as above
            raise EngineError(
                f"onnxruntime failed on a batch of {rows} x {length} tokens ({one_line(error)})"
            ) from error

    def give_logits_only_of(self, token_id: int) -> bool:
        """From now on, let a fill-mask graph compute logits where this token stands, and nowhere else.

        Runs then give [1, places, vocabulary], row by row of the batch, in which it must stand at least once.

        Returns:
            Whether the graph can do so; if not, nothing changes.
        """
        if _ONLY_TOKEN not in self._optional:
            return False
        self._constants[_ONLY_TOKEN] = np.array(token_id, dtype=np.int64)
        return True

    def close(self) -> None:
        """Drop the session; runs under way finish."""
        self._session = None

    def _compute(self, session: Any, feed: dict[str, NDArray[np.int64]], output: str, options: Any) -> Any:
        if self._device is None:
            return session.run([output], feed, options)[0]
        # Bound, the inputs are copied once and only this output comes back.
        import onnxruntime as ort

        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        binding.bind_output(output, self._device)
        session.run_with_iobinding(binding, options)
        return binding.copy_outputs_to_cpu()[0]


class OnnxRuntimeEngine(_OnnxRuntimeSession):
    """Runs a model that takes padded batches."""

    inputs = ("input_ids", "attention_mask")

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """See `Engine.run`."""
        rows, length = input_ids.shape
        return self._run({"input_ids": input_ids, "attention_mask": attention_mask}, rows, length, output)


class PackedOnnxRuntimeEngine(_OnnxRuntimeSession):
    """Runs a model that takes packed tokens."""

    inputs = ("input_ids", "position_ids", "cu_seqlens")

    def run_packed(
        self, input_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """See `PackedEngine.run_packed`."""
        lengths = _lengths(input_ids, cu_seqlens)
        position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
        feed = {"input_ids": input_ids, "position_ids": position_ids, "cu_seqlens": cu_seqlens}
        return self._run(feed, 1, len(input_ids), output)


def _lengths(input_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each text."""
    if input_ids.ndim != 1 or cu_seqlens.ndim != 1:
        raise InputError(
            f"input_ids and cu_seqlens must have one axis, not the shapes {input_ids.shape} and {cu_seqlens.shape}"
        )
    if len(cu_seqlens) < 2:
        raise InputError(f"cu_seqlens must hold the bounds of at least one text, not {cu_seqlens.tolist()}")
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(input_ids):
        raise InputError(
            f"cu_seqlens must go from 0 to the {len(input_ids)} tokens of input_ids, not from {cu_seqlens[0]} to "
            f"{cu_seqlens[-1]}"
        )
    if lengths.min() < 1:
        at = int(lengths.argmin())
        raise InputError(f"cu_seqlens must rise, and goes from {cu_seqlens[at]} to {cu_seqlens[at + 1]} at text {at}")
    return lengths


def load_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        EngineError: it is not installed, or does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f'onnxruntime cannot be imported ({one_line(error)}): pip install "modernbert-deploy[cpu]"'
        ) from error
    return onnxruntime


def _set_option(settings: Any, name: str, value: str) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        raise InputError(f"engine_options must map str to str, not {name!r} to {value!r}")
    if name == "enable_cpu_mem_arena":
        if value not in ("0", "1"):
            raise InputError(f"engine_options: enable_cpu_mem_arena must be '0' or '1', not {value!r}")
        settings.enable_cpu_mem_arena = value == "1"
    elif name.startswith("session."):
        settings.add_session_config_entry(name, value)
    else:
        raise InputError(f"engine_options: {name!r} is neither enable_cpu_mem_arena nor of the form session.*")
