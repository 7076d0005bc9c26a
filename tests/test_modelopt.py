"""int8-qdq and fp8 for TensorRT: ModelOpt where it is installed, else a stand-in that puts the same nodes.

The stand-in takes scales from the largest values that it sees, so that everything around ModelOpt is proven on graphs
that really are quantised: calibration, lint, gate, files.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY
from onnx import TensorProto, helper, numpy_helper

from modernbert.errors import InputError
from modernbert_export.export import export
from modernbert_export.precision.modelopt import MODES
from modernbert_export.session import open_session
from modernbert_export.source_lines import read_sources
from modernbert_export.tensorrt.lint import lint
from modernbert_runtime.bundle import Bundle

INSTALLED = importlib.util.find_spec("modelopt") is not None
LARGEST = {"int8": 127.0, "fp8": 448.0}
TYPES = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def stand_in(file: str, *, quantize_mode: str, calibration_data_reader: Any, output_path: str, **options: Any) -> None:
    """Q/DQ on both inputs of every MatMul with weights, per tensor and per output."""
    assert options["calibration_eps"] == ["cpu"]
    assert options["high_precision_dtype"] == "fp32"
    model = onnx.load(file)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    names = sorted({node.input[0] for node in linear})
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(names, 0.0)
    while (feed := calibration_data_reader.get_next()) is not None:
        for name, value in zip(names, session.run(names, feed), strict=True):
            largest[name] = max(largest[name], float(np.abs(value).max()))
    kind, limit = TYPES[quantize_mode], LARGEST[quantize_mode]

    def pair(name: str, scale: np.ndarray, **axis: int) -> str:
        initial = (np.asarray(scale, np.float16), "scale"), (np.zeros(np.shape(scale), kind), "zero")
        model.graph.initializer.extend(numpy_helper.from_array(value, f"{name}.{what}") for value, what in initial)
        for op, source, result in (("Quantize", name, f"{name}.q"), ("Dequantize", f"{name}.q", f"{name}.dq")):
            inputs = [source, f"{name}.scale", f"{name}.zero"]
            nodes.append(helper.make_node(f"{op}Linear", inputs, [result], name=f"{op} {name}", **axis))
        return f"{name}.dq"

    done: dict[str, str] = {}
    old, nodes = list(model.graph.node), []
    for node in old:
        if node in linear:
            x, w = node.input
            if x not in done:
                done[x] = pair(x, np.float16(largest[x] / limit))
            node.input[0] = done[x]
            node.input[1] = pair(w, np.abs(numpy_helper.to_array(weights[w])).max(0) / limit, axis=1)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        del node.metadata_props[:]  # as ModelOpt loses them
    onnx.save(model, output_path)


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INSTALLED:
        for name in ("modelopt", "modelopt.onnx", "modelopt.onnx.quantization"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        module.quantize = stand_in  # type: ignore[attr-defined]


@pytest.mark.usefixtures("modelopt")
def test_quantised_graphs_pass_lint_and_gate(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether texts are found again is a matter of the model: a tiny one with random weights has hardly any meaning.
    monkeypatch.setattr("modernbert_export.text_fidelity.MIN_OVERLAP", 0.5)
    monkeypatch.setattr("modernbert_export.text_fidelity.MIN_COSINE", 0.95)
    out = tmp_path / "out"
    export(str(checkpoint), out, targets=("tensorrt",), precisions=tuple(MODES), max_length=40)
    bundle = Bundle.open(out)
    made = [(artifact.target, artifact.precision) for artifact in bundle.manifest.artifacts]
    assert made == [(target, precision) for precision in MODES for target in ("tensorrt", "tensorrt-dense")]
    assert [path.name for path in (out / "onnx").glob("*_data")] == ["model_tensorrt_int8-qdq.onnx_data"]
    reports = json.loads((out / "parity.json").read_text())["artifacts"]
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 40))
    for artifact, report in zip(bundle.manifest.artifacts, reports, strict=True):
        assert 0.95 <= report["text"]["min_cosine"] < 0.99999
        file = bundle.onnx_path(artifact)
        model = onnx.load(file)
        kinds = {tensor.data_type for tensor in model.graph.initializer}
        assert {"int8-qdq": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[artifact.precision] in kinds
        assert len(read_sources(file)) == len(model.graph.node)
        assert lint(model, precision=artifact.precision) == []
        hidden, _ = open_session(file).run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert np.isfinite(hidden).all()
        check_lint_finds_faults(model, artifact.precision)


def check_lint_finds_faults(model: onnx.ModelProto, precision: str) -> None:
    """Each of these must be found: other values between, a scale of 0, a zero point, one side not quantised."""
    (other,) = set(MODES) - {precision}
    assert {finding.rule for finding in lint(model, precision=other)} == {"precision"}
    assert {finding.rule for finding in lint(model, precision="fp16")} == {"precision"}
    quantise = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    for index, value, rule in ((1, 0, "scale"), (2, 1, "scale")):
        planted = onnx.ModelProto()
        planted.CopyFrom(model)
        tensor = next(tensor for tensor in planted.graph.initializer if tensor.name == quantise.input[index])
        like = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(like, value), tensor.name))
        assert rule in {finding.rule for finding in lint(planted, precision=precision)}
    for index in (0, 1):
        planted = onnx.ModelProto()
        planted.CopyFrom(model)
        for node in planted.graph.node:
            if node.name == product.name:
                pairs = {node.output[0]: node.input[0] for node in model.graph.node if "Linear" in node.op_type}
                node.input[index] = pairs[pairs[node.input[index]]]
        assert "precision" in {finding.rule for finding in lint(planted, precision=precision)}


@pytest.mark.parametrize("precision", MODES)
def test_without_modelopt_it_says_what_to_install(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    with pytest.raises(
        InputError, match=r"int8-qdq and fp8 need NVIDIA's ModelOpt \(.+\): pip install 'nvidia-modelopt\[onnx\]'"
    ):
        export(str(checkpoint), tmp_path / "out", targets=("tensorrt",), precisions=(precision,))
    assert not list(tmp_path.iterdir())
