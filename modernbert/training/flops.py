"""How much arithmetic a training step is, and how much the device can do: model-FLOP utilisation (2204.02311, app. B).

Counted are the multiplications and additions of the model as it is defined, 2 per weight and token, in local layers
inside the window only; what a backend computes and throws away, or computes again, is not useful work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from modernbert.config import ModernBertConfig


def training_flops(config: ModernBertConfig, lengths: Sequence[int], labels: int) -> int:
    """FLOP of a forward and backward pass, the latter twice the former.

    Args:
        config: of the model.
        lengths: tokens of each sequence.
        labels: tokens for which the vocabulary's logits are computed.
    """
    hidden, radius = config.hidden_size, config.window_radius
    weights = 4 * hidden * hidden + 3 * hidden * config.intermediate_size
    forward = 2 * sum(lengths) * config.num_hidden_layers * weights
    for layer_type in config.layer_types:
        # Scores and weighted sum: 2 * hidden each for every pair of a query and a key that it sees.
        reach = radius if layer_type == "sliding_attention" else None
        forward += 4 * hidden * sum(_pairs(length, reach) for length in lengths)
    forward += 2 * labels * hidden * (hidden + config.vocab_size)
    return 3 * forward


def _pairs(length: int, radius: int | None) -> int:
    if radius is None or radius >= length:
        return length * length
    return length * (2 * radius + 1) - radius * (radius + 1)


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP per second of a large matrix product on this device, now: what utilisation is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def run() -> float:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run()
    best, until = run(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, run())
    return 2 * size**3 / best
