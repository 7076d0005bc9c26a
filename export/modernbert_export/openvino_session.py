"""OpenVINO as a referee runs it in bfloat16, which no other engine computes as it does.

It decides by itself which operators of an fp32 graph take bfloat16, so nothing else can prove such a graph.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modernbert.errors import InputError
from modernbert_runtime.openvino_core import openvino_core

Array = NDArray[Any]


def require_bf16(remedy: str) -> None:
    """Refuses to prove anything in bfloat16 on a CPU that would compute in fp32.

    Args:
        remedy: what to do where it has none, for the message.

    Raises:
        InputError: openvino is not installed, or the CPU has no bfloat16.
    """
    try:
        core = openvino_core()
    except ImportError as error:
        raise InputError(
            "openvino is not installed, which is needed to prove openvino bf16: "
            'pip install "modernbert-deploy[openvino]"'
        ) from error
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError(f"this CPU has no bfloat16, which is needed to prove openvino bf16: {remedy}")


@dataclasses.dataclass(frozen=True)
class _Output:
    name: str


class OpenVinoSession:
    """A graph in OpenVINO in bfloat16, with what a referee uses of onnxruntime's InferenceSession.

    Args:
        onnx_file: the graph, its weights beside it.
        also_output: names of inner values that are made outputs too.
    """

    def __init__(self, onnx_file: Path, also_output: Sequence[str] = ()) -> None:
        core = openvino_core()
        model = core.read_model(os.fspath(onnx_file))
        present = {name for output in model.outputs for name in output.names}
        model.add_outputs([name for name in also_output if name not in present])
        self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

    def get_outputs(self) -> list[_Output]:
        """The outputs by their names."""
        return [_Output(name) for output in self._compiled.outputs for name in output.names]

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        """Each run is the first after memory was handed back, for graphs were seen to give NaN in those alone."""
        self._compiled.release_memory()
        result = self._compiled(dict(feed))
        return [result[name] for name in names]
