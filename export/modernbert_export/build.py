"""The graph files of an export, one per variant, built and not yet verified on the grid.

All start from one checkpoint. There is a trace for fp32, one for fp16 and one for bf16, whose islands are chosen in
torch; each is lowered for every target. int8 is made from the portable fp32 file. Graphs of one precision share a file
of weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from modernbert.errors import ParityError
from modernbert_export.lower import lower
from modernbert_export.precision.audit import LayerRange, audit
from modernbert_export.precision.calibrate import LinearChoice, smooth
from modernbert_export.precision.half import to_half
from modernbert_export.precision.int8 import LEVELS, quantize
from modernbert_export.precision.modelopt import MODES, quantize_for_tensorrt
from modernbert_export.shared_weights import SharedWeights
from modernbert_export.source import Source
from modernbert_export.tasks import EMBEDDING, Loaded
from modernbert_export.text_fidelity import TextFidelity, TextSet
from modernbert_export.trace import trace
from modernbert_export.variants import Variant
from modernbert_export.verify import Array, verify_text

Progress = Callable[[str], None]

# Shares of the linear layers that int8 leaves in fp32, the worst first, tried in turn until the text comes out right.
KEPT_SHARES = (0.0, 0.05, 0.1, 0.2)
# Lengths whose ranges of activations are looked at, where the model takes them.
AUDIT_LENGTHS = (512, 8192)
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A graph file, its external weights or None, and what a report should say about how it came to be."""

    variant: Variant
    file: Path
    data_file: Path | None = None
    text: TextFidelity | None = None
    ranges: tuple[LayerRange, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Builder:
    """What the graphs of one export share.

    Args:
        source: the checkpoint.
        directory: where the files go.
        scratch: where files go that are wanted to make others of only.
        texts: what int8 is measured on.
        wanted: the checkpoint's vectors [texts, dim] of these.
        levels: largest integer that stands for a weight in int8.
        progress: is told what is being done, in a few words.
    """

    source: Source
    directory: Path
    scratch: Path
    texts: TextSet
    wanted: Array
    levels: int = LEVELS
    progress: Progress = lambda _: None

    def build(self, model: Loaded, variants: Sequence[Variant], rows: dict[str, torch.Tensor]) -> list[Built]:
        """Makes the files, in the order given. Uses the model up: the caller should drop it.

        Args:
            model: the checkpoint in fp32.
            variants: those that are wanted.
            rows: sampled inputs of its linear layers, for int8.

        Raises:
            ParityError: int8 loses too much on the text, however much of it stays fp32.
        """
        portable = Variant("portable", "fp32")
        int8 = [variant for variant in variants if variant.precision == "int8"]
        wanted = {name: [v for v in variants if v.precision == name] for name in ("fp32", *HALVES)}
        choices = []
        if int8:
            self.progress("int8: measuring the error of each linear layer")
            choices = smooth(model.encoder, rows, self.levels)
        built: dict[Variant, Built] = {}
        if wanted["fp32"] or int8:
            graph = self._trace(model, "fp32")
            built |= self._lowered(graph, wanted["fp32"], self.directory)
        for variant in int8:
            fp32 = built.get(portable) or self._lowered(graph, [portable], self.scratch)[portable]
            built[variant] = self._int8(variant, fp32.file, choices)
        for name, dtype in HALVES.items():
            if wanted[name]:
                built |= self._half(name, dtype, self.source.load(), wanted[name], self.directory)
        quantized = [variant for variant in variants if variant.precision in MODES]
        if quantized:
            built |= self._quantized_for_tensorrt(quantized, built)
        return [built[variant] for variant in variants]

    def _trace(self, model: Loaded, what: str) -> ir.Model:
        self.progress(f"tracing {what}")
        return trace(
            model.encoder,
            pooling=self.source.pooling,
            normalize=self.source.normalize,
            head=None if self.source.task == EMBEDDING else model.head,
        )

    def _lowered(
        self, traced: ir.Model, variants: Sequence[Variant], folder: Path, ranges: tuple[LayerRange, ...] = ()
    ) -> dict[Variant, Built]:
        """The files of one trace and that of their weights, except that a single one in 16 bits holds its own.

        The weights have the name that goes with the portable graph if there is one: transformers.js looks for it.
        """
        weights = None
        if len(variants) > 1 or any(variant.precision == "fp32" for variant in variants):
            named_by = min(variants, key=lambda variant: variant.target != "portable")
            weights = SharedWeights(folder / f"{named_by.file}_data")
        built = {}
        for variant in variants:
            self.progress(f"lowering {variant.precision} to {variant.target} ONNX")
            graph = lower(traced.clone(), variant.target)
            file = folder / variant.file
            if weights is None:
                ir.save(graph, file)
            else:
                weights.save(graph, file)
            built[variant] = Built(
                variant=variant, file=file, data_file=weights.file if weights else None, ranges=ranges
            )
        return built

    def _int8(self, variant: Variant, fp32: Path, choices: Sequence[LinearChoice]) -> Built:
        """Quantises the fp32 file, leaving more and more of the worst layers in fp32 until the text comes out right."""
        file = self.directory / variant.file
        worst = sorted(choices, key=lambda choice: -choice.error)
        for share in KEPT_SHARES:
            kept = [choice.name for choice in worst[: round(share * len(worst))]]
            self.progress(f"int8: quantising, {len(kept)} of {len(worst)} linear layers left in fp32")
            graph = quantize(ir.load(fp32), self.source.config, kept=kept, levels=self.levels)
            ir.external_data.load_to_model(graph)
            ir.save(graph, file)
            del graph
            gc.collect()  # it is full of cycles
            text = verify_text(file, self.texts, self.wanted, progress=self.progress)
            if text.passed:
                break
        else:
            raise ParityError(f"int8 loses too much, with {len(kept)} layers in fp32.\n\n{text.to_markdown()}")
        smoothed = [choice for choice in choices if choice.strength is not None]
        notes = (
            f"Weights have {2 * self.levels + 1} values per output. Inputs of {len(smoothed)} of {len(choices)} linear "
            f"layers are smoothed; relative error of one layer: {worst[0].error:.2%} at most ({worst[0].name}).",
            f"In fp32: {', '.join(kept) or 'no linear layer'}.",
        )
        return Built(variant=variant, file=file, text=text, notes=notes)

    def _quantized_for_tensorrt(
        self, variants: Sequence[Variant], built: Mapping[Variant, Built]
    ) -> dict[Variant, Built]:
        """Files made from those in fp16, one file of weights, every fourth text giving the scales."""
        halves = dict.fromkeys(Variant(variant.target, "fp16") for variant in variants)
        missing = [half for half in halves if half not in built]
        if missing:
            built = self._half("fp16", HALVES["fp16"], self.source.load(), missing, self.scratch)
        batches = [(np.array([ids]), np.ones((1, len(ids)), np.int64)) for ids in self.texts.ids[::4]]
        weights = SharedWeights(self.directory / f"{variants[0].file}_data")
        notes = (f"Scales of inputs: the largest values on {len(batches)} of the texts, by ModelOpt.",)
        quantized = {}
        for variant in variants:
            half = built[Variant(variant.target, "fp16")]
            self.progress(f"{variant.precision}: measuring inputs of linear layers of {variant.target}")
            graph = quantize_for_tensorrt(half.file, self.scratch, variant.precision, batches)
            file = self.directory / variant.file
            weights.save(graph, file)
            del graph
            gc.collect()  # it is full of cycles
            text = verify_text(file, self.texts, self.wanted, progress=self.progress)
            quantized[variant] = Built(
                variant=variant, file=file, data_file=weights.file, ranges=half.ranges, text=text, notes=notes
            )
        return quantized

    def _half(
        self, precision: str, dtype: torch.dtype, model: Loaded, variants: Sequence[Variant], folder: Path
    ) -> dict[Variant, Built]:
        lengths = {min(length, self.source.max_length) for length in AUDIT_LENGTHS}
        inputs = [self._running_text(length) for length in sorted(lengths)]
        self.progress(f"{precision}: looking at the ranges of activations")
        ranges = audit(model.encoder, inputs, dtype)
        to_half(model.encoder, dtype, ranges)
        return self._lowered(self._trace(model, precision), variants, folder, ranges)

    def _running_text(self, tokens: int) -> torch.Tensor:
        """The texts one behind the other, again and again, cut to a length."""
        joined = torch.cat([torch.tensor(ids) for ids in self.texts.ids])
        return joined.repeat(-(-tokens // len(joined)))[:tokens]
