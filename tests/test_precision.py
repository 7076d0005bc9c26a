"""int8 and fp16: what is in the files, how scales and islands are chosen, and that a bad artifact is never written."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY, write_checkpoint
from safetensors.torch import load_file, save_file

import modernbert_export.build as build_module
import modernbert_export.export as export_module
import modernbert_export.verify as verify_module
from modernbert.errors import InputError, ParityError
from modernbert.model import load_model
from modernbert_export.contents import read_contents
from modernbert_export.export import export
from modernbert_export.on_text import OnText
from modernbert_export.precision.audit import audit
from modernbert_export.precision.calibrate import InputSampler, linear_names, smooth, smoothing_scales
from modernbert_export.precision.linears import integer_weight
from modernbert_export.precision.weight_only import Bits, block_weight
from modernbert_export.text_fidelity import TextFidelity
from modernbert_export.verify import verify_bundle
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.machine import multiplies_int8_exactly

PRECISIONS = ("fp32", "int8", "fp16", "int8-weights")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 texts of letters, one a line, as the tiny tokenizer knows them."""
    draw = random.Random(0)
    lines = (" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 60))) for _ in range(64))
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def several(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in all precisions."""
    out = tmp_path_factory.mktemp("several") / "bundle"
    export(str(checkpoint), out, precisions=PRECISIONS, text=texts)
    return out


def test_one_bundle_holds_all_precisions(several: Path) -> None:
    artifacts = Bundle.open(several).manifest.artifacts
    assert [(artifact.precision, artifact.file) for artifact in artifacts] == [
        ("fp32", "onnx/model.onnx"),
        ("int8", "onnx/model_quantized.onnx"),
        ("fp16", "onnx/model_fp16.onnx"),
        ("int8-weights", "onnx/model_int8_weights.onnx"),
    ]
    for artifact in artifacts:
        onnx.checker.check_model(several / artifact.file, full_check=True)
    reports = json.loads((several / "parity.json").read_text())["artifacts"]
    assert [report["precision"] for report in reports] == list(PRECISIONS)
    assert artifacts[1].parity["text_min_cosine"] >= 0.99
    assert [artifact.reduced_range for artifact in artifacts] == [None, not multiplies_int8_exactly(), None, None]
    assert "<svg" in (several / "parity.svg").read_text()


# Of token vectors: fp16 has 11 bits, int8 8 in every product of four layers.
@pytest.mark.parametrize(
    ("precision", "cosine"),
    [("fp32", 0.9999999), ("fp16", 0.99995), ("int8", 0.99), ("int8-weights", 0.998)],
)
def test_every_precision_computes_what_transformers_does(
    several: Path, checkpoint: Path, precision: str, cosine: float
) -> None:
    ids = torch.randint(TINY["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(ids).last_hidden_state
    file = several / Bundle.open(several).artifact(precision=precision).file
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got, pooled = session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 300), np.int64)})
    assert got.dtype == pooled.dtype == np.float32
    assert torch.cosine_similarity(torch.from_numpy(got).double(), want.double(), dim=-1).min() >= cosine


def test_int8_file_holds_linear_layers_and_embeddings_as_integers(several: Path) -> None:
    graph = onnx.load(several / "onnx/model_quantized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    # Each of 4 layers: q with k, v, Wo, both halves of Wi, mlp.Wo; one quantised input for q, k, v, and one for Wi.
    assert (kinds.count("MatMulInteger"), kinds.count("DynamicQuantizeLinear")) == (24, 16)
    assert kinds.count("MatMul") == 4  # scores and sums of two local layers; those of the global ones are in loops
    integers = sum(np.prod(x.dims) for x in graph.initializer if x.data_type == onnx.TensorProto.INT8)
    hidden, inner, layers = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    weights = layers * hidden * (4 * hidden + 3 * inner) + TINY["vocab_size"] * hidden
    assert integers == weights
    floats = sum(np.prod(x.dims) for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT)
    assert floats < 0.1 * weights


def test_fp16_file_holds_weights_in_16_bits_and_norms_in_32(several: Path) -> None:
    graph = onnx.load(several / "onnx/model_fp16.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 500}
    assert kinds == {onnx.TensorProto.FLOAT16}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {stored[node.input[1]] for node in norms} == {onnx.TensorProto.FLOAT}


def test_verify_compares_all_precisions_again(several: Path, texts: Path) -> None:
    reports = verify_bundle(several, text=texts)
    assert [report.precision for report in reports] == list(PRECISIONS)
    assert all(report.passed and report.text is not None for report in reports)
    fp32, int8, fp16, weights = (report.text for report in reports if isinstance(report.text, TextFidelity))
    assert fp32.top_overlap == 1.0
    assert int8.rank_correlation < fp16.rank_correlation <= fp32.rank_correlation
    assert int8.rank_correlation < weights.rank_correlation <= fp32.rank_correlation


def test_verify_takes_one_artifact_and_refuses_what_overflows_here(
    several: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (report,) = verify_bundle(several, files=["onnx/model_fp16.onnx"])
    assert (report.artifact, report.passed, report.text) == ("onnx/model_fp16.onnx", True, None)
    with pytest.raises(InputError, match=r"^artifact must be one of onnx/model\.onnx, .*, not 'model\.onnx'$"):
        verify_bundle(several, files=["onnx/model.onnx", "model.onnx"])
    monkeypatch.setattr(verify_module, "overflows_here", lambda artifact: artifact.precision == "int8")
    with pytest.raises(InputError, match=r"VNNI.*onnx/model_quantized\.onnx on one that has.*--artifact$"):
        verify_bundle(several)
    assert verify_bundle(several, files=["onnx/model.onnx"])[0].passed


# Smoothing


@pytest.fixture
def spiky(tmp_path: Path) -> Path:
    """A checkpoint with a few channels far larger than the others wherever a linear layer reads."""
    path = write_checkpoint(tmp_path / "spiky", num_hidden_layers=3)
    weights = load_file(path / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            value[5] *= 60
        elif name.endswith("Wqkv.weight"):
            value[2 * 48 + 7] *= 60  # a channel of v
        elif name.endswith("Wi.weight"):
            value[40 + 9] *= 60  # a channel of the gate
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_smoothing_changes_no_bit_of_the_result_and_lowers_the_error(spiky: Path) -> None:
    ids = torch.randint(TINY["vocab_size"], (4, 90), generator=torch.Generator().manual_seed(0))
    model = load_model(spiky)
    with torch.no_grad(), InputSampler(model) as sampler:
        before = model(ids).last_hidden_state
    weights = {name: model.get_submodule(name).weight.clone() for name in linear_names(model)}
    choices = smooth(model, sampler.rows, 127)
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, before)
    assert [choice.name for choice in choices] == list(linear_names(model))
    smoothed = [choice for choice in choices if choice.strength is not None]
    assert len(smoothed) >= 9
    assert choices[0].strength is None  # nothing before the first layer's attention can take the scales
    for choice in smoothed:
        x, w = sampler.rows[choice.name].numpy(), weights[choice.name].detach().numpy()
        assert choice.error < quantisation_error(x, w)


def test_accidents_of_a_sample_are_not_smoothed(checkpoint: Path) -> None:
    # Rare large values that fall in any channel: a scale made for those of the sample fits no other.
    model, generator = load_model(checkpoint), torch.Generator().manual_seed(0)
    rows = {}
    for name in linear_names(model):
        shape = 256, model.get_submodule(name).in_features
        large = 50.0 * (torch.rand(shape, generator=generator) < 1e-3)
        rows[name] = torch.randn(shape, generator=generator) * (1 + large)
    choices = smooth(model, rows, 127)
    # By chance a few; by the sample itself, without halves, most of them.
    assert sum(choice.strength is not None for choice in choices) <= len(choices) // 4


def quantisation_error(x: np.ndarray, w: np.ndarray) -> float:
    """Relative error of x @ w.T with x in 256 steps between its extremes and w in 255 steps per output."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    x_rounded = np.rint((x - low) / step) * step + low
    steps = np.abs(w).max(1, keepdims=True) / 127
    wanted = x @ w.T
    return float(np.linalg.norm(x_rounded @ (np.rint(w / steps) * steps).T - wanted) / np.linalg.norm(wanted))


def test_scales_are_powers_of_two_and_larger_where_the_input_is() -> None:
    x = torch.ones(4, 6)
    x[:, 2] = 100
    scale = smoothing_scales(x, torch.ones(5, 6), 0.5)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert scale[2] / scale[0] in (8, 16)  # sqrt(100), rounded


def test_without_vnni_int8_keeps_to_7_bits(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "multiplies_int8_exactly", lambda: False)
    with pytest.raises(InputError, match="no VNNI"):
        export(str(checkpoint), tmp_path / "out", precisions=["int8"], text=texts, reduce_range=False)
    manifest = export(str(checkpoint), tmp_path / "out", precisions=["int8"], text=texts)
    assert manifest.artifacts[0].reduced_range
    graph = onnx.load(tmp_path / "out" / manifest.artifacts[0].file).graph
    integers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [integers[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(weights) == 24
    assert {int(np.abs(weight).max()) for weight in weights} == {63}


@pytest.mark.parametrize("levels", [127, 63])
def test_integer_weights_are_within_half_a_step(levels: int) -> None:
    w = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    w[:, 3] = 0
    integers, scale = integer_weight(w, levels)
    assert np.abs(integers).max() == levels
    assert (np.abs(integers * scale - w) <= scale * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_block_weights_are_within_half_a_step(bits: Bits) -> None:
    w = np.random.default_rng(0).standard_normal((70, 7)).astype(np.float32)
    w[:32, 3] = 0
    integers, scale = block_weight(w, bits)
    assert (integers.shape, scale.shape) == ((70, 7), (3, 7))
    whole = integers.astype(np.float32)
    assert whole.min() == -(1 << (bits - 1))
    error = np.abs(whole * scale.repeat(32, 0)[:70] - w) / np.abs(scale).repeat(32, 0)[:70]
    # What is as large as the block's largest weight, on the other side, is cut off by one step at most.
    assert np.quantile(error, 0.9) <= 0.5001
    assert error.max() <= 1.0001


@pytest.fixture(scope="module")
def four_bits(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are what 4 bits can say, so that nothing is lost."""
    path = tmp_path_factory.mktemp("four") / "checkpoint"
    shutil.copytree(checkpoint, path)
    weights = load_file(path / "model.safetensors")
    for name in linear_names(load_model(path)):
        matrix = weights[f"model.{name}.weight"]
        integers, scale = block_weight(matrix.T.numpy(), 4)
        exact = integers.astype(np.float32) * scale.repeat(32, 0)[: len(integers)]
        weights[f"model.{name}.weight"] = torch.from_numpy(exact.T.copy())
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_four_bits_say_what_they_can(four_bits: Path, texts: Path, tmp_path: Path) -> None:
    export(str(four_bits), tmp_path / "out", precisions=("int4-weights",), text=texts)
    (artifact,) = Bundle.open(tmp_path / "out").manifest.artifacts
    assert (artifact.file, artifact.opset) == ("onnx/model_q4.onnx", 21)
    assert artifact.parity["text_min_cosine"] > 0.999  # what is left: ONNX Runtime rounds the inputs to 8 bits
    model = onnx.load(tmp_path / "out" / artifact.file)
    assert {opset.domain for opset in model.opset_import} == {""}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    blocks = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(blocks) == 24
    assert {stored[node.input[0]] for node in blocks} == {onnx.TensorProto.INT4}
    file = tmp_path / "out" / artifact.file
    assert read_contents(file).weight_bytes < file.stat().st_size


@pytest.mark.usefixtures("quick")
def test_four_bits_that_lose_too_much_are_not_written(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="int4-weights loses too much, with 8 layers kept finer"):
        export(str(checkpoint), tmp_path / "out", precisions=("int4-weights",), text=texts, max_length=20)
    assert not list(tmp_path.iterdir())


# The gate


def planted(monkeypatch: pytest.MonkeyPatch, bad: int) -> list[int]:
    """The first `bad` measurements of int8 on text say that it fails. Returns what each found: MatMulInteger nodes."""
    found: list[int] = []
    measure = OnText.compare

    def compare(self: OnText, file: Path, progress: Any) -> Any:
        result = measure(self, file, progress)
        nodes = onnx.load(file, load_external_data=False).graph.node
        found.append(sum(node.op_type == "MatMulInteger" for node in nodes))
        return dataclasses.replace(result, top_overlap=0.5) if len(found) <= bad else result

    monkeypatch.setattr(OnText, "compare", compare)
    return found


@pytest.mark.usefixtures("quick")
def test_int8_keeps_more_layers_in_fp32_until_it_passes(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planted(monkeypatch, 2)
    manifest = export(str(checkpoint), tmp_path / "out", precisions=("int8",), text=texts, max_length=20)
    assert [artifact.precision for artifact in manifest.artifacts] == ["int8"]
    assert found[0] == 24
    assert found[0] > found[1] > found[2]
    (report,) = json.loads((tmp_path / "out/parity.json").read_text())["artifacts"]
    assert "Kept finer: layers." in report["notes"][-1]
    assert not (tmp_path / "out/onnx/model.onnx").exists()


@pytest.mark.usefixtures("quick")
def test_int8_that_never_passes_is_not_written(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, 100)
    with pytest.raises(ParityError, match="top-10 overlap"):
        export(str(checkpoint), tmp_path / "out", precisions=("fp32", "int8"), text=texts, max_length=20)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the fp32 graph of `several` in place of a trace of their own, which takes seconds."""
    import onnx_ir as ir

    monkeypatch.setattr(build_module, "trace", lambda model, **_: ir.load(several / "onnx/model.onnx"))
    monkeypatch.setattr(build_module, "lower", lambda graph, target, **_: graph)


# Islands of fp32


@pytest.fixture
def large_values(tmp_path: Path) -> Path:
    """A checkpoint whose second layer multiplies values beyond fp16 before mlp.Wo makes them small again."""
    path = write_checkpoint(tmp_path / "large", num_hidden_layers=2)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.Wi.weight"] *= 400
    weights["model.layers.1.mlp.Wo.weight"] /= 160_000
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def source_of_large(tmp_path: Path) -> Path:
    """A checkpoint with one weight that fp16 cannot hold."""
    path = write_checkpoint(tmp_path / "weights", num_hidden_layers=3)
    weights = load_file(path / "model.safetensors")
    weights["model.embeddings.tok_embeddings.weight"][0, 0] = 1e5
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_audit_finds_what_fp16_cannot_hold(large_values: Path) -> None:
    model = load_model(large_values)
    ids = torch.arange(TINY["vocab_size"])
    ranges = audit(model, [ids])
    assert [row.fp32 for row in ranges] == [(), ("mlp",)]
    with torch.no_grad():
        hidden = model(ids[None], output_hidden_states=True).hidden_states
    assert ranges[0].residual == pytest.approx(float(hidden[1].abs().max()))
    assert ranges[1].gated > 65_504 > ranges[0].gated


def test_values_beyond_fp16_are_computed_in_fp32_or_refused(
    large_values: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For TensorRT the lint counts what is fp32, too.
    targets = ("portable", "tensorrt")
    export(str(large_values), tmp_path / "out", targets=targets, precisions=("fp16",), max_length=40)
    assert "| 1 (sliding_attention) |" in (tmp_path / "out/parity.md").read_text()

    def blind(*arguments: Any) -> Any:
        return tuple(dataclasses.replace(row, gated=0.0) for row in audit(*arguments))

    monkeypatch.setattr(build_module, "audit", blind)
    with pytest.raises(ParityError, match=r"First layer that differs: layer 1 \(sliding"):
        export(str(large_values), tmp_path / "other", precisions=("fp16",), max_length=40)
    assert not (tmp_path / "other").exists()


def test_weights_beyond_fp16_are_refused_by_name(source_of_large: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"embeddings\.tok_embeddings\.weight has values beyond float16: export it as fp32"
    ):
        export(str(source_of_large), tmp_path / "out", precisions=("fp16",), max_length=40)
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            dict(precisions=("fp8",)),
            r"precision for target portable must be one of fp32, fp16, int8, int8-weights, int4-weights, not 'fp8'",
        ),
        (dict(precisions=()), "precision for target portable is empty"),
        (dict(precisions=("fp32", "fp32")), "more than once"),
        (dict(targets=("abacus",)), "target must be one of portable, openvino, ort-cuda, tensorrt, not 'abacus'"),
        (dict(targets=()), "target is empty"),
        (dict(targets=("openvino",) * 2), "target names 'openvino' more than once"),
        (
            dict(targets=("portable", "tensorrt"), precisions=("fp32",)),
            "for target tensorrt must be one of fp16, bf16, int8-qdq, fp8, not fp32",
        ),
        (dict(text="nowhere.txt"), "text 'nowhere.txt' cannot be read"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named) as caught:
        export(str(checkpoint), tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
