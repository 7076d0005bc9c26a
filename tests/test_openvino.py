"""Graphs for OpenVINO in other precisions than fp32, run in OpenVINO: their values, and what it makes of them."""

import collections
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import TINY, write_checkpoint
from test_lowering_targets import cosine

from modernbert.config import load_config
from modernbert_export.export import export
from modernbert_export.lower import lower
from modernbert_export.precision.weight_only import quantize_weights
from modernbert_runtime import Embedder
from modernbert_runtime.bench.candidates import own_candidates
from modernbert_runtime.bundle import Bundle

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'modernbert-deploy[openvino]'")

LAYERS = 2
# Multiples of a block of 32, as in every model that people use. `TINY` has none.
SIZES = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=LAYERS)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["a b c", "x y z " * 100, "q"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of these sizes."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", **SIZES)


@pytest.fixture(scope="module")
def integers(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle for OpenVINO, in fp32 and with weights in 8 bits."""
    out = tmp_path_factory.mktemp("integers") / "bundle"
    texts = out.with_name("texts.txt")
    draw = random.Random(0)
    texts.write_text("\n".join(" ".join(draw.choices(LETTERS, k=draw.randint(2, 60))) for _ in range(40)))
    export(str(wide), out, text=texts, targets=("openvino",), precisions=("fp32", "int8-weights"), max_length=40)
    return out


def compiled(file: Path) -> Any:
    return openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def weight_types(model: Any) -> collections.Counter[str]:
    """Of the linear layers as OpenVINO runs them."""
    layers = [op for op in model.get_runtime_model().get_ordered_ops() if _kind(op) == "FullyConnected"]
    return collections.Counter(op.input_value(1).get_element_type().get_type_name() for op in layers)


def _kind(op: Any) -> str:
    return str(op.get_rt_info()["layerType"].astype(str))


def hidden_states(model: Any, checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the model and transformers make of two texts of 300 tokens."""
    ids = torch.randint(TINY["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)(ids).last_hidden_state
    got = model({"input_ids": ids.numpy(), "attention_mask": np.ones((2, 300), np.int64)})["last_hidden_state"]
    return got, want.numpy()


# Weights in 8 bits


def test_int8_weights_stay_integers_in_memory(integers: Path, wide: Path) -> None:
    fp32, int8 = (
        compiled(integers / "onnx" / name) for name in ("model_openvino.onnx", "model_openvino_int8_weights.onnx")
    )
    # Of every layer: q, k, v, Wo, both halves of Wi, mlp.Wo.
    assert weight_types(fp32) == {"f32": 7 * LAYERS}
    assert weight_types(int8) == {"i8": 7 * LAYERS}
    tables = [op for op in int8.get_runtime_model().get_ordered_ops() if _kind(op) == "Gather"]
    assert "i8" in {op.input_value(0).get_element_type().get_type_name() for op in tables}
    got, want = hidden_states(int8, wide)
    assert 0.998 <= cosine(got, want).min() < 0.999999  # as the portable graph; and not fp32 after all


def test_embedder_takes_int8_weights_in_openvino(integers: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Embedder.load(integers, engine="openvino", precision="int8-weights") as embedder:
        vectors = embedder.embed(TEXTS)
    assert "onnx/model_openvino_int8_weights.onnx, target openvino, precision int8-weights" in caplog.text
    with Embedder.load(integers, engine="openvino", precision="fp32") as exact:
        assert 0.998 <= cosine(vectors, exact.embed(TEXTS)).min() < 0.999999
    names = [candidate.name for candidate in own_candidates(str(integers), Bundle.open(integers).manifest, threads=1)]
    assert "openvino int8-weights" in names


def test_widths_that_32_does_not_divide(traced: onnx.ModelProto, checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO refuses a block that is cut short."""
    graph = lower(ir.from_proto(traced), "openvino")
    quantize_weights(graph, load_config(checkpoint), bits=8, whole_blocks=True)
    ir.save(graph, tmp_path / "model.onnx")
    model = compiled(tmp_path / "model.onnx")
    assert weight_types(model) == {"i8": 7 * TINY["num_hidden_layers"]}
    assert cosine(*hidden_states(model, checkpoint)).min() >= 0.998
