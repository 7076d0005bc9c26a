"""The Embedder from text to vectors, on the tiny bundle: values, order, policies, and every bad input."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import (
    DIMENSION,
    MAX_LENGTH,
    PAD_ID,
    PROMPTS,
    WORDS,
    expected_vector,
    tiny_tokenizer,
    write_tiny_bundle,
)

import modernbert_runtime
from modernbert_runtime import BundleError, Embedder, EngineError, InputError, TextTooLong
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import ModernBertRuntimeError
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine
from modernbert_runtime.tokenizer import TextTokenizer, TokenizedText

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("runtime") / "bundle")


@pytest.fixture(scope="module")
def embedder(root: Path) -> Iterator[Embedder]:
    with Embedder.load(root, threads=1, batch_tokens=24) as embedder:  # small, so that there are several batches
        yield embedder


class Recorder:
    """An engine that keeps what it was given and returns `values` rows."""

    name = "recorder"

    def __init__(self, fill: float = 1.0, dimension: int = DIMENSION) -> None:
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        self.fill, self.dimension = fill, dimension

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray, output: str | None = None) -> np.ndarray:
        self.batches.append((input_ids, attention_mask))
        return np.full((len(input_ids), self.dimension), self.fill, dtype=np.float16)

    def close(self) -> None:
        pass


def with_engine(root: Path, engine: Recorder, **options: Any) -> Embedder:
    bundle = Bundle.open(root)
    tokenizer = TextTokenizer(bundle.path_of("tokenizer.json"), max_length=MAX_LENGTH)
    return Embedder(engine, tokenizer, bundle.manifest, **options)


# Values and order


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(st.sampled_from(LETTERS), max_size=MAX_LENGTH - 2).map(" ".join), max_size=20))
def test_each_vector_is_that_of_its_text_whatever_the_batch(embedder: Embedder, texts: list[str]) -> None:
    vectors = embedder.embed(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(texts), DIMENSION)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, expected_vector(text), atol=1e-6)  # float32 sums of at most 16 terms
        np.testing.assert_allclose(vector, embedder.embed([text])[0], atol=1e-6)


def test_nothing_in_nothing_out(embedder: Embedder) -> None:
    for vectors in (embedder.embed([]), embedder.embed_queries([]), embedder.embed(())):
        assert vectors.shape == (0, DIMENSION)
        assert vectors.dtype == np.float32


def test_prompts(embedder: Embedder) -> None:
    query, document = embedder.embed_queries(["a b"]), embedder.embed_documents(["a b"])
    np.testing.assert_allclose(query, [expected_vector("a b", PROMPTS["query"])], atol=1e-6)
    np.testing.assert_allclose(document, [expected_vector("a b", PROMPTS["document"])], atol=1e-6)
    np.testing.assert_array_equal(query, embedder.embed(["a b"], prompt_name="query"))
    assert np.abs(query - document).max() > 0.01
    with pytest.raises(InputError, match="prompt_name must be one of query, document, not 'title'"):
        embedder.embed(["a b"], prompt_name="title")


def test_a_bundle_without_prompts_embeds_queries_plainly(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle", change=lambda manifest: replace(manifest, prompts={}))
    with Embedder.load(tmp_path / "bundle") as embedder:
        np.testing.assert_array_equal(embedder.embed_queries(["a"]), embedder.embed(["a"]))


def test_batches_are_padded_masked_and_within_budget(root: Path) -> None:
    engine = Recorder()
    vectors = with_engine(root, engine, pad_id=PAD_ID, batch_tokens=12).embed(["a", "a b c d", "b", "a b"])
    assert vectors.dtype == np.float32
    assert [batch[0].shape for batch in engine.batches] == [(2, 6), (2, 3)]
    input_ids, attention_mask = engine.batches[0]
    assert input_ids.dtype == attention_mask.dtype == np.int64
    a, b = WORDS.index("a"), WORDS.index("b")
    assert input_ids.tolist() == [[1, a, b, a + 2, a + 3, 2], [1, a, b, 2, PAD_ID, PAD_ID]]
    assert attention_mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]


def test_pad_id_comes_from_the_config(embedder: Embedder) -> None:
    assert embedder._runner.pad_id == PAD_ID


def test_threads_may_share_an_embedder(embedder: Embedder) -> None:
    results: dict[str, np.ndarray] = {}
    threads = [threading.Thread(target=lambda c=c: results.update({c: embedder.embed([c] * 20)})) for c in LETTERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for letter in LETTERS:
        np.testing.assert_allclose(results[letter], [expected_vector(letter)] * 20, atol=1e-6)


def test_progress_goes_to_stderr_only(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = embedder.embed(["a", "b"], progress=True)
    np.testing.assert_array_equal(vectors, embedder.embed(["a", "b"]))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "embedding" in captured.err


def test_what_was_chosen_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="modernbert_runtime"):
        Embedder.load(root, precision="inline").close()
    (message,) = caplog.messages
    for part in ("CPUExecutionProvider", "onnx/model_inline.onnx", "portable", "inline", "dimension 8"):
        assert part in message


# Truncation


def test_truncation_keeps_the_right_end_and_the_special_tokens(root: Path) -> None:
    words = [LETTERS[i % 26] for i in range(30)]
    text = " ".join(words)
    kept = MAX_LENGTH - 2
    for truncation, expected in (("right", words[:kept]), ("left", words[-kept:])):
        with Embedder.load(root, truncation=truncation) as embedder:
            (tokens,) = embedder.tokenize([text])
            assert tokens.input_ids.tolist() == [1, *(WORDS.index(word) for word in expected), 2]
            assert tokens.num_dropped == 30 - kept
            np.testing.assert_allclose(embedder.embed([text]), [expected_vector(" ".join(expected))], atol=1e-6)


def test_truncation_is_reported_per_item_and_logged_once(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a", "a " * 14, "a " * 15, "a " * 100, ""]
    assert [item.num_dropped for item in embedder.tokenize(texts)] == [0, 0, 1, 86, 0]
    assert not caplog.messages
    embedder.embed(texts)
    (message,) = caplog.messages
    assert message == "truncated 2 of 5 texts to max_length 16; the first is texts[2], 1 tokens dropped"
    caplog.clear()
    embedder.embed(["a " * 14])
    assert not caplog.messages


def test_a_prompt_counts_as_text(embedder: Embedder) -> None:
    (tokens,) = embedder.tokenize(["a " * 14], prompt_name="query")
    assert tokens.num_dropped == 2
    assert tokens.input_ids[1] == WORDS.index("query")


def test_too_long_is_an_error_when_asked_for(root: Path) -> None:
    with Embedder.load(root, truncation="error") as embedder:
        assert embedder.embed(["a " * 14]).shape == (1, DIMENSION)
        with pytest.raises(TextTooLong, match=r"texts\[1\] has 17 tokens, max_length is 16: .*truncation=\"right\""):
            embedder.embed(["a", "a " * 15])


@pytest.mark.parametrize("truncation", ["right", "left", "error"])
def test_a_hundred_thousand_words(root: Path, truncation: modernbert_runtime.tokenizer.Truncation) -> None:
    text = "a b " * 50_000
    with Embedder.load(root, truncation=truncation) as embedder:
        if truncation == "error":
            with pytest.raises(TextTooLong, match="100002 tokens"):
                embedder.embed([text])
        else:
            (tokens,) = embedder.tokenize([text])
            assert (len(tokens.input_ids), tokens.num_dropped) == (MAX_LENGTH, 100_000 - 14)
            np.testing.assert_allclose(embedder.embed([text]), [expected_vector("a b " * 7)], atol=1e-6)


# Odd and bad input


def test_odd_but_valid_texts(embedder: Embedder) -> None:
    texts = [
        "",
        " ",
        "a",
        "\0",
        "a\0b",
        "\ufffe",
        "\U0010ffff",
        "e\u0301",
        "\u202e",
        "\n",
        "👩‍👩‍👧",
        "[PAD] [SEP]",
        np.str_("a"),
    ]
    vectors = embedder.embed(texts)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors[0], expected_vector(""), atol=1e-6)
    np.testing.assert_allclose(vectors[4], expected_vector("a [UNK] b"), atol=1e-6)  # a NUL does not end the text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", r"texts must be a list of str, not one str: pass \[text\]"),
        (b"a text", "texts must be a list of str, not bytes"),
        (None, "texts must be a list of str, not NoneType"),
        (1, "not int"),
        ({"a": "b"}, "not dict"),
        ((t for t in "ab"), "not generator: pass list"),
        (np.array(["a", "b"]), "not ndarray: pass list"),
        (["a", None, "b"], r"texts\[1\] must be str, not NoneType"),
        (["a", "b", b"c"], r"texts\[2\] must be str, not bytes"),
        ([["a"]], r"texts\[0\] must be str, not list"),
        ([float("nan")], r"texts\[0\] must be str, not float"),
        (["a", "bc\ud800d"], r"texts\[1\] has a lone surrogate '\\ud800' at character 2, .*'replace'"),
        (["\udfff"], r"texts\[0\] has a lone surrogate '\\udfff' at character 0"),
    ],
)
def test_bad_texts(embedder: Embedder, texts: list[str], message: str) -> None:
    for call in (embedder.embed, embedder.embed_queries, embedder.embed_documents, embedder.tokenize):
        with pytest.raises(InputError, match=message) as caught:
            call(texts)
        assert "\n" not in str(caught.value)


def test_the_remedy_for_surrogates_works(embedder: Embedder) -> None:
    assert embedder.embed(["bc\ud800d".encode("utf-8", "replace").decode()]).shape == (1, DIMENSION)


def test_the_index_of_a_bad_item_counts_over_all_groups(root: Path) -> None:
    with Embedder.load(root, truncation="error") as embedder, pytest.raises(TextTooLong, match=r"texts\[700\]"):
        embedder.embed(["a"] * 700 + ["a " * 15])


def test_a_text_without_tokens(tmp_path: Path) -> None:
    with Embedder.load(write_tiny_bundle(tmp_path / "bundle", special_tokens=False)) as embedder:
        assert embedder.embed(["a"]).shape == (1, DIMENSION)
        with pytest.raises(InputError, match=r"texts\[1\] has no tokens"):
            embedder.embed(["a", " "])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "middle"}, "truncation must be one of error, right, left, not 'middle'"),
        ({"engine": "torch"}, "engine must be one of auto, onnxruntime, openvino, tensorrt, not 'torch'"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"threads": "2"}, "threads must be at least 1, not '2': pass None"),
        ({"threads": 1.5}, r"threads must be at least 1, not 1\.5"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, not 0"),
        ({"batch_tokens": float("nan")}, "batch_tokens must be at least 1, not nan"),
        ({"providers": [1]}, r"providers must be a list of names, .* not \[1\]"),
        ({"engine_options": ["a"]}, r"engine_options must map str to str, not be \['a'\]"),
        ({"engine_options": {"threads": "1"}}, "engine_options: 'threads' is neither"),
    ],
)
def test_bad_options(root: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embedder.load(root, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [None, 1, b"bundle", ["bundle"]])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(BundleError, match=f"the path of a directory is needed, not {type(path).__name__}"):
        Embedder.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": ["query"]}, r"prompt_name must be one of query, document, not \['query'\]"),
        ({"normalize": 0}, "normalize must be True, False or None, not 0"),
        ({"dimensions": "4"}, "dimensions must be from 1 to 8, not '4'"),
    ],
)
def test_bad_arguments(embedder: Embedder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embedder.embed(["a"], **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "tokens must be a list of TokenizedText, not NoneType"),
        (["a"], r"tokens\[0\] must be a TokenizedText, not str"),
        ([TokenizedText(np.array([1, -1]), 0)], r"tokens\[0\] must hold ids from 0 to 33, not from -1 to 1"),
        ([TokenizedText(np.array([1, 34]), 0)], r"tokens\[0\] must hold ids from 0 to 33, not from 1 to 34"),
        ([TokenizedText(np.array([], np.int32), 0)], r"must hold 1 to 16 ids on one axis, not int32 of shape \(0,\)"),
        ([TokenizedText(np.ones(17, np.int32), 0)], r"must hold 1 to 16 ids on one axis, not int32 of shape \(17,\)"),
        ([TokenizedText(np.array([1.0]), 0)], "must hold 1 to 16 ids on one axis, not float64"),
    ],
)
def test_tokens_that_no_tokenizer_made(embedder: Embedder, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embedder.embed_tokens(tokens)


def test_a_list_that_changes_meanwhile(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a", "b", "c"]
    encode = embedder._tokenizer.encode_checked
    monkeypatch.setattr(embedder._tokenizer, "encode_checked", lambda *a, **k: texts.clear() or encode(*a, **k))
    np.testing.assert_allclose(embedder.embed(texts), [expected_vector(text) for text in "abc"], atol=1e-6)


def test_unknown_precision_names_those_that_exist(root: Path) -> None:
    with pytest.raises(BundleError, match=r"portable/int8 .* only portable/fp32, portable/inline"):
        Embedder.load(root, precision="int8")


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_limit_without_room_for_text(tmp_path: Path, max_length: int) -> None:
    tiny_tokenizer(special_tokens=True).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="max_length must exceed the 2 special tokens"):
        TextTokenizer(tmp_path / "tokenizer.json", max_length=max_length)


# Engines


def test_values_that_are_not_finite_are_never_returned(embedder: Embedder) -> None:
    with pytest.raises(EngineError, match=r"NaN or infinity for texts\[2\]"):
        embedder.embed(["a", "a b c d e f", "broken", "b", "broken"])


def test_the_shape_is_checked(root: Path) -> None:
    with pytest.raises(EngineError, match=r"returned shape \(1, 9\), the manifest promises \(1, 8\)"):
        with_engine(root, Recorder(dimension=DIMENSION + 1)).embed(["a"])


def test_a_failing_run_is_one_line(root: Path) -> None:
    engine = OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding")
    ids = np.full((1, 2), len(WORDS), dtype=np.int64)
    with pytest.raises(EngineError, match="failed on a batch of 1 x 2 tokens") as caught:
        engine.run(ids, np.ones_like(ids))
    assert "\n" not in str(caught.value)


def test_closing(root: Path) -> None:
    with Embedder.load(root) as embedder:
        embedder.embed(["a"])
    embedder.close()
    with pytest.raises(EngineError, match="closed"):
        embedder.embed(["a"])


def test_an_output_or_provider_that_is_not_there(root: Path) -> None:
    with pytest.raises(EngineError, match=r"give logits, not .* give last_hidden_state, sentence_embedding"):
        OnnxRuntimeEngine(root / "onnx/model.onnx", output="logits")
    with pytest.raises(EngineError, match=r"no NoSuchProvider, only .*CPUExecutionProvider"):
        OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding", providers=["NoSuchProvider"])


def test_without_onnxruntime(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r'pip install "modernbert-deploy\[cpu\]"'):
        Embedder.load(root, engine="onnxruntime")


# The package


def test_the_runtime_never_imports_torch_transformers_or_onnx(root: Path) -> None:
    program = """if True:
        import json, sys
        import modernbert_runtime
        early = sorted(sys.modules)
        with modernbert_runtime.Embedder.load(sys.argv[1]) as embedder:
            embedder.embed_queries(["a"], progress=True)
        print(json.dumps([early, sorted(sys.modules)]))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(modernbert_runtime.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, env=environment, check=True
    )
    early, late = json.loads(run.stdout)
    assert "onnxruntime" in late
    assert not {"torch", "transformers", "onnx"} & set(late)
    assert not {"onnxruntime", "rich"} & set(early)  # importing the package stays quick


def test_all_names_exist_and_errors_form_one_tree() -> None:
    exported = [getattr(modernbert_runtime, name) for name in modernbert_runtime.__all__]
    errors = [item for item in exported if issubclass(item, Exception)]
    assert len(errors) == 7
    assert all(issubclass(error, ModernBertRuntimeError) for error in errors)
    assert issubclass(InputError, ValueError)
