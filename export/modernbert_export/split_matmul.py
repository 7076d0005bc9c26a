"""Splits a matrix product whose result is split: products of their own instead of one and copies of its parts.

The weights are cut instead of the activations, once instead of in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class SplitMatMulPass(ir.passes.InPlacePass):
    """Replaces MatMul(x, W) -> Split of the last axis by one MatMul per part."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        modified = False
        for split in list(model.graph):
            matmul = _matmul_of(split)
            if matmul is None:
                continue
            x, weight = matmul.inputs
            assert x is not None
            assert weight is not None
            assert weight.const_value is not None
            parts = _parts(weight, _widths(split, weight))
            for output, part in zip(split.outputs, parts, strict=True):
                model.graph.register_initializer(part)
                product = ir.node("MatMul", [x, part], metadata_props=dict(matmul.metadata_props))
                product.outputs[0].name, product.outputs[0].type = f"{output.name}_product", output.type
                product.outputs[0].shape = output.shape
                model.graph.insert_before(matmul, product)
                output.replace_all_uses_with(product.outputs[0])
            model.graph.remove([split, matmul], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _matmul_of(split: ir.Node) -> ir.Node | None:
    """The product with a constant that only this split reads, if it is one."""
    if split.op_type != "Split" or split.domain or split.inputs[0] is None:
        return None
    product = split.inputs[0]
    matmul = product.producer()
    if matmul is None or matmul.op_type != "MatMul" or len(product.uses()) > 1 or product.is_graph_output():
        return None
    weight = matmul.inputs[1]
    if weight is None or weight.const_value is None or weight.shape is None or len(weight.shape) != 2:
        return None
    axis = split.attributes.get_int("axis", 0)
    last = product.shape is not None and axis in (-1, len(product.shape) - 1)
    return matmul if last and sum(_widths(split, weight)) == weight.shape[1] else None


def _widths(split: ir.Node, weight: ir.Value) -> list[int]:
    """Of the parts: constants of the graph, or equal. Empty where they are neither."""
    assert weight.const_value is not None
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    if sizes is None:
        return [weight.const_value.numpy().shape[1] // len(split.outputs)] * len(split.outputs)
    return [] if sizes.const_value is None else sizes.const_value.numpy().tolist()


def _parts(weight: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
    assert weight.const_value is not None
    columns = np.split(weight.const_value.numpy(), np.cumsum(widths)[:-1], axis=1)
    parts = []
    for index, part in enumerate(columns):
        name = f"{weight.name}_{index}"
        tensor = ir.tensor(part.copy(), name=name)
        parts.append(ir.val(name, const_value=tensor))
    return parts
