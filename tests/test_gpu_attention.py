"""Attention on a CUDA GPU: every backend against float64 `eager`, packed against padded, training steps, global tokens.

Written for what a bare GPU machine has: torch >= 2.11, transformers >= 5.10, Python >= 3.10.
"""

from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor

from modernbert.attention import BACKENDS, ROWS, eager, rows_by_sequence
from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM
from modernbert.packing import Packing, SharedKeys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Compilers and kernels speak up in their own ways; what counts here is what they compute.
    pytest.mark.filterwarnings("default"),
]

HEADS, SIZE = 4, 64
# Of fp32, also where kernels multiply in TF32 blocks (10 bits of a factor); fp16 keeps 11 bits and bf16 8.
TOLERANCE = {
    torch.float32: dict(atol=5e-3, rtol=5e-3),
    torch.float16: dict(atol=5e-3, rtol=5e-3),
    torch.bfloat16: dict(atol=4e-2, rtol=4e-2),
}
CASES = [(name, dtype) for name in BACKENDS for dtype in TOLERANCE if name != "varlen" or dtype != torch.float32]
# Below, at and above the block of 128, one token, none.
LENGTHS = [200, 1, 0, 128, 77, 513]


def packed(lengths: list[int]) -> Packing:
    return Packing.from_cu_seqlens(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cuda()


@pytest.mark.parametrize("number", [0, 3], ids="{} shared keys".format)
@pytest.mark.parametrize("radius", [None, 1, 64])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_backend_and_its_gradients_against_float64(
    name: str, dtype: torch.dtype, radius: int | None, number: int
) -> None:
    packing = packed(LENGTHS)
    shapes = [(sum(LENGTHS), HEADS, SIZE)] * 3 + [(len(LENGTHS), number, HEADS, SIZE)] * 2 * bool(number)
    # Rounded first, so that both sides start from the same numbers.
    exact = [draw(*shape, seed=seed).to(dtype).double() for seed, shape in enumerate(shapes)]
    weight = draw(*shapes[0], seed=9)
    results = []
    for function, precision in ((eager, torch.float64), (BACKENDS[name], dtype)):
        leaves = [x.to(precision).requires_grad_() for x in exact]
        shared = SharedKeys(k_BGHK=leaves[3], v_BGHK=leaves[4]) if number else None
        y = function(*leaves[:3], packing, radius, 0.0, shared)
        assert y.dtype == precision
        grads = torch.autograd.grad((y * weight.to(precision)).sum(), leaves)
        results.append([y, *grads])
    for want, got in zip(*results, strict=True):
        # Gradients of keys are sums over queries: the error is relative to the largest.
        scale = want.abs().max()
        torch.testing.assert_close(got.double() / scale, want / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_varlen_rows_against_float64(dtype: torch.dtype) -> None:
    packing = packed(LENGTHS)
    k, v = (draw(sum(LENGTHS), HEADS, SIZE, seed=seed).to(dtype) for seed in (0, 1))
    q, more_k, more_v = (draw(len(LENGTHS), 2, HEADS, SIZE, seed=seed).to(dtype) for seed in (2, 3, 4))
    got = ROWS["varlen"](q, k, v, packing, 0.0, SharedKeys(k_BGHK=more_k, v_BGHK=more_v))
    shared = SharedKeys(k_BGHK=more_k.double(), v_BGHK=more_v.double())
    want = rows_by_sequence(q.double(), k.double(), v.double(), packing, 0.0, shared)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


def model(number: int, attention: Any) -> ModernBertForMaskedLM:
    config = ModernBertConfig.preset(
        "tiny", vocab_size=64, pad_token_id=0, num_global_tokens=number, num_attention_heads=2, local_attention=32
    )
    made = ModernBertForMaskedLM(config)
    randomise(made)
    made.set_attention(attention)
    return made.cuda()


def batch() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(300) < torch.tensor([300, 1, 40, 129])[:, None]).long()
    return torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(0)).cuda(), mask.cuda()


@pytest.mark.parametrize("number", [0, 2], ids="{} global tokens".format)
@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_step_under_autocast(attention: str, dtype: torch.dtype, number: int) -> None:
    ids, mask = batch()
    labels = torch.where((ids % 3 == 0) & (mask != 0), ids, -100)
    reference = model(number, "eager").double()
    reference(ids, mask, labels=labels).loss.backward()
    trained = model(number, attention)
    with torch.autocast("cuda", dtype=dtype):
        loss = trained(ids, mask, labels=labels).loss
    # Scaled as fp16 training does, so that small gradients do not vanish.
    (loss * 1024).backward()
    for (name, got), want in zip(trained.named_parameters(), reference.parameters(), strict=True):
        cosine = torch.cosine_similarity(got.grad.double().flatten(), want.grad.flatten(), dim=0)
        # Random weights carry rounding of 8 bits through four layers and back.
        assert cosine > (0.99 if dtype == torch.bfloat16 else 0.999), name


@pytest.mark.parametrize("number", [0, 2], ids="{} global tokens".format)
@pytest.mark.parametrize("attention", BACKENDS)
def test_packed_equals_padded(attention: str, number: int) -> None:
    ids, mask = batch()
    half = model(number, attention).bfloat16().eval()
    exact = model(number, "eager").double().eval()
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    with torch.no_grad():
        padded = half.model(ids, mask).last_hidden_state[mask != 0]
        packed_out = half.model(ids[mask != 0], cu_seqlens=offsets).last_hidden_state
        want = exact.model(ids, mask).last_hidden_state[mask != 0]
    for got in (padded, packed_out):
        assert torch.cosine_similarity(got.double(), want, dim=-1).min() > 0.99
    assert torch.cosine_similarity(padded.double(), packed_out.double(), dim=-1).min() > 0.999


@pytest.mark.parametrize("attention", BACKENDS)
def test_packed_documents_never_see_each_other(attention: str) -> None:
    half = model(0, attention).bfloat16().eval()
    embeds = draw(400, 128, seed=0).bfloat16()
    offsets = torch.tensor([0, 130, 131, 400], device="cuda")
    other = embeds.clone()
    other[131:] = draw(269, 128, seed=1).bfloat16()
    with torch.no_grad():
        before = half.model(inputs_embeds=embeds, cu_seqlens=offsets).last_hidden_state
        after = half.model(inputs_embeds=other, cu_seqlens=offsets).last_hidden_state
    assert torch.equal(after[:131], before[:131])
    assert (after[131:] != before[131:]).any(-1).all()


def test_varlen_names_the_precision_that_it_needs() -> None:
    ids, mask = batch()
    with pytest.raises(InputError, match="'varlen' needs float16 or bfloat16"):
        model(0, "varlen")(ids, mask)
