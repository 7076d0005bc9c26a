"""The model is transformers' ModernBERT: same loss, outputs and gradients from the same weights, same files.

Beyond that, what transformers does not promise: packed equals padded, documents do not see each other, nothing but
finite numbers comes out, a window is exactly as wide as it says.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, randomise, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM, ModernBertModel, load_model

# What the project promises: fp32 rounding (6e-8) through four layers that keep activations near 1.
FP32 = dict(atol=1e-5, rtol=1e-5)
# In float64 there would be no difference at all, but transformers rotates q and k in fp32 even then.
FP32_ROTATION = dict(atol=2e-6, rtol=2e-6)
# Two ways of ours in float64, whose rounding is 1e-16: nothing but the order of sums may differ.
FP64 = dict(atol=1e-10, rtol=1e-10)

# The backends that run and train on any machine.
BACKENDS = ("eager", "sdpa", "banded")
FULL, LOCAL = "full_attention", "sliding_attention"


def thetas(full: float, local: float) -> dict[str, Any]:
    return {FULL: {"rope_type": "default", "rope_theta": full}, LOCAL: {"rope_type": "default", "rope_theta": local}}


COMMON: dict[str, Any] = dict(
    vocab_size=37,
    intermediate_size=22,
    max_position_embeddings=64,
    pad_token_id=0,
    cls_token_id=1,
    bos_token_id=1,
    sep_token_id=2,
    eos_token_id=2,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "one head, radius 1": dict(num_attention_heads=1, hidden_size=10, num_hidden_layers=4, local_attention=2),
    "two heads, radius 3 from an odd window": dict(
        num_attention_heads=2, hidden_size=12, num_hidden_layers=3, local_attention=7
    ),
    "three heads, radius 8, old spelling of the pattern and thetas": dict(
        num_attention_heads=3,
        hidden_size=24,
        num_hidden_layers=4,
        local_attention=16,
        global_attn_every_n_layers=2,
        global_rope_theta=500.0,
        local_rope_theta=3.0,
    ),
    "five heads, all local, thetas apart": dict(
        num_attention_heads=5,
        hidden_size=20,
        num_hidden_layers=3,
        local_attention=6,
        layer_types=[LOCAL] * 3,
        rope_parameters=thetas(1e6, 20.0),
    ),
    "all global, one theta, relu": dict(
        num_attention_heads=2,
        hidden_size=16,
        num_hidden_layers=2,
        local_attention=6,
        layer_types=[FULL] * 2,
        rope_parameters=thetas(50.0, 50.0),
        hidden_activation="relu",
        classifier_activation="relu",
    ),
    "local first, every bias, silu": dict(
        num_attention_heads=3,
        hidden_size=18,
        num_hidden_layers=3,
        local_attention=6,
        layer_types=[LOCAL, FULL, LOCAL],
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        decoder_bias=True,
        hidden_activation="silu",
    ),
    "no decoder bias, large epsilon, one layer": dict(
        num_attention_heads=2,
        hidden_size=12,
        num_hidden_layers=1,
        local_attention=6,
        decoder_bias=False,
        norm_eps=0.1,
        layer_types=[LOCAL],
    ),
}
PADDINGS: dict[str, Callable[[int, int], list[int]]] = {
    "none": lambda length, size: [1] * size,
    "right": lambda length, size: [1] * length + [0] * (size - length),
    "left": lambda length, size: [0] * (size - length) + [1] * length,
    "both": lambda length, size: (
        [0] * ((size - length) // 2) + [1] * length + [0] * (size - length - (size - length) // 2)
    ),
    "hole": lambda length, size: [1] * (length // 2) + [0] * (size - length) + [1] * (length - length // 2),
}


def pair(
    config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[ModernBertForMaskedLM, transformers.ModernBertForMaskedLM]:
    """Our model and transformers', with the same random weights."""
    settings = {**COMMON, **config}
    theirs = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**settings, attn_implementation="sdpa")
    ).eval()
    randomise(theirs)
    ours = ModernBertForMaskedLM(ModernBertConfig(**settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def small(**config: Any) -> ModernBertForMaskedLM:
    """One of our models alone, in float64, where different is different and rounding cannot be the excuse."""
    settings = dict(num_attention_heads=3, hidden_size=24, num_hidden_layers=4, local_attention=6)
    model = ModernBertForMaskedLM(ModernBertConfig(**{**COMMON, **settings, **config})).eval()
    randomise(model)
    return model.double()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def batch(radius: int, padding: str) -> tuple[Tensor, Tensor]:
    """Ids and mask; rows have lengths on either side of the radius, of twice the radius, and of a block's end."""
    lengths = sorted({1, 2, radius, radius + 1, 2 * radius, 2 * radius + 1, 3 * radius + 2})
    size = max(lengths) + 2
    mask = torch.tensor([PADDINGS[padding](length, size) for length in lengths])
    return random_ids(*mask.shape), mask


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_transformers(config: dict[str, Any], attention: str, padding: str) -> None:
    check_against_transformers(config, attention, padding, torch.float64, FP32_ROTATION)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_transformers_in_fp32(config: dict[str, Any], attention: str) -> None:
    check_against_transformers(config, attention, "right", torch.float32, FP32)


def check_against_transformers(
    config: dict[str, Any], attention: str, padding: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    ours, theirs = pair(config, dtype)
    ours.set_attention(attention)
    ids, mask = batch(ours.config.window_radius, padding)
    valid = mask != 0
    labels = torch.where(valid & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5), ids, -100)

    got = ours(ids, mask, output_hidden_states=True)
    want = theirs(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == config["num_hidden_layers"] + 1
    for index, (one, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert_close(one[valid], other[valid], tolerance, f"hidden state {index}")
    assert_close(got.logits[valid], want.logits[valid], tolerance, "logits")

    trained = ours(ids, mask, labels=labels)
    # Both compute the loss in fp32.
    assert_close(trained.loss, want.loss.to(trained.loss.dtype), FP32, "loss")
    assert_close(trained.logits, want.logits[labels != -100], tolerance, "logits of labelled tokens")
    # The gradients of a loss in float64, so that its rounding does not blur them.
    trained_loss, wanted_loss = (
        torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        for logits in (trained.logits, want.logits[labels != -100])
    )
    trained_loss.backward()
    wanted_loss.backward()
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        assert grad.abs().max() > 0, name
        assert_close(grads[name], grad, tolerance, name)


def assert_close(got: Tensor | None, want: Tensor, tolerance: dict[str, float], what: str) -> None:
    torch.testing.assert_close(got, want, **tolerance, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("attention", BACKENDS)
def test_encoder_alone_and_given_embeddings_equal_transformers(attention: str) -> None:
    ours, theirs = pair(CONFIGS["two heads, radius 3 from an odd window"], torch.float64)
    ours.set_attention(attention)
    ids, mask = batch(3, "left")
    valid = mask != 0
    want = theirs.model(ids, attention_mask=mask).last_hidden_state
    got = ours.model(ids, mask).last_hidden_state
    torch.testing.assert_close(got[valid], want[valid], **FP32)
    assert (got[~valid] == 0).all()
    from_embeddings = ours.model(inputs_embeds=ours.get_input_embeddings()(ids), attention_mask=mask)
    torch.testing.assert_close(from_embeddings.last_hidden_state, got, **FP64)
    torch.testing.assert_close(ours.model(ids).last_hidden_state, theirs.model(ids).last_hidden_state, **FP32)


def test_loss_is_the_sum_over_labels_divided_by_what_the_caller_says() -> None:
    model = small()
    ids = random_ids(2, 9)
    labels = torch.where(random_ids(2, 9, seed=1) < 20, ids, -100)
    count = int((labels != -100).sum())
    mean = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=10).loss, mean * count / 10, **FP64)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_tuple_output_has_the_same_values() -> None:
    model, ids = small(), random_ids(2, 9)
    logits, hidden = model(ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, model(ids).logits)
    assert torch.equal(hidden[-1], model.model(ids).last_hidden_state)
    assert torch.equal(model.model(ids, return_dict=False)[0], hidden[-1])


# Files


def test_our_checkpoint_opens_in_transformers(tmp_path: Path) -> None:
    ours, _ = pair(CONFIGS["local first, every bias, silu"])
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert type(theirs) is transformers.ModernBertForMaskedLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids, mask = batch(3, "right")
    valid = mask != 0
    torch.testing.assert_close(theirs(ids, attention_mask=mask).logits[valid], ours(ids, mask).logits[valid], **FP32)

    encoder = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(encoder) is transformers.ModernBertModel
    got = encoder(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[valid], ours.model(ids, mask).last_hidden_state[valid], **FP32)


def test_both_write_the_same_names(tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS["local first, every bias, silu"])
    for name, model in (("ours", ours), ("theirs", theirs), ("ours.model", ours.model), ("theirs.model", theirs.model)):
        model.save_pretrained(tmp_path / name)
    weights = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    for name in ("", ".model"):
        assert weights["ours" + name].keys() == weights["theirs" + name].keys()
        torch.testing.assert_close(weights["ours" + name], weights["theirs" + name], rtol=0, atol=0)
    assert "decoder.weight" not in weights["ours"]


@pytest.mark.parametrize("whole", [True, False], ids=["masked LM", "encoder"])
def test_their_checkpoint_opens_here(tmp_path: Path, whole: bool) -> None:
    _, theirs = pair(CONFIGS["local first, every bias, silu"])
    (theirs if whole else theirs.model).save_pretrained(tmp_path)
    encoder = load_model(tmp_path)
    assert not encoder.training
    ids, mask = batch(3, "left")
    valid = mask != 0
    want = theirs.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask).last_hidden_state[valid], want[valid], **FP32)
    if whole:
        model = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        want = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, mask).logits[valid], want[valid], **FP32)


def test_old_config_spellings_load_as_transformers_loads_them(tmp_path: Path) -> None:
    _, theirs = pair(dict(num_attention_heads=2, hidden_size=12, num_hidden_layers=4, local_attention=6))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    config |= {"global_attn_every_n_layers": 2, "global_rope_theta": 400.0, "local_rope_theta": 9.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(2, 20)
    got = load_model(tmp_path)(ids).last_hidden_state
    torch.testing.assert_close(got, stock(ids).last_hidden_state, **FP32)
    # The spellings matter: without them the result is another.
    assert (got - theirs.model(ids).last_hidden_state).abs().max() > 0.1


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    model = small(norm_bias=True)
    model.save_pretrained(tmp_path)
    again = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.decoder.weight is again.get_input_embeddings().weight
    ids = random_ids(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_half_precision_checkpoint_loads_in_fp32(tmp_path: Path) -> None:
    model = small()
    model.bfloat16().save_pretrained(tmp_path)
    encoder = load_model(tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    ids = random_ids(1, 12)
    assert torch.equal(encoder(ids).last_hidden_state, model.float().model(ids).last_hidden_state)


def test_sharded_checkpoint_opens_here(tmp_path: Path) -> None:
    _, theirs = pair(CONFIGS["local first, every bias, silu"])
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = random_ids(1, 12)
    torch.testing.assert_close(load_model(tmp_path)(ids).last_hidden_state, theirs.model(ids).last_hidden_state, **FP32)


def rewrite_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
    "truncated in the data": (lambda path: truncate(path / "model.safetensors", 20_000), "cannot be loaded"),
    "truncated in the header": (lambda path: truncate(path / "model.safetensors", 100), "cannot be loaded"),
    "empty weights": (lambda path: truncate(path / "model.safetensors", 0), "cannot be loaded"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
    "a layer short": (
        lambda path: rewrite_weights(path, lambda weights: weights.pop("model.layers.2.mlp.Wo.weight")),
        "layers.2.mlp.Wo.weight",
    ),
    "weights of another width": (
        lambda path: rewrite_weights(path, lambda w: w.update({"model.final_norm.weight": torch.ones(7)})),
        "final_norm.weight",
    ),
    "nothing but other names": (
        lambda path: save_file({"bert.x": torch.ones(1)}, path / "model.safetensors", {"format": "pt"}),
        "lacks",
    ),
    "unknown activation": (
        lambda path: (path / "config.json").write_text(
            json.dumps({**TINY, "model_type": "modernbert", "hidden_activation": "warp"})
        ),
        "warp",
    ),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    damage(directory)
    with pytest.raises(InputError) as caught:
        load_model(directory)
    assert named in str(caught.value)
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["absent", "owner/absent", "/absent/absent"])
def test_model_that_is_nowhere_is_refused_in_one_line(model: str) -> None:
    with pytest.raises(InputError, match="absent") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


# What the attention sees


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_equals_padded(config: dict[str, Any], attention: str) -> None:
    model = small(**config)
    model.set_attention(attention)
    ids, mask = batch(model.config.window_radius, "right")
    lengths = mask.sum(1).tolist()
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    packed_ids = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])
    labels = torch.where(packed_ids < 20, packed_ids, -100)
    padded_labels = torch.full_like(ids, -100).masked_scatter(mask != 0, labels)

    packed = model(packed_ids, cu_seqlens=cu_seqlens, output_hidden_states=True)
    padded = model(ids, mask)
    torch.testing.assert_close(packed.logits, padded.logits[mask != 0], **FP64)
    assert packed.hidden_states[-1].shape == (len(packed_ids), config["hidden_size"])
    loss = model(packed_ids, cu_seqlens=cu_seqlens, labels=labels).loss
    torch.testing.assert_close(loss, model(ids, mask, labels=padded_labels).loss, **FP64)


@pytest.mark.parametrize("attention", BACKENDS)
def test_result_does_not_depend_on_the_rest_of_the_batch(attention: str) -> None:
    model = small()
    model.set_attention(attention)
    ids, mask = batch(3, "right")
    together = model(ids, mask).logits
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(together[row : row + 1, :length], alone, **FP64)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("changed", range(4))
def test_packed_documents_never_see_each_other(attention: str, changed: int) -> None:
    model = small()
    model.set_attention(attention)
    lengths = [5, 1, 13, 7]
    offsets = torch.tensor([0, 5, 6, 19, 26])
    embeds = model.get_input_embeddings()(random_ids(26)).detach()
    document = torch.repeat_interleave(torch.tensor(lengths))
    before = model(inputs_embeds=embeds, cu_seqlens=offsets).logits
    # Norms keep values apart from each other, not the size: noise is as different as a document can be.
    noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(5))
    other = torch.where((document == changed)[:, None], noise, embeds)
    after = model(inputs_embeds=other, cu_seqlens=offsets).logits
    assert torch.equal(after[document != changed], before[document != changed])
    assert (after[document == changed] - before[document == changed]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("radius", [1, 3, 8])
def test_window_reaches_exactly_the_radius(attention: str, radius: int) -> None:
    model = small(num_hidden_layers=1, layer_types=[LOCAL], local_attention=2 * radius)
    model.set_attention(attention)
    length = 4 * radius + 5
    ids = random_ids(1, length)
    before = model.model(ids).last_hidden_state[0]
    for position in (0, length // 2, length - 1):
        other = ids.clone()
        other[0, position] = 3 + (ids[0, position] - 2) % (COMMON["vocab_size"] - 3)
        change = (model.model(other).last_hidden_state[0] - before).abs().amax(-1)
        for token in range(length):
            if abs(token - position) <= radius:
                assert change[token] > 1e-4
            else:
                assert change[token] == 0


@pytest.mark.parametrize("attention", BACKENDS)
def test_global_layer_sees_everything(attention: str) -> None:
    model = small(num_hidden_layers=1, layer_types=[FULL])
    model.set_attention(attention)
    ids = random_ids(1, 40)
    other = ids.clone()
    other[0, 0] = 3 + (ids[0, 0] - 2) % (COMMON["vocab_size"] - 3)
    change = (model.model(other).last_hidden_state - model.model(ids).last_hidden_state).abs().amax(-1)
    assert (change > 1e-6).all()


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 0), (0, 4)], ids=str)
def test_batch_without_any_token_is_finite(attention: str, shape: tuple[int, int]) -> None:
    model = small()
    model.set_attention(attention)
    ids, mask = random_ids(*shape), torch.zeros(shape, dtype=torch.int64)
    output = model(ids, mask, labels=torch.full_like(ids, -100))
    output.loss.backward()
    assert output.loss == 0
    assert model.model(ids, mask).last_hidden_state.shape == (*shape, 24)
    assert (model.model(ids, mask).last_hidden_state == 0).all()
    assert model(ids, mask).logits.isfinite().all()


@pytest.mark.parametrize("attention", BACKENDS)
def test_empty_rows_change_nothing_and_stay_finite(attention: str) -> None:
    model = small()
    model.set_attention(attention)
    ids, mask = random_ids(4, 9), torch.ones(4, 9, dtype=torch.int64)
    mask[0] = mask[2] = 0
    loss = model(ids, mask, labels=torch.where(mask != 0, ids, -100)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    output = model(ids, mask).logits
    assert output.isfinite().all()
    torch.testing.assert_close(output[[1, 3]], model(ids[[1, 3]]).logits, **FP64)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 0, 5, 5, 9]], ids=str)
def test_packed_with_empty_documents_is_finite(attention: str, cu_seqlens: list[int]) -> None:
    model = small()
    model.set_attention(attention)
    ids = random_ids(cu_seqlens[-1])
    logits = model(ids, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32)).logits
    assert logits.shape == (len(ids), COMMON["vocab_size"])
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_mask_may_be_of_any_type(dtype: torch.dtype) -> None:
    model = small()
    ids, mask = batch(3, "both")
    assert torch.equal(model(ids, mask.to(dtype)).logits, model(ids, mask).logits)


def test_rotary_angles_are_exact_in_bf16() -> None:
    # bf16 counts to 256: angles in it would turn neighbours at 3,000 alike. Positions count padding, so left padding
    # moves a text to 3,000, and attention depends on differences only.
    model = small(max_position_embeddings=4096)
    ids = random_ids(1, 24)
    exact = model.model(ids).last_hidden_state
    model.bfloat16()
    pushed = torch.cat((torch.zeros(1, 3000, dtype=torch.int64), ids), dim=1)
    got = model.model(pushed, (pushed != 0).long()).last_hidden_state[:, 3000:].float()
    # bf16 rounds to 2**-9, which gave cosines of 0.9995 and above; positions counted in bf16 gave 0.68.
    assert torch.cosine_similarity(got.double(), exact, dim=-1).min() > 0.998


# Training


@pytest.mark.parametrize("attention", BACKENDS)
def test_gradient_checkpointing_gives_the_same_gradients(attention: str) -> None:
    model = small().train()
    model.set_attention(attention)
    ids, mask = batch(3, "right")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.zero_grad()
        model(ids, mask, labels=torch.where(mask != 0, ids, -100)).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], **FP64)


@pytest.mark.slow  # 10 to 30 s, all of it compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while it traces
@pytest.mark.parametrize("attention", ["sdpa", "banded"])
def test_compiled_model_trains_alike_and_is_not_compiled_anew_for_every_batch(attention: str) -> None:
    # What depends on data (packing, masks, sequences one by one) stays out of the graphs. Not compiled to machine code,
    # but traced and differentiated ahead as for that.
    model = small(num_hidden_layers=2, layer_types=[FULL, LOCAL]).train()
    model.set_attention(attention)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for index, (rows, length) in enumerate([(4, 17), (3, 23), (5, 29), (6, 11)]):
        ids = random_ids(rows, length, seed=index)
        mask = (torch.arange(length) < torch.arange(2, rows + 2)[:, None] * 2).long()
        results = []
        for run in (model, compiled):
            model.zero_grad()
            # Batches of two sizes teach the compiler what varies; after them nothing may be new.
            with torch.compiler.set_stance("fail_on_recompile" if index > 1 and run is compiled else "default"):
                loss = run(ids, mask, labels=torch.where(mask != 0, ids, -100)).loss
            loss.backward()
            results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        torch.testing.assert_close(results[1], results[0], **FP64)
    torch.compiler.reset()


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("where", ["attention_dropout", "mlp_dropout", "embedding_dropout"])
def test_dropout_acts_in_training_only(attention: str, where: str) -> None:
    model = small(**{where: 0.3})
    model.set_attention(attention)
    ids, mask = batch(3, "right")
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
    model.train()
    first, second = (model(ids, mask, labels=ids) for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    second.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_initial_weights_are_a_truncated_normal_of_the_stated_width() -> None:
    # 2 sigma on either side leave 0.8796 of the deviation; a weight matrix of n entries shows it within 3 / sqrt(n).
    config = ModernBertConfig.preset(
        "tiny", **{**COMMON, "vocab_size": 600, "intermediate_size": 192}, attention_bias=True, norm_bias=True
    )
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(config)
    narrow = 0.02 / math.sqrt(2 * 4)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            wide = any(part in name for part in ("tok_embeddings", "Wqkv", "Wi"))
            assert wide or any(part in name for part in ("Wo", "head.dense")), name
            std = 0.02 if wide else narrow
            assert weight.abs().max() <= 2 * std, name
            assert weight.std().item() == pytest.approx(0.8796 * std, rel=3 / math.sqrt(weight.numel())), name


# What is refused


def test_inputs_that_contradict_each_other_are_refused() -> None:
    model, ids = small(), random_ids(1, 5)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        model.model(ids, inputs_embeds=embeds)
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        model.model()
    with pytest.raises(InputError, match="cu_seqlens"):
        model.model(ids[0], torch.ones(5), cu_seqlens=torch.tensor([0, 5]))


def test_model_works_whatever_was_imported_before() -> None:
    # transformers replaces its own module object while it loads a model: what hung on the first one may be gone.
    program = """
import transformers
transformers.ModernBertModel
from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertModel
ModernBertModel(ModernBertConfig.preset("tiny", vocab_size=9, num_hidden_layers=1, pad_token_id=0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_attention_backend_is_set_everywhere_or_refused() -> None:
    model = small()
    model.set_attention("eager")
    assert (model.attention, model.model.attention) == ("eager", "eager")
    with pytest.raises(InputError, match="eager, sdpa, banded, flex, varlen, not 'flash'"):
        model.set_attention("flash")
    assert isinstance(model.model, ModernBertModel)


def test_checkpoint_of_another_seed_is_another_model(tmp_path: Path, checkpoint: Path) -> None:
    # Guards the comparisons above: if random weights did not reach the output, they would compare nothing.
    other = load_model(write_checkpoint(tmp_path / "other", seed=1))
    ids = random_ids(1, 20) % TINY["vocab_size"]
    assert (other(ids).last_hidden_state - load_model(checkpoint)(ids).last_hidden_state).abs().max() > 0.5
