"""Graphs for OpenVINO in other precisions than fp32: their values, what it makes of them, and what is refused.

bf16 needs a CPU that has it, or else is proven by rounding every result (`bf16_on_cpu`), which is more than OpenVINO
rounds.
"""

import collections
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY, write_checkpoint
from onnx import TensorProto, helper, numpy_helper
from test_lowering_targets import cosine

import modernbert_export.export as export_module
from modernbert.config import load_config
from modernbert.errors import InputError
from modernbert.model import load_model
from modernbert_export.contents import PROBES
from modernbert_export.export import export
from modernbert_export.lower import lower
from modernbert_export.parity import TOLERANCES, Case, Tolerance
from modernbert_export.precision.bf16_on_cpu import bf16_on_cpu
from modernbert_export.precision.weight_only import quantize_weights
from modernbert_export.shared_weights import SharedWeights
from modernbert_export.trace import OUTPUTS
from modernbert_export.variants import SUPPORTED
from modernbert_export.verify import first_difference, verify_bundle
from modernbert_runtime import Embedder
from modernbert_runtime.bench.candidates import own_candidates
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.openvino_core import openvino_core

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'modernbert-deploy[openvino]'")

HAS_BF16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")
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
def every(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle for OpenVINO. Where the CPU has no bf16 the gate is made to go on, and runs it in fp32."""
    out = tmp_path_factory.mktemp("every") / "bundle"
    texts = out.with_name("texts.txt")
    draw = random.Random(0)
    texts.write_text("\n".join(" ".join(draw.choices(LETTERS, k=draw.randint(2, 60))) for _ in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_BF16:
            patch.setattr(export_module, "require_bf16", lambda remedy: None)
        length = None if HAS_BF16 else 40  # where it proves nothing, a short grid does
        export(str(wide), out, text=texts, targets=("openvino",), precisions=SUPPORTED["openvino"], max_length=length)
    return out


def compiled(file: Path) -> Any:
    return openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


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


def test_int8_weights_stay_integers_in_memory(every: Path, wide: Path) -> None:
    fp32, int8 = (
        compiled(every / "onnx" / name) for name in ("model_openvino.onnx", "model_openvino_int8_weights.onnx")
    )
    # Of every layer: q with k, v, Wo, both halves of Wi, mlp.Wo.
    assert weight_types(fp32) == {"f32": 6 * LAYERS}
    assert weight_types(int8) == {"i8": 6 * LAYERS}
    tables = [op for op in int8.get_runtime_model().get_ordered_ops() if _kind(op) == "Gather"]
    assert "i8" in {op.input_value(0).get_element_type().get_type_name() for op in tables}
    got, want = hidden_states(int8, wide)
    assert 0.998 <= cosine(got, want).min() < 0.999999  # as the portable graph; and not fp32 after all


def test_embedder_takes_int8_weights_in_openvino(every: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Embedder.load(every, engine="openvino", precision="int8-weights") as embedder:
        vectors = embedder.embed(TEXTS)
    assert "onnx/model_openvino_int8_weights.onnx, target openvino, precision int8-weights" in caplog.text
    with Embedder.load(every, engine="openvino", precision="fp32") as exact:
        assert 0.998 <= cosine(vectors, exact.embed(TEXTS)).min() < 0.999999
    names = [candidate.name for candidate in own_candidates(str(every), Bundle.open(every).manifest, threads=1)]
    assert "openvino int8-weights" in names


def test_widths_that_32_does_not_divide(traced: onnx.ModelProto, checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO refuses a block that is cut short."""
    graph = lower(ir.from_proto(traced), "openvino")
    quantize_weights(graph, load_config(checkpoint), bits=8, whole_blocks=True)
    ir.save(graph, tmp_path / "model.onnx")
    model = compiled(tmp_path / "model.onnx")
    assert weight_types(model) == {"i8": 6 * TINY["num_hidden_layers"]}
    assert cosine(*hidden_states(model, checkpoint)).min() >= 0.998


# bf16

LONGEST = TINY["max_position_embeddings"]
# 256 is the last position before the first that bf16 does not have.
LENGTHS = (64, 65, 512)


@pytest.fixture(scope="module")
def angles(traced: onnx.ModelProto) -> onnx.ModelProto:
    """The fp32 graph, which computes angles. Leave it as it is."""
    return ir.to_proto(lower(ir.from_proto(traced), "openvino"))


@pytest.fixture(scope="module")
def tables(traced: onnx.ModelProto) -> onnx.ModelProto:
    """The graph for bf16. Leave it as it is."""
    return ir.to_proto(lower(ir.from_proto(traced), "openvino", table_length=LONGEST))


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> dict[int, tuple[dict[str, np.ndarray], np.ndarray]]:
    """length -> a text and what float64 `eager` makes of it."""
    model = load_model(checkpoint).double()
    model.set_attention("eager")
    cases = {}
    for length in LENGTHS:
        ids = np.random.default_rng(length).integers(0, TINY["vocab_size"], (1, length))
        mask = np.ones_like(ids)
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
        cases[length] = ({"input_ids": ids, "attention_mask": mask}, hidden)
    return cases


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The fp32 graph with bf16 for every fp32 value, runnable in ONNX Runtime."""
    low = onnx.ModelProto()
    low.CopyFrom(model)
    del low.graph.value_info[:]
    low.opset_import[0].version = 22  # the first whose cosine takes bf16
    for tensor in low.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in low.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT:
            node.attribute[0].i = TensorProto.BFLOAT16
        assert all(attribute.t.data_type != TensorProto.FLOAT for attribute in node.attribute), node.op_type
    for value in low.graph.output:
        low.graph.node.append(helper.make_node("Cast", [f"{value.name}_low"], [value.name], to=TensorProto.FLOAT))
        for node in low.graph.node[:-1]:
            for names in (node.input, node.output):
                names[:] = [f"{name}_low" if name == value.name else name for name in names]
    return bf16_on_cpu(low)


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    hidden, pooled = session.run(OUTPUTS, feed)
    return hidden, pooled


def test_bf16_graph_shares_the_weights_of_fp32(every: Path) -> None:
    fp32, bf16, _ = Bundle.open(every).manifest.artifacts
    assert (bf16.target, bf16.precision, bf16.file) == ("openvino", "bf16", "onnx/model_openvino_bf16.onnx")
    assert bf16.data_file == fp32.data_file == "onnx/model_openvino.onnx_data"
    assert operators(every / fp32.file)["Cos"] == 2  # one per kind of layer
    assert operators(every / bf16.file)["Cos"] == 0
    # Cosines and sines of both kinds, for the lengths at which contents are read too, and nothing else.
    tables = 4 * max(LONGEST, *PROBES) * (SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2) * 4
    alone = SharedWeights(every.with_name("alone"))
    alone.save(ir.load(every / fp32.file), every.with_name("alone.onnx"))
    assert 0 <= (every / bf16.data_file).stat().st_size - alone.file.stat().st_size - tables < 4 * 64


def operators(file: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


@needs_bf16
def test_openvino_computes_in_bf16(every: Path, wide: Path) -> None:
    """The gate did it already: this looks at what it wrote, against another reference."""
    (report,) = (x for x in json.loads((every / "parity.json").read_text())["artifacts"] if x["precision"] == "bf16")
    assert report["passed"]
    model = openvino_core().compile_model(
        every / "onnx/model_openvino_bf16.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    got, want = hidden_states(model, wide)
    assert TOLERANCES["bf16"].min_cosine <= cosine(got, want).min() < 0.999999  # type: ignore[operator]


def test_engine_says_what_openvino_computes_in(every: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Embedder.load(every, engine="openvino", precision="bf16") as embedder:
        name, vectors = embedder.engine, embedder.embed(TEXTS)
    line = "model_openvino_bf16.onnx: openvino computes in fp32, for this CPU has no bf16"
    assert (name, line in caplog.messages) == (
        ("openvino (CPU, bf16)", False) if HAS_BF16 else ("openvino (CPU, fp32)", True)
    )
    with Embedder.load(every, engine="openvino", precision="fp32") as exact:
        assert cosine(vectors, exact.embed(TEXTS)).min() >= TOLERANCES["bf16"].min_pooled_cosine
    (candidate,) = (
        one for one in own_candidates(str(every), Bundle.open(every).manifest, threads=1) if one.name == "openvino bf16"
    )
    answer = subprocess.run(candidate.command, input="", capture_output=True, text=True, check=True).stdout
    assert ("this CPU has no bf16" in answer) != HAS_BF16  # `bench` counts no time of fp32 as bf16's


def test_first_difference_is_found_in_openvino(every: Path, wide: Path) -> None:
    """With a tolerance that only integers meet, the first place that is looked at."""
    none = Tolerance(max_abs_error=0.0, min_cosine=1.0, min_pooled_cosine=1.0)
    case = Case(batch=2, length=9, padding="right")
    file = every / "onnx/model_openvino_bf16.onnx"
    found = first_difference(file, wide, case, none)
    assert found.startswith("the embeddings, max abs error")
    loose = Tolerance(max_abs_error=1.0, min_cosine=0.99, min_pooled_cosine=0.99)
    found = first_difference(file, wide, case, loose)
    assert found.startswith("none of the layers; the pooled output")


@pytest.mark.parametrize("found", ["no bf16", "no openvino"])
def test_bf16_that_nothing_here_can_prove_is_refused(
    every: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    if found == "no openvino":
        monkeypatch.setitem(sys.modules, "openvino", None)
        line = r'^openvino is not installed, .* to prove openvino bf16: pip install "modernbert-deploy\[openvino\]"$'
    else:
        monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
        line = (
            "^this CPU has no bfloat16, which is needed to prove openvino bf16: "
            "(export on one that has|verify onnx/model_openvino_bf16.onnx on one that has, and .* with --artifact)$"
        )
    with pytest.raises(InputError, match=line):
        export(str(wide), tmp_path / "out", targets=("openvino",), precisions=("fp32", "bf16"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=line):
        verify_bundle(every)


def test_tables_change_nothing_in_fp32(tables: onnx.ModelProto, exact: dict[int, Any]) -> None:
    onnx.checker.check_model(tables, full_check=True)
    kinds = {node.op_type for node in tables.graph.node}
    assert not kinds & {"Cos", "Sin"}
    for feed, want in exact.values():
        np.testing.assert_allclose(run(tables, feed)[0], want, atol=1e-4)
    with pytest.raises(Exception, match=r"(?i)broadcast|dimension"):
        run(tables, {name: np.ones((1, LONGEST + 1), np.int64) for name in feed})


def test_every_result_may_be_rounded_where_tables_are_constants(
    tables: onnx.ModelProto, angles: onnx.ModelProto, exact: dict[int, Any]
) -> None:
    tolerance, failed = TOLERANCES["bf16"], []
    assert tolerance.min_cosine is not None
    for length, (feed, want) in exact.items():
        for name, graph in (("tables", tables), ("angles", angles)):
            hidden, pooled = run(rounded(graph), feed)
            token, text = cosine(hidden, want).min(), cosine(pooled, want.mean(1)).min()
            if token < tolerance.min_cosine or text < tolerance.min_pooled_cosine:
                failed.append((length, name))
    assert failed == [(512, "angles")]
