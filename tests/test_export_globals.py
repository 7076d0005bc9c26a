"""Global tokens through the exporter: every lowering against float64, pooling `global`, and the runtime.

transformers has no global tokens. The reference is our model in float64 with `eager` attention, which
`test_global_tokens` holds against the definition written out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, randomise, write_checkpoint
from safetensors.torch import load_file, save_file
from test_lowering_targets import cosine
from tokenizers import Tokenizer

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError, ParityError
from modernbert.heads import ModernBertForSequenceClassification
from modernbert.model import ModernBertForMaskedLM, load_model
from modernbert_export import trace as trace_module
from modernbert_export.export import export
from modernbert_export.ops.local_attention_with_globals import local_attention_with_globals
from modernbert_export.session import open_session
from modernbert_export.variants import SUPPORTED
from modernbert_export.verify import verify_bundle
from modernbert_runtime import Embedder
from modernbert_runtime.bundle import Bundle

NUMBER = 2
TEXTS = ["a b c", "", "x y z " * 100, "q", "h e l l o " * 20]


@pytest.fixture(scope="module")
def with_globals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with two global tokens. Leave it as it is."""
    path = write_checkpoint(tmp_path_factory.mktemp("globals") / "tiny")
    model = ModernBertForMaskedLM(ModernBertConfig(**TINY, num_global_tokens=NUMBER))
    randomise(model)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(with_globals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle for all targets, in all precisions but int8. Leave it as it is."""
    out = tmp_path_factory.mktemp("globals") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUPPORTED, "openvino", ("fp32",))  # its bf16 is proven on CPUs that have it, and on no other
        export(str(with_globals), out, targets=tuple(SUPPORTED), precisions=("fp32", "fp16", "bf16"), pooling="global")
    return out


def test_every_lowering_passes_the_grid(bundle: Path) -> None:
    reports = json.loads((bundle / "parity.json").read_text())["artifacts"]
    assert len(reports) == 10
    for report in reports:
        assert {row["reference"] for row in report["comparisons"]} == {"float64 eager"}
        assert report["notes"] == ["transformers has no global tokens: the one reference is our own model in float64."]


def test_queries_and_keys_that_stand_apart_are_not_cut(bundle: Path) -> None:
    # Portable bodies gather heads; what they slice is what the model slices.
    slices = {
        artifact.target: sum(node.op_type == "Slice" for node in onnx.load(bundle / artifact.file).graph.node)
        for artifact in Bundle.open(bundle).manifest.artifacts
    }
    assert len(slices) == 5
    assert set(slices.values()) == {slices["portable"]}


def test_each_artifact_pools_the_first_global_token(bundle: Path, with_globals: Path) -> None:
    ids = torch.randint(TINY["vocab_size"], (3, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, :100] = 0
    model = load_model(with_globals).double()
    model.set_attention("eager")
    with torch.no_grad():
        output = model(ids, mask)
    first = torch.nn.functional.normalize(output.global_hidden_state[:, 0], dim=-1).numpy()
    for artifact in Bundle.open(bundle).manifest.artifacts:
        session = open_session(bundle / artifact.file)
        tokens, pooled = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        limits = {"fp32": (0.999999, 0.999999), "fp16": (0.9999, 0.99995), "bf16": (0.999, 0.9995)}[artifact.precision]
        assert tokens.shape == (3, 300, TINY["hidden_size"])
        valid = mask.numpy() != 0
        assert cosine(tokens[valid], output.last_hidden_state.numpy()[valid]).min() >= limits[0], artifact
        assert cosine(pooled, first).min() >= limits[1], artifact


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_runtime_embeds_with_them(bundle: Path, with_globals: Path, engine: Any) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    tokenizer = Tokenizer.from_file(str(with_globals / "tokenizer.json"))
    model = load_model(with_globals)
    with torch.no_grad():
        wanted = [model(torch.tensor([tokenizer.encode(text).ids])).global_hidden_state[0, 0] for text in TEXTS]
    with Embedder.load(bundle, engine=engine, precision="fp32") as embedder:
        vectors = embedder.embed(TEXTS)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(torch.stack(wanted), dim=-1), atol=1e-5)


def test_int8_and_mean_pooling(with_globals: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    draw = np.random.default_rng(0)
    texts.write_text("\n".join(" ".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 20)) for _ in range(40)))
    export(str(with_globals), tmp_path / "out", precisions=("int8",), text=texts, max_length=40)
    (report,) = verify_bundle(tmp_path / "out", text=texts)
    assert report.passed
    assert report.text is not None
    assert report.text.min_cosine >= 0.99


def test_a_window_that_is_one_too_wide_is_found(
    with_globals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide(*arguments: Any) -> Any:
        return local_attention_with_globals(*arguments[:-1], arguments[-1] + 1)

    monkeypatch.setattr(trace_module, "local_attention_with_globals", wide)
    with pytest.raises(ParityError, match=r"First layer that differs: layer 1 \(sliding"):
        export(str(with_globals), tmp_path / "out", max_length=20)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", [0, 1], ids=["global layer", "local layer"])
def test_attention_beyond_fp16_is_fp32_for_tensorrt_too(with_globals: Path, tmp_path: Path, layer: int) -> None:
    path = Path(shutil.copytree(with_globals, tmp_path / "large"))
    weights = load_file(path / "model.safetensors")
    weights[f"model.layers.{layer}.attn.Wqkv.weight"][2 * TINY["hidden_size"] :] *= 1e4
    weights[f"model.layers.{layer}.attn.Wo.weight"] /= 1e4
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    export(str(path), tmp_path / "out", targets=("tensorrt",), max_length=20)
    assert "attention |" in (tmp_path / "out/parity.md").read_text()


def test_pooling_global_needs_global_tokens(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pooling 'global' needs global tokens, and model 'tiny' has none"):
        export(str(checkpoint), tmp_path / "out", pooling="global")


def test_the_bundle_is_a_checkpoint_again(bundle: Path, with_globals: Path) -> None:
    stored = load_file(bundle / "model.safetensors")
    assert torch.equal(stored["embeddings.global_tokens"], load_model(with_globals).embeddings.global_tokens)
    assert Bundle.open(bundle).manifest.pooling == "global"
    assert json.loads((bundle / "1_Pooling/config.json").read_text())["pooling_mode"] == "global"


@pytest.mark.parametrize(
    ("task", "kind"),
    [("fill-mask", ModernBertForMaskedLM), ("text-classification", ModernBertForSequenceClassification)],
)
def test_heads_see_them(task: str, kind: Any, tmp_path: Path) -> None:
    sizes = {**TINY, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    config = ModernBertConfig(**sizes, num_global_tokens=NUMBER, classifier_pooling="global", num_labels=3)
    source = write_checkpoint(tmp_path / "source")
    model = kind(config)
    randomise(model)
    model.save_pretrained(source)
    manifest = export(str(source), tmp_path / "out", task=task, max_length=70)
    assert manifest.artifacts[0].parity["min_cosine"] >= 0.999999
    (report,) = verify_bundle(tmp_path / "out")
    assert report.passed
    assert {row.reference for row in report.comparisons} == {"float64 eager"}
    weights = load_file(source / "model.safetensors")
    weights["model.embeddings.global_tokens"] *= -1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (report,) = verify_bundle(tmp_path / "out", str(source))
    assert not report.passed
