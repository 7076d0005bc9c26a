"""A model repository for Triton Inference Server: text in, embeddings out, from one bundle.

    <out>/<name>_tokenizer/   Python backend: text -> token ids (`modernbert_runtime.triton_tokenizer`)
    <out>/<name>_encoder/     ONNX Runtime or TensorRT: token ids -> embedding, dynamic batching
    <out>/<name>/             an ensemble of both: what clients call

The server's Python must have modernbert-deploy installed, without torch. Nothing here needs torch or Triton.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from modernbert.errors import InputError
from modernbert.output import whole_directory
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.gpu_engines import bundle_plans
from modernbert_runtime.tensorrt_plan import PlanRecord
from modernbert_runtime.tokenizer import TextTokenizer
from modernbert_runtime.triton_tokenizer import ATTENTION_MASK, INPUT_IDS, TEXT

Encoder = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "gpu"]

OUTPUT, TOKENS = "sentence_embedding", "last_hidden_state"
EMBEDDING = "embedding"
# Requests of one shape run together, up to this many rows and tokens.
MOST_ROWS, MOST_TOKENS = 32, 65_536
# How long the first of a batch waits for others.
QUEUE_DELAY_MICROSECONDS = 500
MODEL_PY = '''"""Tokenizer step; see modernbert_runtime.triton_tokenizer."""

from modernbert_runtime.triton_tokenizer import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Name(str):
    """A value that protobuf's text form writes without quotes: a number format or another enum."""

    __slots__ = ()


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    name: str = "modernbert",
    encoder: Encoder = "onnxruntime",
    device: Device = "cpu",
    precision: str | None = None,
    prompt_name: str | None = None,
    truncation: str = "right",
    max_batch: int | None = None,
) -> None:
    """Writes the repository.

    Args:
        bundle: an embedding bundle.
        out: directory to make: whole, or absent when something fails.
        name: of the model that clients call.
        encoder: "tensorrt" takes the plans that were built on this machine.
        device: where ONNX Runtime computes.
        precision: of the artifact; None is the first.
        prompt_name: a prompt of the bundle to put before every text, such as "query".
        truncation: what happens to a longer text: "right", "left", or "error".
        max_batch: most rows that run together; None is 32, less where texts may be longer than 2,048 tokens.

    Raises:
        InputError: a parameter is out of its range, or `out` exists.
        BundleError, EngineError: the bundle lacks what the encoder needs.
    """
    manifest = bundle.manifest
    for parameter, value, known in (("encoder", encoder, get_args(Encoder)), ("device", device, get_args(Device))):
        if value not in known:
            raise InputError(f"{parameter} must be one of {', '.join(known)}, not {value!r}")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"name must be letters, digits, _ and -, not {name!r}")
    if manifest.task != "embedding":
        raise InputError(f"task of the bundle must be embedding, not {manifest.task!r}")
    if prompt_name is not None and prompt_name not in manifest.prompts:
        known = tuple(manifest.prompts) or ("none",)
        raise InputError(f"prompt must be one of the bundle's, {', '.join(known)}, not {prompt_name!r}")
    if max_batch is not None and max_batch < 1:
        raise InputError(f"max_batch must be at least 1, not {max_batch}")
    tokenizer = bundle.path_of("tokenizer.json")
    TextTokenizer(tokenizer, max_length=manifest.max_length, truncation=truncation)  # type: ignore[arg-type]  # refuses
    rows = max_batch or max(1, min(MOST_ROWS, MOST_TOKENS // manifest.max_length))

    with whole_directory(out) as partial:
        version = partial / f"{name}_encoder" / "1"
        version.mkdir(parents=True)
        tokens: list[dict[str, Any]] = []
        if encoder == "onnxruntime":
            config = _onnx_encoder(bundle, version, device, precision)
        else:
            config, most = _plan_encoder(bundle, version, precision)
            if max_batch is not None and max_batch > most:
                raise InputError(
                    f"max_batch must be at most {most}, which the plans take at any length, not {max_batch}"
                )
            rows = min(rows, most)
            # Triton's TensorRT backend wants every output of a plan in the config, whether anybody asks for it or not.
            tokens = [_tensor(TOKENS, "TYPE_FP32", -1, manifest.dimension)]
        shared: dict[str, Any] = {"max_batch_size": rows}
        ids = [_tensor(part, "TYPE_INT64", -1) for part in (INPUT_IDS, ATTENTION_MASK)]
        config = {
            **shared,
            **config,
            "input": ids,
            "output": [_tensor(OUTPUT, "TYPE_FP32", manifest.dimension), *tokens],
            "dynamic_batching": {"max_queue_delay_microseconds": QUEUE_DELAY_MICROSECONDS},
        }
        _write(partial, f"{name}_encoder", config)

        settings = {
            "max_length": str(manifest.max_length),
            "truncation": truncation,
            "prefix": manifest.prompts[prompt_name] if prompt_name else "",
            "pad_id": str(bundle.pad_id()),
        }
        text = _tensor(TEXT, "TYPE_STRING", 1)
        _write(
            partial,
            f"{name}_tokenizer",
            {
                **shared,
                "backend": "python",
                "input": [text],
                "output": ids,
                "parameters": [{"key": key, "value": {"string_value": value}} for key, value in settings.items()],
                "instance_group": [{"kind": Name("KIND_CPU")}],
            },
        )
        shutil.copyfile(tokenizer, partial / f"{name}_tokenizer" / "1" / "tokenizer.json")
        (partial / f"{name}_tokenizer" / "1" / "model.py").write_text(MODEL_PY)

        steps = [
            _step(f"{name}_tokenizer", {TEXT: TEXT}, {INPUT_IDS: INPUT_IDS, ATTENTION_MASK: ATTENTION_MASK}),
            _step(f"{name}_encoder", {INPUT_IDS: INPUT_IDS, ATTENTION_MASK: ATTENTION_MASK}, {OUTPUT: EMBEDDING}),
        ]
        _write(
            partial,
            name,
            {
                **shared,
                "platform": "ensemble",
                "input": [text],
                "output": [_tensor(EMBEDDING, "TYPE_FP32", manifest.dimension)],
                "ensemble_scheduling": {"step": steps},
            },
        )


def _onnx_encoder(bundle: Bundle, version: Path, device: Device, precision: str | None) -> dict[str, Any]:
    """Copies an artifact, its weights under the name that the graph knows them by."""
    targets = ["portable"] if device == "cpu" else ["ort-cuda", "portable"]
    have = {artifact.target for artifact in bundle.manifest.artifacts if precision in (None, artifact.precision)}
    target = next((target for target in targets if target in have), targets[-1])
    artifact = bundle.artifact(target=target, precision=precision)
    path = bundle.onnx_path(artifact)
    shutil.copyfile(path, version / path.name)
    if artifact.data_file is not None:
        shutil.copyfile(bundle.path_of(artifact.data_file), version / Path(artifact.data_file).name)
    return {
        "backend": "onnxruntime",
        "default_model_filename": path.name,
        "instance_group": [{"kind": Name(f"KIND_{device.upper()}")}],
    }


def _plan_encoder(bundle: Bundle, version: Path, precision: str | None) -> tuple[dict[str, Any], int]:
    """Writes the plan that serves every length, and says how many rows it takes at any.

    Triton runs one plan per model and chooses among its profiles. That with the longest profile serves short texts too.
    """
    plans = bundle_plans(bundle, precision).plans
    longest = max(plans.record.key.profiles, key=lambda profile: profile.max_length)
    served = [profile for profile in plans.record.key.profiles if profile.graph == longest.graph]
    (version / "model.plan").write_bytes(plans.load(PlanRecord.file_of(longest.graph)))
    config = {
        "platform": "tensorrt_plan",
        "default_model_filename": "model.plan",
        "instance_group": [{"kind": Name("KIND_GPU"), "profile": [str(index) for index in range(len(served))]}],
    }
    return config, min(profile.max_batch for profile in served)


def _tensor(name: str, data_type: str, *dims: int) -> dict[str, Any]:
    """An input or output whose first axis is the batch, which Triton does not list."""
    return {"name": name, "data_type": Name(data_type), "dims": dims}


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    """A model of an ensemble: its own tensor -> the ensemble's."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _write(root: Path, name: str, config: Mapping[str, Any]) -> None:
    """A model's config.pbtxt and its version directory, which Triton wants even where it is empty."""
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text("".join(_lines({"name": name, **config})), encoding="utf-8")


def _lines(message: Mapping[str, Any], indent: str = "") -> list[str]:
    """A message in protobuf's text form; a list is a repeated field."""
    lines = []
    for field, value in message.items():
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(item, Mapping):
                lines += [f"{indent}{field} {{\n", *_lines(item, indent + "  "), f"{indent}}}\n"]
            else:
                # Text as JSON writes it is text as protobuf reads it, beyond ASCII too.
                text = item if isinstance(item, Name) else json.dumps(item, ensure_ascii=False)
                lines.append(f"{indent}{field}: {text}\n")
    return lines
