"""One candidate in a process of its own, which may crash or run out of memory without taking the others along.

    python -m modernbert_runtime.doctor.worker BUNDLE '{"engine": ...}' CASES.npz OUT.npz

runs each case and prints one line of JSON: the engine's name, seconds of loading and of each length, peak memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from modernbert_runtime.bench.worker import peak_bytes
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.engine import PackedEngine
from modernbert_runtime.engines import open_engine
from modernbert_runtime.errors import ModernBertRuntimeError
from modernbert_runtime.tensorrt_engine import TensorRtEngine

OUTPUT = "last_hidden_state"
# Beyond this many tokens a single run says enough, and takes long enough.
LONG = 2048
RUNS = 3


def main(root: str, options: str, cases: str, out: str) -> None:
    """Runs the cases, arrays "ids_<length>" and "mask_<length>", and saves "<length>" -> hidden states."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        begin = time.perf_counter()
        opened = open_engine(Bundle.open(root, verify_hashes=False), output=OUTPUT, **json.loads(options))
        engine, load_seconds = opened.engine, time.perf_counter() - begin
        assert not isinstance(engine, PackedEngine)  # none was asked for
        given = np.load(cases)
        seconds: dict[str, float] = {}
        hidden: dict[str, Any] = {}
        for name in [name for name in given.files if name.startswith("ids_")]:
            length = name.removeprefix("ids_")
            ids, mask = given[name], given[f"mask_{length}"]
            times = []
            for _ in range(1 if int(length) > LONG else 1 + RUNS):
                begin = time.perf_counter()
                hidden[length] = engine.run(ids, mask)
                times.append(time.perf_counter() - begin)
            seconds[length] = min(times)
        np.savez(out, **hidden)
        answer = {"name": engine.name, "load_seconds": load_seconds, "seconds": seconds}
        if isinstance(engine, TensorRtEngine):
            answer |= {"layers": engine.layers(), "device_bytes": engine.device_bytes}
        engine.close()
        print(json.dumps({**answer, "peak_bytes": peak_bytes()}), file=answers)
    except ModernBertRuntimeError as error:
        print(json.dumps({"error": str(error)}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
