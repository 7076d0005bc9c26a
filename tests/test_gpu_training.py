"""On a GPU: each attention backend against float64, half-precision training steps against fp32, packed against padded.

Everything goes through the model, as training and serving do. The reference is the same model in float64 on the CPU
with the `eager` backend, which other tests compare with transformers.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from torch import Tensor

from modernbert.attention import BACKENDS
from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertForMaskedLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Compilers and kernels speak up in their own ways; what counts here is what they compute.
    pytest.mark.filterwarnings("default"),
]

# Heads of 64, as the presets have them: some kernels take no others.
SIZES = {**TINY, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96, "local_attention": 32}
LENGTHS = [300, 1, 17, 130, 33]  # below, at and above a block; not sorted
# Per token, against float64. fp32 products on a GPU may be TF32 inside a kernel, with 10 bits of mantissa.
MIN_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.999, torch.float16: 0.9999}
# varlen runs flash attention, which has no fp32.
CASES = [
    (name, dtype) for name in BACKENDS for dtype in MIN_COSINE if not (name == "varlen" and dtype == torch.float32)
]


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_model(device: str, dtype: torch.dtype, attention: str) -> ModernBertForMaskedLM:
    model = ModernBertForMaskedLM(ModernBertConfig(**SIZES))
    randomise(model)
    model.set_attention(attention)  # type: ignore[arg-type]
    return model.to(device, dtype)


def padded_batch(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 28, shape, generator=generator) * mask
    labels = torch.where((torch.rand(shape, generator=generator) < 0.3) & (mask != 0), ids, -100)
    return {name: x.to(device) for name, x in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


def packed_batch(device: str) -> dict[str, Tensor]:
    batch = padded_batch(device)
    mask = batch.pop("attention_mask") != 0
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    return {name: x[mask] for name, x in batch.items()} | {"cu_seqlens": offsets}


def hidden(model: ModernBertForMaskedLM, batch: dict[str, Tensor]) -> Tensor:
    """Vectors of the tokens that are text, [T, D] in float64 on the CPU."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    with torch.no_grad():
        vectors = model.model(**inputs).last_hidden_state
    if "attention_mask" in batch:
        vectors = vectors[batch["attention_mask"] != 0]
    return vectors.cpu().double()


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, dict[str, Tensor]]:
    """Vectors, and gradients of the loss, in float64 on the CPU."""
    model = make_model("cpu", torch.float64, "eager")
    batch = padded_batch("cpu")
    vectors = hidden(model.eval(), batch)
    model(**batch).loss.backward()
    return vectors, gradients(model)


def gradients(model: ModernBertForMaskedLM) -> dict[str, Tensor]:
    return {name: x.grad.detach().cpu().double() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
def test_backend_is_float64_eager(name: str, dtype: torch.dtype, batch: object, reference: tuple) -> None:  # type: ignore[type-arg]
    vectors = hidden(make_model("cuda", dtype, name).eval(), batch("cuda"))  # type: ignore[operator]
    assert vectors.isfinite().all()
    assert torch.cosine_similarity(vectors, reference[0], dim=-1).min() > MIN_COSINE[dtype]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
def test_gradients_are_those_of_float64(name: str, dtype: torch.dtype, batch: object, reference: tuple) -> None:  # type: ignore[type-arg]
    model = make_model("cuda", torch.float32, name).train()
    enabled = dtype != torch.float32
    with torch.autocast("cuda", dtype if enabled else torch.bfloat16, enabled=enabled):
        loss = model(**batch("cuda")).loss  # type: ignore[operator]
    # fp16 holds nothing below 6e-8: a GradScaler multiplies the loss, and divides the gradients again.
    (loss * 1024).backward()
    got = gradients(model)
    assert got.keys() == reference[1].keys()
    for key, want in reference[1].items():
        cosine = torch.cosine_similarity(got[key].flatten() / 1024, want.flatten(), dim=0)
        # Weights stay fp32, activations of half precision round at every layer: a whole gradient keeps its direction.
        assert cosine > (0.9999 if dtype == torch.float32 else 0.99), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_steps_follow_fp32(dtype: torch.dtype) -> None:
    losses: dict[str, list[float]] = {}
    for precision in ("full", "half"):
        model = make_model("cuda", torch.float32, "banded").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=precision == "half" and dtype == torch.float16)
        batch = packed_batch("cuda")
        losses[precision] = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, enabled=precision == "half"):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[precision].append(loss.item())
    assert losses["full"][-1] < 0.8 * losses["full"][0]
    # A GradScaler that starts too high skips a step or two; the curve is the same within that.
    assert losses["half"][-1] == pytest.approx(losses["full"][-1], rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pretraining_in_half_precision_follows_fp32(tmp_path: Path, precision: str) -> None:
    # The whole trainer: autocast, for fp16 a GradScaler, StableAdamW's own kernels. A bare machine lacks two packages.
    for package in ("datasets", "optimi"):
        pytest.importorskip(package)
    from modernbert.data.documents import in_memory
    from modernbert.data.tokenizer import train_tokenizer
    from modernbert.training.pretrain import config_for, pretrain
    from modernbert.training.settings import PretrainSettings

    texts = [f"{word} water. {word} boat and {word}." for word in "abcdefghijklmnopqrstuvwxyz" * 4]
    tokenizer = train_tokenizer(texts, vocab_size=384)
    config = config_for(tokenizer, "tiny", num_attention_heads=2, initializer_range=0.1)
    losses = {}
    for name in ("fp32", precision):
        settings = PretrainSettings(max_steps=20, batch_tokens=512, max_length=32, precision=name, learning_rate=5e-3)  # type: ignore[arg-type]
        losses[name] = pretrain(config, tokenizer, in_memory(texts), tmp_path / name, settings).losses
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0]
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], rel=0.1)  # as above


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "varlen"])
def test_packed_is_padded(name: str) -> None:
    model = make_model("cuda", torch.float32, name).eval()
    # The same kernels on other shapes: sums in another order.
    torch.testing.assert_close(
        hidden(model, packed_batch("cuda")), hidden(model, padded_batch("cuda")), atol=1e-4, rtol=1e-4
    )
