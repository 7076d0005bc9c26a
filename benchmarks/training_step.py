"""How fast does our ModernBERT train on a CPU against transformers' (sdpa), and how much memory does it take?

A step is forward, masked-LM loss and backward in fp32 with gradients made anew; the optimizer, the same for both, is
left out. Both sides read one checkpoint (random weights; speed does not depend on them) and one batch, compute logits
of labelled tokens only (transformers: `sparse_prediction`, its fastest form), and must agree on the loss and on the
norm of every gradient before any time counts. Each candidate is a process of its own; they take turns A B A B ....
Where all together would fill the memory, every turn starts a process afresh, warms up once and is timed once.

    make bench-training                                                 # everything: two hours on two cores, 20 GB
    make bench-training ARGS='--parts steps --lengths 2048,8192 --modes eager'
    python benchmarks/training_step.py --preset tiny --lengths 128 --tokens 512 --layer-lengths 1024,2048  # a look

Three parts, in this order, with the time that they take for base on two cores of 200 GFLOP/s (worked out from single
steps: ours 14 s, transformers 19 s at 2,048 tokens, 36 s and 55 s at 4,096):

    layer     one local layer of base, forward and backward: time and memory must grow as n. 3 minutes.
    packed    a batch of varying lengths: ours packed, ours computing the padding as if it were text, transformers with
              its mask; packing should win at least what the padding costs. 20 minutes.
    steps     one sequence at each length, eager, then compiled: 1 minute at 512 tokens, 4 at 2,048, 10 at 4,096,
              20 to 25 at 8,192; compiled as much again, and up to 5 more at each length to compile.

What is measured is written after every part and every length, so that a run that is cut short loses nothing. A later
run on the same machine and versions adds to it, or replaces what it measures again.

Ratios are taken pair by pair, peer / ours. The ceiling is torch's fp32 matrix product rate on the model's own weight
shapes; a candidate's share counts useful work only. Targets, for base, eager: 1.3 times as fast at 2,048 tokens, 1.6
at 8,192, at most 70 % of the peer's peak memory at 4,096. Exit codes: 0 fine, 1 candidates disagree, one failed or a
target is missed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
from command import OneLineParser, complain, positive
from torch_worker import OURS, PEER, Candidate, OutOfMemoryError, Worker, disagreement, make_checkpoint, write_batch

# fp32 sums in another order: the deepest gradients agree to about four digits.
TOLERANCE = 2e-3
TARGET_RATIO = {2048: 1.3, 8192: 1.6}
TARGET_MEMORY = {4096: 0.7}
# Time per token and bytes per token may grow this much from the second shortest length to the longest.
LINEAR_WITHIN = 1.3
LAYER_REPEATS = 3
VOCABULARY = 50_000
MODES = ("eager", "compiled")
PARTS = ("layer", "packed", "steps")


class DisagreementError(RuntimeError):
    """Candidates computed different things, so that their times say nothing."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse(arguments)
    written = options.out / "training_step.json"
    try:
        report = begun(options, written)
    except ValueError as error:
        return complain(error, 2)
    try:
        for number, (name, run) in enumerate(parts := list(chosen(options)), 1):
            tell(f"part {number} of {len(parts)}: {name}")
            report["results"][name] = {"date": now(), **finished(run)}
            write(report, options.out)
    except KeyboardInterrupt:
        kept = f"what was measured is in {written}" if report["results"] else "nothing was measured yet"
        return complain(f"interrupted; {kept}", 130)
    print(text := as_markdown(report))
    tell(f"raw samples, table: {written}, .md")
    return 1 if "fail" in text else 0


def begun(options: argparse.Namespace, written: Path) -> dict[str, Any]:
    """The report without results, or with those that are there already.

    Raises:
        ValueError: those come from another machine, or other versions or settings.
    """
    here = measure.machine()
    tell(f"{here['processor']}, {here['cores']} cores, {options.threads} threads, fp32")
    if here["load_average"] > 0.3:
        tell(f"the machine is busy (load {here['load_average']:.1f}): publish no times from this run")
    options.work.mkdir(parents=True, exist_ok=True)
    ceiling = gemm_rate(checkpoint(options.preset, options), options.threads)
    tell(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s fp32 matrix product")
    report: dict[str, Any] = {
        "question": "training step, ours against transformers' ModernBERT (sdpa): time and memory",
        "machine": here,
        "versions": measure.versions("modernbert-deploy", "torch", "transformers", "numpy"),
        "settings": {"preset": options.preset, "threads": options.threads},
        "ceiling_flops": ceiling,
        "results": {},
    }
    if written.is_file():
        before = json.loads(written.read_text())
        for what, keys in (("machine", ("processor", "instructions", "cores")), ("versions", ()), ("settings", ())):
            one, two = ({key: found.get(key) for key in keys or found} for found in (before[what], report[what]))
            if one != two:
                raise ValueError(f"{written} has results of other {what}, {one} and not {two}; choose another --out")
        report["results"] = before["results"]
        report["ceiling_flops"] = max(ceiling, before["ceiling_flops"])
    return report


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of every part."""
    model = checkpoint(options.preset, options)
    base = Candidate(
        implementation=OURS,
        attention="banded",
        model=str(model),
        threads=options.threads,
        memory_bytes=int(measure.available_memory_bytes() * 0.9),
    )
    peer = dataclasses.replace(base, implementation=PEER, attention="sdpa")
    if "layer" in options.parts:
        yield "layer", lambda: layer(base, options)
    if "packed" in options.parts:
        yield "packed", lambda: packed(base, peer, options)
    for mode in options.modes if "steps" in options.parts else []:
        for length in options.lengths:
            yield f"{mode} step, {length} tokens", functools.partial(step, base, peer, length, mode, options)


def finished(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part found, or why it failed: the parts after it are worth having all the same."""
    try:
        return run()
    except (DisagreementError, measure.WorkerError) as error:
        tell(f"failed: {error}")
        return {"failed": str(error)}


def write(report: dict[str, Any], out: Path) -> None:
    """The report as it stands; each file is whole at any time."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(report, indent=1) + "\n"), ("md", as_markdown(report))):
        partial = out / f".training_step.{name}"
        partial.write_text(text)
        partial.replace(out / f"training_step.{name}")


def step(base: Candidate, peer: Candidate, length: int, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """One sequence: time and memory of both sides."""
    write_batch(batch := options.work / f"train-{length}.npz", [length], vocabulary=VOCABULARY)
    pair = [dataclasses.replace(x, compile=mode == "compiled") for x in (peer, base)]
    flops = 3 * useful_flops(length, Path(base.model))
    return {"tokens": length, "mode": mode, "flops": flops, **compare(pair, batch, options)}


def packed(base: Candidate, peer: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """A batch of varying lengths: what does leaving the padding out win?"""
    random = np.random.default_rng(0)
    lengths: list[int] = []
    longest = max(options.tokens // 4, 16)
    while sum(lengths) < options.tokens:
        # Documents are many short and few long.
        lengths.append(int(np.clip(random.lognormal(np.log(longest / 4), 0.8), 8, longest)))
    write_batch(batch := options.work / f"packed-{options.tokens}.npz", lengths, vocabulary=VOCABULARY)
    candidates = [peer, dataclasses.replace(base, packed=True), dataclasses.replace(base, full=True)]
    # Computing the padding as text changes what texts see, so only the first two can agree.
    found = compare(candidates, batch, options, agreeing=2)
    return {"lengths": lengths, "padding_factor": max(lengths) * len(lengths) / sum(lengths), **found}


def layer(base: Candidate, options: argparse.Namespace) -> dict[str, Any]:
    """One local layer at growing lengths, each in fresh processes; what a process holds at 16 tokens does not count."""
    model = checkpoint("layer", options)
    candidate = dataclasses.replace(base, model=str(model), work="layer")
    write_batch(batch := options.work / "layer-1.npz", [16], vocabulary=VOCABULARY)
    with Worker(candidate) as worker:
        worker.ready()
        empty = worker.run(batch)["peak_bytes"]
    rows = []
    for length in options.layer_lengths:
        write_batch(batch := options.work / f"layer-{length}.npz", [length], vocabulary=VOCABULARY)
        if length == options.layer_lengths[0]:
            require_agreement([candidate, dataclasses.replace(candidate, attention="eager")], batch)
        with Worker(candidate) as worker:
            worker.ready()
            worker.run(batch)
            reply = worker.run(batch, repeats=min(options.repeats, LAYER_REPEATS))
        rows.append({"tokens": length, "seconds": reply["seconds"], "bytes": reply["peak_bytes"] - empty})
        tell(f"one local layer, {length:,} tokens: {statistics.median(reply['seconds']):.3f} s")
    return {"rows": rows}


# -- Measuring.


def compare(
    candidates: list[Candidate], batch: Path, options: argparse.Namespace, *, agreeing: int | None = None
) -> dict[str, Any]:
    """Seconds and peak memory of each candidate, peer first, after they agreed. None for what does not fit."""
    peaks, missing = require_agreement(candidates, batch, agreeing=agreeing)
    able = [candidate for candidate in candidates if candidate.name not in missing]
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in able}
    together = sum(peaks.values()) < measure.available_memory_bytes() / 2
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for candidate in able if together else []:
            workers[candidate.name] = worker = stack.enter_context(Worker(candidate))
            worker.ready()
            worker.run(batch)
        for turn in range(options.repeats if together else options.long_repeats):
            for candidate in able:
                time.sleep(measure.SETTLE_SECONDS)
                if together:
                    reply = workers[candidate.name].run(batch)
                else:
                    with Worker(candidate) as worker:
                        worker.ready()
                        worker.run(batch)
                        reply = worker.run(batch)
                seconds[candidate.name] += reply["seconds"]
                peaks[candidate.name] = max(peaks[candidate.name], reply["peak_bytes"])
            tell(f"{batch.stem}, round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))
    return {
        "turns": "side by side" if together else "a fresh process each",
        "seconds": seconds,
        "peak_bytes": peaks,
        "does_not_fit": missing,
    }


def require_agreement(
    candidates: list[Candidate], batch: Path, *, agreeing: int | None = None
) -> tuple[dict[str, int], dict[str, str]]:
    """One step of each, alone: peak memory by name, and why by name for those that do not fit.

    Raises:
        DisagreementError: the first `agreeing` candidates computed different losses or gradients.
    """
    peaks: dict[str, int] = {}
    missing: dict[str, str] = {}
    found = []
    for index, candidate in enumerate(candidates):
        try:
            with Worker(candidate) as worker:
                worker.ready()
                reply = worker.run(batch, check=True)
        except OutOfMemoryError as error:
            tell(f"{batch.stem}: {error}")
            missing[candidate.name] = str(error)
            continue
        peaks[candidate.name] = reply["peak_bytes"]
        if agreeing is None or index < agreeing:
            found.append((candidate.name, reply["values"]))
    for name, values in found[1:]:
        what, difference = disagreement(found[0][1], values)
        tell(f"{batch.stem}: {name} and {found[0][0]} differ by {difference:.1e} at most, in {what}")
        if not difference <= TOLERANCE:
            raise DisagreementError(
                f"{batch.stem}: {name} and {found[0][0]} differ by {difference:.1e} in {what}, at most {TOLERANCE:.0e}"
            )
    return peaks, missing


def checkpoint(preset: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a preset, made once."""
    return measure.made_once(options.work / f"{preset}-trained-size", make_checkpoint, Path(preset))


def shapes(model: Path) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """[in, out] of a layer's four linear maps, and the configuration."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)], config


def useful_flops(tokens: int, model: Path, *, head: bool = True) -> int:
    """FLOP of one forward pass over one sequence: linear maps, and attention only where a layer looks.

    With `head`, also the masked-LM head on the 30 % of tokens that have a label.
    """
    weights, config = shapes(model)
    radius, positions = config["local_attention"] // 2, np.arange(tokens)
    local = int((np.minimum(positions + radius, tokens - 1) - np.maximum(positions - radius, 0) + 1).sum())
    keys = {"full_attention": tokens * tokens, "sliding_attention": local}
    linear = 2 * tokens * sum(k * n for k, n in weights)
    labelled = round(0.3 * tokens) if head else 0
    logits = 2 * labelled * config["hidden_size"] * (config["hidden_size"] + config["vocab_size"])
    return logits + sum(linear + 4 * config["hidden_size"] * keys[kind] for kind in config["layer_types"])


def gemm_rate(model: Path, threads: int, *, rows: int = 1024, rounds: int = 9) -> float:
    """Best fp32 matrix product rate of torch on the model's weight shapes, FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    weights, _ = shapes(model)
    pairs = [(torch.randn(rows, k), torch.randn(k, n)) for k, n in weights]
    best = 0.0
    for _ in range(rounds):
        begin = time.perf_counter()
        for x, w in pairs:
            x @ w
        best = max(best, 2 * rows * sum(k * n for k, n in weights) / (time.perf_counter() - begin))
    return best


# -- The page.


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables with hardware and versions below."""
    here = report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    failed = {name: found["failed"] for name, found in report["results"].items() if "failed" in found}
    found = {name: found for name, found in report["results"].items() if name not in failed}
    steps = [one for one in found.values() if "mode" in one]
    dates = sorted(one["date"] for one in report["results"].values())
    parts = [
        step_table(report, sorted(steps, key=lambda one: (MODES.index(one["mode"]), one["tokens"]))) if steps else "",
        packed_table(found["packed"]) if "packed" in found else "",
        layer_table(found["layer"]["rows"]) if "layer" in found and len(found["layer"]["rows"]) > 2 else "",
        "\n".join(f"{name}: failed: {why}" for name, why in failed.items()),
        f"{measure.described(here, report['settings']['threads'])}; "
        f"ModernBERT-{report['settings']['preset']}, batch 1, fp32; forward, loss and backward, no optimizer; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {packages}. Ceiling (100 %): "
        f"{report['ceiling_flops'] / 1e9:.0f} GFLOP/s. Faster: peer / ours, median and range of the pairs.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def ratio_text(peer: list[float], ours: list[float]) -> tuple[float, str]:
    """Median of the pairs' ratios, and with its range for people."""
    ratios = [a / b for a, b in zip(peer, ours, strict=True)]
    median = statistics.median(ratios)
    return median, f"{median:.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def step_table(report: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """The part `steps`."""
    headings = ["tokens", "mode", "candidate", "s: min / median / max", "tokens/s", "of ceiling", "peak", "faster"]
    rows = []
    for step in steps:
        tokens, peaks, seconds = step["tokens"], step["peak_bytes"], step["seconds"]
        names = list(seconds)
        for name, samples in seconds.items():
            middle = statistics.median(samples)
            flops = step["flops"]
            faster = ratio_text(seconds[names[0]], samples)[1] if name != names[0] else ""
            rows.append(
                [
                    f"{tokens:,}",
                    step["mode"],
                    name,
                    f"{min(samples):.2f} / {middle:.2f} / {max(samples):.2f}",
                    f"{tokens / middle:,.0f}",
                    f"{flops / middle / report['ceiling_flops']:.0%}",
                    f"{peaks[name] / 1e9:.2f} GB",
                    faster,
                ]
            )
        rows += [[f"{tokens:,}", step["mode"], name, "out of memory", *[""] * 4] for name in step["does_not_fit"]]
        rows += [[f"{tokens:,}", step["mode"], "target", verdict, *[""] * 4] for verdict in verdicts(report, step)]
    return table([*headings], rows)


def verdicts(report: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """What was promised for this length, and whether it holds."""
    if report["settings"]["preset"] != "base" or step["mode"] != "eager" or len(step["seconds"]) < 2:
        return []
    (_, theirs), (_, ours) = step["seconds"].items()
    tokens, (peer_peak, our_peak) = step["tokens"], step["peak_bytes"].values()
    found = []
    if tokens in TARGET_RATIO:
        median = ratio_text(theirs, ours)[0]
        found.append(
            f"at least {TARGET_RATIO[tokens]}x as fast: {'pass' if median >= TARGET_RATIO[tokens] else 'fail'}"
        )
    if tokens in TARGET_MEMORY:
        share = our_peak / peer_peak
        passed = "pass" if share <= TARGET_MEMORY[tokens] else "fail"
        found.append(f"at most {TARGET_MEMORY[tokens]:.0%} of its memory: {share:.0%}, {passed}")
    return found


def packed_table(found: dict[str, Any]) -> str:
    """The part `packed`."""
    ours = next(name for name in found["seconds"] if name.endswith("packed"))
    rows = []
    for name, samples in found["seconds"].items():
        faster = "" if name == ours else f"{ratio_text(samples, found['seconds'][ours])[1]}"
        peak = f"{found['peak_bytes'][name] / 1e9:.2f} GB"
        rows.append(
            [
                name,
                f"{statistics.median(samples):.2f}",
                f"{sum(found['lengths']) / statistics.median(samples):,.0f}",
                peak,
                faster,
            ]
        )
    computed = next((name for name in found["seconds"] if name.endswith("computed")), None)
    verdict = ""
    if computed:
        median = ratio_text(found["seconds"][computed], found["seconds"][ours])[0]
        verdict = (
            f" Target, at least that over computing it: {'pass' if median >= found['padding_factor'] else 'fail'}."
        )
    text = f"{len(found['lengths'])} texts of {min(found['lengths'])} to {max(found['lengths'])} tokens, "
    text += f"{sum(found['lengths']):,} in all; padding multiplies them by {found['padding_factor']:.2f}.{verdict}"
    return text + "\n\n" + table(["candidate", "s, median", "text tokens/s", "peak", "packing is faster"], rows)


def layer_table(rows: list[dict[str, Any]]) -> str:
    """The part `layer`."""
    lines = []
    for row in rows:
        seconds = statistics.median(row["seconds"])
        lines.append(
            [
                f"{row['tokens']:,}",
                f"{seconds:.3f}",
                f"{1e6 * seconds / row['tokens']:.1f}",
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['bytes'] / row['tokens'] / 1e3:.1f}",
            ]
        )
    growth = {
        "time": statistics.median(rows[-1]["seconds"])
        / rows[-1]["tokens"]
        * rows[1]["tokens"]
        / statistics.median(rows[1]["seconds"]),
        "memory": rows[-1]["bytes"] / rows[-1]["tokens"] * rows[1]["tokens"] / max(rows[1]["bytes"], 1),
    }
    text = (
        f"One local layer (banded), forward and backward. From {rows[1]['tokens']:,} to {rows[-1]['tokens']:,} tokens "
    )
    text += ", ".join(
        f"{name} per token grows {value:.2f} times ({'pass' if value <= LINEAR_WITHIN else 'fail'})"
        for name, value in growth.items()
    )
    return (
        text + f"; at most {LINEAR_WITHIN}.\n\n" + table(["tokens", "s", "us per token", "MB", "kB per token"], lines)
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line to options."""

    def numbers(text: str) -> list[int]:
        found = sorted({int(part) for part in text.split(",") if part.strip().isdecimal() and int(part) > 0})
        if len(found) != len(text.split(",")):
            raise argparse.ArgumentTypeError(f"must be distinct numbers of at least 1 between commas, not {text!r}")
        return found

    def some_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            if not text or not set(text.split(",")) <= set(names):
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(names)} between commas, not {text!r}")
            return [name for name in names if name in text.split(",")]

        return read

    work = Path(tempfile.gettempdir(), "modernbert-training-step")
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=["base", "tiny"], default="base", help="default: base")
    add("--lengths", type=numbers, default=[512, 2048, 4096, 8192], metavar="N,...", help="default: 512,2048,4096,8192")
    add("--parts", type=some_of(PARTS), default=PARTS, metavar="PART,...", help=f"default: {','.join(PARTS)}")
    add("--modes", type=some_of(MODES), default=MODES, metavar="MODE,...", help=f"default: {','.join(MODES)}")
    add("--tokens", type=positive, default=4096, metavar="N", help="of the packed batch (default: 4096)")
    add(
        "--layer-lengths",
        type=numbers,
        default=[1 << power for power in range(10, 16)],
        metavar="N,...",
        help="of the one layer (default: 1024 to 32768)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="default: 2")
    add("--repeats", type=positive, default=5, metavar="N", help="rounds (default: 5)")
    add("--long-repeats", type=positive, default=2, metavar="N", help="rounds with fresh processes (default: 2)")
    add("--work", type=Path, default=work, metavar="DIR", help=f"keeps checkpoints (default: {work})")
    add("--out", type=Path, default=measure.results_directory(), metavar="DIR", help="results (default: %(default)s)")
    return parser.parse_args(arguments)


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def tell(message: str) -> None:
    """Progress, on standard error, with the time of day."""
    print(f"{datetime.datetime.now():%H:%M:%S}  {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
