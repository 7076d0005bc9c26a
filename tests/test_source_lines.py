"""Every node of a TensorRT graph names the line of ours that made it; other files say nothing of their origin."""

import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from modernbert_export.lower import lower
from modernbert_export.ops.op import PADDED_TARGETS, Target
from modernbert_export.source_lines import SOURCE, fill_sources, read_sources

ROOT = Path(__file__).resolve().parents[1]
TENSORRT: tuple[Target, ...] = ("tensorrt", "tensorrt-dense")
# Operators that stand for one call of the model each, and what is written in the line that makes it. torch notes lines
# of `forward` only, so the final norm's is the call of what applies it.
WRITTEN = {
    "Attention": ("attend(",),
    "LayerNormalization": ("norm(", "encode("),
    "Gelu": ("_gated(",),
    "RotaryEmbedding": ("attend(",),
}


@pytest.fixture(scope="module")
def files(half_traced: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[Target, Path]:
    directory = tmp_path_factory.mktemp("sources")
    for target in PADDED_TARGETS:
        ir.save(lower(ir.from_proto(half_traced), target), directory / f"{target}.onnx")
    return {target: directory / f"{target}.onnx" for target in PADDED_TARGETS}


def line(source: str) -> str:
    """The text of the line that a source names."""
    file, number = source.rpartition(", ")[2].split(":")
    root = ROOT / "export" if file.startswith("modernbert_export/") else ROOT
    return (root / file).read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize("target", TENSORRT)
def test_every_node_names_the_line_that_made_it(files: dict[Target, Path], target: Target) -> None:
    sources = read_sources(files[target])
    nodes = onnx.load(files[target]).graph.node
    assert len(sources) == len(nodes)
    for node in nodes:
        source = sources[node.name]
        assert re.fullmatch(r"([\w.]+, )?modernbert(_export)?/[\w/]+\.py:\d+", source), source
        if (layer := re.match(r"layers\.(\d+)\.", source)) and node.op_type == "Attention":
            assert layer[1] == str([each for each in nodes if each.op_type == "Attention"].index(node))
        if node.op_type in WRITTEN:
            assert any(call in line(source) for call in WRITTEN[node.op_type]), (node.op_type, source)
    # One for each product of a layer: q with k, v, Wo, both halves of Wi, Wo.
    written = [line(sources[node.name]) for node in nodes if node.op_type == "MatMul"][:6]
    assert ["Wqkv" in text for text in written] == [True] * 2 + [False] * 4
    assert ["Wi(" in text for text in written] == [False] * 3 + [True] * 2 + [False]
    assert ["Wo(" in text for text in written] == [False] * 2 + [True] + [False] * 2 + [True]


def test_files_keep_no_path_of_this_machine_and_others_no_line_at_all(files: dict[Target, Path]) -> None:
    for target, file in files.items():
        assert str(ROOT).encode() not in file.read_bytes()
        assert bool(read_sources(file)) == (target in TENSORRT)
        assert all(not node.metadata_props for node in onnx.load(file).graph.node) == (target not in TENSORRT)


def test_node_that_a_pass_made_has_the_line_of_its_reader_else_of_its_input() -> None:
    x = ir.val("x")
    first, second, third = (ir.node("Exp", [x]) for _ in range(3))
    second.replace_input_with(0, first.outputs[0])
    third.replace_input_with(0, second.outputs[0])
    second.metadata_props[SOURCE] = "a.py:1"
    graph = ir.Graph([x], third.outputs, nodes=[first, second, third], opset_imports={"": 20})
    assert fill_sources(graph) == dict.fromkeys((first, second, third), "a.py:1")
