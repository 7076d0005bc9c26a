"""Rotary tables that OpenVINO keeps exact when it computes in bfloat16.

Told to compute in bfloat16 it computes the rotary angles so, too, and bfloat16 cannot count beyond 256: tokens of a
trained model came out at a cosine of 0.995 at 512 tokens, and of 0.99999 with exact tables. These depend on the
position alone, so they are computed once here, in fp32, for the longest input, and the graph cuts off what it needs.
"""

from typing import Any

import numpy as np


def with_exact_tables(core: Any, model: Any, max_length: int) -> Any:
    """Replaces the cosines and sines of a model by constants, cut to the length of the input.

    Args:
        core: an `openvino.Core`.
        model: an `openvino.Model` with the input `input_ids`; changed in place.
        max_length: most tokens of an input.

    Returns:
        The model.
    """
    import openvino
    from openvino import opset13 as op

    tables = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Cos", "Sin")]
    if not tables:
        return model
    parameters = model.get_parameters()
    alone = openvino.Model([node.output(0) for node in tables], parameters, "rotary tables")
    computed = core.compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    longest = np.ones((1, max_length), dtype=np.int64)
    values = computed(dict.fromkeys((name for one in model.inputs for name in one.get_names()), longest))
    (ids,) = (one for one in parameters if "input_ids" in one.output(0).get_names())
    length = op.gather(op.shape_of(ids), op.constant(np.array([1])), op.constant(0))
    start, step, axis = (op.constant(np.array([number])) for number in (0, 1, 0))
    for index, node in enumerate(tables):
        table = op.slice(op.constant(np.array(values[index])), start, length, step, axis)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(table.output(0))
    model.validate_nodes_and_infer_types()
    return model
