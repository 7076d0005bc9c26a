"""What a ModernBERT is made of: transformers' configuration, checked, with the sizes people use as presets.

Old and new spellings of `config.json` (`global_attn_every_n_layers` or `layer_types`, `global_rope_theta` or
`rope_parameters`) are read by transformers; this file adds what it leaves unchecked.
"""

# No `from __future__ import annotations` here: @strict checks fields by their types, and skips those given as text.

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from modernbert.errors import InputError

LayerType = Literal["full_attention", "sliding_attention"]

PLAIN_MODEL_TYPE = "modernbert"
# Stock code would load the weights of a model with global tokens and compute something else: it must not know the name.
GLOBAL_MODEL_TYPE = "modernbert_global"

# Ettin's small models (Weller et al. 2025, table 1) use theta 160,000 in the local layers too.
_ETTIN_ROPE = {layer_type: {"rope_type": "default", "rope_theta": 160_000.0} for layer_type in get_args(LayerType)}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "large": dict(num_hidden_layers=28, hidden_size=1024, num_attention_heads=16, intermediate_size=2624),
    "base": dict(num_hidden_layers=22, hidden_size=768, num_attention_heads=12, intermediate_size=1152),
    "68m": dict(
        num_hidden_layers=19, hidden_size=512, num_attention_heads=8, intermediate_size=768, rope_parameters=_ETTIN_ROPE
    ),
    "32m": dict(
        num_hidden_layers=10, hidden_size=384, num_attention_heads=6, intermediate_size=576, rope_parameters=_ETTIN_ROPE
    ),
    "17m": dict(
        num_hidden_layers=7, hidden_size=256, num_attention_heads=4, intermediate_size=384, rope_parameters=_ETTIN_ROPE
    ),
    "tiny": dict(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, intermediate_size=192),
}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@strict
class ModernBertConfig(transformers.ModernBertConfig):
    """transformers' `ModernBertConfig`, refusing what the model, its exports and its tests do not cover.

    Attributes:
        num_global_tokens: learned tokens per sequence that attend to all of it and that all of it attends to
            (`modernbert.global_tokens`). With any, `config.json` names a model type that stock code does not know.
        classifier_pooling: "cls", "mean", or "global", the first global token.

    Raises:
        InputError: a field has a value outside what is supported.
    """

    num_global_tokens: int = 0
    classifier_pooling: Literal["cls", "mean", "global"] = "cls"

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES} | {
            "global_attn_every_n_layers": kwargs.get("global_attn_every_n_layers", 1)
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, not {size}")
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise InputError(
                f"hidden_size {self.hidden_size} does not split into num_attention_heads {self.num_attention_heads} "
                "heads of even size, which rotary embedding needs; change one of them"
            )
        if self.local_attention < 2:
            raise InputError(f"local_attention must be at least 2 tokens, not {self.local_attention}")
        if not 0 <= self.norm_eps < math.inf:
            raise InputError(f"norm_eps must be 0 or above, not {self.norm_eps}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(f"pad_token_id {self.pad_token_id} is not below vocab_size {self.vocab_size}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}; "
                "they must agree"
            )
        if self.num_global_tokens < 0:
            raise InputError(f"num_global_tokens must be 0 or above, not {self.num_global_tokens}")
        if self.classifier_pooling == "global" and not self.num_global_tokens:
            raise InputError("classifier_pooling 'global' needs num_global_tokens of 1 or above, not 0")
        for layer_type in self.layer_types:
            if layer_type not in get_args(LayerType):
                raise InputError(f"layer_types must be {' or '.join(get_args(LayerType))}, not {layer_type!r}")
            theta = self.rope_parameters[layer_type].get("rope_theta")
            if not isinstance(theta, int | float) or not 0 < theta < math.inf:
                raise InputError(f"rope_theta must be a number above 0 for {layer_type}, not {theta!r}")
            rope_type = self.rope_parameters[layer_type]["rope_type"]
            if rope_type != "default":
                raise InputError(
                    f"rope_type must be 'default' for {layer_type}, not {rope_type!r}: it is not supported"
                )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def window_radius(self) -> int:
        """How far a token of a sliding-window layer sees to either side, itself not counted: |q - k| <= radius."""
        return int(self.local_attention // 2)

    def rope_theta(self, layer_type: LayerType) -> float:
        """Base of the rotary frequencies in layers of this type."""
        return float(self.rope_parameters[layer_type]["rope_theta"])

    @classmethod
    def get_config_dict(cls, model: str | os.PathLike[str], **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json` as transformers does; the name that keeps stock code away has done its work then.

        Raises:
            InputError: the model type says one thing about global tokens, their number another.
        """
        values, kwargs = super().get_config_dict(model, **kwargs)
        model_type, number = values.get("model_type"), values.get("num_global_tokens", 0)
        if model_type in (PLAIN_MODEL_TYPE, GLOBAL_MODEL_TYPE):
            if (model_type == GLOBAL_MODEL_TYPE) != bool(number):
                raise InputError(
                    f"model {str(model)!r} is of model_type {model_type!r} with num_global_tokens {number!r}; "
                    f"with 1 or more it must be {GLOBAL_MODEL_TYPE!r}, else {PLAIN_MODEL_TYPE!r}"
                )
            values["model_type"] = PLAIN_MODEL_TYPE
        return values, kwargs

    def to_dict(self) -> dict[str, Any]:
        """The fields, as `config.json` holds them; without global tokens they are exactly the stock ones."""
        values: dict[str, Any] = super().to_dict()
        if self.num_global_tokens:
            values["model_type"] = GLOBAL_MODEL_TYPE
        else:
            del values["num_global_tokens"]
        return values

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ModernBertConfig":
        """One of the sizes in `PRESETS`, with any field overridden.

        Raises:
            InputError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
        return cls(**{**PRESETS[name], **overrides})


def load_config(model: str | os.PathLike[str]) -> ModernBertConfig:
    """Reads the configuration of a local directory or hub id.

    Raises:
        InputError: there is none, or it is not a ModernBERT's.
    """
    try:
        values, _ = ModernBertConfig.get_config_dict(model)
        model_type = values.get("model_type")
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two where it is JSON, but no object
        raise InputError(f"model {str(model)!r} has no readable config.json: {str(error).splitlines()[0]}") from error
    if not values:
        raise InputError(f"model {str(model)!r} has no config.json; give a directory that save_pretrained() wrote")
    if model_type != PLAIN_MODEL_TYPE:
        raise InputError(f"model {str(model)!r} is of model_type {model_type!r}; it must be {PLAIN_MODEL_TYPE!r}")
    try:
        return ModernBertConfig.from_dict(values)
    except InputError:
        raise
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config.json of model {str(model)!r} is not supported: {reason}") from error
