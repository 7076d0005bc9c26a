"""Chunks, token vectors and late chunking, against transformers' hidden states and the vectors of the chunks' texts."""

import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import DIMENSION, PROMPTS, expected_vector, write_tiny_bundle
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from modernbert_runtime import Embedder, InputError, TextTooLong
from modernbert_runtime.chunking import TokenVectors, pool_spans, token_windows
from modernbert_runtime.long_text import _window_spans
from modernbert_runtime.tokenizer import TextTokenizer

WORDS = "abcdefghijklmnopqrstuvwxyz"
TEXT = " ".join(WORDS)


@pytest.fixture(scope="module")
def embedder(bundle: Path) -> Iterator[Embedder]:
    with Embedder.load(bundle, engine="onnxruntime", threads=1) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("chunks") / "bundle")


@pytest.fixture(scope="module")
def tiny(tiny_root: Path) -> Iterator[Embedder]:
    with Embedder.load(tiny_root, engine="onnxruntime", threads=1) as embedder:
        yield embedder


def hidden_states(checkpoint: Path, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """transformers' float64 hidden states [tokens, hidden size] of a text, and the characters of each token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").double().eval()
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    offsets = [tuple(pair) for pair in encoded.pop("offset_mapping")[0].tolist()]
    encoded.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**encoded).last_hidden_state[0].numpy(), offsets


# Windows


@settings(deadline=None)
@given(starts=st.lists(st.booleans(), max_size=80), size=st.integers(1, 20), overlap=st.integers(0, 19))
def test_windows_cover_every_token_advance_and_keep_to_their_size(starts: list[bool], size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    windows = token_windows(np.array(starts, dtype=bool), size=size, overlap=overlap).tolist()
    covered = set().union(*(range(start, end) for start, end in windows))
    assert covered == set(range(len(starts)))
    for start, end in windows:
        assert 0 < end - start <= size
        # a window begins and ends inside a word only if that word is longer than the window, or one before it
        assert end == len(starts) or starts[end] or not any(starts[start + 1 : end + 1]) or overlap
    for (start, end), (following, stop) in itertools.pairwise(windows):
        assert start < following <= end < stop
        assert overlap > 0 or following == end
        assert end - following >= min(overlap, end - start - 1)


def test_windows_in_full() -> None:
    every = np.ones(10, dtype=bool)
    assert token_windows(every, size=4, overlap=0).tolist() == [[0, 4], [4, 8], [8, 10]]
    assert token_windows(every, size=4, overlap=2).tolist() == [[0, 4], [2, 6], [4, 8], [6, 10]]
    assert token_windows(every, size=10, overlap=9).tolist() == [[0, 10]]
    words = np.array([1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=bool)  # the last word has eight tokens
    assert token_windows(words, size=5, overlap=1).tolist() == [[0, 4], [2, 6], [4, 9], [6, 11], [10, 14]]


# Token vectors


def test_token_vectors_are_the_hidden_states(embedder: Embedder, checkpoint: Path) -> None:
    texts = ["a b c", TEXT, ""]
    for text, tokens in zip(texts, embedder.embed_token_vectors(texts), strict=True):
        expected, offsets = hidden_states(checkpoint, text)
        np.testing.assert_allclose(tokens.vectors, expected, atol=1e-4)  # fp32 against float64
        assert tokens.vectors.dtype == np.float32
        assert tokens.spans.tolist() == [[-1, -1], *map(list, offsets[1:-1]), [-1, -1]]


def test_spans_of_a_prompt_are_not_spans_of_the_text(tiny: Embedder) -> None:
    (tokens,) = tiny.embed_token_vectors(["ab c a"], prompt_name="query")
    assert len(PROMPTS["query"].split()) == 1
    nowhere = [-1, -1]
    assert tokens.spans.tolist() == [nowhere, nowhere, nowhere, [0, 2], [3, 4], [5, 6], nowhere]
    assert tokens.input_ids.tolist()[:3] == [1, 5, 7]
    (cut,) = tiny.embed_token_vectors(["a " * 20])
    assert cut.num_dropped == 6
    assert len(cut.vectors) == 16


ODD_TEXTS = [
    "naïve cafe\u0301 ok",  # NFC makes one character of two, and its token says that it is the first
    "\u1112\u1161\u11ab\u1100\u1173\u11af 한글",
    "a\r\nb\r\n\r\nc",
    "👩\u200d👩\u200d👧 family 👍🏽!",
    "日本語テキスト" * 3,
    "  e\u0301 \u0301x ﬁ ½ İ",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """As ModernBERT's: NFC, then a token a byte and few merges, so that most characters have several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["family cafe naïve text 日本"] * 3, trainer)
    path = tmp_path_factory.mktemp("byte-level") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextTokenizer(path, max_length=512)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_spans_are_the_characters_that_the_bytes_of_a_token_come_from(
    byte_level: TextTokenizer, text: str, prefix: str
) -> None:
    (item,) = byte_level.encode_with_spans([text], prefix=prefix)
    lengths = [len(unicodedata.normalize("NFC", text[:end])) for end in range(len(text) + 1)]
    starts = [index for index in range(len(text)) if lengths[index + 1] > lengths[index]]  # the rest join
    composed = [(start, end) for start, end in itertools.pairwise([*starts, len(text)])]
    sizes = [len(unicodedata.normalize("NFC", text[start:end]).encode()) for start, end in composed]
    owners = np.repeat(np.arange(len(composed)), sizes)  # of each byte
    begin = -len(prefix.encode())
    for token, span in zip(item.tokens.input_ids.tolist(), item.spans.tolist(), strict=True):
        stop = begin + len(byte_level._tokenizer.id_to_token(token))  # a character of this alphabet stands for a byte
        if stop > 0:
            assert span == [composed[owners[max(begin, 0)]][0], composed[owners[stop - 1]][1]]
        else:
            assert span == [-1, -1]
        begin = stop
    assert begin == len(owners)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("size", [4, 6, 9])
def test_chunks_cut_no_character_and_lose_none(byte_level: TextTokenizer, text: str, size: int) -> None:
    (item,) = byte_level.encode_with_spans([text], whole=True)
    spans = _window_spans(item, size=size, overlap=0).tolist()
    chunks = [text[start:end] for start, end in spans]
    assert "".join("".join(chunks).split()) == "".join(text.split())
    counts = [len(tokens.input_ids) for tokens in byte_level.encode(chunks)]
    assert max(counts) <= size  # a character cut in two would count in both
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


# Plain chunks


def test_a_chunk_has_the_vector_of_its_text(embedder: Embedder) -> None:
    texts = [TEXT, "", "a b", "  c   d  " * 9]
    for text, chunks in zip(texts, embedder.embed_chunks(texts, size=7, overlap=2), strict=True):
        parts = [text[start:end] for start, end in chunks.spans]
        assert len(parts) == len(chunks.vectors)
        assert chunks.num_dropped == 0
        if parts:
            np.testing.assert_allclose(chunks.vectors, embedder.embed(parts), atol=1e-5)  # other batches
            assert all(1 <= len(part.split()) <= 7 for part in parts)
        assert {word for part in parts for word in part.split()} == set(text.split())
    assert [text[a:b] for text in [TEXT] for a, b in embedder.embed_chunks([TEXT], size=10, overlap=2)[0].spans] == [
        "a b c d e f g h i j",
        "i j k l m n o p q r",
        "q r s t u v w x y z",
    ]


def test_a_text_far_above_max_length_loses_nothing(tiny_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Embedder.load(tiny_root, engine="onnxruntime", truncation="error") as tiny:
        (chunks,) = tiny.embed_chunks([TEXT * 10], size=8, overlap=0, prompt_name="document", output_dtype="float16")
    assert len(chunks.spans) == 32  # 251 words: "z" and "a" meet nine times
    assert chunks.vectors.dtype == np.float16
    np.testing.assert_allclose(
        chunks.vectors[0],
        expected_vector("a b c d e f g h", PROMPTS["document"]),
        atol=1e-3,  # float16
    )
    assert not caplog.messages


def test_spans_of_your_own(tiny: Embedder) -> None:
    one, none, two = tiny.embed_chunks(["a b c", "d", "e f"], spans=[[(0, 3)], [], [(0, 1), (0, 3)]])
    np.testing.assert_allclose(one.vectors, [expected_vector("a b")], atol=1e-6)
    assert none.vectors.shape == (0, DIMENSION)
    np.testing.assert_allclose(two.vectors, [expected_vector("e"), expected_vector("e f")], atol=1e-6)
    assert two.spans.tolist() == [[0, 1], [0, 3]]
    assert tiny.embed_chunks([], size=9, overlap=0) == tiny.embed_chunks([], late=True) == []


# Late chunking


@pytest.mark.parametrize("spans", [None, [(0, 3), (2, 9), (40, 51)]])
def test_late_chunks_are_means_of_transformers_hidden_states(
    embedder: Embedder, checkpoint: Path, spans: list[tuple[int, int]] | None
) -> None:
    (chunks,) = embedder.embed_chunks([TEXT], size=8, overlap=3, late=True, spans=[spans] if spans else None)
    states, offsets = hidden_states(checkpoint, TEXT)
    assert len(chunks.spans) == (3 if spans else 5)
    for (start, end), vector in zip(chunks.spans, chunks.vectors, strict=True):
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
        mean = states[inside].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)  # fp32 against float64
    # They have seen what stands around them: the same words alone mean something else.
    alone = embedder.embed([TEXT[start:end] for start, end in chunks.spans])
    assert np.abs(chunks.vectors - alone).max() > 1e-3


def test_late_chunks_of_several_texts_keep_their_order(embedder: Embedder) -> None:
    texts = ["a b", TEXT, "", "c d e"]
    together = embedder.embed_chunks(texts, size=4, overlap=1, late=True, dimensions=16)
    for text, chunks in zip(texts, together, strict=True):
        (alone,) = embedder.embed_chunks([text], size=4, overlap=1, late=True, dimensions=16)
        np.testing.assert_array_equal(chunks.spans, alone.spans)
        np.testing.assert_allclose(chunks.vectors, alone.vectors, atol=1e-5)  # other batches
        np.testing.assert_allclose(np.linalg.norm(chunks.vectors, axis=1), 1, atol=1e-6)


def test_late_chunks_follow_the_truncation_policy(tiny_root: Path) -> None:
    text = "a " * 20
    with Embedder.load(tiny_root, engine="onnxruntime") as tiny:
        (chunks,) = tiny.embed_chunks([text], size=5, overlap=0, late=True)
        assert chunks.num_dropped == 6
        assert chunks.spans.tolist() == [[0, 9], [10, 19], [20, 27]]
        with pytest.raises(InputError, match=r"spans\[0\]\[1\] \(30, 31\) has no tokens of texts\[0\], of which .* 6"):
            tiny.embed_chunks([text], spans=[[(0, 1), (30, 31)]], late=True)
    with Embedder.load(tiny_root, engine="onnxruntime", truncation="error") as tiny, pytest.raises(TextTooLong):
        tiny.embed_chunks([text], late=True)


def test_a_span_without_tokens_gives_nan_and_is_refused(tiny: Embedder) -> None:
    tokens = TokenVectors(np.zeros(2, np.int32), np.array([[-1, -1], [0, 1]]), np.ones((2, 3), np.float32), 0)
    assert np.isnan(pool_spans(tokens, np.array([[1, 2]]))).all()
    assert pool_spans(tokens, np.array([[0, 9]])).tolist() == [[1, 1, 1]]
    touching = TokenVectors(np.zeros(3, np.int32), np.array([[0, 1], [1, 2], [2, 4]]), np.eye(3, dtype=np.float32), 0)
    assert pool_spans(touching, np.array([[1, 2], [3, 4]])).tolist() == [[0, 1, 0], [0, 0, 1]]
    with pytest.raises(InputError, match=r"spans\[0\]\[0\] \(1, 3\) has no tokens of texts\[0\]: drop it"):
        tiny.embed_chunks(["a   b"], spans=[[(1, 3)]], late=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 token, not 0"),
        ({"size": 4, "overlap": 4}, r"overlap must be from 0 to 3 tokens \(size - 1\), not 4"),
        ({"overlap": -1}, "overlap must be from 0 to 255"),
        ({"size": 15, "overlap": 0}, "size must be at most 14 tokens, not 15: max_length is 16"),
        ({"size": 13, "overlap": 0, "prompt_name": "query"}, "size must be at most 12 tokens, not 13"),
        ({"spans": []}, "there are 0 for 1 texts"),
        ({"spans": [[(2, 9)]]}, r"spans\[0\]\[0\] must be .* <= 3, the characters of texts\[0\], not \(2, 9\)"),
        ({"spans": [[(0, 1), (1, 1)]]}, r"spans\[0\]\[1\] must be"),
        ({"spans": 1}, r"spans must be a list of \(start, end\), not int"),
        ({"spans": [None]}, r"spans\[0\] must be a list of \(start, end\), not NoneType"),
        ({"spans": [[1]]}, r"spans\[0\]\[0\] must be .*, not 1$"),
        ({"spans": [[(0, 1, 2)]]}, r"spans\[0\]\[0\] must be .*, not \(0, 1, 2\)"),
        ({"spans": [[(0.0, 1.0)]]}, r"spans\[0\]\[0\] must be .*, not \(0.0, 1.0\)"),
    ],
)
def test_bad_chunks(tiny: Embedder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.embed_chunks(["a b"], **options)


def test_late_chunking_needs_mean_pooling(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "bundle", change=lambda manifest: replace(manifest, pooling="cls"))
    with Embedder.load(root, engine="onnxruntime") as embedder:
        with pytest.raises(InputError, match="late=True needs a bundle with pooling mean, not cls"):
            embedder.embed_chunks(["a"], late=True)
        assert len(embedder.embed_chunks(["a"], size=9, overlap=0)) == 1
