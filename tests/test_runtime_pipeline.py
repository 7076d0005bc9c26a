"""Long lists: tokenization ahead of the engine, order over many groups, progress, and the counters."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import DIMENSION, MAX_LENGTH, token_table, write_tiny_bundle

from modernbert_runtime import Embedder, InputError, TextTooLong, pipeline
from modernbert_runtime.ahead import one_ahead
from modernbert_runtime.tokenizer import slices

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("pipeline") / "bundle")


@pytest.fixture
def embedder(root: Path) -> Iterator[Embedder]:
    with Embedder.load(root, engine="onnxruntime", threads=1, batch_tokens=64) as embedder:
        yield embedder


# One step ahead


def test_the_next_step_runs_while_the_caller_has_the_current_one() -> None:
    started = [threading.Event() for _ in range(4)]

    def work(step: int) -> int:
        started[step].set()
        return step * 10

    results = one_ahead(work, range(4))
    assert next(results) == 0
    assert started[1].wait(10)  # without asking for it
    time.sleep(0.05)
    assert not started[2].is_set()  # but no further, so memory stays bounded
    assert list(results) == [10, 20, 30]


@pytest.mark.parametrize("steps", [1, 3])
def test_errors_come_where_their_result_would(steps: int) -> None:
    def work(step: int) -> int:
        if step == steps - 1:
            raise ValueError("here")
        return step

    results = one_ahead(work, range(steps))
    assert [next(results) for _ in range(steps - 1)] == list(range(steps - 1))
    with pytest.raises(ValueError, match="here"):
        next(results)


def test_leaving_early_ends_the_thread() -> None:
    results = one_ahead(lambda step: step, range(100))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modernbert-ahead")]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=40), texts=st.integers(1, 9), characters=st.integers(1, 100))
def test_slices_join_up_and_keep_to_their_limits(sizes: list[int], texts: int, characters: int) -> None:
    given_texts = ["x" * size for size in sizes]
    parts = list(slices(given_texts, max_texts=texts, max_characters=characters))
    assert [text for part in parts for text in given_texts[part]] == given_texts
    for part in parts:
        length = part.stop - part.start
        assert 1 <= length <= texts
        assert length == 1 or sum(sizes[part]) <= characters


# Through the Embedder


def test_order_over_many_groups(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_GROUP_TEXTS", 7)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list(LETTERS), size=rng.integers(0, 20))) for _ in range(100)]
    vectors = embedder.embed(texts)
    table = token_table().astype(np.float64)
    for text, vector in zip(texts, vectors, strict=True):
        ids = [1, *(8 + LETTERS.index(word) for word in text.split()[: MAX_LENGTH - 2]), 2]
        mean = table[ids].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_truncation_is_logged_once_over_many_groups(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "_GROUP_TEXTS", 2)
    embedder.embed(["a", "b", "c", "a " * 20, "d", "e " * 15])
    assert caplog.messages == ["truncated 2 of 6 texts to max_length 16; the first is texts[3], 6 tokens dropped"]
    assert embedder.stats().truncated == 2


def test_a_text_that_the_policy_refuses_is_found_before_anything_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_GROUP_TEXTS", 2)
    with Embedder.load(root, engine="onnxruntime", truncation="error") as embedder:
        with pytest.raises(TextTooLong, match=r"texts\[4\] has 22 tokens"):
            embedder.embed(["a", "b", "c", "d", "a " * 20])
        assert embedder.stats().batches == 0


def test_a_bad_item_is_found_before_anything_runs(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_GROUP_TEXTS", 2)
    with pytest.raises(InputError, match=r"texts\[5\] must be str"):
        embedder.embed(["a"] * 5 + [None])  # type: ignore[list-item]
    assert embedder.stats().batches == 0


# Counters


def test_stats_count_what_ran(embedder: Embedder) -> None:
    nothing = embedder.stats()
    assert (nothing.texts, nothing.padding_share, nothing.tokens_per_second) == (0, 0.0, 0.0)
    embedder.embed(["a b c", "a", "a " * 20])  # 5 + 3 tokens join 16: a batch of 3 x 16 within 64
    stats = embedder.stats()
    assert (stats.texts, stats.tokens, stats.batches, stats.truncated) == (3, 24, 1, 1)
    assert stats.padding_tokens == 3 * 16 - 24
    assert stats.padding_share == 0.5
    assert stats.seconds > 0
    assert stats.tokens_per_second == pytest.approx(24 / stats.seconds)
    asyncio.run(embedder.aembed(["a"]))
    after = embedder.stats()
    assert (after.texts, after.tokens, after.batches, after.waiting_tokens) == (4, 27, 2, 0)
    assert stats.texts == 3  # a snapshot


def test_stats_add_up_over_threads(embedder: Embedder) -> None:
    threads = [threading.Thread(target=embedder.embed, args=([letter] * 30,)) for letter in LETTERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (embedder.stats().texts, embedder.stats().tokens) == (26 * 30, 26 * 30 * 3)


def test_progress_counts_texts(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    assert embedder.embed(["a"] * 50, progress=True).shape == (50, DIMENSION)
    assert len(embedder.embed_token_vectors(["a"] * 5, progress=True)) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("100%") >= 2
