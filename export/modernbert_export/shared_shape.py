"""Reads the sizes of batch and sequence from one input instead of from a value of every layer.

Bodies of operators ask their own inputs for them. Once all ask the same tensor, equal questions merge, and with them
the positions and masks that are made of the answers: engines that do not merge would compute those in every layer.
"""

from __future__ import annotations

import onnx_ir as ir


class SharedShapePass(ir.passes.InPlacePass):
    """Lets every Shape of one axis that an input has too, by its name, look at that input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        axes = {
            dim.value: (value, axis)
            for value in reversed(model.graph.inputs)
            for axis, dim in enumerate(value.shape or ())
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
        }
        modified = False
        for node in model.graph:
            dim = _single_axis(node)
            if dim is None or dim not in axes:
                continue
            source, axis = axes[dim]
            node.replace_input_with(0, source)
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64("start", axis),
                ir.AttrInt64("end", axis + 1),
            )
            modified = True
        return ir.passes.PassResult(model, modified)


def _single_axis(node: ir.Node) -> str | None:
    """The name of the axis that a Shape node asks for, if it is one and has a name."""
    if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    start = node.attributes.get_int("start", 0)
    axes = range(len(shape))[start : node.attributes.get_int("end", len(shape))]
    dim = shape[axes[0]] if len(axes) == 1 else None
    return dim.value if isinstance(dim, ir.SymbolicDim) else None
