"""Global tokens: what they compute against a dense float64 formula, in every form, on disk and in training.

The reference is written out here from the definition: tokens and global tokens in one matrix of scores per sequence,
rotated where both sides are tokens, not rotated where one is global, one softmax over all that is visible.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, randomise, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from modernbert.config import GLOBAL_MODEL_TYPE, ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.heads import ModernBertForSequenceClassification
from modernbert.model import ModernBertForMaskedLM, ModernBertModel, load_model
from modernbert.pooling import EmbeddingHead

BACKENDS = ("eager", "sdpa", "banded", "flex")
TRAINABLE = BACKENDS[:-1]
FP64 = dict(atol=1e-10, rtol=1e-10)
# The rotary angles are fp32 in the model and float64 in the reference: 6e-8 of at most 40 positions, four layers deep.
ANGLES = dict(atol=2e-5, rtol=2e-5)


def small(number: int = 2, **config: Any) -> ModernBertForMaskedLM:
    settings = {**TINY, "norm_bias": True, "num_global_tokens": number, **config}
    model = ModernBertForMaskedLM(ModernBertConfig(**settings)).eval()
    randomise(model)
    return model.double()


def batch() -> tuple[Tensor, Tensor]:
    """Lengths on either side of the radius 4 and of its blocks, an empty row, padding on the right."""
    lengths = [19, 1, 0, 4, 9, 13]
    mask = (torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, TINY["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(3))
    return ids, mask


def dense(model: ModernBertForMaskedLM, ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: vectors of tokens [S, D] and of global tokens [G, D], from the weights alone."""
    config, w = model.config, {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    length, number = len(ids_S), config.num_global_tokens

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rotated(x_HSK: Tensor, theta: float) -> Tensor:
        angle = torch.arange(length).double()[:, None] / theta ** (torch.arange(0, size, 2).double() / size)
        turn = torch.polar(torch.ones_like(angle), angle)
        y = torch.complex(x_HSK[..., : size // 2], x_HSK[..., size // 2 :]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    x = torch.cat((w["embeddings.tok_embeddings.weight"][ids_S], w["embeddings.global_tokens"]))
    x = norm(x, "embeddings.norm")
    for index, layer_type in enumerate(config.layer_types):
        layer, theta = f"layers.{index}", config.rope_parameters[layer_type]["rope_theta"]
        y = norm(x, f"{layer}.attn_norm") if index else x
        q, k, v = (y @ w[f"{layer}.attn.Wqkv.weight"].T).reshape(-1, 3, heads, size).permute(1, 2, 0, 3)
        scores = q @ k.mT
        tokens = slice(0, length)
        scores[:, tokens, tokens] = rotated(q[:, tokens], theta) @ rotated(k[:, tokens], theta).mT
        place = torch.arange(length)
        hidden = torch.zeros(length + number, length + number, dtype=torch.bool)
        if layer_type == "sliding_attention":
            hidden[tokens, tokens] = (place[:, None] - place).abs() > config.local_attention // 2
        weights = (scores / math.sqrt(size)).masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + (weights @ v).permute(1, 0, 2).flatten(1) @ w[f"{layer}.attn.Wo.weight"].T
        value, gate = (norm(x, f"{layer}.mlp_norm") @ w[f"{layer}.mlp.Wi.weight"].T).chunk(2, dim=-1)
        x = x + (value * (1 + torch.erf(value / math.sqrt(2))) / 2 * gate) @ w[f"{layer}.mlp.Wo.weight"].T
    x = norm(x, "final_norm")
    return x[:length], x[length:]


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("attention", BACKENDS)
def test_padded_equals_the_definition(attention: str, number: int) -> None:
    model = small(number)
    model.set_attention(attention)
    ids, mask = batch()
    with torch.no_grad():
        got = model.model(ids, mask)
        assert got.global_hidden_state.shape == (len(ids), number, TINY["hidden_size"])
        for row, length in enumerate(mask.sum(1).tolist()):
            tokens, extra = dense(model, ids[row, :length])
            torch.testing.assert_close(got.last_hidden_state[row, :length], tokens, **ANGLES)
            torch.testing.assert_close(got.global_hidden_state[row], extra, **ANGLES)
            assert (got.last_hidden_state[row, length:] == 0).all()


@pytest.mark.parametrize("attention", BACKENDS)
def test_packed_equals_padded(attention: str) -> None:
    model = small()
    model.set_attention(attention)
    ids, mask = batch()
    offsets = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    with torch.no_grad():
        padded = model.model(ids, mask, output_hidden_states=True)
        packed = model.model(ids[mask != 0], cu_seqlens=offsets, output_hidden_states=True)
    torch.testing.assert_close(packed.last_hidden_state, padded.last_hidden_state[mask != 0], **FP64)
    torch.testing.assert_close(packed.global_hidden_state, padded.global_hidden_state, **FP64)
    for one, other in zip(packed.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(one, other[mask != 0], **FP64)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("changed", range(4))
def test_packed_documents_never_see_each_other(attention: str, changed: int) -> None:
    model = small()
    model.set_attention(attention)
    lengths = [5, 1, 13, 7]
    document, offsets = torch.repeat_interleave(torch.tensor(lengths)), torch.tensor([0, 5, 6, 19, 26])
    generator = torch.Generator().manual_seed(5)
    embeds, noise = (torch.randn(26, TINY["hidden_size"], generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        before = model.model(inputs_embeds=embeds, cu_seqlens=offsets)
        other = torch.where((document == changed)[:, None], noise, embeds)
        after = model.model(inputs_embeds=other, cu_seqlens=offsets)
    others = [index for index in range(4) if index != changed]
    assert torch.equal(after.last_hidden_state[document != changed], before.last_hidden_state[document != changed])
    assert torch.equal(after.global_hidden_state[others], before.global_hidden_state[others])
    assert (after.global_hidden_state[changed] - before.global_hidden_state[changed]).abs().min() > 1e-4


@pytest.mark.parametrize("attention", TRAINABLE)
def test_gradients_equal_those_of_the_definition(attention: str) -> None:
    model = small().train()
    model.set_attention(attention)
    ids, mask = batch()
    got = model.model(ids, mask)
    weight = torch.randn(got.last_hidden_state.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    extra = torch.randn(got.global_hidden_state.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = dict(model.model.named_parameters())
    loss = (got.last_hidden_state * weight).sum() + (got.global_hidden_state * extra).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))

    # state_dict() detaches; the reference is to be differentiated.
    model.state_dict = lambda: {f"model.{name}": x for name, x in parameters.items()}  # type: ignore[method-assign]
    loss = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(mask.sum(1).tolist()):
        tokens, globals_ = dense(model, ids[row, :length])
        loss = loss + (tokens * weight[row, :length]).sum() + (globals_ * extra[row]).sum()
    for name, got_grad, want in zip(
        parameters, grads, torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        assert want.abs().max() > 0, name
        scale = want.abs().max()  # sums over 46 tokens: the error of the angles is relative to their size
        torch.testing.assert_close(
            got_grad / scale, want / scale, **ANGLES, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_they_carry_what_a_local_layer_alone_cannot() -> None:
    # Two local layers of radius 4 reach 8 tokens; through a global token the first reaches the last.
    for number, reaches in ((0, False), (1, True)):
        model = small(number, num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
        ids = batch()[0][:1, :19]
        other = ids.clone()
        other[0, 0] = 5 + (ids[0, 0] - 4) % 20
        change = (model.model(other).last_hidden_state - model.model(ids).last_hidden_state)[0, -1].abs().max()
        assert (change > 1e-4) == reaches


def test_a_batch_without_any_token_is_finite() -> None:
    for attention in TRAINABLE:
        model = small()
        model.set_attention(attention)
        for shape in ((1, 1), (3, 7), (2, 0), (0, 4)):
            ids = torch.zeros(shape, dtype=torch.int64)
            output = model.model(ids, torch.zeros_like(ids))
            assert output.global_hidden_state.shape == (shape[0], 2, TINY["hidden_size"])
            assert output.global_hidden_state.isfinite().all()
            output.global_hidden_state.sum().backward()


@pytest.mark.parametrize("attention", TRAINABLE)
def test_they_train_with_checkpointing_as_without(attention: str) -> None:
    ids, mask = batch()
    grads = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_attention(attention)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, mask, labels=torch.where(mask != 0, ids, -100)).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], **FP64)


def test_they_start_as_different_vectors_of_the_size_of_embeddings() -> None:
    torch.manual_seed(0)
    tokens = ModernBertModel(ModernBertConfig(**TINY, num_global_tokens=64)).embeddings.global_tokens
    assert tokens.abs().max() <= 0.04
    assert tokens.std().item() == pytest.approx(0.8796 * 0.02, rel=3 / math.sqrt(tokens.numel()))
    assert len(torch.unique(tokens, dim=0)) == 64


# Files


def test_the_model_loads_here_and_stock_transformers_refuses_it(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == GLOBAL_MODEL_TYPE
    with pytest.raises((ValueError, KeyError), match=GLOBAL_MODEL_TYPE):
        transformers.AutoModel.from_pretrained(tmp_path)
    assert load_config(tmp_path).num_global_tokens == 2
    ids, mask = batch()
    want = model.float().model(ids, mask)
    got = load_model(tmp_path)(ids, mask)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert torch.equal(got.global_hidden_state, want.global_hidden_state)
    again = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.num_global_tokens == 2
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == GLOBAL_MODEL_TYPE


def test_there_is_one_tensor_more(tmp_path: Path) -> None:
    names = []
    for number in (0, 3):
        small(number).save_pretrained(tmp_path / str(number))
        names.append(load_file(tmp_path / str(number) / "model.safetensors").keys())
    assert names[1] - names[0] == {"model.embeddings.global_tokens"}
    assert not names[0] - names[1]


def test_a_plain_model_keeps_a_plain_configuration(tmp_path: Path) -> None:
    ModernBertConfig(**TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "modernbert"
    assert "num_global_tokens" not in config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "modernbert", "num_global_tokens": 2}, "num_global_tokens 2"),
        ({"model_type": GLOBAL_MODEL_TYPE}, "num_global_tokens 0"),
        ({"model_type": GLOBAL_MODEL_TYPE, "num_global_tokens": -1}, "num_global_tokens must be 0 or above, not -1"),
        ({"model_type": GLOBAL_MODEL_TYPE, "num_global_tokens": "2"}, "num_global_tokens"),
        ({"model_type": "modernbert", "classifier_pooling": "global"}, "classifier_pooling 'global'"),
    ],
)
def test_contradictions_are_refused_in_one_line(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **values}))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_checkpoint_lacks_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": GLOBAL_MODEL_TYPE, "num_global_tokens": 2})
    )
    with pytest.raises(InputError, match=r"lacks 1 weights: embeddings\.global_tokens"):
        load_model(tmp_path)


# Pooling


def test_pooling_reads_the_first_one() -> None:
    model = small(3)
    ids, mask = batch()
    output = model.model(ids, mask)
    pooled = EmbeddingHead("global", normalize=False)(output.last_hidden_state, mask, output.global_hidden_state)
    assert torch.equal(pooled, output.global_hidden_state[:, 0])
    unit = EmbeddingHead("global", normalize=True)(output.last_hidden_state, mask, output.global_hidden_state)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(len(ids), dtype=torch.float64), **FP64)
    with pytest.raises(InputError, match="'global' needs a model with num_global_tokens"):
        EmbeddingHead("global", normalize=False)(output.last_hidden_state, mask)


def test_a_classifier_may_read_it() -> None:
    config = ModernBertConfig(**TINY, num_global_tokens=2, classifier_pooling="global", num_labels=3)
    model = ModernBertForSequenceClassification(config).eval()
    randomise(model)
    ids, mask = batch()
    want = model.classifier(model.head(model.model(ids, mask).global_hidden_state[:, 0]))
    torch.testing.assert_close(model(ids, mask).logits, want)
