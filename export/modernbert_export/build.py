"""The graph files of an export, one per variant, built and not yet verified on the grid.

All start from one checkpoint. There is a trace for fp32 and one for fp16, whose islands are chosen in torch; each is
lowered for every target. int8 is made from the portable fp32 file. Graphs of one precision share a file of weights.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from modernbert.errors import ParityError
from modernbert_export.lower import lower
from modernbert_export.packed import trace_packed
from modernbert_export.precision.audit import LayerRange, audit
from modernbert_export.precision.calibrate import LinearChoice, smooth
from modernbert_export.precision.half import to_half
from modernbert_export.precision.int8 import LEVELS, quantize
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


def _shared_weights(folder: Path, variants: Sequence[Variant]) -> SharedWeights | None:
    """The file of the weights of these graphs, except that a single one in fp16 holds its own.

    It has the name that goes with the portable graph if there is one: transformers.js looks for it.
    """
    if len(variants) < 2 and all(variant.precision == "fp16" for variant in variants):
        return None
    named_by = min(variants, key=lambda variant: variant.listed_as != "portable")
    return SharedWeights(folder / f"{named_by.file}_data")


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
        scratch: where the fp32 file goes if it is wanted for int8 only.
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
        wanted = {name: [v for v in variants if v.precision == name] for name in ("fp32", "fp16", "int8")}
        choices = []
        if wanted["int8"]:
            self.progress("int8: measuring the error of each linear layer")
            choices = smooth(model.encoder, rows, self.levels)
        built: dict[Variant, Built] = {}
        weights = _shared_weights(self.directory, wanted["fp32"])
        for packed in (False, True):
            fp32, int8 = ([v for v in wanted[name] if v.packed == packed] for name in ("fp32", "int8"))
            if not fp32 and not int8:
                continue
            graph = self._trace(model, "fp32", packed=packed)
            built |= self._lowered(graph, fp32, self.directory, weights)
            for variant in int8:
                base = dataclasses.replace(variant, precision="fp32")
                if base not in built:
                    built |= self._lowered(graph, [base], self.scratch, _shared_weights(self.scratch, [base]))
                built[variant] = self._int8(variant, built[base].file, choices)
        if wanted["fp16"]:
            built |= self._half("fp16", torch.float16, self.source.load(), wanted["fp16"])
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
            self.progress(f"lowering {variant.precision} to {variant.listed_as} ONNX")
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

    def _half(
        self, precision: str, dtype: torch.dtype, model: Loaded, variants: Sequence[Variant]
    ) -> dict[Variant, Built]:
        lengths = {min(length, self.source.max_length) for length in AUDIT_LENGTHS}
        inputs = [self._running_text(length) for length in sorted(lengths)]
        self.progress(f"{precision}: looking at the ranges of activations")
        ranges = audit(model.encoder, inputs)
        to_half(model.encoder, dtype, ranges)
        weights = _shared_weights(self.directory, variants)
        return self._lowered(self._trace(model, precision), variants, self.directory, weights, ranges)

    def _running_text(self, tokens: int) -> torch.Tensor:
        """The texts one behind the other, again and again, cut to a length."""
        joined = torch.cat([torch.tensor(ids) for ids in self.texts.ids])
        return joined.repeat(-(-tokens // len(joined)))[:tokens]
