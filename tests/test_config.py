"""The configuration: presets, old and new spellings, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY

from modernbert.config import PRESETS, ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM

THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
# What is changed in a good configuration, and what the message must name.
REFUSED = {
    "window of one": (dict(local_attention=1), "local_attention"),
    "heads that do not divide": (dict(num_attention_heads=5), "num_attention_heads 5"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads"),
    "negative heads": (dict(num_attention_heads=-3), "num_attention_heads"),
    "odd head size": (dict(hidden_size=45), "hidden_size 45"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers"),
    "too few layer types": (dict(layer_types=["full_attention"] * 3), "layer_types names 3"),
    "unknown layer type": (dict(layer_types=["full_attention"] * 3 + ["chunked_attention"]), "'chunked_attention'"),
    "yarn": (
        dict(rope_parameters=THETAS | {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        "'yarn'",
    ),
    "linear in local layers": (
        dict(rope_parameters=THETAS | {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        "'linear'",
    ),
    "old spelling of linear": (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "'linear'"),
    "text for a number": (dict(hidden_size="48"), "hidden_size"),
    "padding outside the vocabulary": (dict(pad_token_id=TINY["vocab_size"]), "pad_token_id"),
    "no theta": (dict(rope_parameters=THETAS | {"full_attention": {"rope_theta": None}}), "rope_theta"),
    "theta of zero": (dict(rope_parameters=THETAS | {"sliding_attention": {"rope_theta": 0.0}}), "rope_theta"),
    "negative epsilon": (dict(norm_eps=-1.0), "norm_eps"),
    "no period": (dict(global_attn_every_n_layers=0), "global_attn_every_n_layers"),
}


@pytest.mark.parametrize(("change", "named"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_is_not_supported(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert", **TINY, **change}))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (json.dumps({**TINY, "model_type": "bert"}), "'bert'"),
        (json.dumps(TINY), "model_type"),
        ('{"model_type": "modernbert"', "config.json"),
        ("[]", "config.json"),
        ("null", "config.json"),
        ("", "config.json"),
    ],
)
def test_refuses_what_is_no_modernbert(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent") as caught:
        load_config(tmp_path / "absent")
    assert "\n" not in str(caught.value)


def test_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"large, base, .*not 'huge'"):
        ModernBertConfig.preset("huge")


def test_preset_fields_can_be_overridden() -> None:
    config = ModernBertConfig.preset("base", num_hidden_layers=2, local_attention=32)
    assert (config.num_hidden_layers, config.hidden_size, config.window_radius) == (2, 768, 16)


# Parameters of the encoder in millions, as the papers' abstracts round them: arXiv:2412.13663 (base, large) and
# arXiv:2507.11412 (Ettin's small sizes).
@pytest.mark.parametrize(("name", "millions"), [("base", 149), ("large", 395), ("68m", 68), ("32m", 32), ("17m", 17)])
def test_presets_have_the_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = ModernBertForMaskedLM(ModernBertConfig.preset(name))
        stock = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**PRESETS[name]))
    count = sum(parameter.numel() for parameter in model.model.parameters())
    assert round(count / 1e6) == millions
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in stock.named_parameters()
    }


def test_presets_have_the_published_layers_and_thetas() -> None:
    base, ettin = ModernBertConfig.preset("base"), ModernBertConfig.preset("17m")
    assert [i for i, kind in enumerate(base.layer_types) if kind == "full_attention"] == list(range(0, 22, 3))
    assert (base.window_radius, base.head_dim, base.vocab_size) == (64, 64, 50_368)
    assert (base.rope_theta("full_attention"), base.rope_theta("sliding_attention")) == (160_000, 10_000)
    assert (ettin.rope_theta("full_attention"), ettin.rope_theta("sliding_attention")) == (160_000, 160_000)


@pytest.mark.parametrize(("local_attention", "radius"), [(2, 1), (3, 1), (7, 3), (8, 4), (128, 64), (129, 64)])
def test_window_radius_is_half_the_window_rounded_down(local_attention: int, radius: int) -> None:
    assert ModernBertConfig(**{**TINY, "local_attention": local_attention}).window_radius == radius


def test_old_spellings_are_read(tmp_path: Path) -> None:
    # The keys of answerdotai/ModernBERT-base's config.json, written before transformers 5.
    old = {"global_attn_every_n_layers": 2, "global_rope_theta": 1234.0, "local_rope_theta": 77.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert", **TINY, **old}))
    config = load_config(tmp_path)
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2
    assert (config.rope_theta("full_attention"), config.rope_theta("sliding_attention")) == (1234.0, 77.0)


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = ModernBertConfig(**TINY, layer_types=layers, rope_parameters=THETAS, norm_bias=True)
    config.save_pretrained(tmp_path)
    again = load_config(tmp_path)
    assert again.to_dict() | {"architectures": None} == config.to_dict() | {"architectures": None}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "modernbert"
