"""Concurrent callers share batches: a queue with a token budget, and the threads that work it off.

`TokenQueue` decides who waits, who is refused and what runs next; it has no clock, thread or event loop. `AsyncBatcher`
joins it to callers that await and to one thread that runs the engine. There is no timer that collects requests: while
the engine is busy others arrive, and the next batch takes them together.
"""

import contextlib
import logging
import math
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.batching import plan_batches
from modernbert_runtime.errors import (
    DeadlineExceeded,
    EngineError,
    InputError,
    ModernBertRuntimeError,
    Overloaded,
    one_line,
)
from modernbert_runtime.tokenizer import TokenizedText

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A request of n tokens lets at most this many times n tokens that came later go first: 8,192 tokens wait for at most
# 8 full batches of later and shorter requests, and a query goes before the last seven such documents.
PATIENCE = 8
# Batches' worth of tokens, from the front of the queue, among which texts of similar length are sought.
LOOKAHEAD = 4
# Tokens that wait unless the caller says otherwise: minutes of work for a CPU.
MAX_WAITING_TOKENS = 262_144


class Request:
    """The texts of one caller, and the vectors that they become.

    Args:
        tokens: at least one text.
        dimension: of one vector.
        finish: what the caller gets of the vectors [texts, dimension]; called in the engine thread.
        abandoned: whether nobody can receive them any more, for their event loop is closed.
    """

    def __init__(
        self,
        tokens: Sequence[TokenizedText],
        dimension: int,
        finish: Callable[[NDArray[np.float32]], NDArray[Any]] = lambda vectors: vectors,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self.waiting = dict(enumerate(tokens))  # index of the text -> the text, until it starts
        self.num_tokens = sum(len(text.input_ids) for text in tokens)
        self.order = 0  # smaller goes first; the queue sets it
        self.future: Future[NDArray[Any]] = Future()
        self.abandoned = abandoned
        self._finish = finish
        self._vectors = np.empty((len(tokens), dimension), dtype=np.float32)
        self._missing = len(tokens)

    def put(self, index: int, vector: NDArray[Any]) -> None:
        """Take the vector of one text; the last one completes the request."""
        self._vectors[index] = vector
        self._missing -= 1
        if self._missing == 0 and not self.abandoned():
            with contextlib.suppress(InvalidStateError):  # the caller is gone
                self.future.set_result(self._finish(self._vectors))

    def fail(self, error: ModernBertRuntimeError) -> None:
        """Let the caller have this error, unless it is gone or has one already."""
        if not self.abandoned():
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)


Item = tuple[Request, int, TokenizedText]


class TokenQueue:
    """Requests that wait, and which of their texts run next.

    Age is counted in tokens admitted, not in seconds. A request's place is that number when it came plus `PATIENCE`
    times its own tokens: short ones go first, but a place never changes while later ones move back, so none starves.
    Of all that came after a request, less than PATIENCE * its tokens + LOOKAHEAD * batch_tokens can start before it is
    done (the second term fills batches that would otherwise run half empty).

    Args:
        batch_tokens: most tokens of one batch, padding included; a longer text runs alone.
        max_waiting_tokens: most tokens that wait.
        max_rows, packed: see `plan_batches`.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        max_waiting_tokens: int,
        max_rows: Callable[[int], int] | None = None,
        packed: bool = False,
    ) -> None:
        self.waiting_tokens = 0
        self._batch_tokens = batch_tokens
        self._max_rows = max_rows
        self._packed = packed
        self._max_waiting_tokens = max_waiting_tokens
        self._admitted_tokens = 0
        self._requests: list[Request] = []  # sorted by order, ties as they came; each has texts waiting

    def admit(self, request: Request) -> None:
        """Let a request wait. Raises Overloaded where that would exceed `max_waiting_tokens`."""
        if self.waiting_tokens + request.num_tokens > self._max_waiting_tokens:
            never = request.num_tokens > self._max_waiting_tokens
            raise Overloaded(
                f"max_waiting_tokens is {self._max_waiting_tokens}, {self.waiting_tokens} wait and this request has "
                f"{request.num_tokens}: {'send fewer texts at once' if never else 'try again later'}, "
                "or load with a higher max_waiting_tokens"
            )
        request.order = self._admitted_tokens + PATIENCE * request.num_tokens
        self._admitted_tokens += request.num_tokens
        self.waiting_tokens += request.num_tokens
        insort(self._requests, request, key=_order)

    def withdraw(self, request: Request) -> None:
        """Forget what a request has waiting, if anything."""
        if request.waiting:
            self.waiting_tokens -= sum(len(text.input_ids) for text in request.waiting.values())
            request.waiting.clear()
            self._remove(request)

    def withdraw_all(self) -> list[Request]:
        """Forget everything; returns the requests that had texts waiting."""
        requests = list(self._requests)
        for request in requests:
            self.withdraw(request)
        return requests

    def withdraw_abandoned(self) -> None:
        """Forget what nobody can receive."""
        for request in [request for request in self._requests if request.abandoned()]:
            self.withdraw(request)

    def next_batch(self) -> list[Item]:
        """Take the first text of the first request, and those that `plan_batches` puts with it; [] if none waits."""
        items: list[Item] = []
        room = LOOKAHEAD * self._batch_tokens
        last = self._requests[0].order + room if self._requests else 0
        for request in self._requests:
            if request.order >= last or room <= 0:
                break
            for index, text in request.waiting.items():
                items.append((request, index, text))
                room -= len(text.input_ids)
                if room <= 0:
                    break
        lengths = [len(text.input_ids) for _, _, text in items]
        plan = plan_batches(lengths, self._batch_tokens, max_rows=self._max_rows, packed=self._packed)
        batch = [items[position] for rows in plan if 0 in rows for position in rows]
        for request, index, text in batch:
            del request.waiting[index]
            self.waiting_tokens -= len(text.input_ids)
            if not request.waiting:
                self._remove(request)
        return batch

    def _remove(self, request: Request) -> None:
        del self._requests[self._requests.index(request, bisect_left(self._requests, request.order, key=_order))]


class AsyncBatcher:
    """Runs a model for any number of tasks, event loops and threads: all share batches, each is answered on its loop.

    One thread tokenizes and one runs the engine, so no event loop is ever blocked; both start with the first request
    and end with `close` or with the object. A request is counted against `max_waiting_tokens` once it is tokenized.

    Args:
        run: vectors [n, dimension] of texts, not yet checked for NaN. Called in the engine thread.
        run_one: the checked vector of one text; errors name it by the index given. Called in the engine thread.
        dimension: of one vector.
        batch_tokens: see `TokenQueue`.
        max_waiting_tokens: see `TokenQueue`.
        max_rows, packed: see `plan_batches`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[TokenizedText]], NDArray[Any]],
        run_one: Callable[[TokenizedText, int], NDArray[Any]],
        *,
        dimension: int,
        batch_tokens: int,
        max_waiting_tokens: int,
        max_rows: Callable[[int], int] | None = None,
        packed: bool = False,
    ) -> None:
        self._run = run
        self._run_one = run_one
        self._dimension = dimension
        self._queue = TokenQueue(
            batch_tokens=batch_tokens, max_waiting_tokens=max_waiting_tokens, max_rows=max_rows, packed=packed
        )
        self._lock = threading.Lock()  # of the queue and the two flags; never held while the engine runs
        self._working = False
        self._closed = False
        self._tokenizer_thread = ThreadPoolExecutor(1, "modernbert-tokenizer")
        self._engine_thread = ThreadPoolExecutor(1, "modernbert-engine")

    @property
    def waiting_tokens(self) -> int:
        """Tokens of texts that have not started yet."""
        return self._queue.waiting_tokens

    async def embed(
        self,
        tokenize: Callable[[], list[TokenizedText]],
        *,
        finish: Callable[[NDArray[np.float32]], NDArray[Any]] = lambda vectors: vectors,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """What `finish` makes of the rows [n, dimension] of what `tokenize` returns; errors as `Embedder.aembed`."""
        import asyncio  # callers have it; others need not pay 30 ms for it

        if timeout is not None and (not isinstance(timeout, int | float) or math.isnan(timeout)):
            raise InputError(f"timeout must be seconds or None, not {timeout!r}")
        end = None if timeout is None else time.monotonic() + timeout

        def tokenize_if_open() -> list[TokenizedText]:
            self._check_open()
            return tokenize()

        try:
            with self._lock:
                self._check_open()
                tokenizing = _submit(self._tokenizer_thread, tokenize_if_open)
            tokens = await _until(end, tokenizing)
            if not tokens:
                return finish(np.empty((0, self._dimension), dtype=np.float32))
            request = Request(tokens, self._dimension, finish, asyncio.get_running_loop().is_closed)
            self._admit(request)
            try:
                return await _until(end, request.future)
            finally:  # no matter why the caller leaves, what has not started never will
                request.future.cancel()
                with self._lock:
                    self._queue.withdraw(request)
        except _EndReached:
            raise DeadlineExceeded(
                f"timeout of {timeout} s passed before the vectors were ready: allow more time, or send less at once"
            ) from None

    def close(self) -> None:
        """Refuse new requests, fail those with texts waiting, let the running batch finish, and end both threads."""
        with self._lock:
            self._closed = True
            requests = self._queue.withdraw_all()
        for request in requests:
            request.fail(EngineError("closed before this request was done: load the bundle again"))
        self._tokenizer_thread.shutdown()
        self._engine_thread.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("closed: load the bundle again")

    def _admit(self, request: Request) -> None:
        with self._lock:
            self._check_open()
            self._queue.admit(request)
            if not self._working:
                _submit(self._engine_thread, self._work)
                self._working = True

    def _work(self) -> None:
        """Run a batch, and see to it that the next one runs. The engine thread's only job, at most once at a time.

        One batch a job: the end of the interpreter waits for jobs that were submitted, and takes no more of them.
        """
        with self._lock:
            self._queue.withdraw_abandoned()
            batch = self._queue.next_batch()
            if not batch:
                self._working = False
                return
        self._run_batch(batch)
        try:
            _submit(self._engine_thread, self._work)
        except EngineError as error:
            with self._lock:
                requests = self._queue.withdraw_all()
            for request in requests:
                request.fail(error)

    def _run_batch(self, batch: list[Item]) -> None:
        """Answer for every text: what fails together runs once more alone, so that only the culprits' callers hear."""
        alone = batch
        if len(batch) > 1:
            try:
                vectors = self._run([text for _, _, text in batch])
                finite = np.isfinite(vectors).all(axis=1)
            except BaseException as error:  # even SystemExit: whoever awaits the others would wait forever
                logger.warning("a batch of %d texts failed (%s): each runs alone now", len(batch), one_line(error))
            else:
                for (request, index, _), vector, good in zip(batch, vectors, finite, strict=True):
                    if good:
                        request.put(index, vector)
                alone = [item for item, good in zip(batch, finite, strict=True) if not good]
        for request, index, text in alone:
            if request.future.done():  # cancelled, or another of its texts has failed
                continue
            try:
                request.put(index, self._run_one(text, index))
            except BaseException as error:  # as above
                with self._lock:
                    self._queue.withdraw(request)
                request.fail(_as_ours(error, index))


class _EndReached(Exception):  # noqa: N818 - never leaves this file
    pass


async def _until(end: float | None, future: Future[T]) -> T:
    """The result of a future of another thread, or _EndReached; cancels it if it is not needed any more."""
    import asyncio  # as above

    waiter = asyncio.wrap_future(future)
    try:
        left = None if end is None else end - time.monotonic()
        if left is None or left > 0:
            # Not wait_for: before Python 3.12 it can swallow a cancellation, before 3.11 its TimeoutError is another.
            await asyncio.wait([waiter], timeout=left)
        if not waiter.done():
            raise _EndReached
        return waiter.result()
    finally:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and what is left of this task is cleared away
            if not waiter.cancel():
                waiter.exception()  # seen, so asyncio does not log it if we were cancelled meanwhile


def _submit(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    """Raises EngineError where the pool is closed, be it by the end of the interpreter."""
    try:
        return pool.submit(work)
    except RuntimeError as error:
        raise EngineError(f"closed before this request was done ({one_line(error)})") from error


def _as_ours(error: BaseException, index: int) -> ModernBertRuntimeError:
    if isinstance(error, ModernBertRuntimeError):
        return error
    ours = EngineError(f"the engine failed on texts[{index}] ({type(error).__name__}: {one_line(error)})")
    ours.__cause__ = error
    return ours


def _order(request: Request) -> int:
    return request.order
