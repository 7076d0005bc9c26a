"""Joins a residual addition and the norm after it into ONNX Runtime's SkipLayerNormalization.

The sum is an output of the fused node too and goes on as the residual stream, under the name that it had.
"""

from __future__ import annotations

import onnx_ir as ir

from modernbert_export.ops.op import MICROSOFT


class SkipNormPass(ir.passes.InPlacePass):
    """Replaces Add(x, y) -> LayerNormalization over the last axis by SkipLayerNormalization(x, y)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        modified = False
        for norm in list(model.graph):
            add = _addition_of(norm)
            if add is None:
                continue
            fused = ir.node(
                "SkipLayerNormalization",
                [*add.inputs, *norm.inputs[1:]],
                {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
                domain=MICROSOFT.domain,
                num_outputs=4,  # the norm, two statistics, the sum
            )
            (y,), (total,) = norm.outputs, add.outputs
            for new, old in ((fused.outputs[0], y), (fused.outputs[3], total)):
                new.name, new.type, new.shape = old.name, old.type, old.shape
            # Optional outputs that nobody reads have no name.
            fused.outputs[1].name = fused.outputs[2].name = ""
            # Where the first operand came from an earlier addition, that one stands before this node already.
            model.graph.insert_before(norm, fused)
            y.replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
            total.replace_all_uses_with(fused.outputs[3], replace_graph_outputs=True)
            model.graph.remove([norm, add], safe=True)
            modified = True
        if modified:
            model.graph.opset_imports[MICROSOFT.domain] = MICROSOFT.version
        return ir.passes.PassResult(model, modified)


def _addition_of(norm: ir.Node) -> ir.Node | None:
    """The addition of two values of one shape whose sum is normed, if there is one, and nothing uses it before."""
    if norm.op_type != "LayerNormalization" or norm.domain or norm.inputs[0] is None or len(norm.outputs) > 1:
        return None
    total = norm.inputs[0]
    add = total.producer()
    if add is None or add.op_type != "Add" or add.domain or total.shape is None:
        return None
    axis = norm.attributes.get_int("axis", -1)
    same = all(x is not None and x.shape == total.shape for x in add.inputs)
    return add if same and axis in (-1, len(total.shape) - 1) else None
