"""The embedding head: what it computes, padded either side, and its gradient."""

import numpy as np
import pytest
import torch

from modernbert.errors import InputError
from modernbert.pooling import EmbeddingHead


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x_BSD = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_BSD, torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def test_mean_is_over_tokens_only() -> None:
    x, mask = inputs()
    pooled = EmbeddingHead("mean", normalize=False)(x, mask).numpy()
    wanted = [np.mean(x.numpy()[0, :3], axis=0), np.mean(x.numpy()[1, 2:], axis=0), np.zeros(4)]
    np.testing.assert_allclose(pooled, wanted, atol=1e-12)  # float64: summation order only


def test_cls_is_the_first_position() -> None:
    x, mask = inputs()
    torch.testing.assert_close(EmbeddingHead("cls", normalize=False)(x, mask), x[:, 0], rtol=0, atol=0)


def test_normalized_has_length_one_and_no_nan_without_tokens() -> None:
    x, mask = inputs()
    x.requires_grad_()
    pooled = EmbeddingHead("mean", normalize=True)(x, mask)
    np.testing.assert_allclose(torch.linalg.vector_norm(pooled, dim=-1).tolist(), [1, 1, 0], atol=1e-12)
    pooled[:2].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[0, 3:].any()  # padding has no part in it


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(InputError, match="mean, cls, global, not 'max'"):
        EmbeddingHead("max", normalize=True)
