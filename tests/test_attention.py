"""The attention backends are one function: equal to a plain loop, to each other, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modernbert.attention import BACKENDS, rotary_tables, rotate
from modernbert.packing import Packing

# Rounding alone: sums of at most some tens of products of normal values. fp32 keeps 7 digits, float64 15.
TOLERANCE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.float64: dict(atol=1e-12, rtol=1e-12)}
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)

lengths = st.lists(st.integers(0, 20), min_size=1, max_size=5)
radii = st.one_of(st.none(), st.integers(1, 9))
# Rows of one length, with tokens and padding anywhere.
masks = st.integers(1, 16).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)
)


def packed(lengths: list[int]) -> Packing:
    return Packing.from_cu_seqlens(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))


def random_qkv(tokens: int, dtype: torch.dtype, heads: int = 2, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    # Twice normal, so that the softmax is far from uniform and a wrong key shows.
    return [2 * torch.randn(tokens, heads, size, generator=generator, dtype=dtype) for _ in range(3)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, packing: Packing, radius: int | None) -> Tensor:
    """Attention as the paper writes it, token by token; shares nothing with the backends."""
    y = torch.zeros_like(v)
    where = list(zip(packing.sequence_T.tolist(), packing.position_T.tolist(), strict=True))
    for i, (row, position) in enumerate(where):
        keys = [
            j
            for j, (other_row, other) in enumerate(where)
            if other_row == row and (radius is None or position - radius <= other <= position + radius)
        ]
        for head in range(q.shape[1]):
            scores = [math.exp(float(q[i, head] @ k[j, head]) / math.sqrt(q.shape[2])) for j in keys]
            for j, score in zip(keys, scores, strict=True):
                y[i, head] += score / sum(scores) * v[j, head]
    return y


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("radius", [None, 1, 3])
def test_backend_is_attention_as_written(name: str, radius: int | None) -> None:
    packing = packed([1, 0, 8, 3, 4])
    qkv = random_qkv(16, torch.float64)
    got = BACKENDS[name](*qkv, packing, radius, 0.0)
    torch.testing.assert_close(got, by_hand(*qkv, packing, radius), **TOLERANCE[torch.float64])


def check_equal_to_eager(packing: Packing, radius: int | None, dtype: torch.dtype) -> None:
    tokens = len(packing.sequence_T)
    inputs = {name: [x.requires_grad_() for x in random_qkv(tokens, dtype)] for name in BACKENDS}
    outputs = {name: BACKENDS[name](*qkv, packing, radius, 0.0) for name, qkv in inputs.items()}
    weight = torch.randn(tokens, 2, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    grads = {
        name: torch.autograd.grad((output * weight).sum(), inputs[name], materialize_grads=True)
        for name, output in outputs.items()
    }
    for name in BACKENDS:
        assert outputs[name].isfinite().all()
        torch.testing.assert_close(outputs[name], outputs["eager"], **TOLERANCE[dtype])
        torch.testing.assert_close(grads[name], grads["eager"], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@EXAMPLES
@given(lengths=lengths, radius=radii)
def test_backends_agree_on_packed_sequences(dtype: torch.dtype, lengths: list[int], radius: int | None) -> None:
    check_equal_to_eager(packed(lengths), radius, dtype)


@EXAMPLES
@given(mask=masks, radius=radii)
def test_backends_agree_wherever_the_padding_stands(mask: list[list[bool]], radius: int | None) -> None:
    check_equal_to_eager(Packing.from_mask(torch.tensor(mask)), radius, torch.float64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("radius", [None, 2])
def test_dropout_removes_weights_and_scales_the_rest(name: str, radius: int | None) -> None:
    packing = packed([30, 17, 17])
    q, k, _ = random_qkv(64, torch.float32, heads=16)
    ones = torch.ones(64, 16, 4)
    torch.manual_seed(0)
    # Over values of 1 the result is the sum of the weights: 1 without dropout, and 1 on average with it.
    sums = BACKENDS[name](q, k, ones, packing, radius, 0.5)[..., 0]
    torch.testing.assert_close(BACKENDS[name](q, k, ones, packing, radius, 0.0), ones)
    assert sums.min() < 0.1
    assert sums.max() > 1.9
    # Of 1,024 sums, each with a deviation of at most 1, the mean deviates by 1 / 32; this allows four times that.
    assert sums.mean().item() == pytest.approx(1, abs=0.125)


def test_packing_and_unpacking_is_the_identity_on_tokens() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    packing = Packing.from_mask(mask)
    x = torch.randn(3, 4, 5)
    assert packing.lengths == (3, 0, 2)
    assert packing.position_T.tolist() == [0, 2, 3, 1, 2]
    assert torch.equal(packing.unpack(packing.pack(x)), x * mask[:, :, None])


def test_packing_from_offsets() -> None:
    packing = Packing.from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert packing.lengths == (2, 0, 3)
    assert packing.sequence_T.tolist() == [0, 0, 2, 2, 2]
    assert packing.position_T.tolist() == [0, 1, 0, 1, 2]


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    size, theta = 6, 100.0
    position = torch.tensor([0, 1, 7, 8191])
    x = torch.randn(4, 2, size, dtype=torch.float64)
    got = rotate(x, *rotary_tables(position, theta, size, torch.float64))
    angle = position.double()[:, None, None] * theta ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    # Angles are fp32: 8,191 radians are known to 8191 * 2**-24 * 2.
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), atol=3e-3, rtol=0)
    torch.testing.assert_close(got[:3], torch.cat((turned.real, turned.imag), -1)[:3], atol=3e-6, rtol=0)
