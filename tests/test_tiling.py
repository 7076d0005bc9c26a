"""Tiling: where each weight of the large model comes from, read off weights that are numbered."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import TINY, randomise
from torch import Tensor

from modernbert.config import PRESETS, ModernBertConfig
from modernbert.errors import InputError
from modernbert.heads import ModernBertForSequenceClassification
from modernbert.model import ModernBertForMaskedLM
from modernbert.tiling import centred, tile

# Heads of 4: 2 of them become 3; hidden 8 becomes 12, MLP 5 becomes 9, 4 layers become 6.
SMALL = {**TINY, "norm_bias": True, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 5}
LARGE = {**SMALL, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 9, "num_hidden_layers": 6}
HIDDEN = [6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
HEADS = [0, 1, 0]
INNER = [3, 4, 0, 1, 2, 3, 4, 0, 1]


def weights(**config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    small = ModernBertForMaskedLM(ModernBertConfig(**{**SMALL, **config}))
    randomise(small)
    return small.state_dict(), tile(small, ModernBertConfig(**{**LARGE, **config})).state_dict()


def test_places_are_centred_and_wrap_around() -> None:
    assert centred(4, 4).tolist() == [0, 1, 2, 3]
    assert centred(4, 6).tolist() == [3, 0, 1, 2, 3, 0]
    assert centred(2, 7).tolist() == [0, 1, 0, 1, 0, 1, 0]
    for small, large in ((768, 1024), (1152, 2624), (12, 16)):
        places = centred(small, large).tolist()
        start = (large - small) // 2
        assert places[start : start + small] == list(range(small))
        assert all(after == (before + 1) % small for before, after in pairwise(places))


def test_every_weight_comes_from_its_place() -> None:
    # Entry by entry, along axes given here as lists and not by the code's table.
    small, large = weights()
    for index, origin in enumerate([0, 0, 1, 2, 2, 3]):
        new, old = f"model.layers.{index}", f"model.layers.{origin}"
        wqkv, from_wqkv = large[f"{new}.attn.Wqkv.weight"], small[f"{old}.attn.Wqkv.weight"]
        wo, from_wo = large[f"{new}.attn.Wo.weight"], small[f"{old}.attn.Wo.weight"]
        for head, old_head in enumerate(HEADS):
            for component in range(4):
                for column, old_column in enumerate(HIDDEN):
                    for part in range(3):
                        row, old_row = part * 12 + head * 4 + component, part * 8 + old_head * 4 + component
                        assert wqkv[row, column] == from_wqkv[old_row, old_column]
                    assert wo[column, head * 4 + component] == from_wo[old_column, old_head * 4 + component]
        wi, from_wi = large[f"{new}.mlp.Wi.weight"], small[f"{old}.mlp.Wi.weight"]
        mlp_wo, from_mlp_wo = large[f"{new}.mlp.Wo.weight"], small[f"{old}.mlp.Wo.weight"]
        for inner, old_inner in enumerate(INNER):
            for column, old_column in enumerate(HIDDEN):
                assert wi[inner, column] == from_wi[old_inner, old_column]
                assert wi[9 + inner, column] == from_wi[5 + old_inner, old_column]
                assert mlp_wo[column, inner] == from_mlp_wo[old_column, old_inner]
        assert torch.equal(large[f"{new}.mlp_norm.weight"], small[f"{old}.mlp_norm.weight"][HIDDEN])
    for name in ("model.embeddings.norm", "model.final_norm", "head.norm"):
        for kind in ("weight", "bias"):
            assert torch.equal(large[f"{name}.{kind}"], small[f"{name}.{kind}"][HIDDEN])
    embeddings = "model.embeddings.tok_embeddings.weight"
    assert torch.equal(large[embeddings], small[embeddings][:, HIDDEN])
    assert torch.equal(large["head.dense.weight"], small["head.dense.weight"][HIDDEN][:, HIDDEN])
    assert torch.equal(large["decoder.bias"], small["decoder.bias"])


def test_the_norm_that_the_first_layer_has_not_starts_as_one() -> None:
    _, large = weights()
    assert torch.equal(large["model.layers.1.attn_norm.weight"], torch.ones(12))
    assert torch.equal(large["model.layers.1.attn_norm.bias"], torch.zeros(12))


def test_twice_as_wide_computes_the_same() -> None:
    # Every number of the residual stream twice, every head twice: norms see the same mean and deviation. Each product
    # of a matrix is counted twice, so matrices are halved here; then nothing else may differ.
    small = ModernBertForMaskedLM(ModernBertConfig(**SMALL)).double().eval()
    randomise(small)
    double = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 10}
    large = tile(small, ModernBertConfig(**{**SMALL, **double})).double().eval()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            if any(part in name for part in ("Wqkv", "Wo", "Wi", "dense")):
                parameter /= 2
    ids = torch.randint(5, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    got, want = large.model(ids).last_hidden_state, small.model(ids).last_hidden_state
    # Places 0 to 7 of 16 take 4 to 7 and 0 to 3 of 8.
    torch.testing.assert_close(got, want[..., centred(8, 16)], atol=1e-5, rtol=1e-5)  # angles are fp32 in either


@pytest.mark.parametrize("extra", [{}, {"attention_bias": True, "mlp_bias": True, "classifier_bias": True}])
def test_biases_and_global_tokens_follow(extra: dict[str, Any]) -> None:
    small, large = weights(num_global_tokens=2, **extra)
    name = "model.embeddings.global_tokens"
    assert torch.equal(large[name], small[name][:, HIDDEN])
    if extra:
        name = "model.layers.0.attn.Wo.bias"
        assert torch.equal(large[name], small[name][HIDDEN])
        name = "model.layers.5.attn.Wqkv.bias"
        heads = small["model.layers.3.attn.Wqkv.bias"].view(3, 2, 4)
        assert torch.equal(large[name].view(3, 3, 4), heads[:, HEADS])


def test_a_classifier_stays_one() -> None:
    small = ModernBertForSequenceClassification(ModernBertConfig(**SMALL, num_labels=3))
    randomise(small)
    large = tile(small, ModernBertConfig(**LARGE, num_labels=3))
    assert type(large) is ModernBertForSequenceClassification
    assert torch.equal(large.classifier.weight, small.classifier.weight[:, HIDDEN])


def test_large_can_be_made_of_base() -> None:
    with torch.device("meta"):
        base = ModernBertForMaskedLM(ModernBertConfig.preset("base"))
        large = tile(base, ModernBertConfig.preset("large"))
    assert round(sum(x.numel() for x in large.model.parameters()) / 1e6) == 395
    assert PRESETS["large"]["num_hidden_layers"] == len(large.model.layers)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 4, "num_attention_heads": 1}, "hidden_size 4 is below 8"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3 is below 4"),
        ({"hidden_size": 12, "num_attention_heads": 2}, "head_dim must be 4"),
        ({"vocab_size": 99}, "vocab_size must be"),
        ({"num_global_tokens": 1}, "num_global_tokens must be 0"),
        ({"mlp_bias": True}, "biases must be the same"),
        ({"norm_bias": False}, "biases must be the same"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], named: str) -> None:
    small = ModernBertForMaskedLM(ModernBertConfig(**SMALL))
    with pytest.raises(InputError, match=named):
        tile(small, ModernBertConfig(**{**SMALL, **change}))
