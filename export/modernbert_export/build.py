"""The graph files of an export, one per variant, built and not yet verified on the grid.

All start from one checkpoint. There is a trace for fp32, one for fp16 and one for bf16, whose islands are chosen in
torch; each is lowered for every target. Integers are made from the fp32 file of their target, those for TensorRT from
its fp16 ones. Graphs of one precision share a file of weights, but for `INTEGERS`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from modernbert.errors import ParityError
from modernbert_export.contents import PROBES
from modernbert_export.lower import lower
from modernbert_export.on_text import Fidelity, OnText
from modernbert_export.only_token import add_only_token, has_only_token
from modernbert_export.packed import trace_packed
from modernbert_export.precision.audit import LayerRange, audit
from modernbert_export.precision.calibrate import LinearChoice, Rows, smooth, weight_errors
from modernbert_export.precision.half import to_half
from modernbert_export.precision.int8 import LEVELS, quantize
from modernbert_export.precision.modelopt import MODES, quantize_for_tensorrt
from modernbert_export.precision.weight_only import BLOCK, Bits, quantize_weights
from modernbert_export.shared_weights import SharedWeights
from modernbert_export.source import Source
from modernbert_export.tasks import EMBEDDING, Loaded
from modernbert_export.trace import trace
from modernbert_export.variants import INTEGERS, Variant

Progress = Callable[[str], None]

# Shares of the linear layers that stay finer (fp32 in int8, 8 bits among 4), the worst first, tried in turn until the
# text comes out right.
KEPT_SHARES = {"int8": (0.0, 0.05, 0.1, 0.2), "int8-weights": (0.0,), "int4-weights": (0.0, 0.1, 0.25, 0.5)}
# Lengths whose ranges of activations are looked at, where the model takes them.
AUDIT_LENGTHS = (512, 8192)
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _shared_weights(folder: Path, variants: Sequence[Variant]) -> SharedWeights | None:
    """The file of the weights of these graphs, except that a single one in 16 bits holds its own.

    It has the name that goes with the portable graph if there is one: transformers.js looks for it.
    """
    if len(variants) < 2 and all(variant.stored in HALVES for variant in variants):
        return None
    named_by = min(variants, key=lambda variant: variant.target != "portable")
    return SharedWeights(folder / f"{named_by.file}_data")


@dataclass(frozen=True, kw_only=True)
class Built:
    """A graph file, its external weights or None, and what a report should say about how it came to be."""

    variant: Variant
    file: Path
    data_file: Path | None = None
    text: Fidelity | None = None
    ranges: tuple[LayerRange, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Builder:
    """What the graphs of one export share.

    Args:
        source: the checkpoint.
        directory: where the files go.
        scratch: where files go that are wanted to make others of only.
        on_text: what files in integers are measured on.
        levels: largest integer that stands for a weight in int8.
        keep_functions: whether graphs keep their operators' bodies as functions.
        progress: is told what is being done, in a few words.
    """

    source: Source
    directory: Path
    scratch: Path
    on_text: OnText
    levels: int = LEVELS
    keep_functions: bool = False
    progress: Progress = lambda _: None

    def build(self, model: Loaded, variants: Sequence[Variant], rows: Rows) -> list[Built]:
        """Makes the files, in the order given. Uses the model up: the caller should drop it.

        Args:
            model: the checkpoint in fp32.
            variants: those that are wanted.
            rows: sampled inputs of its linear layers, for integers.

        Raises:
            ParityError: integers lose too much on the text, however many layers are kept finer.
        """
        wanted = {name: [v for v in variants if v.stored == name] for name in ("fp32", *HALVES)}
        precisions = {variant.precision for variant in variants}
        choices: list[LinearChoice] = []
        errors: dict[str, dict[str, float]] = {}
        if "int4-weights" in precisions:  # before int8 scales weights, and not the sampled inputs with them
            self.progress("int4-weights: measuring the error of each linear layer")
            errors["int4-weights"] = weight_errors(model.encoder, rows, 4)
        if "int8" in precisions:
            self.progress("int8: measuring the error of each linear layer")
            choices = smooth(model.encoder, rows, self.levels)
            errors["int8"] = {choice.name: choice.error for choice in choices}
        built: dict[Variant, Built] = {}
        weights = _shared_weights(self.directory, wanted["fp32"])
        for packed in (False, True):
            fp32, integers = (
                [v for v in variants if v.stored in names and v.packed == packed] for names in (("fp32",), INTEGERS)
            )
            if not fp32 and not integers:
                continue
            graph = self._trace(model, "fp32", packed=packed)
            built |= self._lowered(graph, fp32, self.directory, weights)
            for variant in integers:
                base = dataclasses.replace(variant, precision="fp32")
                if base not in built:
                    built |= self._lowered(graph, [base], self.scratch, _shared_weights(self.scratch, [base]))
                worst = sorted(errors.get(variant.precision, {}).items(), key=lambda item: -item[1])
                built[variant] = self._integers(variant, built[base].file, worst, _notes(variant, choices, self.levels))
            del graph
        for name, dtype in HALVES.items():
            if wanted[name]:
                built |= self._half(name, dtype, self.source.load(), wanted[name], self.directory)
        quantized = [variant for variant in variants if variant.precision in MODES]
        if quantized:
            built |= self._quantized_for_tensorrt(quantized, built)
        return [built[variant] for variant in variants]

    def _trace(self, model: Loaded, what: str, *, packed: bool = False) -> ir.Model:
        self.progress(f"tracing {what}{', packed' if packed else ''}")
        if packed:
            return trace_packed(model.encoder, pooling=self.source.pooling, normalize=self.source.normalize)
        return trace(
            model.encoder,
            pooling=self.source.pooling,
            normalize=self.source.normalize,
            head=None if self.source.task == EMBEDDING else model.head,
        )

    def _lowered(
        self,
        traced: ir.Model,
        variants: Sequence[Variant],
        folder: Path,
        weights: SharedWeights | None,
        ranges: tuple[LayerRange, ...] = (),
    ) -> dict[Variant, Built]:
        """The files of one trace, with their weights in the file given or, without one, inside."""
        built = {}
        for variant in variants:
            self.progress(f"lowering {variant.precision} to {variant.target} ONNX")
            graph = lower(
                traced.clone(),
                variant.target,
                inline=not self.keep_functions,
                table_length=max(self.source.max_length, *PROBES) if variant.in_openvino else None,
            )
            if has_only_token(self.source.task, variant.target, with_globals=self.source.config.num_global_tokens > 0):
                add_only_token(graph)
            file = folder / variant.file
            if weights is None:
                ir.save(graph, file)
            else:
                weights.save(graph, file)
            built[variant] = Built(
                variant=variant, file=file, data_file=weights.file if weights else None, ranges=ranges
            )
        return built

    def _integers(
        self, variant: Variant, fp32: Path, worst: Sequence[tuple[str, float]], notes: tuple[str, ...]
    ) -> Built:
        """Quantises the fp32 file, keeping more and more of the worst layers finer until the text comes out right."""
        file = self.directory / variant.file
        for share in KEPT_SHARES[variant.precision]:
            kept = [name for name, _ in worst[: round(share * len(worst))]]
            self.progress(f"{variant.precision}: quantising, {len(kept)} linear layers kept finer")
            graph = self._quantized(ir.load(fp32), variant, kept)
            ir.external_data.load_to_model(graph)
            ir.save(graph, file)
            del graph
            gc.collect()  # it is full of cycles
            text = self.on_text.compare(file, self.progress)
            if text.passed:
                break
        else:
            raise ParityError(
                f"{variant.precision} loses too much, with {len(kept)} layers kept finer.\n\n{text.to_markdown()}"
            )
        if worst:
            name, error = worst[0]
            notes += (
                f"Relative error of one layer's output: {error:.2%} at most ({name}).",
                f"Kept finer: {', '.join(kept) or 'no linear layer'}.",
            )
        return Built(variant=variant, file=file, text=text, notes=notes)

    def _quantized(self, graph: ir.Model, variant: Variant, kept: Sequence[str]) -> ir.Model:
        if variant.precision == "int8":
            return quantize(graph, self.source.config, kept=kept, levels=self.levels)
        bits: Bits = 4 if variant.precision == "int4-weights" else 8
        return quantize_weights(
            graph, self.source.config, bits=bits, kept=kept, whole_blocks=variant.target == "openvino"
        )

    def _quantized_for_tensorrt(
        self, variants: Sequence[Variant], built: Mapping[Variant, Built]
    ) -> dict[Variant, Built]:
        """Files made from those in fp16, one file of weights, every fourth text giving the scales."""
        halves = dict.fromkeys(Variant(variant.target, "fp16") for variant in variants)
        missing = [half for half in halves if half not in built]
        if missing:
            built = self._half("fp16", HALVES["fp16"], self.source.load(), missing, self.scratch)
        batches = [(np.array([ids]), np.ones((1, len(ids)), np.int64)) for ids in self.on_text.texts.ids[::4]]
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
            text = self.on_text.compare(file, self.progress)
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
        weights = _shared_weights(folder, variants)
        return self._lowered(self._trace(model, precision), variants, folder, weights, ranges)

    def _running_text(self, tokens: int) -> torch.Tensor:
        """The texts one behind the other, again and again, cut to a length."""
        joined = torch.cat([torch.tensor(ids) for ids in self.on_text.texts.ids])
        return joined.repeat(-(-tokens // len(joined)))[:tokens]


def _notes(variant: Variant, choices: Sequence[LinearChoice], levels: int) -> tuple[str, ...]:
    """What a report should say about how a file in integers was made."""
    if variant.precision != "int8":
        return (f"Weights have a scale for every {BLOCK} of them; inputs are not quantised in the file.",)
    smoothed = sum(choice.strength is not None for choice in choices)
    return (
        f"Weights have {2 * levels + 1} values per output; inputs of {smoothed} of {len(choices)} linear layers are "
        "smoothed.",
    )
