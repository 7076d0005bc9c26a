"""What the latency benchmarks share: workers that take turns, ceilings, medians, and where results are kept.

Every candidate runs in a worker process of its own that imports numpy and ONNX Runtime and nothing else, so that its
peak resident memory is its own. The driver hands out turns over a pipe: never do two workers compute at once. What
is timed is `session.run` on ready numpy inputs with all outputs asked for; not timed: starting, loading, reading the
inputs, warming up, tokenizing.

Peak memory is the high-water mark of a fresh process (`VmHWM` on Linux). `ru_maxrss` will not do there: it survives
`exec`, so a worker would start with the driver's peak. Resetting the mark (`/proc/self/clear_refs`) will not do either:
ONNX Runtime's arena keeps what a longer input made it allocate. Hence a new worker for every input length.

Linux and macOS. This file is also the worker: `python benchmarks/measure.py MODEL.onnx THREADS` reads one JSON command
a line.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# ONNX Runtime's threads spin for a while after a run; they must be asleep before another worker's turn begins.
SETTLE_SECONDS = 0.05


class WorkerError(RuntimeError):
    """A worker died or failed. The message is one line that names the model and the reason."""


class LoadError(WorkerError):
    """ONNX Runtime refused the model."""


class Worker:
    """One ONNX model in one fresh process, run on command. A context manager: leaving it ends the process."""

    def __init__(self, model: Path, *, threads: int) -> None:
        self.model = model
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._reply()
        except WorkerError as error:
            self.__exit__()
            raise LoadError(*error.args) from error

    def run(self, inputs: Path, *, save: Path | None = None) -> float:
        """Run once on the arrays of an .npz file and return the seconds; `save` keeps the first output as .npy."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"inputs": str(inputs), "save": str(save) if save else None}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker is gone; the empty reply below says so with its exit status
        reply = self._reply()
        self.peak_rss_bytes: int = reply["peak_rss_bytes"]
        seconds: float = reply["seconds"]
        return seconds

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            hint = (
                "killed, most likely out of memory: try shorter --lengths" if status == -signal.SIGKILL else "see above"
            )
            raise WorkerError(f"the worker for {self.model.name} ended with status {status}: {hint}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.model}: {reply['error']}")
        return reply

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # it keeps nothing worth saving, and may be in the middle of a long run
        self._process.communicate()


def serve(model: str, threads: int) -> None:
    """Be the worker: load `model`, then answer each command on stdin with one line on stdout, until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends its workers
    import onnxruntime

    options = onnxruntime.SessionOptions()  # everything else as ONNX Runtime has it, for every candidate
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base of their own
        print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return
    print(json.dumps({"loaded": model}), flush=True)
    names = {value.name for value in session.get_inputs()}
    loaded: dict[str, dict[str, np.ndarray]] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["inputs"] not in loaded:
            with np.load(command["inputs"]) as file:
                loaded = {command["inputs"]: {name: file[name] for name in file.files if name in names}}
        feeds = loaded[command["inputs"]]
        begin = time.perf_counter()
        try:
            outputs = session.run(None, feeds)
        except Exception as error:  # as above; out of memory arrives here too
            print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
            return
        seconds = time.perf_counter() - begin
        if command["save"]:
            np.save(command["save"], outputs[0])
        del outputs  # the next run must not have to live beside these
        print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}), flush=True)


def made_once(directory: Path, make: Callable[..., None], *arguments: Path) -> Path:
    """Have `make(directory, *arguments)` fill a directory, unless an earlier run did: it is whole or absent.

    Works in a process of its own, so that what it imported is out of memory when timing begins, and keeps that
    process's output to itself.
    """
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        log, filled = Path(scratch, "log"), Path(scratch, "filled")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=_write_output_to, initargs=(log,)) as pool:
            pool.submit(make, filled, *arguments).result()
        filled.rename(directory)
    return directory


def _write_output_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)


def peak_rss_bytes() -> int:
    """The peak resident memory of this process since it was started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that new processes can take without swapping, in bytes (all of it where the system does not say)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def take_turns(
    models: Mapping[str, Path], inputs: Path, *, threads: int, rounds: int, together: bool, after: Callable[[], object]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every run and peak memory of each model, taking turns A B A B ...: drift hits all alike.

    `together` keeps one warm process per model alive for all rounds. Otherwise, for models that do not fit in memory
    side by side, every turn is a fresh process that runs twice, and the second run counts. `after` follows each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)

    def turn(name: str, worker: Worker) -> None:
        time.sleep(SETTLE_SECONDS)
        seconds[name].append(worker.run(inputs))
        peaks[name] = max(peaks[name], worker.peak_rss_bytes)

    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        if together:
            workers = {name: stack.enter_context(Worker(model, threads=threads)) for name, model in models.items()}
            for worker in workers.values():
                for _ in range(2):
                    worker.run(inputs)
        for _ in range(rounds):
            for name, model in models.items():
                if together:
                    turn(name, workers[name])
                    continue
                with Worker(model, threads=threads) as worker:
                    worker.run(inputs)
                    turn(name, worker)
            after()
    return seconds, peaks


def gemm_rate(
    shapes: Sequence[tuple[int, int]], *, rows: int, threads: int, rounds: int, work: Path, int8: bool = False
) -> list[float]:
    """This machine's matrix product rate in FLOP/s, one sample a round: the ceiling for a model of these shapes.

    Measured with ONNX Runtime's MatMul in fp32, or MatMulInteger on uint8 and int8: [rows, k] by a constant [k, n] for
    each (k, n) in `shapes`, one after another.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    random = np.random.default_rng(0)
    nodes, outputs, weights = [], [], []
    inputs: dict[str, Any] = {}
    for index, (k, n) in enumerate(shapes):
        x, w = (random.standard_normal(shape, dtype=np.float32) for shape in ((rows, k), (k, n)))
        inputs[f"x{index}"] = (x * 30 + 128).clip(0, 255).astype(np.uint8) if int8 else x
        weights.append(numpy_helper.from_array((w * 30).clip(-127, 127).astype(np.int8) if int8 else w, f"w{index}"))
        kind = "MatMulInteger" if int8 else "MatMul"
        nodes.append(helper.make_node(kind, [f"x{index}", f"w{index}"], [f"y{index}"]))
        result = TensorProto.INT32 if int8 else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(f"y{index}", result, [rows, n]))
    kind_in = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind_in, x.shape) for name, x in inputs.items()]
    graph = helper.make_graph(nodes, "gemm", values, outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), work / "gemm.onnx")
    np.savez(work / "gemm.npz", **inputs)
    flops = 2 * rows * sum(k * n for k, n in shapes)
    with Worker(work / "gemm.onnx", threads=threads) as worker:
        return [flops / worker.run(work / "gemm.npz") for _ in range(3 + rounds)][3:]


def compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference and lowest cosine of any token between two arrays [tokens, hidden]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.abs(a - b).max()), float(((a * b).sum(axis=1) / norms).min())


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """The distribution-free confidence interval of the median, from the binomial; min and max when samples are few."""
    ordered, n = sorted(samples), len(samples)
    rank, tail = 0, 0.0
    while rank < n // 2:
        tail += math.comb(n, rank) / 2**n
        if tail > (1 - confidence) / 2:
            break
        rank += 1
    lowest = max(rank - 1, 0)
    return ordered[lowest], ordered[n - 1 - lowest]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}


def machine() -> dict[str, Any]:
    """What a reader needs to know of this machine: processor, cores, memory, system, and how busy it is right now."""
    cpuinfo = Path("/proc/cpuinfo")
    known = dict(re.findall(r"^(\w[\w ]*?)\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)) if cpuinfo.exists() else {}
    name = known.get("model name", platform.processor() or platform.machine()).strip()
    return {
        # Virtual machines often hide the model and give every generation of a CPU one name.
        "processor": f"{name} family {known['cpu family']}" if "cpu family" in known else name,
        "instructions": matrix_instructions(known.get("flags", known.get("Features", "")).split()),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
    }


def described(here: Mapping[str, Any], threads: int) -> str:
    """A `machine()` in the line below a table."""
    return (
        f"{here['processor']} ({here['instructions']}), {here['cores']} cores, {threads} threads, load "
        f"{here['load_average']:.1f} at the start"
    )


def matrix_instructions(flags: Sequence[str]) -> str:
    """Those of a CPU's flags that decide how fast it multiplies matrices, such as "avx512f avx512_vnni"."""
    widest = next((flag for flag in ("avx512f", "avx2", "sve", "asimd") if flag in flags), "")
    return " ".join([widest, *sorted(flag for flag in flags if re.search("vnni|bf16|amx_|i8mm", flag))]).strip()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages named, leaving out what is not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def results_directory() -> Path:
    """`benchmarks/results/<date>_<machine>/`, the machine named by processor, vector instructions and cores."""
    here = machine()
    name = " ".join((here["processor"], *here["instructions"].split()[:1], str(here["cores"]), "cores"))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / f"{datetime.date.today().isoformat()}_{slug}"


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
