"""Rotary tables as constants, for an engine that would round the angles.

A graph computes the angles of its positions in fp32, which is exact enough for engines that do as the graph says. One
that computes in bf16 by itself, as OpenVINO does on request, rounds positions first, and bf16 has no 257. Cosines and
sines it may round: an angle then is off by less than a hundredth, whatever the position.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from modernbert_export.precision.linears import initializer, replace

# Metadata of a file that has such tables: the number of positions, which is the most tokens that it takes.
ROTARY_TABLE_LENGTH = "rotary_table_length"

_TABLES = {"Cos": np.cos, "Sin": np.sin}


def has_constant_tables(model: ModelProto) -> bool:
    """Whether a saved graph is one of these."""
    return any(entry.key == ROTARY_TABLE_LENGTH for entry in model.metadata_props)


class ConstantTablesPass(ir.passes.InPlacePass):
    """Puts the first rows of a table of `length` positions in the place of each cosine and sine [S, 1, K / 2].

    Such a graph fails on more tokens than that, for sizes do not fit.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph, whose first input is [batch, sequence]."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type in _TABLES and not node.domain]
        for node in nodes:
            name = node.outputs[0].name
            table = _TABLES[node.op_type](np.arange(self.length)[:, None, None] * _frequencies(node))
            length = ir.node("Shape", [graph.inputs[0]], {"start": 1, "end": 2}, name=f"{name}_length")
            first = initializer(graph, f"{name}_first", np.array([0]))
            rows = ir.node(
                "Slice",
                [initializer(graph, f"{name}_table", table.astype(np.float32)), first, length.outputs[0], first],
                name=f"{name}_rows",
            )
            replace(graph, node, [length, rows])
        model.metadata_props[ROTARY_TABLE_LENGTH] = str(self.length)
        return ir.passes.PassResult(model, bool(nodes))


def _frequencies(node: ir.Node) -> np.ndarray:
    """What positions are multiplied with, float64 [1, 1, K / 2] or less axes."""
    angle = node.inputs[0]
    product = angle.producer() if angle is not None else None
    assert product is not None
    assert product.op_type == "Mul"
    constants = [value.const_value for value in product.inputs if value is not None and value.const_value is not None]
    assert len(constants) == 1
    return constants[0].numpy().astype(np.float64)
