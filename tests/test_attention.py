"""The attention backends are one function: equal to a plain loop, to each other, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modernbert import attention_varlen
from modernbert.attention import BACKENDS, ROWS, rotary_tables, rotate
from modernbert.attention_flex import BLOCK, block_mask, run_kernel
from modernbert.errors import InputError
from modernbert.packing import Packing, SharedKeys

# Rounding alone: sums of at most some tens of products of normal values. fp32 keeps 7 digits, float64 15.
TOLERANCE = {torch.float32: dict(atol=1e-5, rtol=1e-5), torch.float64: dict(atol=1e-12, rtol=1e-12)}
# Those that run and train on any machine. `flex` has no gradients on a CPU, `varlen` needs CUDA: test_gpu_attention.py.
TRAINABLE = ("eager", "sdpa", "banded")
ON_CPU = (*TRAINABLE, "flex")
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


def shared_keys(batch: int, number: int, dtype: torch.dtype, heads: int = 2, size: int = 4) -> SharedKeys:
    k, v = random_qkv(batch * number, dtype, heads, size)[1:]
    return SharedKeys(k_BGHK=k.unflatten(0, (batch, number)), v_BGHK=v.unflatten(0, (batch, number)))


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, radius: int | None, shared: SharedKeys | None = None
) -> Tensor:
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
            seen = [(k[j, head], v[j, head]) for j in keys]
            if shared is not None:
                seen += zip(shared.k_BGHK[row, :, head], shared.v_BGHK[row, :, head], strict=True)
            scores = [math.exp(float(q[i, head] @ key) / math.sqrt(q.shape[2])) for key, _ in seen]
            for (_, value), score in zip(seen, scores, strict=True):
                y[i, head] += score / sum(scores) * value
    return y


@pytest.mark.parametrize("number", [0, 1, 3], ids="{} shared keys".format)
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("radius", [None, 1, 3])
@pytest.mark.parametrize("lengths", [[1, 0, 8, 3, 4], [5, 5]], ids=str)
def test_backend_is_attention_as_written(name: str, radius: int | None, lengths: list[int], number: int) -> None:
    packing = packed(lengths)
    qkv = random_qkv(sum(lengths), torch.float64)
    shared = shared_keys(len(lengths), number, torch.float64) if number else None
    got = BACKENDS[name](*qkv, packing, radius, 0.0, shared)
    torch.testing.assert_close(got, by_hand(*qkv, packing, radius, shared), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("lengths", [[1, 0, 8, 3], [5, 5]], ids=str)
def test_rows_that_see_all_of_their_sequence(lengths: list[int]) -> None:
    packing, shared = packed(lengths), shared_keys(len(lengths), 2, torch.float64)
    q_BGHK = random_qkv(2 * len(lengths), torch.float64)[0].unflatten(0, (len(lengths), 2))
    _, k, v = random_qkv(sum(lengths), torch.float64)
    got = ROWS["banded"](q_BGHK, k, v, packing, 0.0, shared)
    for row, (keys, values) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        keys, values = torch.cat((keys, shared.k_BGHK[row])), torch.cat((values, shared.v_BGHK[row]))
        for query in range(2):
            for head in range(2):
                weights = (keys[:, head] @ q_BGHK[row, query, head] / 2).softmax(0)
                torch.testing.assert_close(got[row, query, head], weights @ values[:, head], **TOLERANCE[torch.float64])


def check_equal_to_eager(packing: Packing, radius: int | None, dtype: torch.dtype, number: int) -> None:
    tokens, batch = len(packing.sequence_T), len(packing.lengths)

    def attend(name: str, inputs: list[Tensor]) -> Tensor:
        shared = SharedKeys(k_BGHK=inputs[3], v_BGHK=inputs[4]) if number else None
        return BACKENDS[name](*inputs[:3], packing, radius, 0.0, shared)

    def fresh() -> list[Tensor]:
        shared = shared_keys(batch, number, dtype)
        return random_qkv(tokens, dtype) + ([shared.k_BGHK, shared.v_BGHK] if number else [])

    inputs = {name: [x.requires_grad_() for x in fresh()] for name in TRAINABLE}
    outputs = {name: attend(name, tensors) for name, tensors in inputs.items()}
    weight = torch.randn(tokens, 2, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    grads = {
        name: torch.autograd.grad((output * weight).sum(), inputs[name], materialize_grads=True)
        for name, output in outputs.items()
    }
    for name in TRAINABLE:
        assert outputs[name].isfinite().all()
        torch.testing.assert_close(outputs[name], outputs["eager"], **TOLERANCE[dtype])
        torch.testing.assert_close(grads[name], grads["eager"], **TOLERANCE[dtype])
    torch.testing.assert_close(attend("flex", fresh()), outputs["eager"].detach(), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@EXAMPLES
@given(lengths=lengths, radius=radii, number=st.integers(0, 3))
def test_backends_agree_on_packed_sequences(
    dtype: torch.dtype, lengths: list[int], radius: int | None, number: int
) -> None:
    check_equal_to_eager(packed(lengths), radius, dtype, number)


@EXAMPLES
@given(mask=masks, radius=radii, number=st.integers(0, 3))
def test_backends_agree_wherever_the_padding_stands(mask: list[list[bool]], radius: int | None, number: int) -> None:
    check_equal_to_eager(Packing.from_mask(torch.tensor(mask)), radius, torch.float64, number)


# Sums of values around 1 whose terms are rounded to 8 or 11 bits; scores of up to 10, rounded, move a weight by 4 %.
HALF = {torch.bfloat16: dict(atol=0.15, rtol=0.05), torch.float16: dict(atol=0.02, rtol=0.01)}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("radius", [None, 3])
def test_half_precision_is_near_float64(name: str, dtype: torch.dtype, radius: int | None) -> None:
    packing = packed([9, 0, 1, 22])
    qkv, shared = random_qkv(32, dtype), shared_keys(4, 2, dtype)
    exact = SharedKeys(k_BGHK=shared.k_BGHK.double(), v_BGHK=shared.v_BGHK.double())
    want = by_hand(*(x.double() for x in qkv), packing, radius, exact)
    got = BACKENDS[name](*qkv, packing, radius, 0.0, shared)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, **HALF[dtype])


# FlexAttention: the block mask, whose mistakes are lost keys or lost speed


@EXAMPLES
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4).filter(any),
    radius=st.one_of(st.none(), st.integers(1, 300)),
    number=st.integers(0, 3),
)
def test_block_mask_names_every_block_that_is_seen(lengths: list[int], radius: int | None, number: int) -> None:
    packing = packed(lengths)
    mask = block_mask(packing, radius, number)
    tokens, keys = len(packing.sequence_T), len(packing.sequence_T) + len(lengths) * number
    visible = mask.mask_mod(None, None, torch.arange(tokens)[:, None], torch.arange(keys))
    filled = torch.zeros(-(-tokens // BLOCK) * BLOCK, -(-keys // BLOCK) * BLOCK, dtype=torch.bool)
    filled[:tokens, :keys] = visible
    seen = filled.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).movedim(2, 1)

    def listed(count: Tensor, order: Tensor) -> Tensor:
        blocks = torch.zeros(seen.shape[:2], dtype=torch.bool)
        for row in range(len(seen)):
            blocks[row, order[0, 0, row, : count[0, 0, row]].long()] = True
        return blocks

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    assert (seen.any((2, 3)) <= (partial | whole)).all()
    assert (whole <= seen.all(2).all(2)).all()


def test_block_mask_of_a_local_layer_is_a_band() -> None:
    blocks = block_mask(packed([40 * BLOCK]), 64, 0).kv_num_blocks[0, 0]
    assert blocks.tolist() == [2] + [3] * 38 + [2]


def test_block_mask_of_packed_documents_is_their_blocks() -> None:
    mask = block_mask(packed([4 * BLOCK] * 5), None, 0)
    assert mask.kv_num_blocks.sum() == 0
    assert mask.full_kv_num_blocks[0, 0].tolist() == [4] * 20


@pytest.mark.slow
def test_a_process_may_use_the_kernel_in_many_forms() -> None:
    # torch compiles one for each and refuses the ninth by default. What is compiled to does not matter here: "eager".
    for dtype in (torch.float32, *HALF):
        for radius in (None, 1, 3):
            for number in (0, 2):
                packing, qkv, shared = packed([5, 8]), random_qkv(13, dtype), shared_keys(2, number, dtype)
                q, k, v = qkv[0], torch.cat((qkv[1], shared.k_XHK)), torch.cat((qkv[2], shared.v_XHK))
                mask = block_mask(packing, radius, number)
                y = run_kernel(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask, backend="eager")[0].transpose(0, 1)
                exact = SharedKeys(k_BGHK=shared.k_BGHK.double(), v_BGHK=shared.v_BGHK.double())
                want = by_hand(*(x.double() for x in qkv), packing, radius, exact)
                torch.testing.assert_close(y.double(), want, **(TOLERANCE | HALF)[dtype])


def test_flex_refuses_to_train_on_a_cpu_and_runs_without_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(5, torch.float32))
    with pytest.raises(InputError, match=r"'flex' has no gradients on a CPU.*banded"):
        BACKENDS["flex"](q, k, v, packed([5]), 2, 0.0, None)
    with torch.no_grad():
        assert BACKENDS["flex"](q, k, v, packed([5]), 2, 0.0, None).isfinite().all()
    with pytest.raises(InputError, match="'flex' has no dropout"):
        BACKENDS["flex"](*random_qkv(5, torch.float32), packed([5]), 2, 0.1, None)


# Flash attention over packed tokens, which is for CUDA: what is around the kernel runs here with a kernel written out


def kernel_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.attention.varlen.varlen_attn in plain operations; its log-sum-exp [H, T] has no gradient either."""
    assert max_q >= cu_seq_q.diff().max()
    assert max_k >= cu_seq_k.diff().max()
    rows, sums = [], []
    for b in range(len(cu_seq_q) - 1):
        one_q, one_k, one_v = q[cu_seq_q[b] : cu_seq_q[b + 1]], *(x[cu_seq_k[b] : cu_seq_k[b + 1]] for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / math.sqrt(q.shape[-1])
        if window_size[0] >= 0:
            offset = torch.arange(len(one_k)) - torch.arange(len(one_q))[:, None]
            scores = scores.masked_fill((offset < -window_size[0]) | (offset > window_size[1]), float("-inf"))
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
        sums.append(scores.logsumexp(-1))
    y = torch.cat(rows)
    return (y, torch.cat(sums, dim=1).detach()) if return_aux is not None else y


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", kernel_by_hand)
    monkeypatch.setattr(attention_varlen, "require_kernel", lambda q, dropout: None)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("lengths", [[1, 0, 8, 3, 4], [5, 5], [0, 0]], ids=str)
@pytest.mark.parametrize("radius", [None, 1, 3])
@pytest.mark.parametrize("number", [0, 1, 3], ids="{} shared keys".format)
def test_varlen_joins_its_kernel_with_shared_keys(lengths: list[int], radius: int | None, number: int) -> None:
    packing, results = packed(lengths), {}
    for name in ("eager", "varlen"):
        leaves = random_qkv(sum(lengths), torch.float64)
        if number:
            extra = shared_keys(len(lengths), number, torch.float64)
            leaves += [extra.k_BGHK, extra.v_BGHK]
        leaves = [x.requires_grad_() for x in leaves]
        shared = SharedKeys(k_BGHK=leaves[3], v_BGHK=leaves[4]) if number else None
        y = BACKENDS[name](*leaves[:3], packing, radius, 0.0, shared)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results[name] = (y, *torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True))
    # The joint softmax is in fp32, as the kernel's own.
    torch.testing.assert_close(results["varlen"], results["eager"], atol=2e-6, rtol=2e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("lengths", [[1, 0, 8, 3], [5, 5], [0]], ids=str)
def test_varlen_rows_equal_those_by_sequence(lengths: list[int]) -> None:
    packing, shared = packed(lengths), shared_keys(len(lengths), 2, torch.float64)
    q_BGHK = random_qkv(2 * len(lengths), torch.float64)[0].unflatten(0, (len(lengths), 2))
    _, k, v = random_qkv(sum(lengths), torch.float64)
    got, want = (ROWS[name](q_BGHK, k, v, packing, 0.0, shared) for name in ("varlen", "banded"))
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])


@pytest.mark.usefixtures("kernel")
def test_varlen_refuses_padding_inside_a_sequence() -> None:
    # Its window counts packed tokens: across the hole it would reach further than the radius.
    for row, fits in (([1, 1, 1, 0], True), ([0, 1, 1, 1], True), ([1, 1, 0, 1], False)):
        packing = Packing.from_mask(torch.tensor([row]))
        if fits:
            assert BACKENDS["varlen"](*random_qkv(3, torch.float64), packing, 1, 0.0, None).shape == (3, 2, 4)
        else:
            with pytest.raises(InputError, match="padding"):
                BACKENDS["varlen"](*random_qkv(3, torch.float64), packing, 1, 0.0, None)


def test_varlen_names_what_it_needs() -> None:
    with pytest.raises(InputError, match="'varlen' needs a CUDA device, not 'cpu'"):
        BACKENDS["varlen"](*random_qkv(5, torch.float16), packed([5]), 2, 0.0, None)


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("radius", [None, 2])
def test_dropout_removes_weights_and_scales_the_rest(name: str, radius: int | None) -> None:
    packing = packed([30, 17, 17])
    q, k, _ = random_qkv(64, torch.float32, heads=16)
    ones = torch.ones(64, 16, 4)
    torch.manual_seed(0)
    # Over values of 1 the result is the sum of the weights: 1 without dropout, and 1 on average with it.
    sums = BACKENDS[name](q, k, ones, packing, radius, 0.5, None)[..., 0]
    torch.testing.assert_close(BACKENDS[name](q, k, ones, packing, radius, 0.0, None), ones)
    assert sums.min() < 0.1
    assert sums.max() > 1.9
    # Of 1,024 sums, each with a deviation of at most 1, the mean deviates by 1 / 32; this allows four times that.
    assert sums.mean().item() == pytest.approx(1, abs=0.125)


def test_a_band_keeps_every_key_once_for_the_backward_pass() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1024, torch.float32, heads=8, size=32))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = BACKENDS["banded"](q, k, v, packed([1024]), 32, 0.0, None)
    # q, k, v and y; filling, the mask as booleans and floats, and a sum per row together are less than one of them.
    assert 4 * y.nbytes <= sum(kept.values()) < 5 * y.nbytes


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
