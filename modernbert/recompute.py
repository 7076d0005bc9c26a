"""Less to keep for the backward pass: cheap operations in front of a linear map are computed again instead.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174)

A linear map keeps its input for the gradient of its weight, and a norm, activation or product in front of it keeps its
own. One of the two is enough. Which modules are joined is the model's choice; this file only says how.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def keep_input(function: Callable[[Tensor], Tensor], x: Tensor, *, random: bool = False) -> Tensor:
    """`function(x)`, of whose work the backward pass finds `x` alone and computes the rest again.

    The second computation ends with the last tensor that the backward pass needs. So a linear map at the end of
    `function` is not repeated: its input is what it needs, and its output is nobody's.

    Args:
        function: elementwise operations and norms, then a linear map.
        x: its only input besides parameters.
        random: whether it draws random numbers, which then are drawn alike.
    """
    # torch.compile decides on its own what to compute again.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=random)
        return result
    return function(x)
