"""fp16 and bf16 from the torch side: the model whose trace is the 16-bit graph.

Linear layers, attention and the embedding table are 16 bit. fp32 are: the residual stream and the norms that read it,
because sums over layers and statistics over channels lose most; angles; and per layer what `audit` found too large.
Inputs and outputs of the graph are those of the fp32 graph.

bf16 has three bits less than fp16, so it loses 64 times as much of a cosine. On a small model with weights of the size
that training leaves, fp16 stays within 2e-6 of 1 per token and bf16 within 2.5e-4; rounding nothing but the weights and
inputs of linear layers already costs 1.4e-4, so no further islands would bring it to fp16's tolerance of 1e-4, and it
has one of its own (`parity.TOLERANCES`). With these islands it comes about twice as near as transformers in bf16, which
rounds the residual stream, norms and angles too (tests/test_bf16.py); with fresh weights of ModernBERT-base, 1.8e-6
against 7.6e-5. The model that `modernbert demo` trains stays within 8e-6. Prefer fp16: bf16 is for checkpoints whose
values it cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.errors import ParityError
from modernbert.model import ModernBertModel
from modernbert_export.precision.audit import LayerRange


class To(nn.Module):
    """A module whose input and output are cast: from and to what its neighbours compute in."""

    def __init__(self, module: nn.Module, *, compute: torch.dtype, output: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(compute)
        self.compute, self.output = compute, output

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.module(x.to(self.compute)).to(self.output)


def to_half(model: ModernBertModel, dtype: torch.dtype, ranges: Sequence[LayerRange]) -> ModernBertModel:
    """Converts an fp32 model in place; only its padded form with operators of the exporter's runs afterwards.

    Raises:
        ParityError: a weight is too large for the type.
    """
    fp32 = torch.float32
    embeddings = model.embeddings
    embeddings.tok_embeddings.to(dtype)
    embeddings.norm = To(embeddings.norm, compute=fp32, output=fp32)  # type: ignore[assignment]
    layers: list[Any] = list(model.layers)
    for layer, row in zip(layers, ranges, strict=True):
        attention = fp32 if "attention" in row.fp32 else dtype
        mlp = fp32 if "mlp" in row.fp32 else dtype
        layer.attn_norm = To(layer.attn_norm, compute=fp32, output=dtype)
        layer.mlp_norm = To(layer.mlp_norm, compute=fp32, output=mlp)
        layer.attn.Wqkv = To(layer.attn.Wqkv, compute=dtype, output=attention)
        layer.attn.Wo = To(layer.attn.Wo, compute=dtype, output=fp32)
        layer.mlp.Wi = To(layer.mlp.Wi, compute=mlp, output=mlp)
        layer.mlp.Wo = To(layer.mlp.Wo, compute=mlp, output=fp32)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            name, kind = name.replace(".module", ""), str(dtype).removeprefix("torch.")
            raise ParityError(f"weight {name} has values beyond {kind}: export it as fp32")
    return model
