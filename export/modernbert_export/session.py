"""Engines on the CPU as a referee runs them: ONNX Runtime, and OpenVINO for what it alone computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import onnx
import onnxruntime

from modernbert_export.constant_tables import has_constant_tables
from modernbert_export.openvino_session import OpenVinoSession
from modernbert_export.packed_session import PackedSession, is_packed
from modernbert_export.precision.bf16_on_cpu import bf16_on_cpu

Session: TypeAlias = onnxruntime.InferenceSession | PackedSession | OpenVinoSession


def open_session(onnx_file: Path, *, also_output: Sequence[str] = ()) -> Session:
    """ONNX Runtime on the CPU, with its own default settings; inner values of the graph can be made outputs too.

    It takes padded batches, whatever the graph's form; one with bf16 runs as `bf16_on_cpu` has it, and one with
    `constant_tables` in OpenVINO, which computes in bf16 then.
    """
    proto = onnx.load(onnx_file, load_external_data=False)
    if has_constant_tables(proto):
        return OpenVinoSession(onnx_file, also_output)
    present = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in also_output
        if name not in present
    )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(onnx_file.parent.resolve())
    )
    runnable = bf16_on_cpu(proto).SerializeToString()
    session = onnxruntime.InferenceSession(runnable, options, providers=["CPUExecutionProvider"])
    return PackedSession(session) if is_packed(proto.graph) else session
