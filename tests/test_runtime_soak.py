"""One process for a long time: 100,000 short texts from 32 tasks, among them malformed and cancelled ones."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from test_runtime_tiny_bundle import token_table, write_tiny_bundle

from modernbert_runtime import Embedder, EngineError, InputError
from modernbert_runtime.memory import resident_bytes

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = 100_000
TASKS = 32


def expected(words: list[str]) -> np.ndarray:
    ids = [1, *(8 + LETTERS.index(word) for word in words), 2]
    mean = TABLE[ids].mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


TABLE = token_table().astype(np.float64)


class Tally:
    """What the tasks have seen."""

    def __init__(self) -> None:
        self.right = self.malformed = self.poisoned = self.cancelled = self.finished_before_cancel = 0


async def one(embedder: Embedder, rng: random.Random, tally: Tally) -> None:
    """One request with one text of its own, whose answer is known."""
    kind = rng.random()
    words = rng.choices(LETTERS, k=rng.randrange(15))
    if kind < 0.005:  # malformed: refused by the tokenizer
        with pytest.raises(InputError, match=r"texts\[0\] has a lone surrogate"):
            await embedder.aembed(["\ud800" + " ".join(words)])
        tally.malformed += 1
    elif kind < 0.01:  # poisoned: breaks the batch that it is in, after others have joined it
        with pytest.raises(EngineError, match=r"NaN or infinity for texts\[0\]"):
            await embedder.aembed([" ".join([*words[:13], "broken"])])
        tally.poisoned += 1
    elif kind < 0.02:
        task = asyncio.ensure_future(embedder.aembed([" ".join(words)]))
        await asyncio.sleep(rng.random() * 0.002)
        task.cancel()
        try:
            np.testing.assert_allclose((await task)[0], expected(words), atol=1e-6)
            tally.finished_before_cancel += 1
        except asyncio.CancelledError:
            tally.cancelled += 1
    else:
        (vector,) = await embedder.aembed([" ".join(words)])
        np.testing.assert_allclose(vector, expected(words), atol=1e-6)  # its own vector and nobody else's
        tally.right += 1


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_swapped_and_memory_is_flat(tmp_path: Path) -> None:
    tally = Tally()
    resident: list[int] = []

    async def caller(number: int, embedder: Embedder) -> None:
        rng = random.Random(number)
        for count in range(TEXTS // TASKS):
            await one(embedder, rng, tally)
            if number == 0 and count % 100 == 0:
                resident.append(resident_bytes())

    async def everyone(embedder: Embedder) -> None:
        await asyncio.gather(*(caller(number, embedder) for number in range(TASKS)))

    with Embedder.load(write_tiny_bundle(tmp_path / "bundle"), engine="onnxruntime", threads=1) as embedder:
        asyncio.run(everyone(embedder))
        stats = embedder.stats()
    print(f"{vars(tally)}, {stats}, resident {[size // 2**20 for size in resident]} MiB")
    assert sum(vars(tally).values()) == TEXTS
    assert min(tally.malformed, tally.poisoned, tally.cancelled) > 200
    assert stats.waiting_tokens == 0
    assert stats.batches < stats.texts  # they did share
    warm = resident[len(resident) // 10]
    assert max(resident[len(resident) // 10 :]) <= 1.05 * warm
