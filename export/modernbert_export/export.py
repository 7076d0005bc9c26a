"""The export from end to end: checkpoint in, verified bundle out."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from modernbert.config import ModernBertConfig
from modernbert.errors import ParityError
from modernbert.model import load_model
from modernbert.output import whole_directory
from modernbert_export.bundle import hash_files, write_model_files
from modernbert_export.lower import IR_VERSION, lower
from modernbert_export.source import open_source
from modernbert_export.trace import INPUTS, OPSET_VERSION, OUTPUTS, trace
from modernbert_export.verify import verify
from modernbert_runtime.manifest import MANIFEST_NAME, Artifact, Manifest
from modernbert_runtime.manifest import Source as ManifestSource

# What an export writes beside its weights (tokenizer, graph), with room to spare.
EXTRA_BYTES = 64 << 20


def export(
    model: str,
    out: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Exports a ModernBERT to ONNX, proves that it computes what PyTorch does, and writes the bundle.

    Args:
        model: checkpoint directory or hub id.
        out: directory to make. It appears only when everything is in it and verified.
        pooling: "mean" or "cls"; by default what the checkpoint says, else "mean".
        max_length: most tokens of a text; by default what the checkpoint says.
        progress: is told what is being done, in a few words.

    Raises:
        InputError: the checkpoint or a parameter cannot be used.
        ParityError: the graph does not compute what PyTorch does.
    """
    source = open_source(model, pooling=pooling, max_length=max_length)
    weights = sum(path.stat().st_size for path in source.weight_files)
    with whole_directory(Path(out), room=2 * _fp32_bytes(source.config, weights) + EXTRA_BYTES) as partial:
        progress("loading the checkpoint")
        encoder = load_model(source.path)
        write_model_files(source, encoder, partial)
        progress("tracing")
        graph = trace(encoder, pooling=source.pooling, normalize=source.normalize)
        progress("lowering to standard ONNX")
        graph = lower(graph, "portable")
        file = partial / "onnx" / "model.onnx"
        file.parent.mkdir()
        ir.save(graph, file, external_data=f"{file.name}_data")
        del encoder, graph
        check_saved(file)

        report = verify(
            file,
            source.path,
            artifact="onnx/model.onnx",
            precision="fp32",
            pooling=source.pooling,
            normalize=source.normalize,
            max_length=source.max_length,
            progress=progress,
        )
        if report.failures:
            raise ParityError(report.to_markdown())
        (partial / "parity.json").write_text(report.to_json())
        (partial / "parity.md").write_text(report.to_markdown())
        progress("hashing")
        manifest = Manifest(
            generator=f"modernbert-deploy {importlib.metadata.version('modernbert-deploy')}",
            source=ManifestSource(name=source.name, sha256=source.sha256()),
            task="embedding",
            dimension=source.config.hidden_size,
            pooling=source.pooling,
            normalize=source.normalize,
            max_length=source.max_length,
            prompts=source.prompts,
            artifacts=(
                Artifact(
                    target="portable",
                    precision="fp32",
                    file="onnx/model.onnx",
                    data_file="onnx/model.onnx_data",
                    opset=OPSET_VERSION,
                    ir_version=IR_VERSION,
                    parity=report.summary(),
                ),
            ),
            files=hash_files(partial),
        )
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_saved(file: Path) -> None:
    """Reads a saved graph back and refuses a frozen axis, another opset, or anything but standard operators.

    Raises:
        ParityError: the file is not what was meant.
    """
    proto = onnx.load(file, load_external_data=False)
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    wanted = {name: ["batch", "sequence"] for name in INPUTS}
    hidden = axes[OUTPUTS[0]][-1]
    wanted |= {OUTPUTS[0]: ["batch", "sequence", hidden], OUTPUTS[1]: ["batch", hidden]}
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    for what, got, want in (
        ("axes", axes, wanted),
        ("opsets", opsets, {"": OPSET_VERSION}),
        ("ir_version", proto.ir_version, IR_VERSION),
        ("functions", [function.name for function in proto.functions], []),
    ):
        if got != want:
            raise ParityError(f"{file.name}: {what} must be {want}, but the saved file has {got}")


def _fp32_bytes(config: ModernBertConfig, stored: int) -> int:
    """Weights may be stored at half the size that they are written in."""
    linear = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return max(stored, 4 * (linear + config.vocab_size * config.hidden_size))
