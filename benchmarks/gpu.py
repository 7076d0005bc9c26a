"""Everything that needs a GPU, in under eight minutes: the tests marked gpu, then inference and training measured.

For a bare machine: Python, torch, transformers, numpy; no network, nothing installed, started from the checkout.

    PYTHONPATH=.:export:runtime python benchmarks/gpu.py                          # or: make bench-gpu PYTHON=python3
    PYTHONPATH=.:export:runtime python benchmarks/gpu.py --device cpu --tiny      # does this script work?

Random ModernBERT-base, the same on both sides. Inference: bf16 encoder on packed or full batches of 65,536 tokens at
512 and 8,192. Training: masked LM at 1,024 tokens, bf16 autocast, fp32 weights, fused AdamW, 16,384 tokens a step.
Candidates are transformers (eager, sdpa, sdpa compiled) and ours with each attention backend that this machine has,
plain and compiled. Each is a process of its own; before its time counts its outputs, or its loss and gradients, must
agree with transformers' sdpa in the same precision. They take turns; each turn warms up once. Every part has a share of
the time, and what is known is written after each: one that fails or takes too long costs the others nothing.

The ceiling is the best bf16 matrix product rate measured here: the model's own weight shapes, and 8,192 x 8,192. A
share of it counts useful work: linear maps, and attention only where a layer looks; training counts three forwards.
What cannot run here (a package, a backend, memory, time) is named with its reason, and the rest goes on. Exit code 0
if tests passed, something was measured in every task and all that ran agreed, 1 otherwise, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import measure
from torch_worker import OURS, PEER, Candidate, OutOfTimeError, Worker, disagreement, make_checkpoint, write_batch
from training_step import VOCABULARY, shapes, table, useful_flops

ROOT = Path(__file__).resolve().parents[1]
# bf16 keeps three digits; sums of 64 tokens and norms of gradients keep a little more than one of them.
TOLERANCE = 0.1
AIMS = {"infer": "45 % of the matrix rate", "train": "400,000 tokens/s"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One table: what to compute on batches of `rows` sequences of `tokens`."""

    work: str
    tokens: int
    rows: int

    @property
    def name(self) -> str:
        """For people and files."""
        return f"{'inference' if self.work == 'infer' else 'training'} at {self.tokens:,} tokens, batch {self.rows}"


def main() -> int:
    """Run it all and return the exit code."""
    options = parse()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA GPU; --device cpu --tiny tries the script without one", file=sys.stderr)
        return 2
    began = time.monotonic()
    deadline = began + options.minutes * 60
    here = measure.machine() | {"gpu": gpu_name(options.device)}
    tell(f"{here['gpu']}; torch {torch.__version__}")
    absent = [name for name in ("pytest", "onnx", "triton") if importlib.util.find_spec(name) is None]
    for name in absent:
        tell(f"{name} is not installed: what needs it is left out")
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / ("tiny" if options.tiny else "base")
    measure.made_once(model, make_checkpoint, Path(model.name))
    ceiling = matrix_rate(model, options)
    tell(f"ceiling: {ceiling / 1e12:.1f} TFLOP/s bf16 matrix product")
    report: dict[str, Any] = {
        "question": "ModernBERT on a GPU, ours against transformers: inference and training",
        "measured_on": options.device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": here,
        "versions": measure.versions("torch", "transformers", "triton", "numpy"),
        "settings": {"model": model.name, "rounds": options.rounds},
        "absent": absent,
        "ceiling_flops": ceiling,
        "tests": {"summary": "not run", "failed": False},
        "tasks": [],
    }
    if "pytest" not in absent:
        report["tests"] = run_tests(options, limit=options.minutes * 60 / 3)
    write(report, options.out, began)
    tasks = task_list(options)
    for number, task in enumerate(tasks):
        now = time.monotonic()
        # What a part leaves of its time is for those after it.
        until = now + (deadline - now) / (len(tasks) - number)
        try:
            found = rated(measure_task(task, model, options, until=until), model, ceiling)
        except Exception as error:  # whatever it is, what the other parts find is worth having
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            tell(f"  failed: {reason}")
            found = dataclasses.asdict(task) | {"name": task.name, "failed": reason, "seconds": {}, "disagree": {}}
        report["tasks"].append(found)
        write(report, options.out, began)
    print(as_markdown(report))
    tell(f"{report['seconds']:.0f} s; raw samples, tables: {options.out}/gpu.json, .md, gpu_tests.txt")
    good = all(task["seconds"] and not task["disagree"] for task in report["tasks"])
    return 0 if good and not report["tests"]["failed"] else 1


def write(report: dict[str, Any], out: Path, began: float) -> None:
    """The report as it stands; each file is whole at any time."""
    report["seconds"] = time.monotonic() - began
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(report, indent=1) + "\n"), ("md", as_markdown(report))):
        partial = out / f".gpu.{name}"
        partial.write_text(text)
        partial.replace(out / f"gpu.{name}")


# -- Tests.

# They compile most of their time, one thread each: a process for each of these shares.
SHARES = ("not flex", "flex and float32", "flex and not float32")


def run_tests(options: argparse.Namespace, *, limit: float) -> dict[str, Any]:
    """All tests marked gpu, in a few processes side by side. What they print is kept, also of those stopped."""
    tell("tests marked gpu")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "runtime")))}
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    # Compilers warn in their own ways, which is an error elsewhere.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-W", "default"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *files]
    until = time.monotonic() + limit
    summaries, printed, failed = [], [], False
    with contextlib.ExitStack() as stack:
        running = []
        for share in SHARES:
            file = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [*command, "-k", share], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            stack.callback(process.kill)
            running.append((share, file, process))
        for share, file, process in running:
            try:
                status: int | None = process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                status = None
            file.seek(0)
            lines = file.read().strip().splitlines() or ["no output"]
            counts = Counter(re.findall(r"^tests/\S+ (PASSED|FAILED|SKIPPED|ERROR)", "\n".join(lines), re.MULTILINE))
            told = ", ".join(f"{count} {what.lower()}" for what, count in counts.items()) or lines[-1]
            stopped = "" if status is not None else f", stopped after {limit:.0f} s"
            summaries.append(f"{share}: {told}{stopped}")
            tell(f"  {summaries[-1]}")
            printed += [f"== {share}", *lines]
            failed |= status not in (0, 5)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_tests.txt").write_text("\n".join(printed) + "\n")
    for line in printed:
        if line.startswith(("FAILED ", "ERROR ")):
            tell(f"  {line}")
    return {"summary": "; ".join(summaries), "failed": failed}


# -- Measuring.


def task_list(options: argparse.Namespace) -> list[Task]:
    """What is measured, in the order of what is wanted most, in case time runs out."""
    if options.tiny:
        return [Task(work="infer", tokens=64, rows=4), Task(work="train", tokens=64, rows=2)]
    return [
        Task(work="infer", tokens=512, rows=128),
        Task(work="train", tokens=1024, rows=16),
        Task(work="infer", tokens=8192, rows=8),
    ]


def candidates(task: Task, model: Path, options: argparse.Namespace) -> list[Candidate]:
    """Who takes part; the first is what the others must agree with."""
    from modernbert.attention import BACKENDS

    base = Candidate(
        implementation=PEER,
        attention="sdpa",
        model=str(model),
        work=task.work,
        device=options.device,
        precision="bf16",
        optimizer=task.work == "train",
    )
    ours = dataclasses.replace(base, implementation=OURS, packed=True)
    # Ours with dense scores over all packed tokens is the reference of tests, not a candidate.
    backends = [name for name in reversed(BACKENDS) if name not in ("eager", "sdpa")]
    return [
        base,
        *(dataclasses.replace(ours, attention=name) for name in backends),
        *(dataclasses.replace(ours, attention=name, compile=True) for name in backends),
        dataclasses.replace(base, compile=True),
        dataclasses.replace(base, attention="eager"),
    ]


def measure_task(task: Task, model: Path, options: argparse.Namespace, *, until: float) -> dict[str, Any]:
    """Seconds and peak memory of every candidate that can take part, and why the others cannot."""
    tell(f"{task.name}, at most {until - time.monotonic():.0f} s")
    batch = options.work / f"{task.work}-{task.tokens}.npz"
    write_batch(batch, [task.tokens] * task.rows, vocabulary=VOCABULARY)
    left_out: dict[str, str] = {}
    disagree: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}

    def leave_out(worker: Worker, error: measure.WorkerError) -> None:
        name = worker.candidate.name
        left_out[name] = str(error).removeprefix(f"{name}: ")
        samples.pop(name, None)
        worker.stop()  # it may be compiling still, beside those that are timed
        tell(f"  left out: {error}")

    with contextlib.ExitStack() as stack:
        # All start at once, and all compile at once: both take longer than measuring, which must have its time too.
        now = time.monotonic()
        prepared = now + 0.7 * (until - now)
        workers = [stack.enter_context(Worker(c, deadline=prepared)) for c in candidates(task, model, options)]
        able: list[Worker] = []
        for worker in workers:
            try:
                worker.ready()
                able.append(worker)
            except measure.WorkerError as error:
                leave_out(worker, error)
        for worker in able:
            if worker.candidate.compile:
                worker.ask(batch, check=True)
        reference: dict[str, float] | None = None
        for worker in sorted(able, key=lambda worker: worker.candidate.compile):
            name = worker.candidate.name
            try:
                if not worker.candidate.compile:
                    worker.ask(batch, check=True)
                reply = worker.reply()
                worker.run(batch, repeats=2)
            except measure.WorkerError as error:
                leave_out(worker, error)
                continue
            if reference is None:
                reference = reply["values"]
            what, difference = disagreement(reference, reply["values"])
            if not difference <= TOLERANCE:
                disagree[name] = f"differs by {difference:.1e} in {what}, at most {TOLERANCE}"
                tell(f"  {name} {disagree[name]}")
                continue
            worker.deadline, samples[name] = until, []
        for _ in range(options.rounds):
            for worker in [worker for worker in able if worker.candidate.name in samples]:
                try:
                    worker.run(batch)  # memory was given back after the last turn
                    reply = worker.run(batch, repeats=3)
                except OutOfTimeError:
                    break
                except measure.WorkerError as error:
                    leave_out(worker, error)
                    continue
                samples[worker.candidate.name] += reply["seconds"]
                peaks[worker.candidate.name] = reply["peak_bytes"]
            else:
                continue
            tell("  out of time: fewer rounds")
            break
    for name in [name for name in samples if not samples[name]]:
        del samples[name]
        left_out[name] = "out of time"
    return dataclasses.asdict(task) | {
        "name": task.name,
        "seconds": samples,
        "peak_bytes": peaks,
        "left_out": left_out,
        "disagree": disagree,
    }


def rated(task: dict[str, Any], model: Path, ceiling: float) -> dict[str, Any]:
    """Adds tokens/s and the share of the ceiling."""
    tokens = task["tokens"] * task["rows"]
    flops = task["rows"] * useful_flops(task["tokens"], model, head=task["work"] == "train")
    flops *= 3 if task["work"] == "train" else 1
    rates = {
        name: {
            "tokens_per_second": tokens / statistics.median(seconds),
            "share_of_ceiling": flops / statistics.median(seconds) / ceiling,
        }
        for name, seconds in task["seconds"].items()
    }
    return task | {"rates": rates}


def matrix_rate(model: Path, options: argparse.Namespace) -> float:
    """The best bf16 matrix product rate of torch here, FLOP/s."""
    import torch

    rows = 64 if options.tiny else 65_536
    weights, _ = shapes(model)
    square = [(64, 64)] if options.tiny else [(8192, 8192)]
    best = 0.0
    for pairs, height in ((weights, rows), (square, square[0][0])):
        tensors = [
            (
                torch.randn(height, k, dtype=torch.bfloat16, device=options.device),
                torch.randn(k, n, dtype=torch.bfloat16, device=options.device),
            )
            for k, n in pairs
        ]
        for _ in range(12):
            synchronize(options.device)
            begin = time.perf_counter()
            for x, w in tensors:
                x @ w
            synchronize(options.device)
            best = max(best, 2 * height * sum(k * n for k, n in pairs) / (time.perf_counter() - begin))
        del tensors
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return best


def synchronize(device: str) -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def gpu_name(device: str) -> str:
    """What the results are called by."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"no GPU ({device})"


# -- The page.


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables with hardware and versions below."""
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [f"Tests marked gpu: {report['tests']['summary']}", *map(task_table, report["tasks"])]
    if report["measured_on"] != "cuda":
        parts.insert(0, "**Not measured on a GPU: this run only shows that the script works.**")
    if report["absent"]:
        parts.append(f"Not installed, and left out with what needs it: {', '.join(report['absent'])}.")
    parts.append(
        f"{report['machine']['gpu']}; random ModernBERT-{report['settings']['model']}, bf16; training: autocast, fused "
        f"AdamW included; {report['date']}; {packages}. Ceiling (100 %): {report['ceiling_flops'] / 1e12:.1f} TFLOP/s "
        "bf16 matrix product. Faster: transformers sdpa / candidate, medians."
    )
    return "\n\n".join(parts) + "\n"


def task_table(task: dict[str, Any]) -> str:
    """One task: best first, then who was left out and why."""
    if "failed" in task:
        return f"{task['name']}: failed: {task['failed']}"
    medians = {name: statistics.median(seconds) for name, seconds in task["seconds"].items()}
    reference = medians.get(f"{PEER} sdpa")
    rows = [
        [
            name,
            f"{1e3 * medians[name]:.1f}",
            f"{task['rates'][name]['tokens_per_second']:,.0f}",
            f"{task['rates'][name]['share_of_ceiling']:.0%}",
            f"{task['peak_bytes'][name] / 1e9:.1f} GB",
            f"{reference / medians[name]:.2f}x" if reference else "",
        ]
        for name in sorted(medians, key=lambda name: medians[name])
    ]
    left = [f"- {name}: {why}" for name, why in (task["left_out"] | task["disagree"]).items()]
    headings = ["candidate", "ms, median", "tokens/s", "of ceiling", "peak", "faster"]
    parts = [f"{task['name']} (aim on an H200: {AIMS[task['work']]})", table(headings, rows)]
    return "\n\n".join([*parts, *(["Left out:\n\n" + "\n".join(left)] if left else [])])


def parse() -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the script (default: cuda)")
    add("--tiny", action="store_true", help="a tiny model and short inputs: does the script work?")
    add("--minutes", type=float, default=7.5, help="nothing is waited for beyond these (default: 7.5)")
    add("--rounds", type=int, default=5, help="turns of three runs each (default: 5)")
    add("--work", type=Path, help="keeps the checkpoint (default: a temporary directory)")
    add("--out", type=Path, help="results (default: benchmarks/results/<date>_<gpu>/)")
    options = parser.parse_args()
    if options.work is None:
        options.work = Path(tempfile.gettempdir(), "modernbert-gpu")
    if options.out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu_name(options.device).lower()).strip("-")
        options.out = ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}_{slug}"
    return options


def tell(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
