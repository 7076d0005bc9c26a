"""StableAdamW and the warmup-stable-decay schedule, as ModernBERT was trained (arXiv:2412.13663, appendix A)."""

from __future__ import annotations

from typing import Any

import optimi
import torch
from torch import nn

WEIGHT_DECAY = 1e-5


def stable_adamw(model: nn.Module, learning_rate: float, *, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW whose step is cut where the gradient outgrows its running variance (Wortsman et al. 2023, 2304.13013).

    Norms and biases, that is parameters of one dimension, do not decay. Of `sharded` parameters the optimizer's Triton
    kernels would see a part, and take its mean for the whole's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return optimi.StableAdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, triton=False if sharded else None)


def schedule_arguments(warmup_steps: int, decay_steps: int) -> dict[str, Any]:
    """For TrainingArguments: a linear rise, then the peak, then 1 - sqrt(progress) down to 0 (2405.18392)."""
    return dict(
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=warmup_steps,
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "1-sqrt"},
    )
