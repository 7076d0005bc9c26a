"""How large the values in each layer get, on text of up to the longest length: what 16 bits must hold.

fp16 ends at 65,504. Where a layer comes near that, what overflows is computed in fp32 (`precision.half`). bf16 ends
where fp32 does, so there the table is only to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modernbert.model import ModernBertModel

# Other text may reach further than the text seen here.
HEADROOM = 4


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Largest absolute values in one layer.

    `residual` leaves the layer; `qkv` leaves Wqkv; `scores` bounds what softmax sees, by the norms of q and k; `gated`
    enters mlp.Wo; `branch` leaves attn.Wo or mlp.Wo. `limit` is the largest number of the type that is to hold them,
    and `fp32` names the parts that it could not.
    """

    layer: int
    kind: str
    residual: float
    qkv: float
    scores: float
    gated: float
    branch: float
    limit: float

    @property
    def fp32(self) -> tuple[str, ...]:
        """ "attention", "mlp", both or none."""
        limit = self.limit / HEADROOM
        attention = max(self.qkv, self.scores) > limit
        mlp = max(self.gated, self.branch) > limit
        return (*(("attention",) if attention else ()), *(("mlp",) if mlp else ()))

    def products(self, *, with_globals: bool) -> int:
        """How many products of matrices and fused attentions of a graph for TensorRT `fp32` keeps out of 16 bits.

        An MLP has one for each half of Wi, and Wo. Attention is one; with global tokens, which ask apart, it is two,
        the second in local layers not fused: scores and sums, for the window and for the global keys.
        """
        attention = 1
        if with_globals:
            attention = 2 if self.kind == "full_attention" else 5
        return sum({"attention": attention, "mlp": 3}[part] for part in self.fp32)

    @staticmethod
    def table(ranges: Sequence[LayerRange]) -> list[str]:
        """Lines of Markdown."""
        return [
            f"Largest absolute values (the type ends at {ranges[0].limit:.5g}; the residual stream, norms and angles "
            "are fp32 anyway):",
            "",
            "| layer | residual | q, k, v | scores, at most | gated | branch | fp32 |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row.layer} ({row.kind}) | {row.residual:.4g} | {row.qkv:.4g} | {row.scores:.4g} | {row.gated:.4g} "
                f"| {row.branch:.4g} | {', '.join(row.fp32)} |"
                for row in ranges
            ),
        ]


@torch.no_grad()
def audit(
    model: ModernBertModel, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float16
) -> tuple[LayerRange, ...]:
    """Runs an fp32 model on token ids [S], one text after the other, and keeps each layer's largest values.

    `dtype` is what shall hold them.
    """
    heads, size = model.config.num_attention_heads, model.config.head_dim
    found = [dict.fromkeys(("residual", "qkv", "scores", "gated", "branch"), 0.0) for _ in model.layers]

    def note(index: int, name: str, value: Tensor) -> None:
        found[index][name] = max(found[index][name], float(value.abs().max()))

    def scores(index: int, qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, heads, size)).unbind(-3)
        norms = [x.norm(dim=-1).flatten(0, -2).amax(0) for x in (q, k)]
        note(index, "scores", norms[0] * norms[1] * size**-0.5)

    def watch(module: nn.Module, index: int, *keep: Callable[[int, Tensor], None]) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for each in keep:
                each(index, output)

        return module.register_forward_hook(hook)

    def output(name: str) -> Callable[[int, Tensor], None]:
        return lambda index, value: note(index, name, value)

    def gated(module: nn.Module, index: int) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            note(index, "gated", inputs[0])

        return module.register_forward_pre_hook(hook)

    handles = []
    layers: list[Any] = list(model.layers)
    for index, layer in enumerate(layers):
        handles += [
            watch(layer, index, output("residual")),
            watch(layer.attn.Wqkv, index, output("qkv"), scores),
            watch(layer.attn.Wo, index, output("branch")),
            watch(layer.mlp.Wo, index, output("branch")),
            gated(layer.mlp.Wo, index),
        ]
    try:
        for ids in inputs:
            model(ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        LayerRange(layer=index, kind=kind, **values, limit=torch.finfo(dtype).max)
        for index, (kind, values) in enumerate(zip(model.config.layer_types, found, strict=True))
    )
