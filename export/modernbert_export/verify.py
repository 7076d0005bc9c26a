"""Parity: what ONNX Runtime computes from an exported file against PyTorch, on shapes that catch the usual mistakes.

Two references that do not share code: our model in float64 with `eager` attention, and transformers' ModernBERT in
fp32. Lengths lie on both sides of the window's edge and of a block's; batches are unpadded, padded right, and padded
left with one row of nothing but padding.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.model import ModernBertModel, load_model
from modernbert_export.source import open_source
from modernbert_export.trace import OUTPUTS
from modernbert_runtime.bundle import Bundle

Array = NDArray[Any]
Outputs = dict[str, Array]
Progress = Callable[[str], None]

# Of one forward pass in fp32 against exact arithmetic, on valid tokens.
MAX_ABS_ERROR = {"fp32": 1e-4}
MIN_COSINE = {"fp32": 0.999999}
# Dense references at 2,048 and 8,192 tokens take long on real widths; the graph is the same at any width.
LONG_LENGTHS, LONG_MAX_HIDDEN = (2048, 8192), 256
SEED = 20_240_519


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of the grid: a seeded batch [batch, length] with its padding."""

    batch: int
    length: int
    padding: str

    def inputs(self, vocab_size: int) -> dict[str, Array]:
        """`input_ids` and `attention_mask`, int64 [batch, length]; rows of one batch differ in length."""
        generator = np.random.default_rng([SEED, self.batch, self.length])
        ids = generator.integers(0, vocab_size, (self.batch, self.length))
        mask = np.ones_like(ids)
        kept = max(1, self.length // 2)
        if self.padding == "right":
            mask[1, kept:] = 0
        elif self.padding == "left":
            mask[1, : self.length - kept] = 0
            mask[2] = 0
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the artifact is from one reference on one case; the cosines are the worst over tokens and texts."""

    case: Case
    reference: str
    max_abs_error: float
    min_cosine: float
    min_pooled_cosine: float


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All comparisons of one artifact, and what they had to reach."""

    artifact: str
    precision: str
    comparisons: tuple[Comparison, ...]
    first_difference: str | None = None

    @property
    def failures(self) -> list[Comparison]:
        """Comparisons outside the tolerance, NaN among them."""
        return [row for row in self.comparisons if not self._holds(row)]

    def _holds(self, row: Comparison) -> bool:
        return row.max_abs_error <= MAX_ABS_ERROR[self.precision] and all(
            cosine >= MIN_COSINE[self.precision] for cosine in (row.min_cosine, row.min_pooled_cosine)
        )

    def summary(self) -> dict[str, float]:
        """The worst of each figure over all comparisons."""
        return {
            "max_abs_error": float(np.max([row.max_abs_error for row in self.comparisons])),
            "min_cosine": float(np.min([row.min_cosine for row in self.comparisons])),
            "min_pooled_cosine": float(np.min([row.min_pooled_cosine for row in self.comparisons])),
        }

    def to_json(self) -> str:
        """Everything, for machines."""
        tolerance = {"max_abs_error": MAX_ABS_ERROR[self.precision], "min_cosine": MIN_COSINE[self.precision]}
        fields = {**asdict(self), "tolerance": tolerance, "summary": self.summary(), "passed": not self.failures}
        return json.dumps(_without_nan(fields), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The same as a table."""
        lines = [
            f"# Parity of {self.artifact}",
            "",
            f"Tolerance ({self.precision}): max abs error <= {MAX_ABS_ERROR[self.precision]:g} and cosine >= "
            f"{MIN_COSINE[self.precision]:g} on valid tokens. Result: {'FAILED' if self.failures else 'passed'}.",
            *([f"First layer that differs: {self.first_difference}."] if self.first_difference else []),
            "",
            "| reference | batch | length | padding | max abs error | min cosine | min pooled cosine | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.comparisons:
            lines.append(
                f"| {row.reference} | {row.case.batch} | {row.case.length} | {row.case.padding} "
                f"| {row.max_abs_error:.2e} | {row.min_cosine:.8f} | {row.min_pooled_cosine:.8f} "
                f"| {'' if self._holds(row) else 'FAILED'} |"
            )
        return "\n".join(lines) + "\n"


def fidelity_grid(config: ModernBertConfig, max_length: int) -> list[Case]:
    """The cases that a model of this configuration is compared on."""
    radius = config.window_radius
    lengths = {1, 2, radius - 1, radius, radius + 1, 2 * radius, 2 * radius + 1, 500}
    cases = [
        Case(batch=batch, length=length, padding=padding)
        for length in sorted(length for length in lengths if 1 <= length <= max_length)
        for batch, padding in ((1, "none"), (2, "right"), (3, "left"))
    ]
    if config.hidden_size <= LONG_MAX_HIDDEN:
        cases += [Case(batch=1, length=length, padding="none") for length in LONG_LENGTHS if length <= max_length]
    return cases


def verify(
    onnx_file: Path,
    reference: Path,
    *,
    artifact: str,
    precision: str,
    pooling: str,
    normalize: bool,
    max_length: int,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compares an ONNX file with the checkpoint that it should compute.

    Args:
        onnx_file: the artifact, its external data beside it.
        reference: directory with config.json and model.safetensors.
        artifact: its name in the report.
        precision: which tolerance applies.
        pooling: how `sentence_embedding` is made.
        normalize: whether it has unit length.
        max_length: longest input of the grid.
        progress: is told what is being done, in a few words.
    """
    model = load_model(reference)
    model.set_attention("eager")
    cases = fidelity_grid(model.config, max_length)
    inputs = [case.inputs(model.config.vocab_size) for case in cases]

    session = open_session(onnx_file)
    actual = [_run(session, feed) for feed in _told(inputs, progress, "ONNX Runtime")]
    del session
    model.double()
    exact = [_run_ours(model, feed, pooling, normalize) for feed in _told(inputs, progress, "float64 eager")]
    stock = transformers.AutoModel.from_pretrained(reference, dtype=torch.float32, attn_implementation="sdpa").eval()
    known = [_run_stock(stock, feed, pooling, normalize) for feed in _told(inputs, progress, "transformers")]
    del stock

    rows = [
        _compare(case, name, feed["attention_mask"] != 0, got, want, pooling)
        for name, wanted in (("float64 eager", exact), ("transformers", known))
        for case, feed, got, want in zip(cases, inputs, actual, wanted, strict=True)
    ]
    report = ParityReport(artifact=artifact, precision=precision, comparisons=tuple(rows))
    if not report.failures:
        return report
    worst = max(report.failures, key=lambda row: (np.isnan(row.max_abs_error), row.max_abs_error))
    difference = first_difference(onnx_file, model, worst.case, MAX_ABS_ERROR[precision])
    return ParityReport(artifact=artifact, precision=precision, comparisons=tuple(rows), first_difference=difference)


def verify_bundle(
    directory: Path, reference: str | None = None, *, progress: Progress = lambda _: None
) -> list[ParityReport]:
    """Compares every artifact of a bundle with the bundle's own checkpoint, or with another one.

    Raises:
        BundleError: the bundle is not whole and unaltered.
        InputError: the reference cannot be loaded.
    """
    bundle = Bundle.open(directory)
    manifest = bundle.manifest
    if reference is None:
        checkpoint = bundle.root
        for name in manifest.files:
            bundle.path_of(name)
    else:
        source = open_source(reference)
        checkpoint = source.path
        if source.config.hidden_size != manifest.dimension:
            raise InputError(
                f"reference {reference!r} has hidden_size {source.config.hidden_size}, the bundle has "
                f"{manifest.dimension}; give the checkpoint that it was exported from"
            )
    return [
        verify(
            bundle.onnx_path(artifact),
            checkpoint,
            artifact=artifact.file,
            precision=artifact.precision,
            pooling=manifest.pooling,
            normalize=manifest.normalize,
            max_length=manifest.max_length,
            progress=progress,
        )
        for artifact in manifest.artifacts
    ]


def first_difference(onnx_file: Path, model: ModernBertModel, case: Case, tolerance: float) -> str:
    """Names the first layer whose output differs from a float64 model's by more than the tolerance."""
    names = [f"layers.{index}.input" for index in range(model.config.num_hidden_layers)]
    feed = case.inputs(model.config.vocab_size)
    with _exposed(onnx_file, names) as exposed:
        values = open_session(exposed).run([*names, OUTPUTS[0]], feed)
    with torch.no_grad():
        wanted = model(**_tensors(feed), output_hidden_states=True).hidden_states
    valid = feed["attention_mask"] != 0
    before = ["the embeddings", *(f"layer {i} ({kind})" for i, kind in enumerate(model.config.layer_types))]
    for name, got, want in zip(before, values, wanted, strict=True):
        error = np.abs(got - want.numpy())[valid].max()
        if not error <= tolerance:
            return f"{name}, max abs error {error:.2e} at batch {case.batch}, length {case.length}"
    return f"none of the layers; the pooled output alone, at batch {case.batch}, length {case.length}"


def open_session(onnx_file: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with its own default settings."""
    return onnxruntime.InferenceSession(os.fspath(onnx_file), providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _exposed(onnx_file: Path, names: list[str]) -> Iterator[Path]:
    """A copy of the graph, beside the original and its weights, that also outputs the named values."""
    proto = onnx.load(onnx_file, load_external_data=False)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    copy = onnx_file.with_suffix(".debug.onnx")
    try:
        onnx.save(proto, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _told(inputs: list[dict[str, Array]], progress: Progress, who: str) -> Iterator[dict[str, Array]]:
    for index, feed in enumerate(inputs):
        progress(f"parity: {who}, case {index + 1} of {len(inputs)}")
        yield feed


def _run(session: onnxruntime.InferenceSession, feed: dict[str, Array]) -> Outputs:
    return dict(zip(OUTPUTS, session.run(OUTPUTS, feed), strict=True))


@torch.no_grad()
def _run_ours(model: ModernBertModel, feed: dict[str, Array], pooling: str, normalize: bool) -> Outputs:
    hidden = model(**_tensors(feed)).last_hidden_state
    return {OUTPUTS[0]: hidden.numpy(), OUTPUTS[1]: _pool(hidden.numpy(), feed["attention_mask"], pooling, normalize)}


@torch.no_grad()
def _run_stock(model: Any, feed: dict[str, Array], pooling: str, normalize: bool) -> Outputs:
    hidden = model(**_tensors(feed)).last_hidden_state.numpy()
    return {OUTPUTS[0]: hidden, OUTPUTS[1]: _pool(hidden, feed["attention_mask"], pooling, normalize)}


def _tensors(feed: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in feed.items()}


def _pool(hidden: Array, mask: Array, pooling: str, normalize: bool) -> Array:
    """Pooling once more in NumPy, so that the graph's has something to be compared with."""
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = (hidden * mask[:, :, None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None]
    return pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12) if normalize else pooled


def _compare(case: Case, reference: str, valid: Array, got: Outputs, want: Outputs, pooling: str) -> Comparison:
    hidden, pooled = OUTPUTS
    # The first position of a row that is padded left has no reference: torch gives zeros there.
    rows = valid[:, 0] if pooling == "cls" else valid.any(-1)
    # NaN anywhere, padding included, must not hide.
    finite = all(np.isfinite(value).all() for value in got.values())
    errors = (np.abs(got[hidden] - want[hidden])[valid].max(), np.abs(got[pooled] - want[pooled])[rows].max())
    return Comparison(
        case=case,
        reference=reference,
        max_abs_error=float(max(errors)) if finite else float("nan"),
        min_cosine=float(_cosine(got[hidden][valid], want[hidden][valid]).min()),
        min_pooled_cosine=float(_cosine(got[pooled][rows], want[pooled][rows]).min()),
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _cosine(a: Array, b: Array) -> Array:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
