"""Work that is done one step ahead of whoever consumes it: tokenizing the next texts while the engine runs."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def one_ahead(work: Callable[[S], T], steps: Sequence[S]) -> Iterator[T]:
    """`map(work, steps)`, with the next step under way in a thread while the caller has the current one.

    One step makes no thread. An error is raised where its result would have come.
    """
    if len(steps) <= 1:
        yield from map(work, steps)
        return
    with ThreadPoolExecutor(1, "modernbert-ahead") as pool:
        following = pool.submit(work, steps[0])
        for step in steps[1:]:
            current, following = following, pool.submit(work, step)
            yield current.result()
        yield following.result()
