"""A bf16 graph in a form that ONNX Runtime's CPU kernels run, which have next to none for bf16.

Every operator computes in fp32 on inputs that bf16 holds exactly, and its result is rounded to bf16 and back. That is
what tensor cores do with bf16: exact products, sums in fp32, one rounding at the end. Inside a fused attention engines
differ; here it counts as one operator. Values keep their names, so what reads them by name goes on as before.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

_BF16, _FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT
# Operators outside the standard that graphs here have: each gives values of its first input's type and shape.
_LIKE_FIRST_INPUT = ("MultiHeadAttention", "RotaryEmbedding", "SkipLayerNormalization")


def bf16_values(model: onnx.ModelProto) -> frozenset[str]:
    """Names of all values of a graph that are bf16, constants among them.

    Args:
        model: may be without its external weights.
    """
    if not any(_mentions_bf16(node) for node in model.graph.node) and not any(
        tensor.data_type == _BF16 for tensor in model.graph.initializer
    ):
        return frozenset()
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.node[:], graph.value_info[:]
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx"):
            graph.node.append(node)
        else:
            assert node.op_type in _LIKE_FIRST_INPUT, f"{node.op_type} of {node.domain!r}: which types does it give?"
            graph.node.extend(helper.make_node("Identity", node.input[:1], [name]) for name in node.output if name)
    typed = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), check_type=True
    ).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.input, *typed.value_info, *typed.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    untyped = {name for node in graph.node for name in node.output if name and not types.get(name)}
    assert not untyped, f"values without a type: {untyped}"
    return frozenset(name for name, kind in types.items() if kind == _BF16)


def bf16_on_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in that form; one without bf16 comes back as it is.

    Args:
        model: inputs and outputs are not bf16, nor is anything inside a loop. May be without its external weights,
            which stay bf16 in their file.
    """
    low = bf16_values(model)
    if not low:
        return model
    ends = low.intersection(value.name for value in (*model.graph.input, *model.graph.output))
    assert not ends, f"inputs or outputs in bf16: {ends}"
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.name in low:
            graph.node.append(_cast(_stored(tensor.name), tensor.name, _FP32))
            tensor.name = _stored(tensor.name)
    for node in model.graph.node:
        changed = graph.node.add()
        changed.CopyFrom(node)
        constant = node.op_type in ("Constant", "ConstantOfShape")  # bf16 already
        if node.op_type == "Cast" and node.output[0] in low:
            changed.attribute[0].i = _FP32
        for index, name in enumerate(node.output):
            if name in low:
                changed.output[index] = _stored(name) if constant else f"{name}.exact"
                if not constant:
                    graph.node.append(_cast(f"{name}.exact", _stored(name), _BF16))
                graph.node.append(_cast(_stored(name), name, _FP32))
    return result


def _stored(name: str) -> str:
    return f"{name}.bf16"


def _cast(value: str, result: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [value], [result], to=kind)


def _mentions_bf16(node: NodeProto) -> bool:
    return any(
        (attribute.name == "to" and attribute.i == _BF16) or attribute.t.data_type == _BF16
        for attribute in node.attribute
    )
