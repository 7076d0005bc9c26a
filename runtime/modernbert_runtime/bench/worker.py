"""One candidate in one process, run on command: its peak memory is its own.

    python -m modernbert_runtime.bench.worker BUNDLE '{"engine": "onnxruntime", "precision": "fp32", "threads": null}'

reads one JSON command a line and answers each with a line. `serve` is the same for whatever turns texts into vectors.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], NDArray[Any]]


def serve(load: Callable[[], Embed], expected: type[Exception] | tuple[type[Exception], ...] = ()) -> None:
    """Load, then embed what each command asks for, until standard input ends.

    A command is {"texts": [str], "save": path or null}; the answer {"seconds", "peak_bytes"}, or {"error"} once and the
    end. The first answer, to nothing, has the seconds that loading took. Errors of the types `expected` are answered.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends its workers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        begin = time.perf_counter()
        embed = load()
        embed(["a"])
        answer(seconds=time.perf_counter() - begin, peak_bytes=peak_bytes())
        for line in sys.stdin:
            command = json.loads(line)
            begin = time.perf_counter()
            vectors = embed(command["texts"])
            seconds = time.perf_counter() - begin
            if command["save"]:
                np.save(command["save"], np.asarray(vectors, dtype=np.float32))
            answer(seconds=seconds, peak_bytes=peak_bytes())
    except expected as error:
        answer(error=" ".join(str(error).split()))


def peak_bytes() -> int:
    """Peak resident memory of this process since it was started.

    VmHWM on Linux, for ru_maxrss survives `exec` there: a worker would begin with the peak of its driver.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matrix_rate(shapes: Sequence[tuple[int, int]], *, rows: int = 1024, seconds: float = 2.0) -> float:
    """The best rate of fp32 matrix products seen, in FLOP/s: [rows, k] by [k, n] for each (k, n), by numpy's BLAS."""
    random = np.random.default_rng(0)
    pairs = [
        (random.standard_normal((rows, k), dtype=np.float32), random.standard_normal((k, n), dtype=np.float32))
        for k, n in shapes
    ]
    flops = sum(2 * rows * k * n for k, n in shapes)
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < end:
        begin = time.perf_counter()
        for x, w in pairs:
            x @ w
        best = max(best, flops / (time.perf_counter() - begin))
    return best


def main(bundle: str, options: str) -> None:
    """Be the worker of an engine and a precision of a bundle."""
    from modernbert_runtime.errors import EngineError, ModernBertRuntimeError

    def load() -> Embed:
        from modernbert_runtime.embedder import Embedder

        wanted = json.loads(options)
        embedder = Embedder.load(bundle, **wanted)
        if wanted["precision"] == "bf16" and embedder.engine == "openvino (CPU, fp32)":
            raise EngineError(f"this CPU has no bf16: it would be {embedder.engine}")
        return embedder.embed

    serve(load, ModernBertRuntimeError)


if __name__ == "__main__":
    if sys.argv[1] == "--matrix-rate":
        print(matrix_rate(json.loads(sys.argv[2])))
    else:
        main(*sys.argv[1:])
