"""Gives the named operators of a traced graph their bodies for one target and clears the result up.

Functions are inlined, so that the file opens in tools that know standard operators only.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from modernbert_export.ops import OPS
from modernbert_export.ops.op import OPSET, Target
from modernbert_export.split_matmul import SplitMatMulPass

IR_VERSION = 10
# Constants up to this many elements are computed now rather than at run time; the band of a radius of 64 has 12,288.
FOLD_LIMIT = 1 << 14


def lower(model: ir.Model, target: Target) -> ir.Model:
    """Lowers a traced model for a target, in place.

    Raises:
        AssertionError: a node without a body is left: a fault of ours.
    """
    for op in OPS:
        function = ir.serde.deserialize_function(op.bodies[target].to_function_proto())
        model.functions[function.identifier()] = function
    common.InlinePass()(model)
    # Layers repeat what depends on mask and length alone, such as the bias of the band: once is enough. Merged before
    # the optimizer's rewrite rules run, whose time grows with the square of the nodes.
    optimizer.fold_constants(model, output_size_limit=FOLD_LIMIT)
    common.RemoveUnusedNodesPass()(model)
    _merge_equal(model)
    optimizer.optimize(model, inline=False, output_size_limit=FOLD_LIMIT)
    _merge_equal(model)
    SplitMatMulPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    model.ir_version = IR_VERSION
    left = {node.op_identifier() for node in model.graph.all_nodes() if node.domain == OPSET.domain}
    assert not left, f"nodes without a body: {left}"
    return model


def _merge_equal(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=FOLD_LIMIT)(model)
    common.CommonSubexpressionEliminationPass()(model)
