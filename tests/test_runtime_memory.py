"""The memory budget: estimates, plans that keep to it, and what is refused before it runs."""

import asyncio
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import DIMENSION, expected_vector, write_tiny_bundle

from modernbert_runtime import BundleError, Embedder, InputError, TextTooLong
from modernbert_runtime.async_batcher import Request, TokenQueue
from modernbert_runtime.batching import LONG_LENGTH, plan_batches
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.memory import MemoryBudget, parse_bytes, resident_bytes
from modernbert_runtime.tokenizer import TextTokenizer, TokenizedText

KNOWN = st.dictionaries(st.integers(1, 9000), st.integers(1, 10**9), min_size=1, max_size=6)
LENGTHS = st.lists(st.one_of(st.integers(1, 100), st.integers(1, 9000)), max_size=60)


def budget(known: dict[int, int], room: int) -> MemoryBudget:
    return MemoryBudget(limit=room + 7, resident=7, row_bytes=known)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (2_000_000_000, 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("2 gib", 2 * 2**30),
        ("1.5G", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("3k", 3000),
        ("77", 77),
    ],
)
def test_sizes(value: Any, size: int) -> None:
    assert parse_bytes("max_memory", value) == size


@pytest.mark.parametrize("value", [0, -1, "0GB", "", "GB", "2 GB of it", "2TBB", 1.5, True, None, [1]])
def test_bad_sizes(value: Any) -> None:
    with pytest.raises(InputError, match=r"max_memory must be bytes or a size such as '2GB' or '512MiB', not"):
        parse_bytes("max_memory", value)


def test_estimates_are_straight_between_known_lengths_and_square_beyond() -> None:
    known = budget({128: 1000, 512: 5000, 1024: 4000}, room=1)  # a longer row never needs less
    assert [known.estimate(n) for n in (64, 128, 320, 512, 700, 1024)] == [500, 1000, 3000, 5000, 5000, 5000]
    assert known.estimate(2048) == 20_000


@settings(deadline=None)
@given(known=KNOWN, room=st.integers(1, 10**9), lengths=st.lists(st.integers(1, 20_000), min_size=2, max_size=2))
def test_estimates_grow_and_the_longest_text_is_the_longest_that_fits(
    known: dict[int, int], room: int, lengths: list[int]
) -> None:
    of = budget(known, room)
    shorter, longer = sorted(lengths)
    assert of.estimate(shorter) <= of.estimate(longer)
    assert of.max_rows(longer) * of.estimate(longer) <= room
    assert of.max_length == 0 or of.estimate(of.max_length) <= room
    assert of.estimate(of.max_length + 1) > room
    for length in lengths:
        assert (of.max_rows(length) >= 1) == (length <= of.max_length)


@settings(deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(1, 10_000), known=KNOWN, room=st.integers(1, 10**9))
def test_a_plan_keeps_to_memory_and_tokens_and_forgets_nothing(
    lengths: list[int], tokens: int, known: dict[int, int], room: int
) -> None:
    of = budget(known, room)
    lengths = [length for length in lengths if length <= of.max_length]  # the rest is refused before
    batches = plan_batches(lengths, tokens, max_rows=of.max_rows)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * of.estimate(longest) <= room
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert len(batch) == 1 or longest < LONG_LENGTH


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40), room=st.integers(600, 5000))
def test_shared_batches_keep_to_memory_too(lengths: list[int], room: int) -> None:
    of = budget({1: 1}, room)  # beyond the known length with the square
    lengths = [min(length, of.max_length) for length in lengths]
    queue = TokenQueue(batch_tokens=8192, max_waiting_tokens=10**9, max_rows=of.max_rows)
    for length in lengths:
        queue.admit(Request([TokenizedText(np.zeros(length, dtype=np.int32), 0)], 1))
    seen = []
    while batch := queue.next_batch():
        sizes = [len(text.input_ids) for _, _, text in batch]
        assert len(sizes) * of.estimate(max(sizes)) <= room
        seen += sizes
    assert sorted(seen) == sorted(lengths)


# In the Embedder


class Sizes:
    """An engine that notes the shape of what it runs, and that never runs two batches at once."""

    name = "sizes"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.running = 0

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray, output: str | None = None) -> np.ndarray:
        self.running += 1
        assert self.running == 1
        self.shapes.append(input_ids.shape)
        self.running -= 1
        return np.ones((len(input_ids), DIMENSION), dtype=np.float32)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("memory") / "bundle", change=with_estimates)


def with_estimates(manifest: Manifest) -> Manifest:
    known = {"8": 8_000_000, "16": 16_000_000}
    artifacts = tuple(replace(artifact, activation_bytes=known) for artifact in manifest.artifacts)
    return replace(manifest, artifacts=artifacts)


def with_room(root: Path, engine: Sizes, room: int, **options: Any) -> Embedder:
    bundle = Bundle.open(root)
    tokenizer = TextTokenizer(bundle.path_of("tokenizer.json"), max_length=16)
    memory = MemoryBudget.of(bundle.manifest.artifacts[0].activation_bytes, limit=room, resident=0)
    return Embedder(engine, tokenizer, bundle.manifest, memory=memory, **options)


def test_batches_are_cut_by_memory(root: Path) -> None:
    engine = Sizes()
    with_room(root, engine, 14_000_000).embed(["a", "a b", "a b c d e f", "b"])  # 3, 4, 8 and 3 tokens of 1.15 MB each
    assert engine.shapes == [(1, 8), (3, 4)]


def test_a_text_above_the_limit_is_named_before_anything_runs(root: Path) -> None:
    engine = Sizes()
    embedder = with_room(root, engine, 14_000_000)
    texts = ["a", "b " * 11, "c " * 10]
    message = (
        r"^texts\[1\] has 13 tokens and would take about 0\.01 GB; max_memory leaves 0\.0\d GB, "
        r"enough for 12 tokens: raise it, split the text, or use embed_chunks$"
    )
    for call in (
        lambda: embedder.embed(texts),
        lambda: embedder.embed_tokens(embedder.tokenize(texts)),
        lambda: embedder.embed_token_vectors(texts),
        lambda: asyncio.run(embedder.aembed(texts)),
    ):
        with pytest.raises(TextTooLong, match=message):
            call()
    assert engine.shapes == []
    embedder.embed(["c " * 10])
    assert engine.shapes == [(1, 12)]


def test_it_is_named_by_its_own_index_in_long_lists(root: Path) -> None:
    engine = Sizes()
    with pytest.raises(TextTooLong, match=r"^texts\[5000\] has 13 tokens"):
        with_room(root, engine, 14_000_000).embed(["a"] * 5000 + ["b " * 11])
    assert engine.shapes == []


def test_loading_within_a_limit(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = resident_bytes() + 400_000_000
    with caplog.at_level("INFO"), Embedder.load(root, max_memory=limit) as embedder:
        np.testing.assert_allclose(embedder.embed(["a b"]), [expected_vector("a b")], atol=1e-6)
    assert "(max_memory is given)" in caplog.messages[-1]
    assert re.search(r"0\.\d\d GB for a batch, texts of up to \d+ tokens$", caplog.messages[-1])


def test_a_text_that_could_not_be_tokenized_within_the_limit(root: Path) -> None:
    tokenizer = TextTokenizer(root / "tokenizer.json", max_length=16)
    tokenizer.limit_memory(budget({1: 1}, 30_000))
    fits, long, wide = "a" * 100, "a" * 101, "é" * 51
    assert len(tokenizer.encode([fits, fits])) == 2
    for encode, name in (
        (lambda text: tokenizer.encode(["a", text]), r"texts\[1\]"),
        (lambda text: tokenizer.encode_with_spans(["a", text]), r"texts\[1\]"),
        (lambda text: tokenizer.encode_pairs([("a", "b"), ("", text)]), r"pairs\[1\]"),
    ):
        for text, size in ((long, 101), (wide, 102)):
            with pytest.raises(TextTooLong, match=rf"{name} has {size} bytes, .* max_memory leaves 0\.00 GB"):
                encode(text)


def test_a_long_text_is_not_tokenized_beside_a_batch(root: Path) -> None:
    bundle = Bundle.open(root)
    tokenizer = TextTokenizer(bundle.path_of("tokenizer.json"), max_length=16)
    memory = budget({1: 1}, 3_000_000)
    tokenizer.limit_memory(memory)
    engine = Sizes()
    embedder = Embedder(engine, tokenizer, bundle.manifest, memory=memory)
    long = "a " * 500  # 300,000 bytes, a tenth of the room
    with ThreadPoolExecutor(1) as pool:
        for call in (
            lambda text: tokenizer.encode([text]),
            lambda text: tokenizer.encode_with_spans([text]),
            lambda text: tokenizer.encode_pairs([("a", text)]),
            lambda text: embedder.embed_tokens([TokenizedText(np.array([1]), 0)]),  # a batch holds it too
        ):
            with memory.turn:
                assert len(tokenizer.encode(["a"])) == 1
                waiting = pool.submit(call, long)
                with pytest.raises(FutureTimeout):
                    waiting.result(0.2)
                assert engine.shapes == []
            assert len(waiting.result(10)) == 1
    assert engine.shapes == [(1, 1)]
    assert not memory.turn.locked()


# In a process of its own: in one whose heap has holes more of it stays.
TAKES_AND_GIVES_BACK = """
import sys
from modernbert_runtime.memory import resident_bytes
from modernbert_runtime.tokenizer import TextTokenizer
tokenizer = TextTokenizer(sys.argv[1], max_length=16)
tokenizer.encode(["a"])
before = resident_bytes()
(tokens,) = tokenizer.encode(["a " * 600_000])
print(tokens.num_dropped, resident_bytes() - before)
"""


def test_what_a_long_text_took_comes_back(root: Path) -> None:
    command = [sys.executable, "-c", TAKES_AND_GIVES_BACK, str(root / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dropped, kept = map(int, done.stdout.split())
    assert dropped == 600_000 - 14
    assert kept < 20e6  # of about 180 MB


def test_limits_that_cannot_be_kept(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_memory must exceed \d\.\d\d GB, not be 0\.00 GB"):
        Embedder.load(root, engine="onnxruntime", max_memory="1MB")
    with pytest.raises(InputError, match="max_memory counts memory of the CPU and providers compute elsewhere"):
        Embedder.load(root, max_memory="1GB", providers=["CUDAExecutionProvider"])
    plain = write_tiny_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="needs the artifact's activation_bytes, which this bundle's manifest lacks"):
        Embedder.load(plain, engine="onnxruntime", max_memory="1GB")
