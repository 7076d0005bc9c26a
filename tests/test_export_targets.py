"""One export for several targets: files, shared weights, manifest, and that engines run what is meant for them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import TINY, randomise, write_checkpoint
from test_lowering_targets import cosine

import modernbert_export.export as export_module
from modernbert.cli.export import build_plans_or_say_why
from modernbert.config import ModernBertConfig
from modernbert.errors import InputError, ParityError
from modernbert.model import ModernBertForMaskedLM
from modernbert_export.contents import read_contents
from modernbert_export.export import export
from modernbert_export.lower import FORMS
from modernbert_export.session import open_session
from modernbert_export.shared_weights import SharedWeights
from modernbert_export.tensorrt import build as build_module
from modernbert_export.tensorrt.lint import Finding
from modernbert_export.variants import LOWERINGS, SUPPORTED, Variant, choose_variants, split_targets
from modernbert_runtime import Embedder
from modernbert_runtime import tensorrt_engine as engine_module
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.tensorrt_plan import DENSE_LENGTH, PlanRecord

TARGETS = tuple(SUPPORTED)
FILES = {
    ("portable", "fp32"): "model.onnx",
    ("portable", "fp16"): "model_fp16.onnx",
    ("openvino", "fp32"): "model_openvino.onnx",
    ("ort-cuda", "fp32"): "model_ort-cuda.onnx",
    ("ort-cuda", "fp16"): "model_ort-cuda_fp16.onnx",
    ("ort-cuda", "bf16"): "model_ort-cuda_bf16.onnx",
    ("tensorrt", "fp16"): "model_tensorrt_fp16.onnx",
    ("tensorrt-dense", "fp16"): "model_tensorrt-dense_fp16.onnx",
    ("tensorrt", "bf16"): "model_tensorrt_bf16.onnx",
    ("tensorrt-dense", "bf16"): "model_tensorrt-dense_bf16.onnx",
}


@pytest.fixture(scope="module")
def every(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for all targets in fp32, fp16 and bf16, as far as they go. Leave it as it is."""
    out = tmp_path_factory.mktemp("every") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUPPORTED, "openvino", ("fp32",))  # its bf16 needs a CPU that has it: tests/test_openvino.py
        export(str(checkpoint), out, targets=TARGETS[::-1], precisions=("fp32", "fp16", "bf16"))
    return out


def test_one_bundle_holds_all_targets(every: Path) -> None:
    artifacts = Bundle.open(every).manifest.artifacts
    assert {(artifact.target, artifact.precision): Path(artifact.file).name for artifact in artifacts} == FILES
    for artifact in artifacts:
        form = FORMS[artifact.target]
        proto = onnx.load(every / artifact.file, load_external_data=False)
        onnx.checker.check_model(every / artifact.file, full_check=True)
        assert (
            (artifact.opset, artifact.ir_version)
            == (form.opset, form.ir_version)
            == (
                proto.opset_import[0].version,
                proto.ir_version,
            )
        )
        assert bool(artifact.activation_bytes) == (artifact.target == "portable")
        assert artifact.max_length == (DENSE_LENGTH if artifact.target == "tensorrt-dense" else None)


def test_weights_of_a_precision_are_stored_once(every: Path, checkpoint: Path) -> None:
    data = {path.name: path.stat().st_size for path in (every / "onnx").glob("*_data")}
    # By the name of the portable graph, though it was asked for last.
    assert data.keys() == {"model.onnx_data", "model_fp16.onnx_data", "model_tensorrt_bf16.onnx_data"}
    weights = sum(weight.numel() for weight in transformers.AutoModel.from_pretrained(checkpoint).parameters())
    # Norms are too small to be worth it: they are in every graph.
    assert 3.9 * weights <= data["model.onnx_data"] <= 4.2 * weights
    assert 1.9 * weights <= data["model_fp16.onnx_data"] <= 2.2 * weights
    assert 1.9 * weights <= data["model_tensorrt_bf16.onnx_data"] <= 2.2 * weights
    assert all(path.stat().st_size < 200_000 for path in (every / "onnx").glob("*.onnx"))


@pytest.mark.parametrize(("target", "precision"), FILES)
def test_every_artifact_computes_what_transformers_does(
    every: Path, checkpoint: Path, target: str, precision: str
) -> None:
    ids = torch.randint(TINY["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32)(ids).last_hidden_state
    bundle = Bundle.open(every)
    file = bundle.onnx_path(bundle.artifact(target=target, precision=precision))
    session = open_session(file)
    got, _ = session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 300), np.int64)})
    assert cosine(got, want.numpy()).min() >= {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.999}[precision]


def test_attention_counts_as_work_whatever_its_operator(every: Path) -> None:
    contents = read_contents(every / "onnx/model_tensorrt-dense_fp16.onnx", quadratic=True)
    hidden, inner, layers = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    for tokens in (512, 8192):
        linear = 2 * tokens * hidden * (4 * hidden + 3 * inner)
        assert contents.flops[str(tokens)] == layers * (linear + 4 * tokens**2 * hidden)


def test_only_portable_graphs_must_stay_bounded(every: Path) -> None:
    read_contents(every / "onnx/model.onnx")
    with pytest.raises(ParityError, match="grows with the square of the length"):
        read_contents(every / "onnx/model_openvino.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("num_global_tokens", [0, 1])
def test_every_lowering_holds_at_2048_and_8192_tokens(
    tmp_path: Path, num_global_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(
        hidden_size=16, num_attention_heads=1, num_hidden_layers=2, local_attention=128, max_position_embeddings=8192
    )
    path = write_checkpoint(tmp_path / "narrow", **sizes)
    if num_global_tokens:
        model = ModernBertForMaskedLM(ModernBertConfig(**{**TINY, **sizes}, num_global_tokens=num_global_tokens))
        randomise(model)
        model.save_pretrained(path)
    monkeypatch.setitem(SUPPORTED, "openvino", ("fp32",))  # as above
    # Refuses, besides lost parity, a portable graph in which anything grows with the square of the length.
    export(str(path), tmp_path / "out", targets=TARGETS, precisions=("fp32", "fp16", "bf16"))
    for report in json.loads((tmp_path / "out/parity.json").read_text())["artifacts"]:
        lengths = {row["case"]["length"] for row in report["comparisons"]}
        long = {length for length in lengths if length > DENSE_LENGTH}
        assert long == (set() if "dense" in report["artifact"] else {2048, 8192}), report["artifact"]


def test_openvino_runs_its_own_artifact(every: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'modernbert-deploy[openvino]'")
    texts = ["a b c", "x y z " * 100, "q"]
    with caplog.at_level("INFO"), Embedder.load(every) as chosen:
        vectors = chosen.embed(texts)
    assert "onnx/model_openvino.onnx, target openvino" in caplog.text
    with Embedder.load(every, engine="onnxruntime") as other:
        np.testing.assert_allclose(vectors, other.embed(texts), atol=1e-5)


# What is made


def test_each_target_gets_the_precisions_that_it_has() -> None:
    assert choose_variants(["portable"], None) == (Variant("portable", "fp32"),)
    assert choose_variants(["tensorrt"], None) == (Variant("tensorrt", "fp16"), Variant("tensorrt-dense", "fp16"))
    chosen = choose_variants(["ort-cuda", "portable"], ["int8", "fp16"])
    assert chosen == (Variant("ort-cuda", "fp16"), Variant("portable", "int8"), Variant("portable", "fp16"))
    assert set(SUPPORTED) == set(LOWERINGS)
    assert {lowering for lowerings in LOWERINGS.values() for lowering in lowerings} == set(FORMS) - {"packed"}


@pytest.mark.parametrize(
    ("targets", "precisions", "named"),
    [
        (["tensorrt"], ["fp32"], "precision for target tensorrt must be one of fp16, bf16, int8-qdq, fp8, not 'fp32'"),
        (
            ["portable", "tensorrt"],
            ["fp32"],
            "precision for target tensorrt must be one of fp16, bf16, int8-qdq, fp8, not fp32",
        ),
        (["openvino", "openvino"], None, "target names 'openvino' more than once"),
        ([], None, "target is empty"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(targets: list[str], precisions: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        choose_variants(targets, precisions)


@pytest.mark.parametrize(
    ("targets", "graphs", "repository"),
    [
        (["triton"], ["portable"], True),
        (["ort-cuda", "triton"], ["ort-cuda"], True),
        (["triton", "openvino", "tensorrt"], ["openvino", "tensorrt"], True),
        (["openvino"], ["openvino"], False),
    ],
    ids=str,
)
def test_triton_is_a_repository_of_other_targets(targets: list[str], graphs: list[str], repository: bool) -> None:
    assert split_targets(targets) == (graphs, repository)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["openvino", "triton"], "target triton runs graphs of portable, ort-cuda, tensorrt: name one of these beside"),
        (["triton", "triton"], "target names 'triton' more than once"),
        (["abacus"], "target must be one of portable, openvino, ort-cuda, tensorrt, triton, not 'abacus'"),
        ([], "target is empty; give one or more of portable,openvino,ort-cuda,tensorrt,triton"),
    ],
    ids=str,
)
def test_targets_without_a_graph_for_triton_are_refused(targets: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        split_targets(targets)


def test_a_graph_that_tensorrt_would_refuse_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Finding(rule="operator", where="NonZero 'found'", message="not among the operators")
    monkeypatch.setattr(export_module, "lint", lambda *_, **__: [fault])
    with pytest.raises(ParityError, match="operator: NonZero 'found': not among"):
        export(str(checkpoint), tmp_path / "out", targets=("tensorrt",), max_length=20)
    assert not list(tmp_path.iterdir())


# Plans


def test_plans_are_built_from_what_the_bundle_holds(every: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        __version__ = "11.4.0"

    seen: dict[str, dict[str, Any]] = {}
    monkeypatch.setitem(sys.modules, "tensorrt", Library())
    monkeypatch.setattr(engine_module, "device_here", lambda: ("Test GPU", "9.0"))
    monkeypatch.setattr(
        build_module, "build_plans", lambda graphs, out, **more: seen.update({out.name: {**more, "graphs": graphs}})
    )
    out = build_module.plan_bundle(every)
    folders = [f"test-gpu-sm90-trt11.4.0-{precision}" for precision in ("fp16", "bf16")]
    assert out == [every / "tensorrt" / folder for folder in folders]
    assert list(seen) == folders
    for precision, built in zip(("fp16", "bf16"), seen.values(), strict=True):
        check_plans_of(built, precision)


def check_plans_of(seen: dict[str, Any], precision: str) -> None:
    assert {target: path.name for target, path in seen["graphs"].items()} == {
        "tensorrt-dense": f"model_tensorrt-dense_{precision}.onnx",
        "tensorrt": f"model_tensorrt_{precision}.onnx",
    }
    assert seen["precision"] == precision
    assert {profile.graph for profile in seen["profiles"]} == {"tensorrt-dense", "tensorrt"}
    assert max(profile.max_length for profile in seen["profiles"]) == TINY["max_position_embeddings"]
    assert {f"{target}.plan" for target in seen["graphs"]} == {PlanRecord.file_of(p.graph) for p in seen["profiles"]}


def test_export_says_how_to_build_plans_where_it_cannot(
    every: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert not build_plans_or_say_why(every)
    line = capsys.readouterr().out.strip()
    assert line.startswith("No TensorRT plans were built: tensorrt cannot be imported (")
    assert line.endswith(f"python -m modernbert_export.tensorrt {every}")
    assert not (every / "tensorrt").exists()


@pytest.mark.parametrize(
    ("arguments", "named"), [([], "usage: "), (["nowhere"], "error: bundle: no manifest.json")], ids=str
)
def test_building_plans_of_nothing_is_refused(arguments: list[str], named: str) -> None:
    command = [sys.executable, "-m", "modernbert_export.tensorrt", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(named)
    assert len(result.stderr.splitlines()) == 1


def test_weights_are_stored_apart_where_they_differ(every: Path, tmp_path: Path) -> None:
    shared = SharedWeights(tmp_path / "weights")
    for index, name in enumerate(("model.onnx", "model_openvino.onnx", "model.onnx")):
        graph = ir.load(every / "onnx" / name)
        if index == 2:
            value = graph.graph.initializers["model.embeddings.tok_embeddings.weight"]
            changed = value.const_value.numpy() + 1
            value.const_value = ir.tensor(changed, name=value.name)
        shared.save(graph, tmp_path / f"{index}.onnx")
    table = TINY["vocab_size"] * TINY["hidden_size"] * 4
    assert 0 <= shared.file.stat().st_size - (every / "onnx/model.onnx_data").stat().st_size - table < 64
    stored = onnx.load(tmp_path / "2.onnx")
    (kept,) = (x for x in stored.graph.initializer if x.name == "model.embeddings.tok_embeddings.weight")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept), changed)


def test_operators_may_stay_nodes(checkpoint: Path, tmp_path: Path) -> None:
    export(str(checkpoint), tmp_path / "out", precisions=("fp32", "int8-weights"), max_length=70, keep_functions=True)
    for artifact in Bundle.open(tmp_path / "out").manifest.artifacts:
        proto = onnx.load(tmp_path / "out" / artifact.file, load_external_data=False)
        nodes = {node.op_type for node in proto.graph.node if node.domain == "modernbert"}
        assert nodes == {"ModernBertRotary", "ModernBertLocalAttention", "ModernBertGlobalAttention"}
        assert nodes <= {function.name for function in proto.functions}
    with pytest.raises(InputError, match="keep_functions goes with portable, openvino and ort-cuda"):
        export(str(checkpoint), tmp_path / "no", targets=("tensorrt",), keep_functions=True)
