"""Callers that share batches: the queue's promises over arbitrary requests, then `aembed` with a controlled engine."""

import asyncio
import contextlib
import gc
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import (
    DIMENSION,
    MAX_LENGTH,
    PROMPTS,
    WORDS,
    expected_vector,
    token_table,
    write_tiny_bundle,
)

from modernbert_runtime import DeadlineExceeded, Embedder, EngineError, InputError, ModernBertRuntimeError, Overloaded
from modernbert_runtime.async_batcher import LOOKAHEAD, PATIENCE, Request, TokenQueue
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.tokenizer import TextTokenizer, TokenizedText

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OUR_THREADS = ("modernbert-tokenizer", "modernbert-engine")


# The queue: pure, so any sequence of events can be tried


def request_of(*lengths: int) -> Request:
    return Request([TokenizedText(np.zeros(length, dtype=np.int32), 0) for length in lengths], 1)


def queue_of(*requests: Request, batch_tokens: int = 100) -> TokenQueue:
    queue = TokenQueue(batch_tokens=batch_tokens, max_waiting_tokens=10**9)
    for request in requests:
        queue.admit(request)
    return queue


def lengths_of(queue: TokenQueue) -> list[list[int]]:
    batches = []
    while batch := queue.next_batch():
        batches.append([len(text.input_ids) for _, _, text in batch])
    return batches


LENGTHS = st.one_of(st.integers(1, 30), st.integers(1, 600))
# Texts of a new request, or None to take a batch, or a number to withdraw a request by its position.
EVENTS = st.lists(st.one_of(st.lists(LENGTHS, min_size=1, max_size=8), st.none(), st.integers(0, 50)), max_size=80)


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, batch_tokens=st.integers(1, 300), limit=st.integers(1, 6000))
def test_every_text_starts_once_unless_withdrawn_and_waits_its_bound_at_most(
    events: list[list[int] | int | None], batch_tokens: int, limit: int
) -> None:
    queue = TokenQueue(batch_tokens=batch_tokens, max_waiting_tokens=limit)
    admitted: list[Request] = []
    started: dict[Request, set[int]] = {}
    passed: dict[Request, int] = {}  # tokens that came later and started while the request had texts waiting
    withdrawn: set[Request] = set()

    def take() -> bool:
        waiting = [request for request in admitted if request.waiting]
        batch = queue.next_batch()
        lengths = [len(text.input_ids) for _, _, text in batch]
        if batch:
            longest = max(lengths)
            assert len(batch) == 1 or longest * len(batch) <= batch_tokens
            assert longest <= 64 or 2 * min(lengths) >= longest
        for request, index, text in batch:
            assert request not in withdrawn
            assert index not in started[request]
            started[request].add(index)
            position = admitted.index(request)
            for other in waiting:
                if admitted.index(other) < position:
                    passed[other] += len(text.input_ids)
        assert bool(batch) == bool(waiting)  # never idle while texts wait
        return bool(batch)

    for event in events:
        if isinstance(event, list):
            request = request_of(*event)
            before = queue.waiting_tokens
            if before + sum(event) > limit:
                with pytest.raises(Overloaded):
                    queue.admit(request)
                assert queue.waiting_tokens == before
            else:
                queue.admit(request)
                admitted.append(request)
                started[request], passed[request] = set(), 0
        elif event is None:
            take()
        elif event < len(admitted):
            if admitted[event].waiting:
                withdrawn.add(admitted[event])
            queue.withdraw(admitted[event])
        assert queue.waiting_tokens == sum(len(t.input_ids) for r in admitted for t in r.waiting.values()) <= limit
    while take():
        pass
    assert queue.waiting_tokens == 0
    for request in admitted:
        if request not in withdrawn:
            assert started[request] == set(range(len(started[request])))
            assert not request.waiting
        assert passed[request] < PATIENCE * request.num_tokens + LOOKAHEAD * batch_tokens


def test_short_requests_go_before_longer_ones_that_came_first() -> None:
    assert lengths_of(queue_of(request_of(1000), request_of(500), request_of(10))) == [[10], [500], [1000]]
    bulk = request_of(*[50] * 40)
    query = request_of(50)
    queue = queue_of(bulk, query)
    # Priority is by request: a list of short texts is long. Nor does it make the query's batch slower by joining it.
    assert [request for request, _, _ in queue.next_batch()] == [query]


def test_a_stream_of_short_requests_does_not_starve_a_long_one() -> None:
    long = request_of(200)
    queue = queue_of(long)
    passed = 0
    while long.waiting:  # a new short one before every batch, and shortest first would never end
        queue.admit(request_of(10))
        passed += sum(len(text.input_ids) for request, _, text in queue.next_batch() if request is not long)
        assert passed <= 10_000
    assert PATIENCE * 200 / 2 < passed < PATIENCE * 200 + LOOKAHEAD * 100


def test_requests_of_equal_length_run_in_the_order_they_came() -> None:
    requests = [request_of(40, 40) for _ in range(20)]
    queue = queue_of(*requests)
    order = []
    while batch := queue.next_batch():
        order += [request for request, _, _ in batch]
    assert order == [request for request in requests for _ in range(2)]


def test_long_texts_do_not_pad_short_ones() -> None:
    queue = queue_of(request_of(10, 300, 12, 290), request_of(11, 280), batch_tokens=1000)
    assert [sorted(batch) for batch in lengths_of(queue)] == [[10, 11, 12], [280, 290, 300]]


# Engines and a loop under control


class TinyEngine:
    """Computes what the tiny bundle means, in numpy, and keeps the texts of each call; can be held up, and can fail.

    With `error`, a batch with `fail_on` in a text raises; without, "broken" gives NaN as in the tiny bundle.
    """

    name = "tiny"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[str]] = []
        self.error: Callable[[str], BaseException] | None = None
        self.fail_on = "broken"
        self.closed = False

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        lengths = attention_mask.sum(axis=1)
        texts = [" ".join(WORDS[i] for i in ids[1 : n - 1]) for ids, n in zip(input_ids, lengths, strict=True)]
        self.calls.append(texts)
        assert self.gate.wait(5)
        assert not self.closed
        bad = [text for text in texts if self.fail_on in text]
        if self.error is not None and bad:
            raise self.error(bad[0])
        rows = token_table()[input_ids] * attention_mask[:, :, None]
        total = rows.sum(axis=1)
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("async") / "bundle")


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    yield
    assert our_threads() == []


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(OUR_THREADS)]


def with_engine(root: Path, engine: TinyEngine, **options: Any) -> Embedder:
    bundle = Bundle.open(root)
    tokenizer = TextTokenizer(bundle.path_of("tokenizer.json"), max_length=MAX_LENGTH)
    return Embedder(engine, tokenizer, bundle.manifest, **options)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; that this ever returns shows that the loop is not blocked."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timed out"
        await asyncio.sleep(0.001)


class Held:
    """An embedder whose engine is held up in the first call, with text "z", so that what follows must wait."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.engine = TinyEngine()
        self.embedder = with_engine(root, self.engine, **options)

    async def __aenter__(self) -> "Held":
        self.engine.gate.clear()
        self.first = self.ask("z")
        await until(lambda: self.engine.calls == [["z"]])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.gate.set()
        with contextlib.suppress(EngineError):
            await self.first
        await self.embedder.aclose()

    def ask(self, *texts: str, timeout: float | None = None) -> "asyncio.Task[np.ndarray]":
        return asyncio.ensure_future(self.embedder.aembed(texts, timeout=timeout))

    async def ask_and_wait(self, *texts: str) -> "asyncio.Task[np.ndarray]":
        """As `ask`, until it is in the queue."""
        before = self.waiting
        task = self.ask(*texts)
        await until(lambda: self.waiting > before)
        return task

    @property
    def waiting(self) -> int:
        return self.embedder._batcher.waiting_tokens


# Values, sharing, order


def test_the_same_vectors_as_embed(root: Path) -> None:
    texts = ["a b c", "", "z " * 40, "q", "a"]

    async def main(embedder: Embedder) -> None:
        for prompt in (None, "query"):
            vectors = await embedder.aembed(texts, prompt_name=prompt)
            assert vectors.dtype == np.float32
            np.testing.assert_allclose(vectors, embedder.embed(texts, prompt_name=prompt), atol=1e-6)
        np.testing.assert_allclose(
            await embedder.aembed(["a"], prompt_name="query"), [expected_vector("a", PROMPTS["query"])], atol=1e-6
        )
        assert (await embedder.aembed([])).shape == (0, DIMENSION)
        assert (await embedder.aembed(["a"], timeout=float("inf"))).shape == (1, DIMENSION)

    with Embedder.load(root, threads=1, batch_tokens=24) as embedder:
        asyncio.run(main(embedder))


def test_callers_share_batches(root: Path) -> None:
    async def main() -> None:
        async with Held(root) as held:
            tasks = [held.ask(letter, letter * 2 + " b") for letter in LETTERS[:20]]
            await until(lambda: held.waiting == 20 * (3 + 4))
            held.engine.gate.set()
            for letter, vectors in zip(LETTERS[:20], await asyncio.gather(*tasks), strict=True):
                np.testing.assert_allclose(vectors[0], expected_vector(letter), atol=1e-6)
            assert [len(call) for call in held.engine.calls] == [1, 40]

    asyncio.run(main())


def test_batches_keep_to_the_budget(root: Path) -> None:
    async def main() -> None:
        async with Held(root, batch_tokens=12) as held:
            tasks = [await held.ask_and_wait(letter) for letter in LETTERS[:10]]  # 3 tokens each
            held.engine.gate.set()
            await asyncio.gather(*tasks)
            assert held.engine.calls[1:] == [["a", "b", "c", "d"], ["e", "f", "g", "h"], ["i", "j"]]

    asyncio.run(main())


def test_several_event_loops_share_batches(root: Path) -> None:
    engine = TinyEngine()
    engine.gate.clear()
    results: dict[str, np.ndarray] = {}
    with with_engine(root, engine) as embedder:

        def ask(letter: str) -> None:
            results[letter] = asyncio.run(embedder.aembed([letter]))

        threads = [threading.Thread(target=ask, args=(letter,)) for letter in LETTERS[:8]]
        threads[0].start()
        asyncio.run(until(lambda: len(engine.calls) == 1))
        for thread in threads[1:]:
            thread.start()
        asyncio.run(until(lambda: embedder._batcher.waiting_tokens == 7 * 3))
        engine.gate.set()
        for thread in threads:
            thread.join(10)
    assert [len(call) for call in engine.calls] == [1, 7]
    for letter in LETTERS[:8]:
        np.testing.assert_allclose(results[letter], [expected_vector(letter)], atol=1e-6)


def test_nothing_is_lost_swapped_or_repeated_under_load(root: Path) -> None:
    """32 tasks, 4,000 requests, 1 % of them malformed in four ways, 1 % cancelled: each gets its own answer."""
    malformed: dict[object, str] = {
        "a broken b": "texts[{}]",  # NaN for this row
        "a\ud800": "texts[{}] has a lone surrogate",
        None: "texts[{}] must be str",
        7: "texts[{}] must be str",
    }
    counts = {"right": 0, "refused": 0, "cancelled": 0}

    async def one(embedder: Embedder, rng: random.Random) -> None:
        texts: list[Any] = [
            " ".join(rng.choices(LETTERS, k=rng.randrange(MAX_LENGTH - 2))) for _ in range(rng.choice([1, 1, 1, 5]))
        ]
        chance = rng.random()
        if chance < 0.01:
            bad, position = rng.choice(list(malformed)), rng.randrange(len(texts))
            texts[position] = bad
            with pytest.raises(ModernBertRuntimeError) as caught:
                await embedder.aembed(texts)
            assert malformed[bad].format(position) in str(caught.value)
            counts["refused"] += 1
            return
        task = asyncio.ensure_future(embedder.aembed(texts))
        if chance < 0.02:
            await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.002]))
            task.cancel()
            counts["cancelled"] += 1
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return
        vectors = await task
        np.testing.assert_allclose(vectors, [expected_vector(text) for text in texts], atol=1e-6)
        counts["right"] += 1

    async def worker(embedder: Embedder, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(125):
            await one(embedder, rng)

    async def main() -> None:
        embedder = Embedder.load(root, threads=1, batch_tokens=96)
        async with contextlib.aclosing(embedder):
            await asyncio.gather(*(worker(embedder, seed) for seed in range(32)))
            assert embedder._batcher.waiting_tokens == 0

    asyncio.run(main())
    assert sum(counts.values()) == 4000
    assert min(counts.values()) > 10


# Cancelling, deadlines, overload


def test_cancelling_removes_the_work(root: Path) -> None:
    async def main() -> None:
        async with Held(root) as held:
            tasks = {letter: await held.ask_and_wait(letter, letter) for letter in LETTERS[:10]}
            for letter in "bdf":
                tasks[letter].cancel()
            for letter in "bdf":
                with pytest.raises(asyncio.CancelledError):
                    await tasks.pop(letter)
            assert held.waiting == 7 * 2 * 3
            held.engine.gate.set()
            for letter, task in tasks.items():
                np.testing.assert_allclose(await task, [expected_vector(letter)] * 2, atol=1e-6)
            assert held.engine.calls[1:] == [[letter for letter in "aceghij" for _ in range(2)]]

    asyncio.run(main())


def test_cancelling_what_runs_drops_its_result_only(root: Path) -> None:
    async def main() -> None:
        async with Held(root) as held:
            cancelled, other = await held.ask_and_wait("a"), await held.ask_and_wait("b")
            first_gate, held.engine.gate = held.engine.gate, threading.Event()
            first_gate.set()
            await until(lambda: held.engine.calls[1:] == [["a", "b"]])
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            held.engine.gate.set()
            np.testing.assert_allclose(await other, [expected_vector("b")], atol=1e-6)
            np.testing.assert_allclose(await held.ask("c"), [expected_vector("c")], atol=1e-6)

    asyncio.run(main())


def test_a_loop_that_ends_leaves_nothing_waiting(root: Path) -> None:
    engine = TinyEngine()
    engine.gate.clear()
    with with_engine(root, engine) as embedder:

        async def leave() -> None:
            running = asyncio.ensure_future(embedder.aembed(["a"]))
            await until(lambda: engine.calls == [["a"]])
            waiting = asyncio.ensure_future(embedder.aembed(["b", "c"]))
            await until(lambda: embedder._batcher.waiting_tokens == 2 * 3)
            assert not running.done()  # asyncio.run cancels them
            assert not waiting.done()

        asyncio.run(leave())
        assert embedder._batcher.waiting_tokens == 0
        engine.gate.set()
        np.testing.assert_allclose(asyncio.run(embedder.aembed(["d"])), [expected_vector("d")], atol=1e-6)
    assert engine.calls == [["a"], ["d"]]


def test_a_request_leaves_the_queue_when_its_time_is_up(root: Path) -> None:
    async def main() -> None:
        async with Held(root) as held:
            late, patient = held.ask("a", "b", timeout=0.05), await held.ask_and_wait("c")
            with pytest.raises(
                DeadlineExceeded, match=r"timeout of 0\.05 s passed before .*: allow more time"
            ) as caught:
                await late
            assert isinstance(caught.value, TimeoutError)
            await until(lambda: held.waiting == 3)
            for timeout in (0, -1):
                with pytest.raises(DeadlineExceeded):
                    await held.ask("d", timeout=timeout)
            held.engine.gate.set()
            await patient
            assert held.engine.calls == [["z"], ["c"]]

    asyncio.run(main())


def test_the_timeout_counts_from_the_call_and_tokenizing_does_not_block(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = TinyEngine(), threading.Event()

    async def main(embedder: Embedder) -> None:
        encode = embedder._tokenizer.encode
        monkeypatch.setattr(embedder._tokenizer, "encode", lambda *a, **k: gate.wait(5) and encode(*a, **k))
        tasks = [asyncio.ensure_future(embedder.aembed([text], timeout=0.05)) for text in "ab"]
        assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [DeadlineExceeded] * 2
        gate.set()
        await embedder.aembed(["c"])

    with with_engine(root, engine) as embedder:
        asyncio.run(main(embedder))
    assert engine.calls == [["c"]]


def test_overload_is_refused_with_limit_and_value(root: Path) -> None:
    async def main() -> None:
        async with Held(root, max_waiting_tokens=12) as held:
            waiting = await held.ask_and_wait("a", "b", "c")
            message = "max_waiting_tokens is 12, 9 wait and this request has 4: try again later, or load with a higher"
            with pytest.raises(Overloaded, match=message):
                await held.ask("d e")
            with pytest.raises(Overloaded, match="9 wait and this request has 13: send fewer texts at once"):
                await held.ask("a b c d e f g h i j k")
            fits = await held.ask_and_wait("f")
            held.engine.gate.set()
            await asyncio.gather(waiting, fits)
            assert (await held.ask("d e")).shape == (1, DIMENSION)  # it recovers
            assert "d e" not in held.engine.calls[1]

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [float("nan"), "1"])
def test_a_timeout_that_is_none(root: Path, timeout: Any) -> None:
    with (
        with_engine(root, TinyEngine()) as embedder,
        pytest.raises(InputError, match="timeout must be seconds or None"),
    ):
        asyncio.run(embedder.aembed(["a"], timeout=timeout))


def test_time_that_is_up_starts_nothing(root: Path) -> None:
    async def main() -> None:
        for _ in range(20):  # however fast the tokenizer is
            with pytest.raises(DeadlineExceeded):
                await embedder.aembed(["a"], timeout=0)

    with with_engine(root, TinyEngine()) as embedder:
        asyncio.run(main())
        assert embedder.stats().batches == 0


@pytest.mark.parametrize("value", [0, -1, 1.5, "9", None, True])
def test_bad_options(root: Path, value: Any) -> None:
    with pytest.raises(InputError, match=f"max_waiting_tokens must be at least 1, not {value!r}"):
        Embedder.load(root, max_waiting_tokens=value)


def test_short_requests_go_first_and_long_ones_still_get_their_turn(root: Path) -> None:
    async def main() -> None:
        async with Held(root, batch_tokens=MAX_LENGTH) as held:
            tasks = [await held.ask_and_wait(text) for text in ("a b c d e f g h i j k l", "m n o p q r s t", "u", "v")]
            held.engine.gate.set()
            await asyncio.gather(*tasks)
            assert held.engine.calls[1:] == [["u", "v"], ["m n o p q r s t"], ["a b c d e f g h i j k l"]]

    asyncio.run(main())


# Failures


@pytest.mark.parametrize("error", [EngineError, ValueError, MemoryError, StopIteration, SystemExit])
def test_a_failed_batch_runs_item_by_item(root: Path, error: type[BaseException]) -> None:
    async def main() -> None:
        async with Held(root) as held:
            held.engine.error = lambda text: error(f"cannot do\n{text!r}")
            good, bad = await held.ask_and_wait("a", "b"), await held.ask_and_wait("c", "broken d", "broken e", "f")
            other = await held.ask_and_wait("broken")
            held.engine.gate.set()
            np.testing.assert_allclose(await good, [expected_vector("a"), expected_vector("b")], atol=1e-6)
            with pytest.raises(EngineError, match="broken d"):
                await bad
            with pytest.raises(EngineError, match="'broken'") as caught:
                await other
            if error is not EngineError:
                assert "the engine failed on texts[0] (" in str(caught.value)
                assert "\n" not in str(caught.value)
                assert isinstance(caught.value.__cause__, error)
            # Together once, then alone; after its first error the rest of a request is not tried.
            together = ["broken d", "broken e", "broken", "a", "b", "c", "f"]
            assert held.engine.calls[1:] == [together, ["broken d"], ["broken"], ["a"], ["b"]]

    asyncio.run(main())


def test_only_texts_without_finite_values_run_again(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Held(root) as held:
            good, bad = await held.ask_and_wait("a", "b"), await held.ask_and_wait("c", "broken")
            held.engine.gate.set()
            np.testing.assert_allclose(await good, [expected_vector("a"), expected_vector("b")], atol=1e-6)
            with pytest.raises(EngineError, match=r"NaN or infinity for texts\[1\]"):
                await bad
            assert held.engine.calls[1:] == [["a", "b", "c", "broken"], ["broken"]]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert not caplog.messages


def test_a_failure_takes_the_rest_of_its_request_out_of_the_queue(root: Path) -> None:
    async def main() -> None:
        async with Held(root, batch_tokens=8) as held:
            bad = await held.ask_and_wait("broken a", "b c", "d e", "f g")
            held.engine.gate.set()
            while held.waiting:  # the loop gets no chance to do it
                time.sleep(0.001)
            with pytest.raises(EngineError, match=r"texts\[0\]"):
                await bad
            assert held.engine.calls[1:] == [["broken a", "b c"], ["broken a"]]

    asyncio.run(main())


def test_an_engine_that_always_fails_answers_everybody(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Held(root) as held:
            held.engine.error, held.engine.fail_on = EngineError, ""
            tasks = [await held.ask_and_wait(letter) for letter in LETTERS]
            held.engine.gate.set()
            for task in [held.first, *tasks]:
                with pytest.raises(EngineError):
                    await task
            held.engine.error = None
            assert (await held.ask("a")).shape == (1, DIMENSION)  # and it works again once the engine does

    asyncio.run(main())
    assert any("a batch of 26 texts failed" in message for message in caplog.messages)


def test_bad_texts_reach_no_engine(root: Path) -> None:
    engine = TinyEngine()

    async def main(embedder: Embedder) -> None:
        for texts, message in (("a", "not one str"), (["a", None], r"texts\[1\] must be str"), (None, "NoneType")):
            with pytest.raises(InputError, match=message):
                await embedder.aembed(texts)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="prompt_name must be one of"):
            await embedder.aembed(["a"], prompt_name="title")

    with with_engine(root, engine) as embedder:
        asyncio.run(main(embedder))
    assert engine.calls == []


def test_truncation_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with with_engine(root, TinyEngine()) as embedder:
        asyncio.run(embedder.aembed(["a " * 15]))
    assert caplog.messages == ["truncated 1 of 1 texts to max_length 16; the first is texts[0], 1 tokens dropped"]


# Closing


@pytest.mark.parametrize("close", ["close", "aclose"])
def test_closing_answers_everybody_and_ends_the_threads(root: Path, close: str) -> None:
    async def main() -> None:
        async with Held(root, batch_tokens=6) as held:
            tasks = [await held.ask_and_wait(letter, letter) for letter in LETTERS]
            closing = asyncio.ensure_future(
                held.embedder.aclose() if close == "aclose" else asyncio.to_thread(held.embedder.close)
            )
            for task in tasks:  # while the engine is still held up
                with pytest.raises(EngineError, match="closed before this request was done: load the bundle again"):
                    await task
            assert not closing.done()
            assert not held.engine.closed
            with pytest.raises(EngineError, match="closed: load"):
                await held.ask("a")
            held.engine.gate.set()
            await closing
            np.testing.assert_allclose(await held.first, [expected_vector("z")], atol=1e-6)  # what runs is finished
            assert held.engine.closed
            assert our_threads() == []
            assert held.engine.calls == [["z"]]
            held.embedder.close()  # twice is fine

    asyncio.run(main())


def test_closing_within_the_loop_does_not_deadlock(root: Path) -> None:
    async def main() -> None:
        with with_engine(root, TinyEngine(), batch_tokens=4) as embedder:
            tasks = [asyncio.ensure_future(embedder.aembed([letter])) for letter in LETTERS]
            await asyncio.sleep(0)
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10):
            assert isinstance(result, EngineError | np.ndarray)

    asyncio.run(main())


def test_closing_before_any_use(root: Path) -> None:
    async def main(embedder: Embedder) -> None:
        await embedder.aclose()
        with pytest.raises(EngineError, match="closed"):
            await embedder.aembed(["a"])

    asyncio.run(main(with_engine(root, TinyEngine())))


def test_a_loop_that_is_closed_leaves_no_work(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = TinyEngine()
    engine.gate.clear()
    loop = asyncio.new_event_loop()
    with with_engine(root, engine, batch_tokens=3) as embedder:
        tasks = [loop.create_task(embedder.aembed([letter])) for letter in "abcd"]
        loop.run_until_complete(until(lambda: embedder._batcher.waiting_tokens == 3 * 3))
        loop.close()  # without cancelling anybody
        engine.gate.set()
        np.testing.assert_allclose(asyncio.run(embedder.aembed(["e"])), [expected_vector("e")], atol=1e-6)
        assert engine.calls == [["a"], ["e"]]
        assert embedder._batcher.waiting_tokens == 0
    for task in tasks:
        task.get_coro().close()  # as the garbage collector does
        task._log_destroy_pending = False
    assert caplog.messages == []


EXIT = """
import asyncio, atexit, contextlib, sys, threading, time
from modernbert_runtime import Embedder, EngineError

embedder = Embedder.load(sys.argv[1], engine="onnxruntime", batch_tokens=5)
run, runs = embedder._runner.engine.run, []

def slow(*batch):
    runs.append(time.sleep(0.005))
    return run(*batch)

def ask():
    with contextlib.suppress(EngineError):  # closed before this request was done
        asyncio.run(embedder.aembed(["a b c"] * 1000))

embedder._runner.engine.run = slow
atexit.register(lambda: print(len(runs)))  # called when threads have ended
threading.Thread(target=ask, daemon=True).start()
while len(runs) < 3:
    time.sleep(0.01)
"""


def test_the_interpreter_ends_after_the_batch_that_runs(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EXIT, str(root)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert 3 <= int(done.stdout) < 500


def test_an_embedder_that_is_dropped_takes_its_threads_along(root: Path) -> None:
    embedder = with_engine(root, TinyEngine())
    asyncio.run(embedder.aembed(["a"]))
    assert len(our_threads()) == 2
    del embedder

    def gone() -> bool:
        gc.collect()  # repeatedly: the engine thread holds the embedder until it sees that nothing waits
        return our_threads() == []

    asyncio.run(until(gone))
