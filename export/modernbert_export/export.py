"""The export from end to end: checkpoint in, verified bundle out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError, ParityError
from modernbert.output import whole_directory
from modernbert_export.build import Builder, Built
from modernbert_export.bundle import hash_files, write_model_files
from modernbert_export.contents import Contents, read_contents
from modernbert_export.lower import TargetForm
from modernbert_export.on_text import OnText
from modernbert_export.only_token import ONLY_TOKEN
from modernbert_export.openvino_session import require_bf16
from modernbert_export.ops.op import OPSET
from modernbert_export.packed import PACKED_INPUTS, check_packable
from modernbert_export.parity import ParityReport
from modernbert_export.plot import error_plot
from modernbert_export.precision.calibrate import InputSampler
from modernbert_export.precision.int8 import LEVELS, REDUCED_LEVELS
from modernbert_export.precision.modelopt import MODES, require_modelopt
from modernbert_export.references import References, compute_references
from modernbert_export.source import Source, mask_token, open_source
from modernbert_export.tasks import EMBEDDING, FILL_MASK, TASKS
from modernbert_export.tensorrt.lint import lint
from modernbert_export.texts import FEW_TOKENS, MOST_TOKENS, TextSet
from modernbert_export.trace import INPUTS, OUTPUTS
from modernbert_export.variants import INTEGERS, QUANTISED, Variant, choose_variants
from modernbert_export.verify import fidelity_grid, verify, verify_head
from modernbert_runtime.machine import multiplies_int8_exactly
from modernbert_runtime.manifest import MANIFEST_NAME, Artifact, Manifest
from modernbert_runtime.manifest import Source as ManifestSource

Progress = Callable[[str], None]

# What an export writes beside its weights (tokenizer, graphs), with room to spare.
EXTRA_BYTES = 64 << 20
TOKEN_AXES = ("batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One artifact that passed: its file below the bundle, its external weights, its report and contents."""

    variant: Variant
    file: str
    data_file: str | None
    report: ParityReport
    contents: Contents


def export(
    model: str,
    out: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("portable",),
    precisions: Sequence[str] | None = None,
    task: str = EMBEDDING,
    pooling: str | None = None,
    max_length: int | None = None,
    text: str | os.PathLike[str] | None = None,
    reduce_range: bool | None = None,
    packed: bool = False,
    keep_functions: bool = False,
    progress: Progress = lambda _: None,
    proven: Callable[[Exported], None] = lambda _: None,
) -> Manifest:
    """Exports a ModernBERT to ONNX, proves that it computes what PyTorch does, and writes the bundle.

    Args:
        model: checkpoint directory or hub id.
        out: directory to make. It appears only when everything is in it and verified.
        targets: what the graphs are for, of `variants.SUPPORTED`, the preferred one first.
        precisions: of these each target gets those that it has, the preferred one first; by default its usual one.
        task: "embedding", or one of `tasks.TASKS`, whose head the checkpoint must have.
        pooling: "mean", "cls" or "global"; by default what the checkpoint says, else "mean".
        max_length: most tokens of a text; by default what the checkpoint says.
        text: file with one text a line, on which integers are chosen and proven; built-in ones when absent.
        reduce_range: 7-bit weights in int8, for CPUs without VNNI; by default if this machine's CPU is one.
        packed: portable graphs in packed form too (`modernbert_export.packed`), for this project's own runtime.
        keep_functions: leave the operators of the domain `modernbert` as nodes, their bodies as functions beside them,
            for those who bring kernels; not for tensorrt, whose parser has rules of its own.
        progress: is told what is being done, in a few words.
        proven: is told of each artifact that passed, with its report and what is in the graph.

    Raises:
        InputError: the checkpoint or a parameter cannot be used.
        ParityError: a graph does not compute what PyTorch does.
    """
    variants = choose_variants(targets, precisions, packed=packed)
    if keep_functions and "tensorrt" in targets:
        raise InputError("keep_functions goes with portable, openvino and ort-cuda, not with target tensorrt")
    made = {variant.precision for variant in variants}
    if reduce_range is None:
        reduce_range = not multiplies_int8_exactly()
    elif "int8" in made and not reduce_range and not multiplies_int8_exactly():
        raise InputError(
            "int8 without reduce_range cannot be proven here: this CPU has no VNNI, without which products of 8 bits "
            "overflow. Leave the option out, or export where there is VNNI"
        )
    if any(variant.in_openvino for variant in variants):
        require_bf16("export on one that has")
    source = open_source(model, pooling=pooling, max_length=max_length, task=task)
    embeds = task == EMBEDDING
    if packed:
        check_packable(source.config, task)
    quantised = not made.isdisjoint(QUANTISED)
    if made.intersection(MODES):
        require_modelopt()
    texts = TextSet.read(
        source.path / "tokenizer.json",
        max_tokens=min(source.max_length, MOST_TOKENS if text is not None or quantised else FEW_TOKENS),
        file=text,
        hide_by=mask_token(source.path, source.config) if task == FILL_MASK else None,
    )
    weights = sum(path.stat().st_size for path in source.weight_files)
    # The checkpoint, and weights per precision; those of fp32 are there for integers in any case.
    room = (1 + len({*made, "fp32"})) * _fp32_bytes(source.config, weights) + EXTRA_BYTES
    with whole_directory(Path(out), room=room) as partial:
        # First, while nothing else is in memory: a model in float64 is the largest thing there is.
        grid = fidelity_grid(source.config, source.max_length)
        references = compute_references(source.path, grid, progress) if embeds else None
        progress("loading the checkpoint")
        model_for_task = source.load()
        encoder = model_for_task.encoder
        write_model_files(source, model_for_task.whole, partial)
        (partial / "onnx").mkdir()
        with InputSampler(encoder) if made.intersection(INTEGERS) else contextlib.nullcontext() as sampler:
            on_text = OnText.of(model_for_task, texts, task, progress)
        with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f"{partial.name}.") as scratch:
            builder = Builder(
                source=source,
                directory=partial / "onnx",
                scratch=Path(scratch),
                on_text=on_text,
                levels=REDUCED_LEVELS if reduce_range else LEVELS,
                keep_functions=keep_functions,
                progress=progress,
            )
            built = builder.build(model_for_task, variants, sampler.rows if sampler else {})
        del model_for_task, encoder, sampler, builder
        gc.collect()  # graphs are full of cycles
        for one in built:
            outputs = None if embeds else TASKS[task].outputs(source.config)
            check_saved(one.file, one.variant.form, outputs, packed=one.variant.packed, with_functions=keep_functions)
            _check_lint(one, with_globals=source.config.num_global_tokens > 0)
        artifacts = []
        for one in built:
            if text is not None and one.text is None:
                one = dataclasses.replace(one, text=on_text.compare(one.file, progress))
            artifacts.append(_prove(one, source, references, partial, progress))
        del references
        reports = [artifact.report for artifact in artifacts]
        (partial / "parity.json").write_text(json.dumps({"artifacts": [r.to_dict() for r in reports]}, indent=2) + "\n")
        (partial / "parity.md").write_text(
            "\n".join(f"{a.report.to_markdown()}\n{a.contents.to_markdown(f'`{a.file}`')}" for a in artifacts)
        )
        (partial / "parity.svg").write_text(error_plot(reports))
        progress("hashing")
        manifest = Manifest(
            generator=f"modernbert-deploy {importlib.metadata.version('modernbert-deploy')}",
            source=ManifestSource(name=source.name, sha256=source.sha256()),
            task=task,
            dimension=source.config.hidden_size,
            pooling=source.pooling,
            normalize=source.normalize,
            max_length=source.max_length,
            prompts=source.prompts,
            artifacts=tuple(
                Artifact(
                    target=artifact.variant.target,
                    precision=artifact.variant.precision,
                    file=artifact.file,
                    data_file=artifact.data_file,
                    opset=artifact.variant.form.opset,
                    ir_version=artifact.variant.form.ir_version,
                    max_length=artifact.variant.max_length,
                    reduced_range=reduce_range if artifact.variant.precision == "int8" else None,
                    parity=artifact.report.summary(),
                    # What is fused away is in the estimate of a graph, and not in what its engine needs.
                    activation_bytes={} if artifact.variant.form.quadratic else artifact.contents.activation_bytes,
                )
                for artifact in artifacts
            ),
            files=hash_files(partial),
            labels=source.labels,
            score_function=source.score_function,
            calibration=_ranges(on_text.wanted) if embeds else {},
        )
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    for artifact in artifacts:
        proven(artifact)
    return manifest


def _prove(built: Built, source: Source, references: References | None, root: Path, progress: Progress) -> Exported:
    """Verifies a file on the grid and reads back what is in it.

    Raises:
        ParityError: it must not be written.
    """
    name = built.file.relative_to(root).as_posix()
    max_length = min(source.max_length, built.variant.max_length or source.max_length)
    if source.task == EMBEDDING:
        report = verify(
            built.file,
            source.path,
            artifact=name,
            precision=built.variant.precision,
            pooling=source.pooling,
            normalize=source.normalize,
            max_length=max_length,
            references=references,
            progress=progress,
        )
    else:
        report = verify_head(
            built.file,
            source.path,
            artifact=name,
            precision=built.variant.precision,
            task=source.task,
            max_length=max_length,
            progress=progress,
        )
    report = dataclasses.replace(report, text=built.text, ranges=built.ranges, notes=(*report.notes, *built.notes))
    if not report.passed:
        raise ParityError(report.to_markdown())
    progress(f"reading back {built.file.name}")
    return Exported(
        variant=built.variant,
        file=name,
        data_file=built.data_file.relative_to(root).as_posix() if built.data_file else None,
        report=report,
        contents=read_contents(built.file, quadratic=built.variant.form.quadratic),
    )


def _check_lint(built: Built, *, with_globals: bool) -> None:
    """Refuses a graph for TensorRT that its parser would refuse or compute wrongly.

    Raises:
        ParityError: it has faults; all are listed.
    """
    if built.variant.target in ("tensorrt", "tensorrt-dense"):
        proto = onnx.load(built.file, load_external_data=False)
        islands = sum(row.products(with_globals=with_globals) for row in built.ranges)
        faults = lint(proto, precision=built.variant.precision, islands=islands)
        if faults:
            listed = "\n".join(map(str, faults))
            raise ParityError(f"{built.file.name}: TensorRT would not build what was meant:\n{listed}")


def check_saved(
    file: Path,
    form: TargetForm,
    outputs: Mapping[str, Sequence[str | int]] | None = None,
    *,
    packed: bool = False,
    with_functions: bool = False,
) -> None:
    """Reads a saved graph back and refuses a frozen axis, another form than its target's, or a function left over.

    Args:
        file: the graph.
        outputs: name -> axes of what it must give; those of an embedding model when absent.
        packed: whether it is of the packed form.
        with_functions: whether it must have functions.

    Raises:
        ParityError: the file is not what was meant.
    """
    proto = onnx.load(file, load_external_data=False)
    # An input that has a default is none that must be given.
    values = [value for value in (*proto.graph.input, *proto.graph.output) if value.name != ONLY_TOKEN]
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    inputs: Mapping[str, Sequence[str | int]] = PACKED_INPUTS if packed else dict.fromkeys(INPUTS, TOKEN_AXES)
    wanted = {name: list(shape) for name, shape in inputs.items()}
    if outputs is None:
        hidden = axes[OUTPUTS[0]][-1]
        tokens, texts = (PACKED_INPUTS["input_ids"], "texts") if packed else (TOKEN_AXES, "batch")
        outputs = {OUTPUTS[0]: [*tokens, hidden], OUTPUTS[1]: [texts, hidden]}
    wanted |= {name: list(shape) for name, shape in outputs.items()}
    integers, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    own = {OPSET.domain: OPSET.version} if with_functions else {}
    for what, got, want in (
        ("axes", axes, wanted),
        ("types", types, dict.fromkeys(inputs, integers) | dict.fromkeys(outputs, floats)),
        ("opsets", opsets, {"": form.opset, **form.domains, **own}),
        ("ir_version", proto.ir_version, form.ir_version),
        ("functions", bool(proto.functions), with_functions),
    ):
        if got != want:
            raise ParityError(f"{file.name}: {what} must be {want}, but the saved file has {got}")


def _ranges(vectors: NDArray[np.float32]) -> dict[str, tuple[float, ...]]:
    """Of each dimension over all texts, as the manifest has them."""
    return {"low": tuple(vectors.min(0).tolist()), "high": tuple(vectors.max(0).tolist())}


def _fp32_bytes(config: ModernBertConfig, stored: int) -> int:
    """Weights may be stored at half the size that they are written in."""
    linear = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return max(stored, 4 * (linear + config.vocab_size * config.hidden_size))
