"""Gives the named operators of a traced graph their bodies for one target and clears the result up.

Functions are inlined, so that the file opens in tools that know standard operators only; `inline=False` keeps them, for
those who bring kernels of their own for the nodes of the domain `modernbert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from modernbert_export.constant_tables import ConstantTablesPass
from modernbert_export.ops import OPS
from modernbert_export.ops.op import MICROSOFT, OPSET, Target
from modernbert_export.precision.weight_only import OPSET as BLOCKS_OPSET
from modernbert_export.shared_shape import SharedShapePass
from modernbert_export.skip_norm import SkipNormPass
from modernbert_export.source_lines import SOURCE, fill_sources
from modernbert_export.split_matmul import SplitMatMulPass

IR_VERSION = 10
# Constants up to this many elements are computed now rather than at run time; the band of a radius of 64 has 12,288.
FOLD_LIMIT = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetForm:
    """The form that files of a target have.

    `passes` rewrite the graph once its operators are standard ones; `domains` are those that its nodes may have beside
    the standard one, with their versions; `quadratic` allows values that grow with the square of the length, because
    the target's engine fuses them away; `sources` keeps where each node comes from, for an engine that may refuse one.
    """

    opset: int = 20
    ir_version: int = IR_VERSION
    domains: Mapping[str, int]
    passes: tuple[type[ir.passes.InPlacePass], ...]
    quadratic: bool = False
    sources: bool = False


# Attention and RotaryEmbedding are operators since opset 23, which the TensorRT parser reads up to 24.
_TENSORRT = TargetForm(opset=24, ir_version=11, domains={}, passes=(SplitMatMulPass,), quadratic=True, sources=True)
FORMS: Mapping[Target, TargetForm] = {
    "portable": TargetForm(domains={}, passes=(SplitMatMulPass,)),
    "openvino": TargetForm(domains={}, passes=(SplitMatMulPass,), quadratic=True),
    "ort-cuda": TargetForm(
        domains={MICROSOFT.domain: MICROSOFT.version}, passes=(SplitMatMulPass, SkipNormPass), quadratic=True
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-dense": _TENSORRT,
    "packed": TargetForm(domains={MICROSOFT.domain: MICROSOFT.version}, passes=(SplitMatMulPass,)),
}


def form_of(target: Target, precision: str) -> TargetForm:
    """The form of a target's files in a precision: integer weights in blocks need a newer opset than the rest."""
    form = FORMS[target]
    return dataclasses.replace(form, opset=max(form.opset, BLOCKS_OPSET)) if precision.endswith("-weights") else form


def lower(model: ir.Model, target: Target, *, inline: bool = True, table_length: int | None = None) -> ir.Model:
    """Lowers a traced model for a target, in place.

    `table_length` makes the rotary tables constants of so many positions; see `constant_tables`.

    Raises:
        AssertionError: a node is left that has no body, or is of a domain the target does not have: a fault of ours.
    """
    form = FORMS[target]
    model.graph.opset_imports[""] = form.opset
    for op in OPS:
        for proto in op.functions(target) if target in op.bodies else ():
            function = ir.serde.deserialize_function(proto)
            function.opset_imports.update({"": form.opset, **form.domains})  # those inside loops are not among them
            model.functions[function.identifier()] = function
    if inline:
        common.InlinePass()(model)
    else:
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    # Layers repeat what depends on mask and length alone, such as the bias of the band: once is enough. Merged before
    # the optimizer's rewrite rules run, whose time grows with the square of the nodes.
    optimizer.fold_constants(model, output_size_limit=FOLD_LIMIT)
    common.RemoveUnusedNodesPass()(model)
    _merge_equal(model)
    # Before they run, too, because a transposition that something asks for its shape does not cancel out.
    SharedShapePass()(model)
    optimizer.optimize(model, inline=False, output_size_limit=FOLD_LIMIT)
    common.IdentityEliminationPass()(model)
    if table_length is not None:
        ConstantTablesPass(table_length)(model)
    _merge_equal(model)
    for rewrite in form.passes:
        rewrite()(model)
    common.RemoveUnusedNodesPass()(model)
    sources = fill_sources(model.graph) if form.sources else {}
    common.ClearMetadataAndDocStringPass()(model)
    for node, source in sources.items():
        node.metadata_props[SOURCE] = source
    common.RemoveUnusedOpsetsPass()(model)
    model.ir_version = form.ir_version
    allowed = {"", *form.domains, *(() if inline else (OPSET.domain,))}
    foreign = {node.op_identifier() for node in model.graph.all_nodes() if node.domain not in allowed}
    assert not foreign, f"nodes that the target {target} does not have: {foreign}"
    return model


def _merge_equal(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=FOLD_LIMIT)(model)
    common.CommonSubexpressionEliminationPass()(model)
