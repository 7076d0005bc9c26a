"""A large model that starts from a smaller trained one, as ModernBERT-large did from ModernBERT-base.

    Warner et al. 2024 (arXiv:2412.13663), "Weight Initialization and Tiling": the small weights stand in the centre of
    the large ones, per head of the attention, and wrap around to fill the rest
    Rae et al. 2021, "Gopher" (arXiv:2112.11446), appendix on tiling: layers are repeated in place, each by as many as
    the depths ask for

Nothing is scaled: what the large model computes at first is near to the small one's, and training does the rest.

Shapes: D hidden size, H heads, K size of a head, I MLP size, V vocabulary, C labels.
"""

from __future__ import annotations

import re
from typing import TypeVar

import torch
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertPreTrainedModel

Model = TypeVar("Model", bound=ModernBertPreTrainedModel)

# The axes of every weight by the end of its name. D, H and I grow; 3, K and V are what they were.
_AXES = {
    "tok_embeddings.weight": "VD",
    "global_tokens": "GD",
    "Wqkv.weight": "3HKD",
    "Wqkv.bias": "3HK",
    "attn.Wo.weight": "DHK",
    "mlp.Wi.weight": "2ID",
    "mlp.Wi.bias": "2I",
    "mlp.Wo.weight": "DI",
    "Wo.bias": "D",
    "dense.weight": "DD",
    "dense.bias": "D",
    "norm.weight": "D",
    "norm.bias": "D",
    "decoder.weight": "VD",
    "decoder.bias": "V",
    "classifier.weight": "CD",
    "classifier.bias": "C",
}
_KEPT = ("vocab_size", "head_dim", "num_global_tokens", "num_labels")


def tile(small: Model, config: ModernBertConfig) -> Model:
    """A model of `config`'s size and the class of `small`, whose weights are those of `small`, tiled.

    Args:
        small: the trained model, with any head.
        config: of the large one. Vocabulary, size of a head, biases and global tokens must be the small one's.

    Raises:
        InputError: it is smaller in some size, or differs in what must be equal.
    """
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        if getattr(config, name) < getattr(small.config, name):
            raise InputError(
                f"{name} {getattr(config, name)} is below {getattr(small.config, name)}, that of the model to start "
                "from; tiling makes models larger"
            )
    for name in _KEPT:
        if getattr(config, name) != getattr(small.config, name):
            raise InputError(
                f"{name} must be {getattr(small.config, name)}, that of the model to start from, "
                f"not {getattr(config, name)}"
            )
    large = type(small)(config)
    source, target = small.state_dict(), large.state_dict()
    for name, weight in target.items():
        origin = re.sub(r"layers\.(\d+)", lambda found: f"layers.{_layer(int(found[1]), small.config, config)}", name)
        if origin in source:
            # Heads, and parts that share a matrix, are one axis again.
            weight.copy_(_tiled(source[origin], _axes(name), small.config, config).reshape(weight.shape))
        elif "layers.0.attn_norm" not in origin:
            # The first layer follows a norm and has none; its repetition keeps the one that it starts with.
            raise InputError(f"the model to start from has no weight {origin}; biases must be the same in both")
    surplus = sorted(source.keys() - target.keys())
    if surplus:
        raise InputError(f"the model to make has no weight {surplus[0]}; biases must be the same in both")
    return large


def _layer(index: int, small: ModernBertConfig, large: ModernBertConfig) -> int:
    """Which of the small model's layers the large one's layer repeats."""
    return index * small.num_hidden_layers // large.num_hidden_layers


def _axes(name: str) -> str:
    for end, axes in _AXES.items():
        if name.endswith(end):
            return axes
    raise AssertionError(f"no axes are known for weight {name}")


def _tiled(weight: Tensor, axes: str, small: ModernBertConfig, large: ModernBertConfig) -> Tensor:
    sizes = {
        axis: (getattr(small, name), getattr(large, name))
        for axis, name in (("D", "hidden_size"), ("I", "intermediate_size"), ("H", "num_attention_heads"))
    } | {"2": (2, 2), "3": (3, 3), "K": (small.head_dim, large.head_dim)}
    shape = [sizes[axis][0] if axis in sizes else -1 for axis in axes]
    tiled = weight.reshape(shape)
    for dimension, axis in enumerate(axes):
        if axis in "DIH":
            tiled = tiled.index_select(dimension, centred(*sizes[axis]))
    return tiled


def centred(small: int, large: int) -> Tensor:
    """For each of `large` places the one of `small` that it takes: in order in the centre, and around from there."""
    return (torch.arange(large) - (large - small) // 2) % small
