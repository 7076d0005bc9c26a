"""What a graph operator is: one name, one torch reference, one ONNX body per target.

The name stands in the ONNX domain `modernbert` and is never that of a built-in operator, because some parsers ignore
the domain when they look a name up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import onnx
import onnxscript
import torch

# What graphs are made for that take padded batches, and all. "packed" is ONNX Runtime on a CPU, see `packed`.
PaddedTarget = Literal["portable", "openvino", "ort-cuda", "tensorrt", "tensorrt-dense"]
Target = Literal[PaddedTarget, "packed"]
PADDED_TARGETS: tuple[PaddedTarget, ...] = get_args(PaddedTarget)
OPSET = onnxscript.values.Opset("modernbert", 1)
MICROSOFT = onnxscript.values.Opset("com.microsoft", 1)  # operators that ONNX Runtime alone has

# Added to the score of a key that must not be seen. Finite, so that a row without any visible key gives no NaN.
HIDDEN_KEY = -1e9
# The same where scores may be fp16, which ends at 65,504: far below any score that fp16 holds beside it.
HIDDEN_KEY_HALF = -3e4


@dataclass(frozen=True, kw_only=True)
class GraphOp:
    """An operator of the traced graph.

    `torch_op` is what the trace calls and what computes the reference; `node` makes the ONNX node of such a call, whose
    `inputs` and `attributes` are named here; `bodies` defines the node for each target whose graphs have it. Inputs
    named in `float_inputs` have a type of their own and may stay fp32 where the others are fp16; those in
    `integer_inputs` are int64. Attributes have their type, int or float, beside their name.
    """

    name: str
    torch_op: torch._ops.OpOverload
    node: Callable[..., Any]
    inputs: tuple[str, ...]
    attributes: Mapping[str, type] = field(default_factory=dict)
    bodies: Mapping[Target, onnxscript.OnnxFunction]
    float_inputs: tuple[str, ...] = ()
    integer_inputs: tuple[str, ...] = ()

    def function(self, target: Target) -> onnx.FunctionProto:
        """The body for a target, under the name that the node has."""
        proto = self.bodies[target].to_function_proto()
        proto.name = self.name
        return proto

    def functions(self, target: Target) -> list[onnx.FunctionProto]:
        """The body for a target and the parts that it calls."""
        parts = self.bodies[target].function_ir.get_called_functions().values()
        return [self.function(target), *(part.to_function_proto() for part in parts)]

    def register_schema(self) -> None:
        """Makes the node known to onnx, so that the tracer may emit it before it has a body. Safe to repeat."""
        if onnx.defs.has(self.name, OPSET.domain):
            return
        formal, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
        attribute_kinds = {int: onnx.defs.OpSchema.AttrType.INT, float: onnx.defs.OpSchema.AttrType.FLOAT}
        kinds = dict.fromkeys(self.float_inputs, "F") | dict.fromkeys(self.integer_inputs, "tensor(int64)")
        floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
        onnx.defs.register_schema(
            onnx.defs.OpSchema(
                self.name,
                OPSET.domain,
                OPSET.version,
                inputs=[formal(name, kinds.get(name, "T")) for name in self.inputs],
                outputs=[formal("y", "T")],
                type_constraints=[("T", floats, ""), *([("F", floats, "")] if self.float_inputs else [])],
                attributes=[attribute(name, attribute_kinds[kind]) for name, kind in self.attributes.items()],
            )
        )
