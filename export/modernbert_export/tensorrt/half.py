"""fp16 with fp32 islands: what a strongly typed engine computes is what the types in the graph say.

Works on a traced fp32 graph, before `lower`. From the embeddings to the last norm activations and weights are fp16.
fp32 stay: rotary angles and the rotation itself, the bias that hides keys, and everything from the last norm on, for a
mean over 8,192 tokens does not fit fp16. Norms within keep fp16 inputs here; `NormIslandPass` gives them fp32
statistics.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from modernbert.errors import ParityError
from modernbert_export.ops import OPS
from modernbert_export.ops.op import OPSET

_FLOAT_INPUTS = {op.name: {op.inputs.index(name) for name in op.float_inputs} for op in OPS}


class HalfPass(ir.passes.InPlacePass):
    """Converts a traced graph.

    Args:
        output: name of the graph output that the last norm gives.

    Raises:
        ParityError: a weight is too large for fp16, or there is no last norm.
    """

    def __init__(self, output: str = "last_hidden_state") -> None:
        super().__init__()
        self.output = output

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        graph = model.graph
        ids = graph.inputs[0]
        halves: set[ir.Value] = set()
        for node in list(graph):
            embeds = node.op_type == "Gather" and not node.domain and node.inputs[1] is ids
            if not embeds and not halves.intersection(node.inputs):
                continue
            if node.outputs[0].name == self.output:
                up = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_up")
                assert node.inputs[0] is not None
                up.outputs[0].type, up.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), node.inputs[0].shape
                graph.insert_before(node, up)
                node.replace_input_with(0, up.outputs[0])
                return ir.passes.PassResult(model, True)
            keep = _FLOAT_INPUTS.get(node.op_type, set()) if node.domain == OPSET.domain else set()
            for index, value in enumerate(node.inputs):
                if index not in keep and value is not None and value.const_value is not None:
                    node.replace_input_with(index, _half(graph, node, value))
            for value in node.outputs:
                if value.dtype in (None, ir.DataType.FLOAT):
                    value.type = ir.TensorType(ir.DataType.FLOAT16)
                    halves.add(value)
        raise ParityError(f"the graph has no norm that gives {self.output}: nothing to convert up to")


def _half(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """The same constant in fp16, if it is fp32: one for all who ask."""
    assert value.const_value is not None
    if value.const_value.dtype != ir.DataType.FLOAT:
        return value
    name = f"{value.name}_fp16"
    if name not in graph.initializers:
        exact = value.const_value.numpy()
        if not np.abs(exact).max(initial=0.0) <= np.finfo(np.float16).max:
            raise ParityError(f"{value.name}, read by {before.name}, has values beyond fp16: export it as fp32 or bf16")
        graph.register_initializer(ir.val(name, const_value=ir.tensor(exact.astype(np.float16), name=name)))
    return graph.initializers[name]
