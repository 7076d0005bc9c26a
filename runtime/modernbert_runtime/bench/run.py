"""The driver: starts a worker per candidate, checks that their vectors agree, and gives them turns.

Drift of the machine hits all alike, for rounds go A B C A B C ...; never do two workers compute at once. The time is
given: rows get as many rounds as it allows, the small ones first, and the report says how many.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from modernbert_runtime.bench.candidates import Candidate, own_candidates
from modernbert_runtime.bench.report import Measurement, Report, model_flops, weight_shapes
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import BundleError, EngineError, InputError

LENGTHS = (16, 128, 512, 2048)
BATCHES = (1, 8, 32)
BATCH_LENGTH = 128

# Engines' threads spin for a while after a run; they must be asleep before another worker's turn begins.
_SETTLE_SECONDS = 0.05
_MOST_ROUNDS = 200
_WORDS = ("a", "the", "of", "in", "to", "is", "on", "for", "with", "wing", "flow", "heat", "time", "test", "data")


def bench(
    bundle: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    batch_length: int | None = None,
    threads: int | None = None,
    seconds: float = 55.0,
    peers: Sequence[Candidate] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure every engine and precision of a bundle that can run here, and whatever else is passed in.

    Args:
        bundle: directory that `modernbert export` wrote.
        lengths: tokens of a text, for latency; None is `LENGTHS`, as far as the bundle takes them and the time allows.
        batches: texts of a call, for throughput; None is `BATCHES`, as far as the time allows.
        batch_length: tokens of each of these texts; None is `BATCH_LENGTH`, or the most that the bundle takes.
        threads: of each candidate; None leaves it to them.
        seconds: to spend on everything, about. Lengths and batches that were asked for get a round even beyond it.
        peers: candidates that are not of this package.
        progress: told what is being done.

    Raises:
        InputError: lengths, batches or threads out of range.
        BundleError: not a whole embedding bundle.
        EngineError: no candidate can run.
    """
    end = time.monotonic() + seconds
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    longest = manifest.max_length
    asked = {"lengths": lengths is not None, "batches": batches is not None}
    if lengths is None:
        lengths = [min(length, longest) for length in LENGTHS]
    if batches is None:
        batches = BATCHES
    if batch_length is None:
        batch_length = min(BATCH_LENGTH, longest)
    lengths, batches = sorted(set(lengths)), sorted(set(batches))
    _check(lengths, batches, batch_length, threads, longest)
    progress("checking the bundle")  # which also brings its files into memory, so that loading does not time the disk
    for name in manifest.files:
        if name.startswith("onnx/") or name in ("tokenizer.json", "config.json"):
            opened.path_of(name)
    config = _config(opened)
    writer = TextsOfLength(opened.path_of("tokenizer.json"))
    candidates = [*own_candidates(str(opened.root), manifest, threads=threads), *peers]
    progress("measuring the matrix rate")
    report = Report(
        bundle=str(bundle),
        source=manifest.source.name,
        machine=machine(threads),
        versions=versions("modernbert-deploy", "onnxruntime", "openvino", "torch", "transformers", "numpy"),
        matrix_rate=_matrix_rate(config, threads),
    )
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for candidate in candidates:
            progress(f"loading {candidate.name}")
            try:
                worker = Worker(candidate)
            except EngineError as error:
                report.absent[candidate.name] = str(error)
                continue
            workers[candidate.name] = stack.enter_context(worker)
            report.load_seconds[candidate.name] = worker.load_seconds
        if not workers:
            raise EngineError(f"nothing can run this bundle here: {'; '.join(report.absent.values())}")
        progress("comparing vectors")
        for name in _disagreeing(workers, writer, longest, report):
            workers.pop(name).close()
        latency = [(length, 1) for length in lengths]
        throughput = [(batch_length, batch) for batch in batches]
        wanted = {*(latency if asked["lengths"] else ()), *(throughput if asked["batches"] else ())}
        rows = _rows(workers, writer, config, {*latency, *throughput}, wanted, end, report, progress)
        if not any(rows.values()) and not report.disagreeing:
            raise EngineError(f"nothing ran to its end: {'; '.join(report.absent.values())}")
        report.latency.extend(row for shape in latency for row in rows.get(shape, ()))
        report.throughput.extend(row for shape in throughput for row in rows.get(shape, ()))
    return report


class Worker:
    """A candidate's process. A context manager: leaving it ends the process.

    Raises:
        EngineError: it cannot run (the message is its own) or died.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            candidate.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - begin

    def run(self, texts: Sequence[str], save: Path | None = None) -> tuple[float, int]:
        """Seconds of one call, and the process's peak memory in bytes; `save` keeps the vectors as .npy."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone; the missing answer below says how
            self._process.stdin.write(json.dumps({"texts": texts, "save": save and str(save)}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["peak_bytes"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
            reason = "killed, most likely out of memory" if status == -signal.SIGKILL else last
            raise EngineError(f"{self.candidate.name} ended with status {status}: {reason}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it keeps nothing worth saving."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TextsOfLength:
    """Texts of exactly so many tokens, special tokens included, from common words."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._words = [word for word in _WORDS if self._count(f"a {word}") == self._count("a") + 1]
        if not self._words:
            raise BundleError("tokenizer.json has no common word as one token: bench knows no texts for it")

    def text(self, tokens: int, seed: int) -> str:
        """Raises InputError when there is none, for special tokens alone are more."""
        num_words = tokens - (self._count("a") - 1)
        text = " ".join(random.Random(seed).choices(self._words, k=max(num_words, 1)))  # noqa: S311 - not for secrets
        if self._count(text) != tokens:
            raise InputError(f"lengths: no text of {tokens} tokens with this tokenizer; the shortest has more")
        return text

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)


Shape = tuple[int, int]  # tokens of a text, texts of a call


def _rows(
    workers: dict[str, Worker],
    writer: TextsOfLength,
    config: dict[str, Any],
    shapes: set[Shape],
    wanted: set[Shape],
    end: float,
    report: Report,
    progress: Callable[[str], None],
) -> dict[Shape, list[Measurement]]:
    """Measure shapes, the smallest first, until `end`; those `wanted` get a round even beyond it, others are skipped.

    What a larger shape will take is foreseen from the one before it, by its arithmetic.
    """
    order = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    flops = {shape: shape[1] * model_flops(shape[0], config) for shape in order}
    found: dict[Shape, list[Measurement]] = {}
    pace = 0.0  # seconds per FLOP of a round
    for index, shape in enumerate(order):
        length, batch = shape
        needed = [2 * pace * flops[one] for one in order[index:]]  # a warm-up and a round
        left = end - time.monotonic()
        if found and needed[0] > left and shape not in wanted:
            report.skipped[f"{batch} x {length} tokens"] = (
                f"about {needed[0]:.0f} s needed, {max(left, 0):.0f} s left: allow more seconds, or ask for it"
            )
            continue
        progress(f"{batch} x {length} tokens")
        share = min(needed[0], left) + max(left - sum(needed), 0) / len(needed)
        texts = [writer.text(length, seed) for seed in range(batch)]
        found[shape] = [
            Measurement(candidate=name, tokens=length, batch=batch, seconds=times, peak_bytes=peak, flops=flops[shape])
            for name, (times, peak) in _row(workers, texts, share, report).items()
        ]
        if not workers:
            break
        pace = sum(row.percentile(50) for row in found[shape]) / flops[shape]
    return found


def _row(
    workers: dict[str, Worker], texts: list[str], seconds: float, report: Report
) -> dict[str, tuple[list[float], int]]:
    """Rounds of all on the same texts for about so many seconds, at least one after the one that warms up.

    A candidate that dies has no part in the row, nor in those that follow.
    """
    begin = time.monotonic()
    found: dict[str, tuple[list[float], int]] = {}
    for number in range(_MOST_ROUNDS + 1):
        for name in list(workers):
            time.sleep(_SETTLE_SECONDS)
            run = _run(workers, name, texts, report)
            if run is None:
                found.pop(name, None)
            elif number:  # the first warms up
                taken, peak = run
                found[name] = ([*found.get(name, ([], 0))[0], taken], peak)
        elapsed = time.monotonic() - begin
        # As long as the rounds so far, one more would be too long.
        if number and elapsed + elapsed / (number + 1) > seconds:
            break
    return found


def _run(
    workers: dict[str, Worker], name: str, texts: Sequence[str], report: Report, save: Path | None = None
) -> tuple[float, int] | None:
    """What `Worker.run` gives; None from one that died, which goes from `workers` to the report."""
    try:
        return workers[name].run(texts, save)
    except EngineError as error:
        report.absent[name] = str(error)
        workers.pop(name).close()
        return None


def _disagreeing(workers: dict[str, Worker], writer: TextsOfLength, longest: int, report: Report) -> list[str]:
    """Those whose vectors are not those of the reference: the first in fp32, else the first."""
    texts = [writer.text(min(tokens, longest), seed) for seed, tokens in enumerate((5, 300, 33, 129, 64))]
    vectors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in list(workers):
            if _run(workers, name, texts, report, save=Path(scratch, "vectors.npy")) is None:
                continue
            raw = np.load(Path(scratch, "vectors.npy"), allow_pickle=False).astype(np.float64)
            vectors[name] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    reference = next(
        (name for name, worker in workers.items() if worker.candidate.precision == "fp32"), next(iter(workers), "")
    )
    wrong = []
    for name, worker in workers.items():
        same_shape = vectors[name].shape == vectors[reference].shape
        cosine = float((vectors[name] * vectors[reference]).sum(axis=1).min()) if same_shape else 0.0
        report.cosines[name] = cosine
        if not cosine >= worker.candidate.min_cosine:
            wrong.append(name)
            report.disagreeing[name] = (
                f"lowest cosine {cosine:.6f} with {reference}, at least {worker.candidate.min_cosine} is needed"
            )
    return wrong


def _check(
    lengths: Sequence[int], batches: Sequence[int], batch_length: int, threads: int | None, longest: int
) -> None:
    for name, values in (("lengths", lengths), ("batch_length", [batch_length]), ("batch", batches)):
        if not values:
            raise InputError(f"{name} must name at least one number")
        if values[0] < 1:
            raise InputError(f"{name} must be at least 1, not {values[0]}")
    if (most := max(*lengths, batch_length)) > longest:
        raise InputError(f"lengths: at most {longest} tokens for this bundle, not {most}")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")


def _config(bundle: Bundle) -> dict[str, Any]:
    try:
        config = json.loads(bundle.path_of("config.json").read_text(encoding="utf-8"))
        weight_shapes(config)
        model_flops(1, config)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"config.json lacks the sizes of the model ({error!r}): export the bundle again") from error
    return dict(config)


def _matrix_rate(config: dict[str, Any], threads: int | None) -> float:
    """In a process of its own: BLAS reads its number of threads when it is loaded."""
    command = [sys.executable, "-m", "modernbert_runtime.bench.worker", "--matrix-rate"]
    limit = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")} if threads else {}
    done = subprocess.run(
        [*command, json.dumps(weight_shapes(config))], env={**os.environ, **limit}, capture_output=True, text=True
    )
    if done.returncode:
        raise EngineError(f"the matrix rate cannot be measured: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def machine(threads: int | None) -> dict[str, Any]:
    """Processor, cores and system, and how busy it is right now."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        processor = found[1].strip()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the packages named, leaving out what is not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
