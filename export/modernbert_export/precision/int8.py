"""Dynamic int8 for CPUs: weights as integers with a scale per output, inputs quantised when they arrive.

Linear layers become DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, which ONNX Runtime runs as one kernel;
products of two activations stay fp32. The embedding table gets a scale per token. Written as a pass over `onnx_ir`
because the stock quantiser goes over every column in Python, holds the model several times, and gives the whole
embedding table one scale.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig
from modernbert_export.precision.calibrate import LINEARS

LEVELS = 127
# Without VNNI, x86 adds two products of 8 bits in 16, which saturates: 7 bits for weights leave room.
REDUCED_LEVELS = 63


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model, which the graph may compute in several products over parts of its outputs."""

    name: str
    inputs: int
    outputs: int


def linears(config: ModernBertConfig) -> list[Linear]:
    """All of them in the order of the graph."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
    return [
        Linear(f"layers.{index}.{name}", *shape)
        for index in range(config.num_hidden_layers)
        for name, shape in zip(LINEARS, shapes, strict=True)
    ]


def needs_reduced_range() -> bool:
    """Whether this machine multiplies 8-bit integers without VNNI, so that full weights would saturate."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not cpuinfo.exists() or "vnni" not in cpuinfo.read_text()


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
    for linear, products in _products(model, linears(config)):
        if linear.name not in kept:
            for node in products:
                _quantize_product(model.graph, node, quantized, levels)
    _quantize_embeddings(model.graph, (config.vocab_size, config.hidden_size))
    return model


def _products(model: ir.Model, wanted: Sequence[Linear]) -> Iterator[tuple[Linear, list[ir.Node]]]:
    """The MatMul nodes of each linear layer, found by order and size."""
    products = [node for node in model.graph if node.op_type == "MatMul" and _matrix(node.inputs[1]) is not None]
    for linear in wanted:
        mine, outputs = [], 0
        while outputs < linear.outputs:
            node = products.pop(0)
            rows, columns = _matrix(node.inputs[1])  # type: ignore[misc]
            assert rows == linear.inputs, f"{linear}: found a product with {rows} inputs"
            mine.append(node)
            outputs += columns
        assert outputs == linear.outputs, f"{linear}: products with {outputs} outputs"
        yield linear, mine
    assert not products, f"products that belong to no linear layer: {products}"


def _matrix(value: ir.Value | None) -> tuple[int, int] | None:
    """Rows and columns of a constant matrix."""
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    rows, columns = value.const_value.shape.numpy()
    return rows, columns


def _quantize_product(
    graph: ir.Graph, node: ir.Node, quantized: dict[ir.Value, Sequence[ir.Value]], levels: int
) -> None:
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    assert weight.const_value is not None
    integers, scale = integer_weight(weight.const_value.numpy(), levels)
    if x not in quantized:
        dynamic = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}_quantize")
        for output, suffix in zip(dynamic.outputs, ("integers", "scale", "zero_point"), strict=True):
            output.name = f"{x.name}_{suffix}"
        graph.insert_before(node, dynamic)
        quantized[x] = dynamic.outputs
    x_integers, x_scale, x_zero = quantized[x]
    matrix = _initializer(graph, f"{weight.name}_int8", integers)
    scales = _initializer(graph, f"{weight.name}_scale", scale)
    zero = _initializer(graph, f"{weight.name}_zero_point", np.zeros_like(scale, np.int8))
    product = ir.node("MatMulInteger", [x_integers, matrix, x_zero, zero], name=f"{node.name}_integer")
    floats = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_cast")
    both = ir.node("Mul", [x_scale, scales], name=f"{node.name}_scale")
    result = ir.node("Mul", [floats.outputs[0], both.outputs[0]], name=f"{node.name}_scaled")
    _replace(graph, node, [product, floats, both, result])


def _quantize_embeddings(graph: ir.Graph, shape: tuple[int, int]) -> None:
    """Gather from a table of integers, and from the column of its rows' scales."""
    (node,) = (node for node in graph if node.op_type == "Gather" and _matrix(node.inputs[0]) == shape)
    table, ids = node.inputs
    assert table is not None
    assert table.const_value is not None
    integers, scale = integer_weight(table.const_value.numpy().T, LEVELS)
    rows = ir.node(
        "Gather", [_initializer(graph, f"{table.name}_int8", integers.T), ids], {"axis": 0}, name=f"{node.name}_integer"
    )
    scales = ir.node(
        "Gather",
        [_initializer(graph, f"{table.name}_scale", scale[:, None]), ids],
        {"axis": 0},
        name=f"{node.name}_scale",
    )
    floats = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_cast")
    result = ir.node("Mul", [floats.outputs[0], scales.outputs[0]], name=f"{node.name}_scaled")
    _replace(graph, node, [rows, scales, floats, result])


def integer_weight(w_IO: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers [I, O] and scales [O] whose product is the matrix, each column's largest value at `levels`."""
    scale_O = np.maximum(np.abs(w_IO).max(0) / levels, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(w_IO / scale_O).astype(np.int8), scale_O


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Puts nodes, the last of which computes the same, in the place of one; constants that no node reads go away."""
    graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = None
    old.replace_all_uses_with(new)
    inputs = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        if not value.uses() and value.name is not None:
            graph.initializers.pop(value.name, None)
