"""The gradient of a table that embeds tokens and, transposed, decodes them: without a matrix that is almost all zeros.

The decoder's share of the gradient is a full matrix. The embedding's has as many rows as the batch has tokens, but by
default is written as a full matrix too, 155 MB for base. A sparse share is added to the decoder's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def joined_to_decoder(embedding: nn.Embedding, decoder: nn.Linear) -> Iterator[None]:
    """While it lasts, `embedding` gives a sparse gradient if that ends up in the one that `decoder` gives.

    So both must be part of one loss, and share their weight. torch.compile has no sparse gradients, and GPUs would have
    to sort them; there it changes nothing.
    """
    before = embedding.sparse
    tied = embedding.weight is decoder.weight
    embedding.sparse = before or (tied and embedding.weight.is_cpu and not torch.compiler.is_compiling())
    try:
        yield
    finally:
        embedding.sparse = before
