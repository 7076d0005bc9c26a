"""How the linear layers are best quantised: scales and their errors, measured on text.

Dynamic int8 gives all of a layer's input one range, so a channel with large values takes the resolution from all
others. Dividing channel j of the input by s_j and multiplying column j of the weights by s_j leaves the product as it
is and evens the ranges out (Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438: s_j = max|x_j|^a / max|w_j|^(1-a)). The
division costs nothing where something linear comes before: a norm's weights, the rows that make v, those that make the
gate. Here s_j are powers of two, which floating point multiplies by exactly: the model computes the same bits.

Shapes: R rows (tokens) of a sample, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modernbert.model import ModernBertModel
from modernbert_export.precision.linears import LAYER_LINEARS
from modernbert_export.precision.weight_only import BLOCK, Bits, block_weight

# Of SmoothQuant's exponent; None leaves the layer as it is.
STRENGTHS = (None, 0.25, 0.5, 0.75)
SAMPLE_ROWS = 256
# Of the error without smoothing, at most, to be worth it.
WORTH_IT = 0.8


@dataclass(frozen=True, kw_only=True)
class LinearChoice:
    """A linear layer, the strength of its smoothing, and its relative output error in int8 (root mean square)."""

    name: str
    strength: float | None
    error: float


Rows = Mapping[str, Tensor]  # sampled inputs [R, I] of linear layers by name


class InputSampler:
    """While it is entered, keeps a sample of rows [R, I] of what goes into every linear layer of a model."""

    def __init__(self, model: ModernBertModel) -> None:
        self.rows: dict[str, Tensor] = {}
        self._model = model
        self._generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> InputSampler:
        self._handles = [
            self._model.get_submodule(name).register_forward_pre_hook(self._keep(name))
            for name in linear_names(self._model)
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            # A few of every batch, and the largest: ranges hang on those.
            largest = rows.abs().amax(-1).topk(min(2, len(rows))).indices
            drawn = torch.randperm(len(rows), generator=self._generator)[: SAMPLE_ROWS // 16]
            kept = torch.cat([self.rows[name], rows[largest], rows[drawn]]) if name in self.rows else rows[drawn]
            self.rows[name] = kept[-SAMPLE_ROWS:].clone()

        return hook


def linear_names(model: ModernBertModel) -> Iterator[str]:
    """The linear layers of the encoder in the order that it runs them."""
    for index in range(model.config.num_hidden_layers):
        yield from (f"layers.{index}.{name}" for name in LAYER_LINEARS)


@torch.no_grad()
def smooth(model: ModernBertModel, rows: Rows, levels: int) -> list[LinearChoice]:
    """Chooses each linear layer's strength by its error in int8, and moves the scales into the weights, in place.

    Scales come from one half of the rows and are judged by the other: what evens out the accidents of a sample is no
    gain elsewhere.

    Args:
        model: fp32; computes the same afterwards.
        rows: sampled inputs [R, I] by layer name, from `InputSampler`.
        levels: largest integer that stands for a weight.
    """
    choices = []
    for name in linear_names(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        seen_RI, unseen_RI, w_OI = rows[name][::2], rows[name][1::2], linear.weight
        before = _producer(model, name)
        strengths = STRENGTHS if before is not None else (None,)
        scales = {strength: smoothing_scales(seen_RI, w_OI, strength) for strength in strengths}
        errors = {strength: _error(unseen_RI / scale_I, w_OI * scale_I, levels) for strength, scale_I in scales.items()}
        strength = min(errors, key=lambda strength: errors[strength])
        if errors[strength] > WORTH_IT * errors[None]:
            strength = None
        if before is not None and strength is not None:
            linear.weight.mul_(scales[strength])
            for parameter in before:
                parameter.div_(scales[strength].reshape(-1, *(1,) * (parameter.dim() - 1)))
        choices.append(LinearChoice(name=name, strength=strength, error=errors[strength]))
    return choices


@torch.no_grad()
def weight_errors(model: ModernBertModel, rows: Rows, bits: Bits) -> dict[str, float]:
    """The relative output error of each linear layer when its weights alone have so many bits."""
    errors = {}
    for name in linear_names(model):
        x_RI, w_OI = rows[name], model.get_submodule(name).weight
        integers_IO, scale_NO = block_weight(w_OI.T.numpy(), bits)
        got_IO = integers_IO.astype(np.float32) * scale_NO.repeat(BLOCK, 0)[: len(integers_IO)]
        wanted_RO = x_RI @ w_OI.T
        errors[name] = float((x_RI @ torch.from_numpy(got_IO) - wanted_RO).norm() / wanted_RO.norm().clamp(min=1e-30))
    return errors


def smoothing_scales(x_RI: Tensor, w_OI: Tensor, strength: float | None) -> Tensor:
    """Powers of two [I] to divide the input's channels by."""
    if strength is None:
        return torch.ones(x_RI.shape[1])
    largest_x, largest_w = (value.abs().amax(0).clamp(min=1e-8) for value in (x_RI, w_OI))
    scale = largest_x**strength / largest_w ** (1 - strength)
    # Around 1, so that neither side loses range where a channel is never used.
    return torch.exp2((scale / scale.log().mean().exp()).log2().round().clamp(-8, 8))


def _producer(model: ModernBertModel, name: str) -> list[Tensor] | None:
    """The parameters whose leading axis is the input's channels: dividing them divides the input. None if none are.

    The first layer's attention reads the embeddings themselves, which the residual stream reads too.
    """
    layer_name = ".".join(name.split(".")[:2])
    layer = model.get_submodule(layer_name)
    hidden = model.config.hidden_size
    if name.endswith("attn.Wqkv"):
        module, rows = layer.attn_norm, slice(None)
    elif name.endswith("mlp.Wi"):
        module, rows = layer.mlp_norm, slice(None)
    elif name.endswith("attn.Wo"):
        module, rows = layer.attn.Wqkv, slice(2 * hidden, None)
    else:
        module, rows = layer.mlp.Wi, slice(model.config.intermediate_size, None)
    parameters = [parameter.data[rows] for parameter in module.parameters()]
    return parameters or None


def _error(x_RI: Tensor, w_OI: Tensor, levels: int) -> float:
    """Of the product in int8, relative to the product."""
    wanted = x_RI @ w_OI.T
    got = _fake_input(x_RI) @ _fake_weight(w_OI, levels).T
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _fake_input(x_RI: Tensor) -> Tensor:
    """Rounded to one of 256 values between the tensor's extremes and zero, as DynamicQuantizeLinear does."""
    low, high = x_RI.min().clamp(max=0), x_RI.max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x_RI / step).round() + zero).clamp(0, 255).sub(zero).mul(step)


def _fake_weight(w_OI: Tensor, levels: int) -> Tensor:
    """Rounded to 2 * levels + 1 values, per output."""
    step = (w_OI.abs().amax(1, keepdim=True) / levels).clamp(min=1e-30)
    return (w_OI / step).round() * step
