"""The graph files of an export, one per precision, built and not yet verified on the grid.

All precisions start from one checkpoint. int8 is made from the fp32 file; fp16 has a trace of its own, because its
islands are chosen in torch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from modernbert.errors import ParityError
from modernbert_export.lower import lower
from modernbert_export.ops.op import Target
from modernbert_export.precision import FILES
from modernbert_export.precision.audit import LayerRange, audit
from modernbert_export.precision.calibrate import LinearChoice, smooth
from modernbert_export.precision.half import to_half
from modernbert_export.precision.int8 import LEVELS, quantize
from modernbert_export.source import Source
from modernbert_export.tasks import EMBEDDING, Loaded
from modernbert_export.text_fidelity import TextFidelity, TextSet
from modernbert_export.trace import trace
from modernbert_export.verify import Array, verify_text

Progress = Callable[[str], None]

# Shares of the linear layers that int8 leaves in fp32, the worst first, tried in turn until the text comes out right.
KEPT_SHARES = (0.0, 0.05, 0.1, 0.2)
# Lengths whose ranges of activations are looked at, where the model takes them.
AUDIT_LENGTHS = (512, 8192)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A graph file, its external weights or None, and what a report should say about how it came to be."""

    precision: str
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
        target: the lowering.
        directory: where the files go.
        scratch: where the fp32 file goes if it is wanted for int8 only.
        texts: what int8 is measured on.
        wanted: the checkpoint's vectors [texts, dim] of these.
        levels: largest integer that stands for a weight in int8.
        progress: is told what is being done, in a few words.
    """

    source: Source
    target: Target
    directory: Path
    scratch: Path
    texts: TextSet
    wanted: Array
    levels: int = LEVELS
    progress: Progress = lambda _: None

    def build(self, model: Loaded, precisions: Sequence[str], rows: dict[str, torch.Tensor]) -> list[Built]:
        """Makes the files, in the order given. Uses the model up: the caller should drop it.

        Args:
            model: the checkpoint in fp32.
            precisions: those that are wanted.
            rows: sampled inputs of its linear layers, for int8.

        Raises:
            ParityError: int8 loses too much on the text, however much of it stays fp32.
        """
        built: dict[str, Built] = {}
        choices = []
        if "int8" in precisions:
            self.progress("int8: measuring the error of each linear layer")
            choices = smooth(model.encoder, rows, self.levels)
        if {"fp32", "int8"}.intersection(precisions):
            folder = self.directory if "fp32" in precisions else self.scratch
            built["fp32"] = self._fp32(model, folder)
        if "int8" in precisions:
            built["int8"] = self._int8(built["fp32"].file, choices)
        if "fp16" in precisions:
            built["fp16"] = self._half("fp16", torch.float16, self.source.load())
        return [built[precision] for precision in precisions]

    def _graph(self, model: Loaded, what: str) -> ir.Model:
        self.progress(f"tracing {what}")
        graph = trace(
            model.encoder,
            pooling=self.source.pooling,
            normalize=self.source.normalize,
            head=None if self.source.task == EMBEDDING else model.head,
        )
        self.progress(f"lowering {what} to {self.target} ONNX")
        return lower(graph, self.target)

    def _fp32(self, model: Loaded, folder: Path) -> Built:
        file = folder / FILES["fp32"]
        ir.save(self._graph(model, "fp32"), file, external_data=f"{file.name}_data")
        return Built(precision="fp32", file=file, data_file=file.with_name(f"{file.name}_data"))

    def _int8(self, fp32: Path, choices: Sequence[LinearChoice]) -> Built:
        """Quantises the fp32 file, leaving more and more of the worst layers in fp32 until the text comes out right."""
        file = self.directory / FILES["int8"]
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
        return Built(precision="int8", file=file, text=text, notes=notes)

    def _half(self, precision: str, dtype: torch.dtype, model: Loaded) -> Built:
        lengths = {min(length, self.source.max_length) for length in AUDIT_LENGTHS}
        inputs = [self._running_text(length) for length in sorted(lengths)]
        self.progress(f"{precision}: looking at the ranges of activations")
        ranges = audit(model.encoder, inputs)
        file = self.directory / FILES[precision]
        to_half(model.encoder, dtype, ranges)
        ir.save(self._graph(model, precision), file)
        return Built(precision=precision, file=file, ranges=ranges)

    def _running_text(self, tokens: int) -> torch.Tensor:
        """The texts one behind the other, again and again, cut to a length."""
        joined = torch.cat([torch.tensor(ids) for ids in self.texts.ids])
        return joined.repeat(-(-tokens // len(joined)))[:tokens]
