"""The benchmark that says where the time goes puts every node with the right layer, those around a Loop too."""

import importlib.util
import json
from pathlib import Path

import onnx

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "layer_times.py"


def test_every_layer_has_its_products(bundle: Path) -> None:
    spec = importlib.util.spec_from_file_location("layer_times", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph = onnx.load(bundle / "onnx/model.onnx", load_external_data=False).graph
    for index, node in enumerate(graph.node):
        node.name = f"node {index}"
    places = module.places(graph)
    assert set(places) == {node.name for node in graph.node}
    for layer, kind in enumerate(json.loads((bundle / "config.json").read_text())["layer_types"]):
        mine = [node.op_type for node in graph.node if places[node.name] == (layer, "linear layers")]
        assert mine == ["MatMul"] * 6  # q with k, v, Wo, both halves of Wi, Wo
        attention = [node.op_type for node in graph.node if places[node.name] == (layer, "attention")]
        assert sorted(attention) == (["Loop"] if kind == "full_attention" else ["MatMul", "MatMul", "Softmax"])
