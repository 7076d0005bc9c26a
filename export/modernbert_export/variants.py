"""Which artifacts an export makes: a lowering, a precision and a form each, and the names of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modernbert.errors import InputError
from modernbert_export.lower import TargetForm, form_of
from modernbert_export.ops.op import Target
from modernbert_export.precision.modelopt import MODES
from modernbert_runtime.manifest import PACKED
from modernbert_runtime.tensorrt_plan import DENSE_LENGTH

# Lowerings by the target that a user names. TensorRT gets two graphs, with the same weights: its local layers are dense
# up to DENSE_LENGTH and banded above.
LOWERINGS: Mapping[str, tuple[Target, ...]] = {
    "portable": ("portable",),
    "openvino": ("openvino",),
    "ort-cuda": ("ort-cuda",),
    "tensorrt": ("tensorrt", "tensorrt-dense"),
}
# Those that are made from the fp32 file of their target: `int8` quantises what comes in as well, the others weights
# alone.
INTEGERS = ("int8", "int8-weights", "int4-weights")
# Those that must prove themselves on text.
QUANTISED = (*INTEGERS, *MODES)
# Precisions by the same, the one first that is taken when none is named. Integers are for CPUs, where ONNX Runtime has
# kernels for them; OpenVINO runs `int8` as slowly as fp32, and has kernels for `int8-weights`. bf16 is for GPUs, and in
# OpenVINO for CPUs that have it: ONNX Runtime's CPU kernels have next to none for it. Its MultiHeadAttention takes it
# on CUDA since pull request 26083 (September 2025).
SUPPORTED: Mapping[str, tuple[str, ...]] = {
    "portable": ("fp32", "fp16", *INTEGERS),
    "openvino": ("fp32", "bf16", "int8-weights"),
    "ort-cuda": ("fp32", "fp16", "bf16"),
    "tensorrt": ("fp16", "bf16", *MODES),
}
# Not a graph of its own: a model repository of one of these.
TRITON = "triton"
FOR_TRITON = ("portable", "ort-cuda", "tensorrt")
# The portable files have the names that transformers.js and optimum look for; the others' have their target in it.
_FILES: Mapping[str, str] = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "bf16": "model_bf16.onnx",
    "int8": "model_quantized.onnx",
    "int8-weights": "model_int8_weights.onnx",
    "int4-weights": "model_q4.onnx",
    **{name: f"model_{name}.onnx" for name in MODES},
}
# Precisions that the packed form of the portable graph has.
PACKED_PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Variant:
    """One artifact to make."""

    target: Target
    precision: str

    @property
    def file(self) -> str:
        """Name of its graph file."""
        name = _FILES[self.precision]
        return name if self.target == "portable" else name.replace("model", f"model_{self.target}", 1)

    @property
    def stored(self) -> str:
        """Precision of the numbers in its file: OpenVINO takes fp32 ones and computes in bf16 by itself."""
        return "fp32" if self.in_openvino else self.precision

    @property
    def in_openvino(self) -> bool:
        """See `proven_in_openvino`."""
        return proven_in_openvino(self.target, self.precision)

    @property
    def packed(self) -> bool:
        """Whether it takes packed tokens; see `modernbert_export.packed`."""
        return self.target == PACKED

    @property
    def form(self) -> TargetForm:
        """What its graph may consist of."""
        return form_of(self.target, self.precision)

    @property
    def max_length(self) -> int | None:
        """Most tokens that it is for, where that is less than the model takes."""
        return DENSE_LENGTH if self.target == "tensorrt-dense" else None


def proven_in_openvino(target: str, precision: str) -> bool:
    """Whether an artifact is compared as OpenVINO computes it, on a CPU that can; all others as ONNX Runtime does."""
    return (target, precision) == ("openvino", "bf16")


def split_targets(targets: Sequence[str]) -> tuple[list[str], bool]:
    """The targets that are graphs, and whether a repository for Triton is to be made of them.

    Raises:
        InputError: a target is unknown or named twice, or none of the graphs is one that Triton runs.
    """
    _check_names("target", targets, dict.fromkeys((*SUPPORTED, TRITON)))
    graphs = [name for name in targets if name != TRITON]
    if TRITON in targets and graphs and not set(graphs) & set(FOR_TRITON):
        raise InputError(
            f"target {TRITON} runs graphs of {', '.join(FOR_TRITON)}: name one of these beside it, or none"
        )
    return graphs or list(FOR_TRITON[:1]), TRITON in targets


def choose_variants(
    targets: Sequence[str], precisions: Sequence[str] | None, *, packed: bool = False
) -> tuple[Variant, ...]:
    """What to make for these targets: each in those of the precisions that it has, by default in its usual one.

    `packed` adds the packed form to the portable graphs; other tools read those, so it does not come without them.

    Raises:
        InputError: a target or precision is unknown or named twice, or one goes with none of the other.
    """
    _check_names("target", targets, SUPPORTED)
    possible = [name for target in targets for name in SUPPORTED[target]]
    if precisions is not None:
        _check_names(f"precision for target {', '.join(targets)}", precisions, dict.fromkeys(possible))
    variants = []
    for target in targets:
        wanted = SUPPORTED[target][:1] if precisions is None else precisions
        chosen = [name for name in wanted if name in SUPPORTED[target]]
        if not chosen:
            raise InputError(
                f"precision for target {target} must be one of {', '.join(SUPPORTED[target])}, not {', '.join(wanted)}"
            )
        variants += [Variant(lowering, name) for name in chosen for lowering in LOWERINGS[target]]
    if packed:
        padded = [one for one in variants if one.target == "portable" and one.precision in PACKED_PRECISIONS]
        if not padded:
            raise InputError(
                f"packed goes with target portable in {' or '.join(PACKED_PRECISIONS)}, and none of these is asked "
                "for; leave it out, or add one"
            )
        variants += [replace(one, target=PACKED) for one in padded]
    return tuple(variants)


def _check_names(what: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    if not names:
        raise InputError(f"{what} is empty; give one or more of {','.join(known)}")
    for name in names:
        if name not in known:
            raise InputError(f"{what} must be one of {', '.join(known)}, not {name!r}")
        if list(names).count(name) > 1:
            raise InputError(f"{what} names {name!r} more than once; name it once")
