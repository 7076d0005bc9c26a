"""Each graph operator: its torch reference against the model's own attention, each ONNX body against that reference.

The bodies run alone in ONNX Runtime, one node with its function attached, so that a mistake shows here and not as a
number in a parity report.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from modernbert.attention import eager, rotary_tables
from modernbert.packing import Packing, SharedKeys
from modernbert_export.lower import FORMS
from modernbert_export.ops import OPS
from modernbert_export.ops.global_attention import GLOBAL_ATTENTION, LONG, QUERY_BLOCK
from modernbert_export.ops.local_attention import LOCAL_ATTENTION
from modernbert_export.ops.local_attention_with_globals import LOCAL_ATTENTION_WITH_GLOBALS as WITH_GLOBALS
from modernbert_export.ops.op import HIDDEN_KEY, OPSET, PADDED_TARGETS, GraphOp
from modernbert_export.ops.packed_global_attention import PACKED_GLOBAL_ATTENTION
from modernbert_export.ops.packed_local_attention import PACKED_LOCAL_ATTENTION
from modernbert_export.ops.rotary import ROTARY

HEADS, SIZE = 2, 6
# Not the usual one, so that a body that takes the usual one anyway shows.
SCALE = 0.3
# fp32 against float64: a softmax over at most some hundred keys and a mean of values of size 1.
FP32 = dict(atol=5e-6, rtol=1e-5)
# A key that is hidden by -1e9 has a weight of exactly 0, in any precision.
FP64 = dict(atol=1e-12, rtol=1e-12)
RADII = (1, 3, 8)


def qkv(batch: int, length: int) -> list[Tensor]:
    """[B, S, H, K] in float64 holding fp32 values, so that both sides start from the same.

    Large enough that softmax is far from uniform: a wrong key shows.
    """
    generator = torch.Generator().manual_seed(100 * batch + length)
    return [2 * torch.randn(batch, length, HEADS, SIZE, generator=generator).double() for _ in range(3)]


def as_one(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The same with queries and keys as one tensor [B, S, 2 H, K], which stands for both."""
    qk = torch.cat((q, k), dim=2)
    return [qk, qk, v]


def with_globals(batch: int, length: int, number: int = 2) -> list[Tensor]:
    """q, plain q, k and v of tokens [B, S, H, K], k and v of global tokens [B, G, H, K], as `qkv`."""
    q, k, v = qkv(batch, length)
    plain, global_k, global_v = qkv(batch, length + number)
    return [q, plain[:, :length], k, v, global_k[:, :number], global_v[:, :number]]


def angles(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, K / 2]."""
    cos, sin = rotary_tables(torch.arange(length), 100.0, SIZE, dtype)
    return cos[:, 0], sin[:, 0]


def masks(batch: int, length: int) -> dict[str, Tensor]:
    """1 on tokens, 0 on padding. Rows differ; where there are three, one has no token at all."""
    kept = max(1, length // 2)
    ones = torch.ones(batch, length, dtype=torch.int64)
    right, left, holes = ones.clone(), ones.clone(), ones.clone()
    right[-1, kept:] = 0
    left[-1, : length - kept] = 0
    holes[:, length // 3 : length // 2] = 0
    if batch == 3:
        right[0] = left[1] = 0
    return {"none": ones, "right": right, "left": left, "holes": holes}


def key_bias(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1 - mask.to(dtype)) * HIDDEN_KEY


def one_node_model(op: GraphOp, target: Any, attributes: dict[str, Any], ranks: list[int]) -> bytes:
    """A model of one node of ours, all axes dynamic, with the target's body attached as a function."""
    op.register_schema()
    node = helper.make_node(op.name, op.inputs, ["y"], domain=OPSET.domain, **attributes)
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT64 if name in op.integer_inputs else TensorProto.FLOAT,
            [f"{name}{axis}" for axis in range(rank)],
        )
        for name, rank in zip(op.inputs, ranks, strict=True)
    ]
    graph = helper.make_graph(
        [node], op.name, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    )
    form = FORMS[target]
    versions = {"": form.opset, OPSET.domain: OPSET.version, **form.domains}
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    functions = op.functions(target)
    for function in functions:
        del function.opset_import[:]
        function.opset_import.extend(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=form.ir_version, functions=functions)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def session(op: GraphOp, target: Any, attributes: dict[str, Any], ranks: list[int]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        one_node_model(op, target, attributes, ranks), providers=["CPUExecutionProvider"]
    )


def run(session: onnxruntime.InferenceSession, op: GraphOp, *inputs: Tensor) -> Tensor:
    feed = {
        name: (x.float() if x.is_floating_point() else x).numpy() for name, x in zip(op.inputs, inputs, strict=True)
    }
    return torch.from_numpy(session.run(None, feed)[0]).double()


def by_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, radius: int | None) -> Tensor:
    """What the model computes on these tokens, [T, H, K]. It scales the queries itself, by the usual factor."""
    packing = Packing.from_mask(mask)
    return eager(*(packing.pack(x) for x in (q * SCALE * SIZE**0.5, k, v)), packing, radius, 0.0)


def on_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """[B, S, H, K] -> [T, H, K]."""
    return x[mask != 0]


def test_every_operator_is_tested_here() -> None:
    here = (ROTARY, LOCAL_ATTENTION, WITH_GLOBALS, GLOBAL_ATTENTION)
    in_test_packed = (PACKED_LOCAL_ATTENTION, PACKED_GLOBAL_ATTENTION)
    assert [op.name for op in OPS] == [op.name for op in (*here, *in_test_packed)]
    targets_of = {op.name: set(PADDED_TARGETS) for op in here} | {op.name: {"packed"} for op in in_test_packed}
    targets_of[ROTARY.name] = {*PADDED_TARGETS, "packed"}
    for op in OPS:
        assert not onnx.defs.has(op.name), f"{op.name} is the name of a built-in operator"
        assert set(op.bodies) == targets_of[op.name]
        for target in op.bodies:
            proto = op.function(target)
            assert (proto.name, proto.domain, tuple(proto.input)) == (op.name, OPSET.domain, op.inputs)
            assert set(proto.attribute) == set(op.attributes)
            # Parts of bodies, in our domain, come with them.
            whole = op.functions(target)
            nodes = [node for function in whole for node in all_nodes(function.node)]
            assert {node.domain for node in nodes} <= {"", "ai.onnx", OPSET.domain, *FORMS[target].domains}
            parts = {part.name for part in whole[1:]}
            assert {node.op_type for node in nodes if node.domain == OPSET.domain} == parts


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


# The references


@pytest.mark.parametrize("radius", [None, *RADII])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_reference_is_the_models_attention(radius: int | None, batch: int) -> None:
    for length in range(1, 3 * (radius or 5) + 3):
        inputs = qkv(batch, length)
        for padding, mask in masks(batch, length).items():
            op, more = (GLOBAL_ATTENTION, []) if radius is None else (LOCAL_ATTENTION, [radius])
            y = op.torch_op(*inputs, key_bias(mask), SCALE, *more)
            assert y.isfinite().all()
            assert torch.equal(y, op.torch_op(*as_one(*inputs), key_bias(mask), SCALE, *more))
            want = by_eager(*inputs, mask, radius)
            torch.testing.assert_close(on_tokens(y, mask), want, **FP64, msg=lambda text, p=padding: f"{p}: {text}")


@pytest.mark.parametrize("radius", RADII)
def test_reference_with_globals_is_the_models_attention(radius: int) -> None:
    # The model's form: one query, rotated and plain side by side, and keys with zeros where they are not met.
    for batch, length in product((1, 2, 3), range(1, 3 * radius + 3)):
        q, plain, k, v, global_k, global_v = with_globals(batch, length)
        for padding, mask in masks(batch, length).items():
            y = WITH_GLOBALS.torch_op(q, plain, k, v, global_k, global_v, key_bias(mask), SCALE, radius)
            packing = Packing.from_mask(mask)
            both, met, value = (
                packing.pack(x) for x in (torch.cat((q, plain), -1), F.pad(k, (0, SIZE)), F.pad(v, (0, SIZE)))
            )
            shared = SharedKeys(k_BGHK=F.pad(global_k, (SIZE, 0)), v_BGHK=F.pad(global_v, (0, SIZE)))
            want = eager(both * SCALE * (2 * SIZE) ** 0.5, met, value, packing, radius, 0.0, shared)[..., :SIZE]
            torch.testing.assert_close(on_tokens(y, mask), want, **FP64, msg=lambda text, p=padding: f"{p}: {text}")


def test_rotary_reference_turns_by_the_angle() -> None:
    # Against complex numbers, which share nothing with the split-half form.
    x = qkv(2, 7)[0]
    cos, sin = angles(7, torch.float64)
    y = ROTARY.torch_op(x, cos, sin)
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1), **FP64)
    assert torch.equal(y[:, 0], x[:, 0])
    assert (y[:, 1:] - x[:, 1:]).abs().amax((0, 2, 3)).min() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_are_well_formed_for_torch_export(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(2, 9))
    bias = key_bias(masks(2, 9)["right"], dtype)
    tables = angles(9, dtype)
    # A transposed view too: what an operator says of its result's memory must hold for any input.
    for view in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        for op, arguments in (
            (ROTARY, (view(q), *tables)),
            (GLOBAL_ATTENTION, (view(q), view(k), view(v), bias, SCALE)),
            (GLOBAL_ATTENTION, (view(q)[:, :5], *map(view, as_one(q, k, v)[1:]), bias, SCALE)),
            (LOCAL_ATTENTION, (view(q), view(k), view(v), bias, SCALE, 3)),
            (LOCAL_ATTENTION, (*map(view, as_one(q, k, v)), bias, SCALE, 3)),
            (WITH_GLOBALS, (*map(view, (q, q, k, v, k[:, :2], v[:, :2])), bias, SCALE, 3)),
        ):
            torch.library.opcheck(op.torch_op, arguments, test_utils=("test_schema", "test_faketensor"))


# The bodies


@pytest.mark.parametrize("target", PADDED_TARGETS)
@pytest.mark.parametrize("radius", RADII)
def test_local_attention_body_equals_its_reference(target: str, radius: int) -> None:
    op = LOCAL_ATTENTION
    runner = session(op, target, dict(num_heads=HEADS, scale=SCALE, radius=radius), [4, 4, 4, 2])
    for batch, length in product((1, 2, 3), range(1, 3 * radius + 3)):
        inputs = qkv(batch, length)
        for padding, mask in masks(batch, length).items():
            want = op.torch_op(*inputs, key_bias(mask), SCALE, radius)
            for form in (inputs, as_one(*inputs)):
                y = run(runner, op, *form, key_bias(mask))
                check(y, want, mask, f"batch {batch}, length {length}, padding {padding}")


@pytest.mark.parametrize("target", PADDED_TARGETS)
def test_local_attention_body_equals_its_reference_at_the_real_radius(target: str) -> None:
    op, radius = LOCAL_ATTENTION, 64
    runner = session(op, target, dict(num_heads=HEADS, scale=SCALE, radius=radius), [4, 4, 4, 2])
    for length in (1, 63, 64, 65, 127, 128, 129, 130, 193, 300):
        inputs, mask = qkv(2, length), masks(2, length)["left"]
        y = run(runner, op, *inputs, key_bias(mask))
        check(y, op.torch_op(*inputs, key_bias(mask), SCALE, radius), mask, f"length {length}")


@pytest.mark.parametrize("target", PADDED_TARGETS)
@pytest.mark.parametrize("radius", RADII)
def test_local_attention_with_globals_body_equals_its_reference(target: str, radius: int) -> None:
    runner = session(WITH_GLOBALS, target, dict(num_heads=HEADS, scale=SCALE, radius=radius), [4, 4, 4, 4, 4, 4, 2])
    for batch, length in product((1, 3), range(1, 3 * radius + 3)):
        inputs = with_globals(batch, length, number=1 + length % 3)
        for padding, mask in masks(batch, length).items():
            y = run(runner, WITH_GLOBALS, *inputs, key_bias(mask))
            want = WITH_GLOBALS.torch_op(*inputs, key_bias(mask), SCALE, radius)
            check(y, want, mask, f"batch {batch}, length {length}, padding {padding}")


@pytest.mark.parametrize("target", PADDED_TARGETS)
def test_fewer_queries_than_keys(target: str) -> None:
    runner = session(GLOBAL_ATTENTION, target, dict(num_heads=HEADS, scale=SCALE), [4, 4, 4, 2])
    for queries, length in ((1, 5), (2, 2), (3, QUERY_BLOCK + 2), (QUERY_BLOCK + 1, QUERY_BLOCK + 3)):
        q, k, v = qkv(2, length)
        mask = masks(2, length)["right"]
        y = run(runner, GLOBAL_ATTENTION, q[:, :queries], k, v, key_bias(mask))
        want = GLOBAL_ATTENTION.torch_op(q[:, :queries], k, v, key_bias(mask), SCALE)
        torch.testing.assert_close(y, want, **FP32, msg=lambda text, n=length: f"length {n}: {text}")


@pytest.mark.parametrize("target", PADDED_TARGETS)
def test_global_attention_body_equals_its_reference(target: str) -> None:
    op = GLOBAL_ATTENTION
    runner = session(op, target, dict(num_heads=HEADS, scale=SCALE), [4, 4, 4, 2])
    edges = [edge + step for edge in (QUERY_BLOCK, 2 * QUERY_BLOCK) for step in (-1, 0, 1)]
    for batch, length in [*product((1, 2, 3), (1, 2, 3, 7, 16)), *product((1, 3), edges)]:
        inputs = qkv(batch, length)
        for padding, mask in masks(batch, length).items():
            want = op.torch_op(*inputs, key_bias(mask), SCALE)
            for form in (inputs, as_one(*inputs)):
                y = run(runner, op, *form, key_bias(mask))
                check(y, want, mask, f"batch {batch}, length {length}, padding {padding}")


@pytest.mark.parametrize(
    ("batch", "heads", "length"),
    [
        (3, 4, LONG - 1),  # a text at a time
        (3, 2, LONG - 1),  # all texts at a time
        (1, 4, LONG - 1),  # all heads, blocks of queries
        (1, 4, LONG),  # two heads at a time
        (2, 4, LONG + 1),  # blocks that are not full
        (2, 3, LONG),  # one head at a time
    ],
)
def test_every_way_of_the_portable_body_equals_the_reference(batch: int, heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, length, heads, SIZE, generator=generator).double() for _ in range(3))
    runner = session(GLOBAL_ATTENTION, "portable", dict(num_heads=heads, scale=SCALE), [4, 4, 4, 2])
    for padding in ("none", "right"):
        mask = masks(batch, length)[padding]
        want = GLOBAL_ATTENTION.torch_op(q, k, v, key_bias(mask), SCALE)
        for form in ([q, k, v], as_one(q, k, v)):
            y = run(runner, GLOBAL_ATTENTION, *form, key_bias(mask))
            check(y, want, mask, f"padding {padding}")
    bias = key_bias(masks(batch, length)["holes"])
    few = run(runner, GLOBAL_ATTENTION, q[:, :5], k, v, bias)
    torch.testing.assert_close(few, GLOBAL_ATTENTION.torch_op(q[:, :5], k, v, bias, SCALE), **FP32)


@pytest.mark.parametrize("target", PADDED_TARGETS)
def test_rotary_body_equals_its_reference(target: str) -> None:
    runner = session(ROTARY, target, {}, [4, 2, 2])
    for batch, length in product((1, 2, 3), (1, 2, 9)):
        x = qkv(batch, length)[0]
        tables = [table.double() for table in angles(length, torch.float32)]
        torch.testing.assert_close(run(runner, ROTARY, x, *tables), ROTARY.torch_op(x, *tables), **FP32)


@pytest.mark.parametrize("target", PADDED_TARGETS)
@pytest.mark.parametrize("size", [1e4, 1e-30], ids=str)
def test_extreme_scores_stay_finite(target: str, size: float) -> None:
    mask = masks(3, 11)["right"]
    inputs = [size * x for x in qkv(3, 11)[:2]] + qkv(3, 11)[2:]
    for op, attributes in ((LOCAL_ATTENTION, dict(radius=3)), (GLOBAL_ATTENTION, {})):
        runner = session(op, target, dict(num_heads=HEADS, scale=SCALE, **attributes), [4, 4, 4, 2])
        y = run(runner, op, *inputs, key_bias(mask))
        assert y.isfinite().all()
        if size < 1:  # scores of 0: the mean over visible keys; a hidden one among them would show
            check(y, op.torch_op(*inputs, key_bias(mask), SCALE, *attributes.values()), mask, op.name)


def check(y: Tensor, want: Tensor, mask: Tensor, what: str) -> None:
    """Equal on tokens; on padding, whose value nobody reads, finite and of the right shape."""
    assert y.shape == want.shape, what
    assert np.isfinite(y.numpy()).all(), what
    torch.testing.assert_close(on_tokens(y, mask), on_tokens(want, mask), **FP32, msg=lambda text: f"{what}: {text}")
