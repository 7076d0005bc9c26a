"""The smallest bundle that embeds, made by hand for the other runtime tests, and a check of it against numpy.

The model looks up a random row per token, averages the rows that the mask keeps and scales the mean to unit length.
It ignores token order, which no runtime test needs, but a wrong mask, wrong padding or wrong row shows at once.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from modernbert_runtime import Embedder
from modernbert_runtime.manifest import MANIFEST_NAME, Artifact, Manifest, Source, sha256_file

DIMENSION = 8
MAX_LENGTH = 16
PAD_ID = 3  # not 0, so that a runtime that assumes 0 is noticed
WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "broken", "query", "passage", ":", *"abcdefghijklmnopqrstuvwxyz"]
PROMPTS = {"query": "query: ", "document": "passage: "}


def write_tiny_bundle(
    root: Path, *, change: Callable[[Manifest], Manifest] = lambda manifest: manifest, special_tokens: bool = True
) -> Path:
    """Write a bundle to `root`, with fp32 weights in an external file and a second artifact with them inside."""
    (root / "onnx").mkdir(parents=True)
    tiny_tokenizer(special_tokens=special_tokens).save(str(root / "tokenizer.json"))
    (root / "config.json").write_text(json.dumps({"pad_token_id": PAD_ID}))
    onnx.save_model(
        tiny_model(),
        root / "onnx/model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=100,  # the table only: shape inference needs the axes inside
    )
    onnx.save_model(tiny_model(), root / "onnx/model_inline.onnx")
    names = ["tokenizer.json", "config.json", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_inline.onnx"]
    manifest = Manifest(
        generator="test",
        source=Source(name="tiny", sha256="0" * 64),
        task="embedding",
        dimension=DIMENSION,
        pooling="mean",
        normalize=True,
        max_length=MAX_LENGTH,
        prompts=PROMPTS,
        artifacts=(
            _artifact(precision="fp32", file="onnx/model.onnx", data_file="onnx/model.onnx_data"),
            _artifact(precision="inline", file="onnx/model_inline.onnx", data_file=None),
        ),
        files={name: sha256_file(root / name) for name in names},
    )
    (root / MANIFEST_NAME).write_text(change(manifest).to_json())
    return root


def rehash(root: Path, *names: str) -> None:
    """Make the manifest agree with files that a test has changed."""
    path = root / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_text())
    hashes = {name: sha256_file(root / name) for name in names}
    path.write_text(replace(manifest, files={**manifest.files, **hashes}).to_json())


def token_table() -> np.ndarray:
    """One float32 row per word; the word "broken" gives NaN."""
    table = np.random.default_rng(0).normal(size=(len(WORDS), DIMENSION)).astype(np.float32)
    table[WORDS.index("broken")] = np.nan
    return table


def tiny_model() -> onnx.ModelProto:
    constants = {"table": token_table(), "axis_1": np.array([1]), "axis_2": np.array([2])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["float_mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_mask", "axis_2"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["last_hidden_state"]),
        helper.make_node("ReduceSum", ["last_hidden_state", "axis_1"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "axis_1"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("ReduceL2", ["mean", "axis_1"], ["norm"], keepdims=1),
        helper.make_node("Div", ["mean", "norm"], ["sentence_embedding"]),
    ]
    tokens = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, DIMENSION]),
            helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", DIMENSION]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tiny_tokenizer(*, special_tokens: bool) -> Tokenizer:
    """Word level; it brings truncation and padding along, as real files do, which the runtime must undo."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12)
    return tokenizer


def expected_vector(text: str, prompt: str = "") -> np.ndarray:
    """What the tiny model means by a text of whole words, computed without any of the runtime's code."""
    words = ["[CLS]", *(prompt.replace(":", " :") + text).split(), "[SEP]"]
    mean = token_table().astype(np.float64)[[WORDS.index(word) for word in words]].mean(axis=0)
    return mean / np.linalg.norm(mean)


def _artifact(*, precision: str, file: str, data_file: str | None) -> Artifact:
    parity = {"max_abs_error": 0.0}
    return Artifact(
        target="portable", precision=precision, file=file, data_file=data_file, opset=20, ir_version=10, parity=parity
    )


@pytest.mark.parametrize("precision", ["fp32", "inline"])
def test_tiny_bundle_computes_what_it_says(tmp_path: Path, precision: str) -> None:
    with Embedder.load(write_tiny_bundle(tmp_path / "bundle"), precision=precision) as embedder:
        vectors = embedder.embed(["a b c", "", "z"])
    expected = [expected_vector(text) for text in ("a b c", "", "z")]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)  # float32 sums of few terms
