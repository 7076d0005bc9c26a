"""Puts the statistics of norms into fp32 where activations are fp16 or bf16.

LayerNormalization promises that by its `stash_type`, but the TensorRT parser builds strongly typed networks in which
only the types in the graph count. So the types say it: cast up, norm with an fp32 scale, cast down.
"""

from __future__ import annotations

import onnx_ir as ir

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class NormIslandPass(ir.passes.InPlacePass):
    """Wraps every LayerNormalization of half precision in casts and gives it fp32 weights."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        modified = False
        for norm in list(model.graph):
            if norm.op_type != "LayerNormalization" or norm.domain or norm.inputs[0] is None:
                continue
            dtype = norm.inputs[0].dtype
            assert dtype is not None, f"the input of {norm.name} has no type: infer shapes first"
            if dtype not in HALVES:
                continue
            up = ir.node("Cast", [norm.inputs[0]], {"to": ir.DataType.FLOAT})
            _type(up.outputs[0], ir.DataType.FLOAT, norm.inputs[0].shape)
            weights = [_fp32(model.graph, value) for value in norm.inputs[1:]]
            inner = ir.node("LayerNormalization", [up.outputs[0], *weights], norm.attributes)
            _type(inner.outputs[0], ir.DataType.FLOAT, norm.outputs[0].shape)
            down = ir.node("Cast", [inner.outputs[0]], {"to": dtype})
            _type(down.outputs[0], dtype, norm.outputs[0].shape)
            down.outputs[0].name = norm.outputs[0].name
            for node in (up, inner, down):
                node.name = f"{norm.name}_{'up' if node is up else 'fp32' if node is inner else 'down'}"
                model.graph.insert_before(norm, node)
            norm.outputs[0].replace_all_uses_with(down.outputs[0], replace_graph_outputs=True)
            model.graph.remove(norm, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _fp32(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """The same constant in fp32: one for all who ask."""
    if value is None or value.dtype == ir.DataType.FLOAT:
        return value
    assert value.const_value is not None
    name = f"{value.name}_fp32"
    if name not in graph.initializers:
        tensor = ir.tensor(value.const_value.numpy().astype("float32"), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def _type(value: ir.Value, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.type, value.shape = ir.TensorType(dtype), shape
