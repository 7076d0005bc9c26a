"""The linear layers of a lowered graph: which MatMul nodes compute each, and how one is put in another's place.

Every integer precision is a pass over these nodes. The graph may compute a layer in several products, each over a part
of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig

# Of a layer, in the order of the graph.
LAYER_LINEARS = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")


@dataclass(frozen=True)
class Linear:
    """A linear layer, by the name of its module in the encoder; that of a vocabulary's logits is "decoder"."""

    name: str
    inputs: int
    outputs: int


def linears(config: ModernBertConfig) -> list[Linear]:
    """All of the encoder in the order of the graph."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
    return [
        Linear(f"layers.{index}.{name}", *shape)
        for index in range(config.num_hidden_layers)
        for name, shape in zip(LAYER_LINEARS, shapes, strict=True)
    ]


def products(model: ir.Model, config: ModernBertConfig) -> Iterator[tuple[Linear, list[ir.Node]]]:
    """The MatMul nodes of each linear layer, found by order and size, and that of a decoder if there is one.

    Other products of a head are small, and left alone.

    Raises:
        AssertionError: the graph's products are not the encoder's linear layers: a fault of ours.
    """
    nodes = [node for node in model.graph if node.op_type == "MatMul" and matrix_shape(node.inputs[1]) is not None]
    for linear in linears(config):
        mine, outputs = [], 0
        while outputs < linear.outputs:
            node = nodes.pop(0)
            rows, columns = matrix_shape(node.inputs[1])  # type: ignore[misc]
            assert rows == linear.inputs, f"{linear}: found a product with {rows} inputs"
            mine.append(node)
            outputs += columns
        assert outputs == linear.outputs, f"{linear}: products with {outputs} outputs"
        yield linear, mine
    for node in nodes:
        rows, columns = matrix_shape(node.inputs[1])  # type: ignore[misc]
        if columns == config.vocab_size:
            yield Linear("decoder", rows, columns), [node]


def matrix_shape(value: ir.Value | None) -> tuple[int, int] | None:
    """Rows and columns of a constant matrix; None if it is none."""
    stored, transposed = _stored(value)
    if stored is None or len(stored.shape) != 2:
        return None
    rows, columns = stored.shape.numpy()
    return (columns, rows) if transposed else (rows, columns)


def matrix(value: ir.Value | None) -> NDArray[np.float32]:
    """The numbers of a constant matrix."""
    stored, transposed = _stored(value)
    assert stored is not None
    return stored.numpy().T if transposed else stored.numpy()


def _stored(value: ir.Value | None) -> tuple[ir.TensorProtocol | None, bool]:
    """The tensor behind a value, and whether the graph transposes it: a decoder takes the table of embeddings so."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        return node.inputs[0].const_value, True
    return (value.const_value if value is not None else None), False


def initializer(graph: ir.Graph, name: str, tensor: NDArray[np.generic]) -> ir.Value:
    """Registers a constant."""
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(tensor), name=name))
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
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


def quantize_embeddings(graph: ir.Graph, config: ModernBertConfig) -> None:
    """Gather from a table of 8-bit integers, and from the column of its rows' scales, which are fp16."""
    shape = (config.vocab_size, config.hidden_size)
    (node,) = (node for node in graph if node.op_type == "Gather" and matrix_shape(node.inputs[0]) == shape)
    table, ids = node.inputs
    assert table is not None
    integers, scale = integer_weight(matrix(table).T, scales=np.float16)
    rows = ir.node("Gather", [initializer(graph, f"{table.name}_int8", integers.T), ids], {"axis": 0})
    scales = ir.node("Gather", [initializer(graph, f"{table.name}_scale", scale[:, None]), ids], {"axis": 0})
    floats = [ir.node("Cast", [part.outputs[0]], {"to": ir.DataType.FLOAT}) for part in (rows, scales)]
    result = ir.node("Mul", [part.outputs[0] for part in floats])
    replace(graph, node, [rows, scales, *floats, result])


def integer_weight(
    w_IO: NDArray[np.float32], levels: int = 127, scales: type[np.floating[Any]] = np.float32
) -> tuple[NDArray[np.int8], NDArray[np.floating[Any]]]:
    """Integers [I, O] and scales [O] whose product is the matrix, each column's largest value at `levels`."""
    scale_O = np.maximum(np.abs(w_IO).max(0) / levels, np.finfo(scales).tiny).astype(scales)
    integers_IO = np.rint(w_IO / scale_O.astype(np.float32))
    return integers_IO.clip(-levels, levels).astype(np.int8), scale_O
