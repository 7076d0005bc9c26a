"""Dynamic int8 for CPUs: weights as integers with a scale per output, inputs quantised when they arrive.

Linear layers become DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, which ONNX Runtime runs as one kernel;
products of two activations stay fp32. The embedding table gets a scale per token. Written as a pass over `onnx_ir`
because the stock quantiser goes over every column in Python, holds the model several times, and gives the whole
embedding table one scale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from modernbert.config import ModernBertConfig
from modernbert_export.precision.linears import (
    initializer,
    integer_weight,
    matrix,
    products,
    quantize_embeddings,
    replace,
)

LEVELS = 127
# For CPUs on which 8 bits overflow: see `modernbert_runtime.machine.multiplies_int8_exactly`.
REDUCED_LEVELS = 63


def quantize(model: ir.Model, config: ModernBertConfig, *, kept: Collection[str], levels: int = LEVELS) -> ir.Model:
    """Quantises a lowered fp32 graph in place.

    Args:
        model: the graph, linear layers as MatMul with a constant on the right.
        config: what the graph computes.
        kept: names of linear layers, such as "layers.3.mlp.Wo", that stay fp32.
        levels: largest integer that stands for a weight.

    Raises:
        AssertionError: the graph's products are not the model's linear layers: a fault of ours.
    """
    quantized: dict[ir.Value, Sequence[ir.Value]] = {}  # products that read one input share its integers
    for linear, nodes in products(model, config):
        if linear.name not in kept:
            for node in nodes:
                _quantize_product(model.graph, node, quantized, levels)
    quantize_embeddings(model.graph, config)
    common.RemoveUnusedNodesPass()(model)
    for value in (output for node in model.graph for output in node.outputs if not output.is_graph_output()):
        value.type = value.shape = None  # whoever reads the file infers them
    return model


def _quantize_product(
    graph: ir.Graph, node: ir.Node, quantized: dict[ir.Value, Sequence[ir.Value]], levels: int
) -> None:
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    integers, scale = integer_weight(matrix(weight), levels)
    if x not in quantized:
        dynamic = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        for output, suffix in zip(dynamic.outputs, ("integers", "scale", "zero_point"), strict=True):
            output.name = f"{x.name}_{suffix}"
        graph.insert_before(node, dynamic)
        quantized[x] = dynamic.outputs
    x_integers, x_scale, x_zero = quantized[x]
    columns = initializer(graph, f"{weight.name}_int8", integers)
    scales = initializer(graph, f"{weight.name}_scale", scale)
    # No zero point of the weights, which is 0: given one, ONNX Runtime's kernels take another, slower way.
    product = ir.node("MatMulInteger", [x_integers, columns, x_zero])
    floats = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [x_scale, scales])
    result = ir.node("Mul", [floats.outputs[0], both.outputs[0]])
    replace(graph, node, [product, floats, both, result])
