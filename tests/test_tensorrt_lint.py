"""The lint over TensorRT graphs: silent on ours, and each fault that is planted into them found under its own rule."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modernbert_export.lower import lower
from modernbert_export.ops.op import Target
from modernbert_export.tensorrt.lint import _OPERATORS, _TYPES, OPSETS, lint

PUBLISHED = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text())
# Its names of types, and those of ONNX.
NAMES = {"FP32": "FLOAT", "FP16": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN"}
TARGETS: tuple[Target, ...] = ("tensorrt", "tensorrt-dense")


def lowered(traced: ModelProto, target: Target) -> ModelProto:
    return ir.to_proto(lower(ir.from_proto(traced), target))


@pytest.fixture(scope="module")
def graphs(half_traced: ModelProto) -> dict[str, ModelProto]:
    return {target: lowered(half_traced, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_our_graphs_have_no_fault(graphs: dict[str, ModelProto], traced: ModelProto, target: Target) -> None:
    assert lint(graphs[target], precision="fp16") == []
    assert lint(lowered(traced, target), precision="fp32") == []


def test_operators_and_types_are_those_that_the_parser_publishes() -> None:
    assert [OPSETS[0], OPSETS[-1]] == PUBLISHED["opset"]
    for name, letters in _OPERATORS.items():
        published = {NAMES.get(kind, kind) for kind in PUBLISHED["operators"][name]}
        ours = {TensorProto.DataType.Name(kind) for letter in letters for kind in _TYPES[letter]}
        assert ours <= published, name


def test_function_by_the_name_of_anything_that_the_parser_knows_is_found(graphs: dict[str, ModelProto]) -> None:
    """Custom operators are those of onnx-tensorrt's docs/TRT_custom_ops.md."""
    for name in (*PUBLISHED["operators"], "TRT_Attention", "TRT_QuantizedAttention", "TRT_KVCacheUpdate"):
        model = ModelProto()
        model.opset_import.extend([*graphs["tensorrt"].opset_import, helper.make_opsetid("modernbert", 1)])
        model.ir_version = graphs["tensorrt"].ir_version
        body = [helper.make_node("Identity", ["x"], ["y"])]
        model.functions.append(helper.make_function("modernbert", name, ["x"], ["y"], body, model.opset_import[:1]))
        assert "hijack" in {finding.rule for finding in lint(model, precision="fp16")}, name


def first(model: ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def insert(model: ModelProto, before: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    at = list(model.graph.node).index(before)
    for step, node in enumerate(nodes):
        model.graph.node.insert(at + step, node)


def newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 25


def own_attention(model: ModelProto) -> None:
    """A function of ours by the name of a built-in operator: the parser would compute the built-in one."""
    model.opset_import.append(helper.make_opsetid("modernbert", 1))
    function = helper.make_function(
        "modernbert", "Attention", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], model.opset_import[:1]
    )
    model.functions.append(function)


def contrib_operator(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def infinite_constant(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, -np.inf], np.float32), "mask"))


def infinite_constant_node(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.array([-np.inf], np.float16))
    insert(model, model.graph.node[0], helper.make_node("Constant", [], ["mask"], value=tensor))


def unbounded_mask(model: ModelProto) -> None:
    """-1e9 goes to fp16 as it is."""
    bound = first(model, "Max")
    bound.CopyFrom(helper.make_node("Identity", bound.input[:1], bound.output))


def double(model: ModelProto) -> None:
    norm = first(model, "LayerNormalization")
    up = helper.make_node("Cast", [norm.input[0]], ["wide"], to=TensorProto.DOUBLE)
    insert(model, norm, up, helper.make_node("Cast", ["wide"], ["narrow"], to=TensorProto.FLOAT))
    norm.input[0] = "narrow"


def integer_clip(model: ModelProto) -> None:
    node = first(model, "Gather")
    insert(model, node, helper.make_node("Clip", ["input_ids"], ["clipped"]))
    node.input[1] = "clipped"


def unknown_operator(model: ModelProto) -> None:
    insert(model, model.graph.node[0], helper.make_node("NonZero", ["attention_mask"], ["found"]))


def dynamic_heads(model: ModelProto) -> None:
    """The number of heads comes from a shape: the same number here, but not known to the parser."""
    transposed = next(node for node in model.graph.node if node.output[0] == first(model, "Attention").input[2])
    reshape = next(node for node in model.graph.node if node.output[0] == transposed.input[0])
    shape = next(node for node in model.graph.node if node.output[0] == reshape.input[1])
    shape.input[2] = shape.input[0]


def softcap(model: ModelProto) -> None:
    first(model, "Attention").attribute.append(helper.make_attribute("softcap", 30.0))


def softmax_precision(model: ModelProto) -> None:
    first(model, "Attention").attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))


def output_in_half(model: ModelProto) -> None:
    """Given as it was computed: NumPy has no bf16, and a server's config says fp32."""
    model.graph.node.append(helper.make_node("Cast", [model.graph.output[0].name], ["half"], to=TensorProto.FLOAT16))
    model.graph.output.append(helper.make_tensor_value_info("half", TensorProto.FLOAT16, None))


def key_lengths(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "lengths"))
    first(model, "Attention").input.extend(["", "", "lengths"])


def no_positions(model: ModelProto) -> None:
    del first(model, "RotaryEmbedding").input[3:]


def computed_axes(model: ModelProto) -> None:
    first(model, "Unsqueeze").input[1] = "axes"
    shape = helper.make_node("Shape", ["attention_mask"], ["axes"], start=0, end=1)
    insert(model, model.graph.node[0], shape)


FAULTS: dict[Callable[[ModelProto], None], str] = {
    newer_opset: "opset",
    own_attention: "hijack",
    contrib_operator: "domain",
    infinite_constant: "infinity",
    infinite_constant_node: "infinity",
    unbounded_mask: "infinity",
    double: "float64",
    integer_clip: "types",
    unknown_operator: "operator",
    dynamic_heads: "attention",
    softcap: "attention",
    softmax_precision: "attention",
    output_in_half: "output",
    key_lengths: "attention",
    no_positions: "rotary",
    computed_axes: "constant",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_planted_fault_is_found(graphs: dict[str, ModelProto], plant: Callable[[ModelProto], None]) -> None:
    model = ModelProto()
    model.CopyFrom(graphs["tensorrt-dense"])
    plant(model)
    rules = {finding.rule for finding in lint(model, precision="fp16")}
    assert FAULTS[plant] in rules


def test_norm_in_half_precision_is_found(graphs: dict[str, ModelProto]) -> None:
    model = ModelProto()
    model.CopyFrom(graphs["tensorrt"])
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    insert(model, norm, helper.make_node("Cast", [norm.input[0]], ["narrow"], to=TensorProto.FLOAT16))
    insert(model, norm, helper.make_node("Cast", [weight.name], ["wide"], to=TensorProto.FLOAT16))
    norm.input[0], norm.input[1] = "narrow", "wide"
    later = helper.make_node("Cast", ["normed"], [norm.output[0]], to=TensorProto.FLOAT)
    model.graph.node.insert(list(model.graph.node).index(norm) + 1, later)
    norm.output[0] = "normed"
    (rule,) = {(finding.rule, finding.where.split()[0]) for finding in lint(model, precision="fp16")}
    assert rule == ("precision", "LayerNormalization")


def test_products_left_in_fp32_are_found(traced: ModelProto) -> None:
    found = {finding.where.split()[0] for finding in lint(lowered(traced, "tensorrt"), precision="fp16")}
    assert found == {"MatMul", "Attention", "the"}


def test_islands_are_as_many_as_they_must_be(graphs: dict[str, ModelProto]) -> None:
    (finding,) = lint(graphs["tensorrt"], precision="fp16", islands=4)
    assert str(finding).startswith("island: the graph: 0 products or attentions are fp32, not the 4")


def test_other_targets_are_refused(half_traced: ModelProto) -> None:
    rules = {finding.rule for finding in lint(lowered(half_traced, "portable"), precision="fp16")}
    assert "operator" in rules
