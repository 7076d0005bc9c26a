"""What a graph contains: against formulas, against ONNX Runtime's own account of its memory, and planted faults."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY
from onnx import TensorProto, helper, numpy_helper

from modernbert.errors import ParityError
from modernbert_export.contents import ARENA, read_contents


def test_arithmetic_is_that_of_linear_layers_blocks_and_the_band(bundle: Path) -> None:
    contents = read_contents(bundle / "onnx/model.onnx")
    hidden, inner, heads, radius = 48, 40, 3, TINY["local_attention"] // 2
    size = hidden // heads
    for n in (512, 2048, 8192):
        linear = 2 * n * hidden * (4 * hidden + 3 * inner)
        full = 2 * heads * n * n * 2 * size
        band = 2 * heads * n * 3 * radius * 2 * size
        assert contents.flops[str(n)] == 4 * linear + 2 * full + 2 * band
    stored = onnx.load(bundle / "onnx/model.onnx").graph.initializer
    assert contents.weight_bytes == sum(numpy_helper.to_array(tensor).nbytes for tensor in stored)
    assert contents.operators["LayerNormalization"] == 9
    assert contents.operators["Softmax"] == 4  # two of them in loops
    assert "LayerNormalization" in contents.to_markdown("x")


@pytest.mark.parametrize("tokens", [512, 2048])
def test_memory_is_near_what_onnxruntime_measures(bundle: Path, tmp_path: Path, tokens: int) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, {name: np.ones((1, tokens), np.int64) for name in ("input_ids", "attention_mask")})
    events = json.loads(Path(session.end_profiling()).read_text())
    used = [int(event["args"]["mem_in_use_peak"]) for event in events if "mem_in_use_peak" in event.get("args", {})]
    measured = max(used) - min(used)
    estimate = read_contents(bundle / "onnx/model.onnx").activation_bytes[str(tokens)]
    # ONNX Runtime fuses and works in place, and rounds up; a batch planner needs the order of magnitude, from above.
    assert 0.8 * measured <= estimate <= 2.5 * measured


def graph(*nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Nodes from "ids", the ids [1, n] as floats, to "last_hidden_state"."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, None)]
    cast = helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT)
    stored = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    proto = helper.make_graph([cast, *nodes], "g", inputs, outputs, stored)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


COS = helper.make_node("Cos", ["ids"], ["cos"])


def test_matrix_of_scores_is_refused(tmp_path: Path) -> None:
    nodes = (
        COS,
        helper.make_node("Transpose", ["cos"], ["column"], perm=[1, 0]),
        helper.make_node("MatMul", ["column", "cos"], ["scores"]),
        helper.make_node("ReduceMax", ["scores"], ["last_hidden_state"]),
    )
    onnx.save(graph(*nodes), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="'scores' grows with the square of the length"):
        read_contents(tmp_path / "model.onnx")


def test_peak_of_a_chain_is_two_values_and_views_are_free(tmp_path: Path) -> None:
    nodes = (
        COS,
        helper.make_node("Unsqueeze", ["cos", "axis"], ["view"]),
        helper.make_node("Exp", ["view"], ["exp"]),
        helper.make_node("Sqrt", ["exp"], ["last_hidden_state"]),
    )
    onnx.save(graph(*nodes, constants={"axis": np.array([0])}), tmp_path / "model.onnx")
    assert read_contents(tmp_path / "model.onnx").activation_bytes == {
        str(n): ARENA * 2 * 4 * n for n in (512, 2048, 8192)
    }


@pytest.mark.parametrize("stored_angles", [True, False])
def test_stored_rotary_table_is_refused(tmp_path: Path, stored_angles: bool) -> None:
    constants = {"table": np.ones((1, 1), np.float32)}
    sine = helper.make_node("Cos", ["table"], ["table_cos"])
    product = helper.make_node("Mul", ["ids", "table_cos" if stored_angles else "table"], ["last_hidden_state"])
    onnx.save(graph(*([sine] if stored_angles else []), product, constants=constants), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"rotary|does not depend"):
        read_contents(tmp_path / "model.onnx")
