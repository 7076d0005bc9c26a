"""From checkpoint to bundle: what the file is, what the directory holds, and that it is whole or absent."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY, WORDS, write_checkpoint
from safetensors.torch import load_file, save_file

import modernbert_export.build as build_module
import modernbert_export.export as export_module
import modernbert_export.source as source_module
from modernbert.errors import InputError, ParityError
from modernbert.model import load_model
from modernbert.output import whole_directory
from modernbert_export.export import check_saved, export
from modernbert_export.lower import FORMS
from modernbert_export.source import open_source
from modernbert_runtime import Embedder
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.manifest import sha256_file

# ONNX Runtime against transformers, both in fp32, on vectors of unit length.
UNIT = dict(atol=1e-5, rtol=0)


def stored_graph(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "onnx/model.onnx", load_external_data=False)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def sentence_transformers_files(directory: Path, *, pooling: dict[str, Any], normalize: bool, **more: Any) -> Path:
    """Adds to a checkpoint what sentence-transformers writes beside one."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(directory / "modules.json", modules)
    write_json(directory / "1_Pooling/config.json", {"word_embedding_dimension": TINY["hidden_size"], **pooling})
    for name, content in more.items():
        write_json(directory / f"{name}.json", content)
    return directory


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def no_trace(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the graph of `bundle` in place of a trace of their own, which takes seconds."""
    monkeypatch.setattr(build_module, "trace", lambda model, **_: ir.load(bundle / "onnx/model.onnx"))
    monkeypatch.setattr(build_module, "lower", lambda graph, target, **_: graph)


# The file


def test_file_is_plain_onnx_with_weights_beside_it(bundle: Path) -> None:
    check_saved(bundle / "onnx/model.onnx", FORMS["portable"])
    onnx.checker.check_model(bundle / "onnx/model.onnx", full_check=True)
    proto = stored_graph(bundle)
    assert proto.ir_version == 10
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
    assert not proto.functions
    assert {value.name for value in proto.graph.input} == {"input_ids", "attention_mask"}
    assert [value.name for value in proto.graph.output] == ["last_hidden_state", "sentence_embedding"]
    assert {node.domain for node in proto.graph.node} == {""}
    # Operators inside Loop bodies count too.
    bodies = [a.g for node in proto.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert bodies
    assert {node.domain for body in bodies for node in body.node} == {""}
    locations = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx_data"}


def test_file_holds_the_weights_and_nothing_that_grows_with_the_length(bundle: Path) -> None:
    weights = sum(weight.numel() for weight in load_file(bundle / "model.safetensors").values())
    stored = sum(int(np.prod(tensor.dims)) for tensor in stored_graph(bundle).graph.initializer)
    # Beside the weights, once each: the band of a block (radius x 3 radius), rotary frequencies, shapes, scalars.
    # One rotary table for the example's 200 tokens would be 1,600 values more.
    radius = TINY["local_attention"] // 2
    assert weights <= stored <= weights + 3 * radius**2 + 250
    # The writer aligns large tensors to pages.
    assert (bundle / "onnx/model.onnx_data").stat().st_size <= 4 * weights + 500_000
    assert (bundle / "onnx/model.onnx").stat().st_size < 300_000


def test_layers_share_what_depends_on_mask_and_length_alone(bundle: Path) -> None:
    kinds = [node.op_type for node in stored_graph(bundle).graph.node]
    assert kinds.count("Loop") == 2  # one per global layer
    assert kinds.count("Cos") == kinds.count("Sin") == 2  # one per kind of layer


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 520), (5, 300)], ids=str)
def test_any_batch_and_length_runs(bundle: Path, shape: tuple[int, int]) -> None:
    session = onnxruntime.InferenceSession(str(bundle / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], shape)
    mask = np.ones_like(ids)
    mask[-1, shape[1] // 2 + 1 :] = 0
    hidden, pooled = session.run(None, {"input_ids": ids, "attention_mask": mask})
    model = load_model(bundle)
    with torch.no_grad():
        want = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
    # fp32 against fp32 through four layers.
    torch.testing.assert_close(torch.from_numpy(hidden)[mask != 0], want[mask != 0], atol=2e-5, rtol=1e-4)
    mean = torch.stack([row[: int(count)].mean(0) for row, count in zip(want, mask.sum(1), strict=True)])
    torch.testing.assert_close(torch.from_numpy(pooled), torch.nn.functional.normalize(mean), **UNIT)


def test_rows_without_tokens_give_finite_values(bundle: Path) -> None:
    session = onnxruntime.InferenceSession(str(bundle / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.full((2, 9), 3)
    for mask in (np.zeros_like(ids), np.stack([np.ones(9, int), np.zeros(9, int)])):
        for value in session.run(None, {"input_ids": ids, "attention_mask": mask}):
            assert np.isfinite(value).all()


FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "frozen length of an input": (
        lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 200),
        "axes",
    ),
    "frozen batch of an input": (
        lambda proto: setattr(proto.graph.input[1].type.tensor_type.shape.dim[0], "dim_value", 2),
        "axes",
    ),
    "frozen batch of the embedding": (
        lambda proto: setattr(proto.graph.output[1].type.tensor_type.shape.dim[0], "dim_value", 2),
        "axes",
    ),
    "an output more": (
        lambda proto: proto.graph.output.append(
            onnx.helper.make_tensor_value_info("layers.1.input", onnx.TensorProto.FLOAT, ["batch", "sequence", 48])
        ),
        "axes",
    ),
    "two lengths that may differ": (
        lambda proto: setattr(proto.graph.input[1].type.tensor_type.shape.dim[1], "dim_param", "other"),
        "axes",
    ),
    "another type of an input": (
        lambda proto: setattr(proto.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.INT32),
        "types",
    ),
    "another opset": (lambda proto: setattr(proto.opset_import[0], "version", 23), "opsets"),
    "operators of another domain": (
        lambda proto: proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1)),
        "opsets",
    ),
    "another IR": (lambda proto: setattr(proto, "ir_version", 11), "ir_version"),
    "a function left": (lambda proto: proto.functions.append(onnx.FunctionProto(name="f", domain="x")), "functions"),
}


@pytest.mark.parametrize(("fault", "named"), FAULTS.values(), ids=FAULTS)
def test_saved_file_with_a_fault_is_refused(
    bundle: Path, tmp_path: Path, fault: Callable[[onnx.ModelProto], object], named: str
) -> None:
    proto = stored_graph(bundle)
    fault(proto)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ParityError, match=named):
        check_saved(tmp_path / "model.onnx", FORMS["portable"])


# The directory


def test_bundle_holds_what_other_tools_look_for(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json",
        "parity.json",
        "parity.md",
        "parity.svg",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
    }
    assert (bundle / "2_Normalize").is_dir()
    assert json.loads((bundle / "special_tokens_map.json").read_text())["pad_token"]["content"] == "[PAD]"
    pooling = json.loads((bundle / "1_Pooling/config.json").read_text())
    assert (pooling["pooling_mode_mean_tokens"], pooling["pooling_mode_cls_token"]) == (True, False)
    assert json.loads((bundle / "sentence_bert_config.json").read_text())["max_seq_length"] == 520


def test_manifest_knows_memory_and_the_range_of_embeddings(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    sizes = manifest.artifacts[0].activation_bytes
    assert set(sizes) == {"512", "2048", "8192"}
    # Linear layers, windows and blocks of queries: nothing grows faster than the length.
    assert sizes["512"] < sizes["2048"] < sizes["8192"] <= 4.1 * sizes["2048"]
    low, high = np.array(manifest.calibration["low"]), np.array(manifest.calibration["high"])
    assert low.shape == high.shape == (48,)
    assert (low < high).all()
    assert np.abs([low, high]).max() <= 1  # of vectors of unit length


def test_manifest_is_true(bundle: Path, checkpoint: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    for name, digest in manifest.files.items():
        assert sha256_file(bundle / name) == digest, name
    assert (manifest.task, manifest.dimension, manifest.max_length) == ("embedding", 48, 520)
    assert (manifest.pooling, manifest.normalize, manifest.prompts) == ("mean", True, {})
    assert manifest.source.name == checkpoint.name
    assert manifest.generator.startswith("modernbert-deploy ")
    (artifact,) = manifest.artifacts
    assert (artifact.target, artifact.precision) == ("portable", "fp32")
    assert (artifact.file, artifact.data_file) == ("onnx/model.onnx", "onnx/model.onnx_data")
    assert (artifact.opset, artifact.ir_version) == (20, 10)
    (report,) = json.loads((bundle / "parity.json").read_text())["artifacts"]
    assert artifact.parity == report["summary"]
    assert report["passed"] is True
    assert 0 < artifact.parity["max_abs_error"] <= 1e-4
    assert "Result: passed." in (bundle / "parity.md").read_text()


def test_source_hash_follows_the_weights(bundle: Path, checkpoint: Path, source: Path) -> None:
    stated = Bundle.open(bundle).manifest.source.sha256
    assert open_source(str(checkpoint)).sha256() == stated
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    assert open_source(str(source)).sha256() != stated


def test_bundle_opens_in_transformers_with_its_tokenizer(bundle: Path, checkpoint: Path) -> None:
    model = transformers.AutoModel.from_pretrained(bundle, dtype=torch.float32).eval()
    original = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    batch = tokenizer(["a b c", "z"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist()[1] == [1, WORDS.index("z"), 2, 3, 3]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert torch.equal(model(**batch).last_hidden_state, original(**batch).last_hidden_state)


def test_config_tells_older_versions_of_transformers_the_same(bundle: Path) -> None:
    # They know no layer_types and no rope_parameters: these three keys only.
    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "modernbert"
    assert config["global_attn_every_n_layers"] == 3
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (160_000, 10_000)


def test_embeddings_are_those_of_transformers(bundle: Path, checkpoint: Path) -> None:
    texts = ["a b c", "", "z " * 400, "q", "y x w v u t s r q p o n m l"]
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    with Embedder.load(bundle) as embedder:
        vectors = embedder.embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        want = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(torch.from_numpy(vector), want, **UNIT)


def test_cls_pooling_without_normalisation_from_a_sharded_bf16_encoder(tmp_path: Path) -> None:
    # Everything that differs from the plain way, in one export, since each takes seconds.
    source = write_checkpoint(tmp_path / "source", num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    stock = transformers.AutoModel.from_pretrained(source, dtype=torch.bfloat16)
    (source / "model.safetensors").unlink()
    stock.save_pretrained(source, max_shard_size="10KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    sentence_transformers_files(
        source,
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        normalize=False,
        sentence_bert_config={"max_seq_length": 40, "do_lower_case": False},
        config_sentence_transformers={"prompts": {"query": "q ", "document": ""}},
    )
    manifest = export(str(source), tmp_path / "out")
    assert (manifest.pooling, manifest.normalize, manifest.max_length) == ("cls", False, 40)
    assert manifest.prompts == {"query": "q ", "document": ""}
    assert not (tmp_path / "out/2_Normalize").exists()
    assert json.loads((tmp_path / "out/1_Pooling/config.json").read_text())["pooling_mode_cls_token"] is True

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    stock = stock.float().eval()
    with Embedder.load(tmp_path / "out") as embedder:
        vectors = embedder.embed_queries(["a b c", "k"])
    for text, vector in zip(["q a b c", "q k"], vectors, strict=True):
        with torch.no_grad():
            want = stock(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        torch.testing.assert_close(torch.from_numpy(vector), want, atol=2e-5, rtol=1e-4)


# Parity lost


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_wrong_weight_means_no_bundle_and_names_the_layer(source: Path, tmp_path: Path, layer: int) -> None:
    # One matrix differs by a thousandth between the graph and the checkpoint.
    weights = load_file(source / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.Wi.weight"] *= 1.001
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    kind = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"][layer]
    with pytest.raises(ParityError, match=rf"First layer that differs: layer {layer} \({kind}\)"):
        export(str(source), tmp_path / "out", max_length=20)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        # The usual mistakes: a window one wider, the thetas of the two kinds exchanged, another pattern.
        (dict(local_attention=10), r"layer 1 \(sliding"),
        (dict(local_attention=6), r"layer 1 \(sliding"),
        (
            dict(
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 160_000.0},
                }
            ),
            r"layer 0 \(full",
        ),
        (
            dict(layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"]),
            r"layer 2 \(full",
        ),
        (dict(norm_eps=1e-2), "the embeddings"),
    ],
    ids=["window wider", "window narrower", "thetas exchanged", "other pattern", "other epsilon"],
)
def test_usual_mistakes_are_found(source: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, **change})
    with pytest.raises(ParityError, match=f"First layer that differs: {named}"):
        export(str(source), tmp_path / "out", max_length=20)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("override", [dict(pooling="cls"), dict(normalize=False)], ids=str)
def test_wrong_pooling_is_found(source: Path, tmp_path: Path, override: dict[str, Any]) -> None:
    # The graph pools by the mean and normalises; the source says otherwise.
    pooling = {"pooling_mode_cls_token": "pooling" in override, "pooling_mode_mean_tokens": "pooling" not in override}
    sentence_transformers_files(source, pooling=pooling, normalize=override.get("normalize", True))
    with pytest.raises(ParityError, match="pooled output alone"):
        export(str(source), tmp_path / "out", max_length=20)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Whole or absent


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("step", ["load_for_task", "write_model_files", "trace", "check_saved", "verify", "hash_files"])
@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_interrupted_export_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    owners = {"trace": build_module, "load_for_task": source_module}
    monkeypatch.setattr(owners.get(step, export_module), step, fail)
    with pytest.raises(type(error)):
        export(str(source), tmp_path / "deep/out", max_length=3)
    assert not list((tmp_path / "deep").iterdir())


def test_directory_appears_at_the_end_only(tmp_path: Path) -> None:
    out = tmp_path / "a/b"
    with whole_directory(out, room=1) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
        assert partial.parent == out.parent
    assert (out / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["b"]


def test_existing_output_is_refused_before_any_work(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("directory", "file", "link"):
        out = tmp_path / name
        if name == "directory":
            out.mkdir()
        elif name == "file":
            out.touch()
        else:
            out.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match=f"{name}.* exists"):
            export(str(checkpoint), out)
    assert not (tmp_path / "nowhere").exists()


def test_full_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MiB of disk"), whole_directory(tmp_path / "out", room=1 << 60):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "file").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make() -> None:
        with whole_directory(out, room=1) as partial:
            (partial / "file").touch()
            out.mkdir()
            (out / "precious").touch()

    with pytest.raises(InputError, match="out"):
        make()
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What the source says


POOLINGS: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    "newer spelling": ({"pooling_mode": "cls"}, "cls"),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("pooling", "expected"), POOLINGS.values(), ids=POOLINGS)
def test_pooling_and_normalisation_come_from_the_source(
    source: Path, pooling: dict[str, Any], expected: str, normalize: bool
) -> None:
    sentence_transformers_files(source, pooling=pooling, normalize=normalize)
    found = open_source(str(source))
    assert (found.pooling, found.normalize) == (expected, normalize)
    assert open_source(str(source), pooling="mean").pooling == "mean"


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"cls\+mean"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_pooling_that_is_not_supported_is_refused(source: Path, pooling: dict[str, Any], named: str) -> None:
    sentence_transformers_files(source, pooling=pooling, normalize=True)
    with pytest.raises(InputError, match=named):
        open_source(str(source))


def test_pooling_is_read_where_modules_json_says(source: Path) -> None:
    sentence_transformers_files(source, pooling={"pooling_mode_cls_token": True}, normalize=True)
    (source / "1_Pooling").rename(source / "pooling")
    modules = json.loads((source / "modules.json").read_text())
    for module in modules:
        module["path"] = module["path"].replace("1_Pooling", "pooling")
    write_json(source / "modules.json", modules)
    assert open_source(str(source)).pooling == "cls"


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "Dense"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name"),
        ("config_sentence_transformers.json", {"prompts": {"query": None}}, "prompts"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
    ],
)
def test_what_an_export_cannot_hold_is_refused(source: Path, file: str, content: Any, named: str) -> None:
    sentence_transformers_files(source, pooling={"pooling_mode_mean_tokens": True}, normalize=True)
    write_json(source / file, content)
    with pytest.raises(InputError, match=named):
        open_source(str(source))


def test_plain_checkpoint_gets_mean_pooling_and_unit_length(source: Path) -> None:
    found = open_source(str(source))
    assert (found.pooling, found.normalize, found.max_length, found.prompts) == ("mean", True, 520, {})
    assert found.special_tokens["pad_token"] == "[PAD]"


def test_max_length_is_the_smallest_of_what_is_said(source: Path) -> None:
    assert open_source(str(source), max_length=64).max_length == 64
    write_json(source / "sentence_bert_config.json", {"max_seq_length": 99})
    assert open_source(str(source)).max_length == 99
    assert open_source(str(source), max_length=100).max_length == 100
    write_json(source / "sentence_bert_config.json", {"max_seq_length": 100_000})
    assert open_source(str(source)).max_length == 520
    for value in (0, -1, 2, 521):
        with pytest.raises(InputError, match=f"max_length must be 3 to 520 .*not {value}"):
            open_source(str(source), max_length=value)


def spoil_weights(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down.weight"] = weights.pop("model.layers.1.mlp.Wo.weight")
    weights["model.layers.2.attn.Wo.weight"] = weights["model.layers.2.attn.Wo.weight"][:, :-1].contiguous()
    save_file(weights, path / "model.safetensors", {"format": "pt"})


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer"),
    "tokenizer larger than the model": (
        lambda path: rewrite(path / "config.json", vocab_size=20, pad_token_id=3),
        "vocab_size 20",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
    "pickled weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "pickled weights are not read",
    ),
    "weights missing, renamed and of another shape": (
        spoil_weights,
        "1 missing: layers.1.mlp.Wo.weight; 1 not part of a ModernBERT: layers.1.mlp.down.weight; "
        "1 of another shape: layers.2.attn.Wo.weight [48, 47] instead of [48, 48]",
    ),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
    "broken modules.json": (lambda path: (path / "modules.json").write_text("["), "modules.json"),
    "modules.json of another shape": (lambda path: (path / "modules.json").write_text('{"a": 1}'), "modules.json"),
    "prompts of another shape": (
        lambda path: (path / "config_sentence_transformers.json").write_text("[]"),
        "config_sentence_transformers.json",
    ),
    "length that is no number": (
        lambda path: (path / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}'),
        "max_seq_length",
    ),
}


def rewrite(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(("damage", "named"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_source_is_refused_in_one_line(source: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(source)
    with pytest.raises(InputError) as caught:
        open_source(str(source))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
