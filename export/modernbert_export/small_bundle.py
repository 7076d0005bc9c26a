"""A bundle of a small model with random weights, made in seconds, and what PyTorch computes of it.

For `modernbert doctor`: any length up to 8,192 tokens, both kinds of layer, the usual window.
It has no tokenizer, and no parity report: proving parity is what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertModel
from modernbert_export.bundle import hash_files
from modernbert_export.lower import FORMS, lower
from modernbert_export.ops.op import Target
from modernbert_export.precision.audit import audit
from modernbert_export.precision.half import to_half
from modernbert_export.tensorrt.build import build_plans
from modernbert_export.trace import trace
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.doctor import Reference
from modernbert_runtime.doctor.examine import Cases
from modernbert_runtime.manifest import MANIFEST_NAME, Artifact, Manifest, Source
from modernbert_runtime.plan_store import PLAN_GRAPHS, PlanSource, plan_directory
from modernbert_runtime.tensorrt_engine import key_here
from modernbert_runtime.tensorrt_plan import plan_profiles

MAX_LENGTH = 8192
VOCAB_SIZE = 1000
PORTABLE: tuple[Target, ...] = ("portable",)
FOR_TENSORRT: tuple[Target, ...] = ("tensorrt-dense", "tensorrt")

Progress = Callable[[str], None]


def small_model() -> ModernBertModel:
    """One global and two local layers of the usual window, with weights of the size that training leaves."""
    config = ModernBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    model = ModernBertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    return model


def write_small_bundle(root: Path, *, tensorrt: bool, progress: Progress = lambda _: None) -> Bundle:
    """Makes the bundle in a directory that exists.

    Args:
        root: the directory.
        tensorrt: the graphs for TensorRT, too.
        progress: is told what is being done.
    """
    artifacts = []
    progress("making a small model")
    model = small_model()
    artifacts += _write(model, root, "fp32", PORTABLE)
    if tensorrt:
        ranges = audit(model, [torch.arange(VOCAB_SIZE)])
        artifacts += _write(to_half(model, torch.float16, ranges), root, "fp16", FOR_TENSORRT)
    manifest = Manifest(
        generator="modernbert doctor",
        source=Source(name="random weights", sha256="0" * 64),
        task="embedding",
        dimension=model.config.hidden_size,
        pooling="mean",
        normalize=True,
        max_length=MAX_LENGTH,
        prompts={},
        artifacts=tuple(artifacts),
        files=hash_files(root),
    )
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(root)


def build_small_plans(bundle: Bundle, progress: Progress = lambda _: None) -> None:
    """Builds TensorRT plans of the bundle into the user's cache.

    Raises:
        EngineError, InputError: as for `build_plans`.
    """
    source = PlanSource.of(bundle)
    profiles = plan_profiles(MAX_LENGTH, batch_tokens=MAX_LENGTH)
    build_plans(
        {target: bundle.onnx_path(source.artifacts[target]) for target in PLAN_GRAPHS},
        plan_directory(key_here(source.sha256, source.precision)),
        profiles=profiles,
        precision=source.precision,
        onnx_sha256=source.sha256,
        inspectable=True,
        progress=progress,
    )


def torch_reference(cases: Cases) -> Reference:
    """What PyTorch computes of the small model in float64, with attention that shares no code with the export."""
    model = small_model().double()
    model.set_attention("sdpa")
    hidden = {}
    with torch.no_grad():
        for length, (ids, mask) in cases.items():
            result = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
            hidden[length] = result.numpy().astype(np.float64)
    return Reference(name=f"PyTorch {torch.__version__} in float64", hidden=hidden)


def _write(model: ModernBertModel, root: Path, precision: str, targets: tuple[Target, ...]) -> list[Artifact]:
    traced = ir.to_proto(trace(model, pooling="mean", normalize=True))
    artifacts = []
    (root / "onnx").mkdir(exist_ok=True)
    for target in targets:
        file = f"onnx/{target}.onnx"
        ir.save(lower(ir.from_proto(traced), target), root / file)
        form = FORMS[target]
        artifacts.append(
            Artifact(
                target=target,
                precision=precision,
                file=file,
                data_file=None,
                opset=form.opset,
                ir_version=form.ir_version,
                parity={},
            )
        )
    return artifacts
