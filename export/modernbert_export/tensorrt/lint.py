"""What TensorRT's ONNX parser would refuse or compute otherwise, found in the graph, without TensorRT.

The rules are those of the parser's operator list (onnx-tensorrt, docs/operators.md of TensorRT 11.1; opset 25 came with
11.5) and of its importers; those on precision are ours. Each finding names the node.
An engine may still fail to build: the lint proves that a graph has none of the known faults, not that it has no fault.

Letters of types: F fp32, fp16, bf16; I int32, int64; B bool; Q int8, fp8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

OPSETS = range(9, 25)
# What products and attention compute in, and what the values between QuantizeLinear and DequantizeLinear are.
PRECISIONS = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8-qdq": TensorProto.FLOAT16,
    "fp8": TensorProto.FLOAT16,
}
QUANTISED = {"int8-qdq": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
_TYPES = {
    "F": {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16},
    "I": {TensorProto.INT32, TensorProto.INT64},
    "B": {TensorProto.BOOL},
    "Q": set(QUANTISED.values()),
}
# What an encoder may need, by the types of its data. Control flow is left out on purpose: engines with If or Loop are
# not captured as CUDA graphs.
_OPERATORS = {
    **dict.fromkeys(("Attention", "LayerNormalization", "RotaryEmbedding", "MatMul", "Gemm", "Softmax"), "F"),
    **dict.fromkeys(("Gelu", "Erf", "Exp", "Log", "Tanh", "Sigmoid", "Relu", "Sqrt", "Reciprocal", "Sin", "Cos"), "F"),
    **dict.fromkeys(("Clip", "ReduceL2", "Floor", "Ceil"), "F"),
    **dict.fromkeys(("Abs", "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Max", "Min", "Mod", "Range", "Pad"), "FI"),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "Sign"), "FI"),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), "FI"),
    **dict.fromkeys(("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten"), "FIB"),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Shape", "Size", "Slice"), "FIB"),
    **dict.fromkeys(("Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"), "FIB"),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), "B"),
    "QuantizeLinear": "F",
    "DequantizeLinear": "Q",
}
# Operators of the parser that no standard names. NVIDIA's own begin with TRT_.
_OF_THE_PARSER = ("ImageScaler", "ParametricSoftplus", "ScaledTanh")
# Where the data is not the first input; these inputs must be constants of the file.
_DATA_INPUT = {"Where": 1}
_CONSTANT_INPUT = {"Squeeze": 1, "Unsqueeze": 1, "ReduceSum": 1, "ReduceMean": 1, "ReduceMax": 1, "ReduceL2": 1}
# Statistics, angles and sums over many tokens; and what makes the engine fast.
_ALWAYS_FP32 = ("LayerNormalization", "RotaryEmbedding", "ReduceSum", "ReduceL2", "Sin", "Cos")
_IN_PRECISION = ("MatMul", "Attention")
_BOUNDS = ("Max", "Clip", "Softmax")  # behind these a value is no longer beyond fp16
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault: the rule that it breaks, where, and what is wrong."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.message}"


def lint(model: onnx.ModelProto, *, precision: str, islands: int = 0) -> list[Finding]:
    """All faults of a graph that is to be built in a precision of `PRECISIONS`; none is what a file must have.

    Args:
        model: loaded without its external weights where they are large: only small constants are looked at.
        precision: what products and attention must be computed in.
        islands: how many of them must be fp32 all the same, because 16 bits cannot hold their values.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]  # what the file says of its inner values is not what the parser finds
    try:
        typed = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return [Finding(rule="types", where="the graph", message=" ".join(str(error).split())[:300])]
    findings = list(_Lint(typed, precision).findings())
    others = [finding for finding in findings if finding.rule != "island"]
    found = len(findings) - len(others)
    if found == islands:
        return others
    message = f"{found} products or attentions are fp32, not the {islands} that must be"
    return [Finding(rule="island", where="the graph", message=message), *findings]


class _Lint:
    def __init__(self, model: onnx.ModelProto, precision: str) -> None:
        self.model, self.graph = model, model.graph
        self.half, self.quantised = PRECISIONS[precision], QUANTISED.get(precision)
        self.producers = {name: node for node in self.graph.node for name in node.output}
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        for node in self.graph.node:
            for item in node.attribute if node.op_type == "Constant" else ():
                if item.name == "value":
                    self.constants[node.output[0]] = item.t

    def findings(self) -> Iterator[Finding]:
        yield from self._file()
        yield from self._constants()
        yield from self._overflow()
        for node in self.graph.node:
            rules = [self._operator, self._precision]
            rules += {"Attention": [self._attention], "RotaryEmbedding": [self._rotary]}.get(node.op_type, [])
            rules += {"MatMul": [self._linear], "QuantizeLinear": [self._scale], "DequantizeLinear": [self._scale]}.get(
                node.op_type, []
            )
            for rule in rules:
                for name, message in rule(node):
                    yield Finding(rule=name, where=f"{node.op_type} {node.name or node.output[0]!r}", message=message)

    def _file(self) -> Iterator[Finding]:
        for opset in self.model.opset_import:
            if opset.domain not in ("", "ai.onnx"):
                message = (
                    f"the parser knows standard operators only, and of others nothing but the name: {opset.domain!r}"
                )
                yield Finding(rule="domain", where="opset_import", message=message)
            elif opset.version not in OPSETS:
                message = f"opset must be within {OPSETS[0]} to {OPSETS[-1]}, not {opset.version}"
                yield Finding(rule="opset", where="opset_import", message=message)
        names = {(function.name, function.domain) for function in self.model.functions}
        names |= {(node.op_type, node.domain) for node in self.graph.node if node.domain not in ("", "ai.onnx")}
        for name, domain in sorted(names):
            if onnx.defs.has(name) or name in _OF_THE_PARSER or name.startswith("TRT_"):
                message = f"the parser ignores the domain {domain!r} and takes it for the built-in operator"
                yield Finding(rule="hijack", where=name, message=message)

    def _constants(self) -> Iterator[Finding]:
        for name, kind in self.types.items():
            if kind == TensorProto.DOUBLE:
                yield Finding(rule="float64", where=name, message="the parser rounds float64 to fp32 without a word")
        for output in self.graph.output:
            if self.types[output.name] != TensorProto.FLOAT:
                message = "outputs are fp32: NumPy has no bf16, and readers expect one type of all precisions"
                yield Finding(rule="output", where=output.name, message=message)
        for name, tensor in self.constants.items():
            if not np.isfinite(self._floats(tensor)).all():
                yield Finding(rule="infinity", where=name, message="a row of nothing but -inf is NaN after a softmax")

    def _overflow(self) -> Iterator[Finding]:
        """Follows numbers beyond fp16 to casts that would make them infinite."""
        beyond = {name for name, tensor in self.constants.items() if (abs(self._floats(tensor)) > _LARGEST_HALF).any()}
        for node in self.graph.node:
            if not beyond.intersection(node.input) or node.op_type in (*_BOUNDS, *_DATA_FREE):
                continue
            if self.types.get(node.output[0]) == TensorProto.FLOAT16:
                message = f"{beyond.intersection(node.input).pop()} may be beyond {_LARGEST_HALF:g}: bound it first"
                yield Finding(rule="infinity", where=f"{node.op_type} {node.name or node.output[0]!r}", message=message)
            elif self.types.get(node.output[0]) in _TYPES["F"]:
                beyond.update(node.output)

    def _operator(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        if node.domain not in ("", "ai.onnx"):
            return
        allowed = _OPERATORS.get(node.op_type)
        if allowed is None:
            yield "operator", "not among the operators that engines of this project are built from"
            return
        data = node.input[_DATA_INPUT.get(node.op_type, 0)] if node.input else node.output[0]
        kind = self.types.get(data)
        if kind is None:
            yield "types", f"{data!r} has no type"
        elif kind not in set().union(*(_TYPES[letter] for letter in allowed)) and kind != TensorProto.DOUBLE:
            yield "types", f"{data!r} is {TensorProto.DataType.Name(kind)}, which the parser does not take here"
        index = _CONSTANT_INPUT.get(node.op_type)
        if index is not None and len(node.input) > index and node.input[index] not in self.constants:
            yield "constant", f"{node.input[index]!r} must be a constant of the file"

    def _attention(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        for name in node.input[:3]:
            shape = self.shapes.get(name, ())
            if len(shape) != 4:
                yield "attention", f"{name!r} must have 4 axes, not {len(shape)}"
            elif not (shape[1].HasField("dim_value") and shape[3].HasField("dim_value")):
                yield "attention", f"{name!r} must have a static number of heads and head size"
        if len(node.input) > 3 and len(self.shapes.get(node.input[3], ())) != 4:
            yield "attention", f"the mask {node.input[3]!r} must have 4 axes"
        if any(node.input[4:]) or len(node.output) > 1:
            yield "attention", "past keys, key lengths and further outputs are not supported"
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for name in ("softcap", "softmax_precision", "qk_matmul_output_mode", "is_causal"):
            if attributes.get(name):
                yield "attention", f"{name} is not supported, or not beside a mask"

    def _rotary(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        if len(node.input) < 4 or self.types.get(node.input[3]) != TensorProto.INT64:
            yield "rotary", "position_ids must be given, as int64"

    def _scale(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        """Quantisation is symmetric, by positive scales that are known when the engine is built."""
        scale = self.constants.get(node.input[1])
        if scale is None or not (np.isfinite(self._floats(scale)) & (self._floats(scale) > 0)).all():
            yield "scale", f"the scale {node.input[1]!r} must be a positive constant of the file"
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None and numpy_helper.to_array(zero).astype(np.float32).any():
            yield "scale", f"the zero point {node.input[2]!r} must be 0"
        low = self.types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0])
        if low != self.quantised:
            yield "precision", f"quantised values must not be {TensorProto.DataType.Name(low or 0)} in this precision"

    def _linear(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        """A product with weights has both sides quantised where the precision is, or it runs in 16 bits unnoticed."""
        x, weight = (self._dequantised(name) for name in node.input)
        if self.quantised is not None and not (x and weight) and (x or weight or node.input[1] in self.constants):
            yield "precision", "both inputs of a linear layer must be quantised"

    def _dequantised(self, name: str) -> bool:
        return name in self.producers and self.producers[name].op_type == "DequantizeLinear"

    def _precision(self, node: NodeProto) -> Iterator[tuple[str, str]]:
        kind = self.types.get(node.input[0]) if node.input else None
        if kind not in _TYPES["F"]:
            return
        if node.op_type in _ALWAYS_FP32 and kind != TensorProto.FLOAT:
            yield "precision", "must be fp32: strongly typed engines take statistics, angles and sums as the types say"
        if node.op_type in _IN_PRECISION and kind != self.half:
            rule = "island" if kind == TensorProto.FLOAT else "precision"
            yield rule, f"must be {TensorProto.DataType.Name(self.half)}, not {TensorProto.DataType.Name(kind)}"

    def _floats(self, tensor: TensorProto) -> np.ndarray:
        """The values of a float constant; none of another type, or where they are in another file."""
        if tensor.data_type not in {*_TYPES["F"], TensorProto.DOUBLE} or tensor.data_location == TensorProto.EXTERNAL:
            return np.zeros(0)
        return numpy_helper.to_array(tensor).astype(np.float64)


# Operators whose result does not have the size of their input's values.
_DATA_FREE = ("Shape", "Size", "LayerNormalization", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal")
