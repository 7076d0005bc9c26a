"""Lets whoever runs a fill-mask graph ask for the logits of one token's places only.

Logits of a vocabulary for every token of 8,192 are 3.3 GB, and a quarter of the base model's arithmetic; to fill gaps
takes those where the mask token stands. The graph gets one more input, `only_token`, with a default: an initializer of
the same name (ONNX, IR 4 and later). Whoever does not give it, such as transformers.js and optimum, which do not even
see it, gets logits [batch, sequence, vocabulary] as ever. Whoever gives a token id gets [1, places, vocabulary]: of all
places where `input_ids` has it, row by row. There must be one.

Shapes: P places, D hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from modernbert_export.ops.op import Target
from modernbert_export.tasks import LOGITS

ONLY_TOKEN = "only_token"  # noqa: S105 - no password
EVERY_TOKEN = -1
HIDDEN = "last_hidden_state"


def has_only_token(task: str, target: Target, *, with_globals: bool) -> bool:
    """Whether such a graph gets the input: ONNX Runtime takes it, the other engines make it a constant.

    Not where global tokens stand before the others: places are counted without them.
    """
    return task == "fill-mask" and target in ("portable", "ort-cuda") and not with_globals


def add_only_token(model: ir.Model) -> ir.Model:
    """Adds the input to a lowered graph, in place.

    Raises:
        AssertionError: the graph has no token vectors of that name, or no logits: a fault of ours.
    """
    graph = model.graph
    hidden = next((out for node in graph for out in node.outputs if out.name == HIDDEN), None)
    (logits,) = (value for value in graph.outputs if value.name == LOGITS)
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert hidden is not None, f"no value {HIDDEN}"
    declared = logits.shape
    assert declared is not None
    last = logits.producer()
    assert last is not None
    wanted = ir.val(
        ONLY_TOKEN, ir.DataType.INT64, ir.Shape([]), const_value=ir.tensor(np.array(EVERY_TOKEN), name=ONLY_TOKEN)
    )
    graph.inputs.append(wanted)
    graph.register_initializer(wanted)

    def constant(name: str, value: Any) -> ir.Value:
        made = ir.val(f"{ONLY_TOKEN}_{name}", const_value=ir.tensor(np.array(value), name=f"{ONLY_TOKEN}_{name}"))
        graph.register_initializer(made)
        return made

    readers = list(hidden.uses())
    every = ir.node("Equal", [wanted, constant("every", EVERY_TOKEN)])
    there = ir.node("Equal", [ids, wanted])
    chosen = ir.node("Or", [every.outputs[0], there.outputs[0]])
    places = ir.node("NonZero", [chosen.outputs[0]])
    place = ir.node("Transpose", places.outputs, {"perm": [1, 0]})
    rows_PD = ir.node("GatherND", [hidden, place.outputs[0]])
    rows_1PD = ir.node("Unsqueeze", [rows_PD.outputs[0], constant("front", [0])])
    before = [every, there, chosen, places, place, rows_PD, rows_1PD]
    graph.insert_after(hidden.producer(), before)  # type: ignore[arg-type]
    for node, index in readers:
        node.replace_input_with(index, rows_1PD.outputs[0])
    _forget_shapes(rows_1PD.outputs[0])

    batch = ir.node("Shape", [ids], {"start": 0, "end": 1})
    rows = ir.node("Where", [every.outputs[0], batch.outputs[0], constant("one", [1])])
    shape = ir.node("Concat", [rows.outputs[0], constant("axes", [-1, int(declared[-1])])], {"axis": 0})  # type: ignore[arg-type]
    result = ir.node("Reshape", [logits, shape.outputs[0]])
    graph.insert_after(last, [batch, rows, shape, result])
    given = result.outputs[0]
    given.name, given.type, given.shape = LOGITS, logits.type, declared
    logits.name = f"{LOGITS}_rows"
    graph.outputs[list(graph.outputs).index(logits)] = given
    for node in (*before, batch, rows, shape, result):
        node.name = node.name or f"{ONLY_TOKEN}_{node.op_type}"
        for value in node.outputs:
            value.name = value.name or f"{node.name}_output"
    return model


def _forget_shapes(value: ir.Value) -> None:
    """Everything computed from a value has another number of rows now than its shape says."""
    ahead = [value]
    while ahead:
        for node, _ in ahead.pop().uses():
            for output in node.outputs:
                output.shape = None
                ahead.append(output)
