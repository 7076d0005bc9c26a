"""Precisions: which there are, and per target where they run.

fp32 is the graph as it is lowered. `half` makes fp16 and bf16 on the torch side, before the trace; `int8` rewrites the
lowered fp32 graph, with scales and exceptions that `calibrate` chose by measured error.
"""

from collections.abc import Mapping

from modernbert.errors import InputError
from modernbert_export.ops.op import Target

# File of a portable artifact by precision: the names that transformers.js and optimum look for.
FILES: Mapping[str, str] = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
# int8 is for CPUs: its operators are ONNX Runtime's CPU kernels'.
SUPPORTED: Mapping[Target, tuple[str, ...]] = {"portable": ("fp32", "fp16", "int8")}


def check_precisions(target: str, precisions: tuple[str, ...]) -> Target:
    """The target, if it and the precisions can be exported.

    Raises:
        InputError: the target or a precision is unknown, or one is named twice.
    """
    known = [name for name in SUPPORTED if name == target]
    if not known:
        raise InputError(f"target must be one of {', '.join(SUPPORTED)}, not {target!r}")
    possible = SUPPORTED[known[0]]
    if not precisions:
        raise InputError(f"precision is empty; give one or more of {','.join(possible)}")
    for precision in precisions:
        if precision not in possible:
            raise InputError(f"precision for target {target} must be one of {', '.join(possible)}, not {precision!r}")
        if precisions.count(precision) > 1:
            raise InputError(f"precision names {precision!r} more than once; name it once")
    return known[0]
