"""int8 and fp8 for TensorRT by NVIDIA's ModelOpt: QuantizeLinear and DequantizeLinear around the linear layers.

It starts from the fp16 graph, islands and all, runs it on sample texts in ONNX Runtime on the CPU, and chooses a scale
for each input of a linear layer and for each output of its weights. TensorRT turns the pairs into products of 8 bits;
the stored weights stay fp16. Attention is left as it is.

ModelOpt is optional (`pip install 'nvidia-modelopt[onnx]'`): it asks for an ONNX Runtime of its own, so it is best
installed apart. Tried with 0.47.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from modernbert.errors import InputError
from modernbert_export.source_lines import SOURCE, fill_sources, read_sources
from modernbert_export.trace import INPUTS
from modernbert_runtime.errors import one_line

# Our name of a precision -> ModelOpt's.
MODES: Mapping[str, str] = {"int8-qdq": "int8", "fp8": "fp8"}

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]


def require_modelopt() -> None:
    """Raises InputError where ModelOpt is not installed, or what it needs for ONNX."""
    try:
        importlib.import_module("modelopt.onnx.quantization")
    except ImportError as error:
        raise InputError(
            f"precisions {' and '.join(MODES)} need NVIDIA's ModelOpt ({one_line(error)}): "
            "pip install 'nvidia-modelopt[onnx]', or leave them out"
        ) from error


def quantize_for_tensorrt(half: Path, scratch: Path, precision: str, batches: Sequence[Batch]) -> ir.Model:
    """Quantises an fp16 graph, whose file stays as it is.

    Args:
        half: the graph, its weights beside it.
        scratch: directory for ModelOpt's own file.
        precision: one of `MODES`.
        batches: ids and masks [B, S] to measure on.

    Returns:
        The graph, its nodes with the source lines of the fp16 graph's.
    """
    from modelopt.onnx.quantization import quantize

    file = scratch / f"{half.stem}.{precision}.onnx"
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars of its own
        quantize(
            str(half),
            quantize_mode=MODES[precision],
            calibration_data_reader=_reader(batches),
            calibration_method="max",  # its histograms of fp16 values fail where a few are far larger than the rest
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul"],
            high_precision_dtype="fp32",  # converts nothing: what is fp16 and what is not has been chosen
            log_level="ERROR",
            output_path=str(file),
        )
    model = ir.load(file)
    ir.external_data.load_to_model(model)
    model.ir_version = ir.load(half).ir_version
    sources = read_sources(half)
    for node in model.graph:
        if node.name in sources:
            node.metadata_props[SOURCE] = sources[node.name]
    for node, source in fill_sources(model.graph).items():
        node.metadata_props[SOURCE] = source
    return model


def _reader(batches: Sequence[Batch]) -> Any:
    """The batches as ONNX Runtime's calibrator reads them, which ModelOpt may rewind."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._rest: Iterator[Batch] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.int64]] | None:
            batch = next(self._rest, None)
            return None if batch is None else dict(zip(INPUTS, batch, strict=True))

        def get_first(self) -> dict[str, NDArray[np.int64]]:
            return dict(zip(INPUTS, batches[0], strict=True))

    return Reader()
