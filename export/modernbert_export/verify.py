"""Parity: what an exported file computes in ONNX Runtime against PyTorch, on shapes that catch the usual mistakes.

Lengths lie on both sides of the window's edge and of a block's; batches are unpadded, padded right, and padded left
with one row of nothing but padding. `references` says what they are compared with.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.model import load_model
from modernbert_export.head_parity import cases_for, compare_logits
from modernbert_export.on_text import OnText
from modernbert_export.openvino_session import require_bf16
from modernbert_export.packed_session import PackedSession, packed_feed
from modernbert_export.parity import Case, Comparison, ParityReport, Tolerance
from modernbert_export.references import TRANSFORMERS, References, compute_references
from modernbert_export.session import open_session
from modernbert_export.source import mask_token, open_source
from modernbert_export.tasks import EMBEDDING, FILL_MASK, LOGITS, TASKS, load_for_task
from modernbert_export.texts import MOST_TOKENS, TextSet
from modernbert_export.trace import OUTPUTS
from modernbert_export.variants import QUANTISED, proven_in_openvino
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.engines import overflows_here
from modernbert_runtime.manifest import Artifact

Array = NDArray[Any]
Outputs = dict[str, Array]
Progress = Callable[[str], None]

# Dense references at 2,048 and 8,192 tokens take long on real widths; the graph is the same at any width.
LONG_LENGTHS, LONG_MAX_HIDDEN = (2048, 8192), 256

NO_SECOND = "transformers has no global tokens: the one reference is our own model in float64."


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
    references: References | None = None,
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
        max_length: longest input to compare on.
        references: what `compute_references` gave for this checkpoint and grid, if another artifact needed it too.
        progress: is told what is being done, in a few words.
    """
    if references is None:
        references = compute_references(reference, fidelity_grid(load_config(reference), max_length), progress)
    session = open_session(onnx_file)
    rows = []
    cases = [case for case in references.cases if case.length <= max_length]
    for index, case in enumerate(cases):
        progress(f"parity: ONNX Runtime, case {index + 1} of {len(cases)}")
        feed = case.inputs(references.vocab_size)
        actual = dict(zip(OUTPUTS, session.run(OUTPUTS, feed), strict=True))
        for name, hidden in references.hidden.items():
            pooled = _pool(hidden[case], references.summary[name].get(case), feed["attention_mask"], pooling, normalize)
            wanted = {OUTPUTS[0]: hidden[case], OUTPUTS[1]: pooled}
            rows.append(_compare(case, name, feed["attention_mask"] != 0, actual, wanted, pooling))
    if isinstance(session, PackedSession):
        progress("parity: ONNX Runtime, texts of all lengths packed together")
        rows += _compare_mixes(session, cases, references, pooling, normalize)
    del session
    rows.sort(key=lambda row: row.reference)  # stable: the grid's order within each
    notes = () if TRANSFORMERS in references.hidden else (NO_SECOND,)
    report = ParityReport(artifact=artifact, precision=precision, comparisons=tuple(rows), notes=notes)
    return _with_first_difference(report, onnx_file, reference)


def _compare_mixes(
    session: PackedSession, cases: Sequence[Case], references: References, pooling: str, normalize: bool
) -> list[Comparison]:
    """One call with the first text of every length, in several orders: each must come out as it does alone."""
    alone = [case for case in cases if case.batch == 1]
    rows = []
    for order, mixed in (
        ("shortest first", alone),
        ("longest first", alone[::-1]),
        ("mixed", alone[::2] + alone[1::2][::-1]),
    ):
        texts = [case.texts(references.vocab_size)[0] for case in mixed]
        hidden, pooled = session.packed.run(OUTPUTS, packed_feed(texts))
        parts = np.split(hidden, np.cumsum([len(text) for text in texts])[:-1])
        for case, tokens, summary in zip(mixed, parts, pooled, strict=True):
            actual = dict(zip(OUTPUTS, (tokens[None], summary[None]), strict=True))
            mask = np.ones((1, case.length), np.int64)
            for name, vectors in references.hidden.items():
                wanted = {OUTPUTS[0]: vectors[case], OUTPUTS[1]: _pool(vectors[case], None, mask, pooling, normalize)}
                among = dataclasses.replace(case, padding=f"packed, {order}")
                rows.append(_compare(among, name, mask != 0, actual, wanted, pooling))
    return rows


def _with_first_difference(report: ParityReport, onnx_file: Path, reference: Path) -> ParityReport:
    if not report.failures:
        return report
    worst = max(report.failures, key=lambda row: (np.isnan(row.max_abs_error), row.max_abs_error))
    difference = first_difference(onnx_file, reference, worst.case, report.tolerance)
    return dataclasses.replace(report, first_difference=difference)


def verify_head(
    onnx_file: Path,
    reference: Path,
    *,
    artifact: str,
    precision: str,
    task: str,
    max_length: int,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """As `verify`, of a graph that gives `logits`; see `head_parity` for how these are compared.

    Args:
        onnx_file, reference, artifact, precision, max_length, progress: as for `verify`.
        task: one of `tasks.TASKS`.
    """
    config = load_config(reference)
    grid = fidelity_grid(config, max_length)
    cases = cases_for(TASKS[task], config, grid)
    session = open_session(onnx_file)

    def run(feed: dict[str, Array]) -> Array:
        logits: Array = session.run([LOGITS], feed)[0]
        return logits

    rows = compare_logits(run, reference, TASKS[task], cases, progress)
    skipped = sorted({case.length for case in grid} - {case.length for case in cases})
    report = ParityReport(
        artifact=artifact,
        precision=precision,
        comparisons=tuple(rows),
        notes=(
            "Compared are the logits: errors in units of the largest one where that is above 1, cosines with a "
            "constant 1 beside them."
            + (f" Left out for their size: lengths {', '.join(map(str, skipped))}." if skipped else ""),
            *((NO_SECOND,) if config.num_global_tokens else ()),
        ),
    )
    return _with_first_difference(report, onnx_file, reference)


def verify_bundle(
    directory: Path,
    reference: str | None = None,
    *,
    files: Sequence[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    progress: Progress = lambda _: None,
) -> list[ParityReport]:
    """Compares the artifacts of a bundle with the bundle's own checkpoint, or with another one.

    Args:
        directory: the bundle.
        reference: checkpoint directory or hub id.
        files: of the artifacts to compare, such as "onnx/model.onnx"; by default all.
        text: file with one text a line, to compare on as well; integers are compared on built-in ones in any case.
        progress: is told what is being done, in a few words.

    Raises:
        BundleError: the bundle is not whole and unaltered.
        InputError: the reference or the text cannot be loaded, a file is none of the bundle's, or this CPU lacks what
            an artifact needs.
    """
    bundle = Bundle.open(directory)
    manifest = bundle.manifest
    artifacts = _choose(manifest.artifacts, files)
    if reference is None:
        checkpoint = bundle.root
        for name in manifest.files:
            bundle.path_of(name)
    else:
        source = open_source(reference, task=manifest.task)
        checkpoint = source.path
        own = load_config(bundle.root)
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            if getattr(source.config, name) != getattr(own, name):
                raise InputError(
                    f"reference {reference!r} has {name} {getattr(source.config, name)}, the bundle has "
                    f"{getattr(own, name)}; give the checkpoint that it was exported from"
                )
    on_text = None
    if text is not None or any(artifact.precision in QUANTISED for artifact in artifacts):
        texts = TextSet.read(
            bundle.path_of("tokenizer.json"),
            max_tokens=min(manifest.max_length, MOST_TOKENS),
            file=text,
            hide_by=mask_token(bundle.root, load_config(bundle.root)) if manifest.task == FILL_MASK else None,
        )
        model = load_for_task(checkpoint, manifest.task, pooling=manifest.pooling, normalize=manifest.normalize)
        on_text = OnText.of(model, texts, manifest.task, progress)
        del model
    references = None
    if manifest.task == EMBEDDING:
        grid = fidelity_grid(load_config(checkpoint), manifest.max_length)
        references = compute_references(checkpoint, grid, progress)
    reports = []
    for artifact in artifacts:
        file = bundle.onnx_path(artifact)
        if references is None:
            report = verify_head(
                file,
                checkpoint,
                artifact=artifact.file,
                precision=artifact.precision,
                task=manifest.task,
                max_length=manifest.max_length,
                progress=progress,
            )
        else:
            report = verify(
                file,
                checkpoint,
                artifact=artifact.file,
                precision=artifact.precision,
                pooling=manifest.pooling,
                normalize=manifest.normalize,
                max_length=artifact.max_length or manifest.max_length,
                references=references,
                progress=progress,
            )
        if on_text is not None and (text is not None or artifact.precision in QUANTISED):
            report = dataclasses.replace(report, text=on_text.compare(file, progress))
        reports.append(report)
    return reports


def _choose(artifacts: Sequence[Artifact], files: Sequence[str] | None) -> list[Artifact]:
    """Those that are asked for, if this CPU computes them as they were exported."""
    names = [artifact.file for artifact in artifacts]
    if unknown := [file for file in files or () if file not in names]:
        raise InputError(f"artifact must be one of {', '.join(names)}, not {unknown[0]!r}")
    chosen = [artifact for artifact in artifacts if not files or artifact.file in files]
    for artifact in chosen:
        remedy = f"verify {artifact.file} on one that has, and what else there is here with --artifact"
        if proven_in_openvino(artifact.target, artifact.precision):
            require_bf16(remedy)
        if overflows_here(artifact):
            raise InputError(f"this CPU has no VNNI, without which products of 8 bits overflow: {remedy}")
    return chosen


@torch.no_grad()
def first_difference(onnx_file: Path, reference: Path, case: Case, tolerance: Tolerance) -> str:
    """Names the first layer whose output differs from a float64 model's by more than the tolerance."""
    model = load_model(reference).double()
    model.set_attention("eager")
    names = [f"layers.{index}.input" for index in range(model.config.num_hidden_layers)]
    feed = case.inputs(model.config.vocab_size)
    session = open_session(onnx_file, also_output=[*names, OUTPUTS[0]])
    values = session.run([*names, OUTPUTS[0]], feed)
    tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
    wanted = model(**tensors, output_hidden_states=True).hidden_states
    valid = feed["attention_mask"] != 0
    before = ["the embeddings", *(f"layer {i} ({kind})" for i, kind in enumerate(model.config.layer_types))]
    where = f"at batch {case.batch}, length {case.length}"
    for name, got, want in zip(before, values, wanted, strict=True):
        # Before the tokens stand the global ones, if there are any.
        mine, theirs = got[:, -case.length :][valid], want.numpy()[valid]
        error, cosine = np.abs(mine - theirs).max(), _cosine(mine, theirs).min()
        if not tolerance.holds(max_abs_error=error, min_cosine=cosine, min_pooled_cosine=cosine):
            return f"{name}, max abs error {error:.2e}, min cosine {cosine:.7f} {where}"
    if isinstance(session, PackedSession) and case.batch == 1:
        return f"none of the layers when this text runs without others, {where}"
    after = "head" if LOGITS in {output.name for output in session.get_outputs()} else "pooled output"
    return f"none of the layers; the {after} alone, {where}"


def _pool(hidden: Array, summary: Array | None, mask: Array, pooling: str, normalize: bool) -> Array:
    """Pooling once more in NumPy, so that the graph's has something to be compared with."""
    if pooling == "global":
        assert summary is not None
        pooled = summary
    elif pooling == "cls":
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


def _cosine(a: Array, b: Array) -> Array:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
