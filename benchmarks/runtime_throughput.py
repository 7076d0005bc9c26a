"""How many texts a second does our runtime embed in bulk, and in how much memory, against the tools people use?

Sets: Cranfield queries (short), Cranfield documents (medium), long documents cut at 8,192 tokens, and a mix of all
three, shuffled. Candidates, on one bundle and with the same threads: this runtime in every precision that the bundle
has; sentence-transformers on torch and on ONNX; fastembed; and what transformers' exporter writes, with hand-written
padding. The ONNX ones but the last run our own export, so what differs there is the runtime alone.

    python benchmarks/runtime_throughput.py BUNDLE --data FOLDER             # about an hour, 20 GB
    python benchmarks/runtime_throughput.py BUNDLE --data FOLDER --sets queries --rounds 1      # a first look

BUNDLE must hold the checkpoint (model.safetensors), as `modernbert export` leaves it there. FOLDER has
`cranfield/queries.jsonl`, `cranfield/documents.jsonl` and `longdocs/documents.jsonl`. Tools that want versions of their
own come from the environments that `make peers` makes; where one is missing, its candidates are left out, and said so.

First all embed the same few texts, and their vectors must agree (cosine with ours in fp32: 0.9999, int8 0.99). Then
they take turns over a set, A B C A B C ..., each turn a fresh process: start, load and one warm-up are not timed, peak
memory is that of the process. Peers get texts in the batch sizes of `PEER_BATCH`, which keep what they need for padding
and attention within this machine's memory; they sort by length, or it is done for them. Text to vector is timed,
tokenizing included.

Targets against the best peer of a set: 1.3x on queries, 1.5x on the mix in fp32, 3x in int8, and never above 2.5 GB
(10^9 bytes). Exit codes: 0 fine, 1 vectors differ or a target is missed, 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import measure
import numpy as np
from export_latency import export_peer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from modernbert_runtime.bench.candidates import MIN_COSINE, Candidate
from modernbert_runtime.bench.run import Worker
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import EngineError, ModernBertRuntimeError

HERE = Path(__file__).resolve().parent
SETS = ("queries", "documents", "long", "mix")
PEER_BATCH = {"queries": 32, "documents": 8, "long": 1, "mix": 2}
LONGEST = 8192
FP32_MIN_COSINE = 0.9999
TARGET_RATIO = {("queries", "fp32"): 1.3, ("mix", "fp32"): 1.5, ("mix", "int8"): 3.0}  # ours / best peer, at least
TARGET_PEAK_BYTES = 2.5e9
OURS = "ours"

progress_to = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse(arguments)
    try:
        report = benchmark(options)
    except (ModernBertRuntimeError, OSError, ValueError, KeyError) as error:
        print(f"runtime_throughput: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("runtime_throughput: interrupted; nothing was written", file=sys.stderr)
        return 130
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "runtime_throughput.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "runtime_throughput.md").write_text(as_markdown(report))
    Console(width=None if sys.stdout.isatty() else 140).print(as_table(report))
    progress_to.print(f"Raw samples, table: {options.out}/runtime_throughput.json, .md", soft_wrap=True)
    failed = report["disagreeing"] or any("fail" in row["verdict"] for row in report["rows"])
    return 1 if failed else 0


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the texts to the table's rows."""
    here = measure.machine()
    if here["load_average"] > 0.3:
        progress_to.print(
            f"[yellow]The machine is busy (load {here['load_average']:.1f}): publish no times from this run."
        )
    bundle = Bundle.open(options.bundle)
    tokenizer = Tokenizer.from_file(str(bundle.path_of("tokenizer.json")))
    sets = read_sets(options, tokenizer, min(LONGEST, bundle.manifest.max_length))
    tokens = {name: sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sets[name])) for name in options.sets}
    candidates, absent = find_candidates(bundle, options)
    with progress_to.status("comparing vectors") as status:
        cosines = agreement(candidates, check_texts(sets), status.update)
    disagreeing = {name: cosine for name, cosine in cosines.items() if not cosine >= least_cosine(candidates[name])}
    for name, cosine in cosines.items():
        progress_to.print(f"{name}: lowest cosine {cosine:.6f}{' - not timed' if name in disagreeing else ''}")
    timed = [name for name in candidates if name in cosines and name not in disagreeing]
    found: dict[str, dict[str, Any]] = {}
    for set_name in options.sets:
        found[set_name] = {name: {"seconds": [], "peak_bytes": 0} for name in timed}
        for number in range(options.rounds):
            for name in timed:
                with progress_to.status(f"{set_name}, round {number + 1} of {options.rounds}: {name}"):
                    take_turn(candidates[name], set_name, sets[set_name], found[set_name][name])
    return {
        "question": "our runtime against the tools people use: texts a second in bulk, and memory",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": here,
        "versions": measure.versions("modernbert-deploy", "onnxruntime", "transformers", "torch", "numpy"),
        "settings": {"threads": options.threads, "rounds": options.rounds, "peer_batch": PEER_BATCH},
        "sets": {name: {"texts": len(sets[name]), "tokens": tokens[name]} for name in options.sets},
        "absent": absent,
        "cosines": cosines,
        "disagreeing": disagreeing,
        "samples": found,
        "rows": [row for name in options.sets for row in rows(name, len(sets[name]), tokens[name], found[name])],
    }


# -- Texts.


def read_sets(options: argparse.Namespace, tokenizer: Tokenizer, longest: int) -> dict[str, list[str]]:
    """The texts of every set. The first of each file, so that smaller runs are parts of larger ones."""

    def read(name: str, count: int) -> list[str]:
        with open(options.data / name, encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
        return [f"{row.get('title', '')} {row['text']}".strip() for row in rows]

    queries = read("cranfield/queries.jsonl", options.queries)
    documents = read("cranfield/documents.jsonl", options.documents)
    longest_first = sorted(read("longdocs/documents.jsonl", 10_000), key=len, reverse=True)
    long = [cut(text, tokenizer, longest) for text in longest_first[: options.long]]
    mix = queries + documents[: max(len(documents) // 2, 1)] + long[: max(len(long) // 2, 1)]
    random.Random(0).shuffle(mix)  # noqa: S311 - not for secrets
    return {"queries": queries, "documents": documents, "long": long, "mix": mix}


def cut(text: str, tokenizer: Tokenizer, longest: int) -> str:
    """The start of a text that has at most `longest` tokens, special tokens included."""
    offsets = tokenizer.encode(text).offsets
    while len(offsets) > longest:
        text = text[: offsets[longest - 2][0]]
        offsets = tokenizer.encode(text).offsets
    return text


def check_texts(sets: dict[str, list[str]]) -> list[str]:
    """A few of each length but the longest, which would take the peers minutes."""
    return [*sets["queries"][:4], *sets["documents"][:4], *(text[:6000] for text in sets["long"][:1])]


# -- Candidates.


def find_candidates(bundle: Bundle, options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> interpreter, loader, options and precision; and those that are left out, with the reason."""
    found: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    common = {"bundle": str(bundle.root), "threads": options.threads}
    for precision in dict.fromkeys(artifact.precision for artifact in bundle.manifest.artifacts):
        own = {**common, "engine": options.engine, "precision": precision}
        found[f"{OURS} {precision}"] = {"python": sys.executable, "loader": "runtime", "options": own}
    found["sentence-transformers torch"] = {
        "python": sys.executable,
        "loader": "sentence-transformers",
        "options": {**common, "backend": "torch"},
    }
    for name, environment, loader, more in (
        ("sentence-transformers onnx", "optimum", "sentence-transformers", {"backend": "onnx"}),
        ("fastembed", "fastembed", "fastembed", {}),
    ):
        python = options.environments / environment / "bin" / "python"
        if python.is_file():
            found[name] = {"python": str(python), "loader": loader, "options": {**common, **more}}
        else:
            absent[name] = f"no environment {python.parents[1]}; make peers"
    with progress_to.status("exporting with transformers, about two minutes unless an earlier run did"):
        options.work.mkdir(parents=True, exist_ok=True)
        key = bundle.manifest.files["model.safetensors"][:12]
        model = measure.made_once(options.work / f"peer-{key}", export_peer, bundle.root) / "model.onnx"
    found["transformers exporters"] = {
        "python": sys.executable,
        "loader": "exporters",
        "options": {**common, "model": str(model)},
    }
    if options.only:
        found = {name: value for name, value in found.items() if name in options.only or name == f"{OURS} fp32"}
    for name, why in absent.items():
        progress_to.print(f"{name} is left out: {why}")
    return found, absent


def least_cosine(candidate: dict[str, Any]) -> float:
    """What its vectors must reach."""
    precision = candidate["options"].get("precision", "fp32")
    return FP32_MIN_COSINE if precision == "fp32" else MIN_COSINE.get(precision, MIN_COSINE["int8"])


def start(name: str, candidate: dict[str, Any], batch: int) -> Worker:
    """A fresh process of a candidate."""
    options = json.dumps({**candidate["options"], "batch": batch})
    command = [candidate["python"], str(HERE / "throughput_worker.py"), candidate["loader"], options]
    return Worker(Candidate(name, "fp32", command))


# -- Measuring.


def agreement(candidates: dict[str, dict[str, Any]], texts: Sequence[str], tell: Any) -> dict[str, float]:
    """Candidate -> lowest cosine with ours in fp32. One that cannot run is left out, and said so."""
    vectors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, candidate in candidates.items():
            tell(f"comparing vectors: {name}")
            try:
                with start(name, candidate, 2) as worker:
                    worker.run(texts, save=Path(scratch, "vectors.npy"))
            except EngineError as error:
                if name == f"{OURS} fp32":
                    raise
                progress_to.print(f"[red]{name} cannot run: {error}")
                continue
            raw = np.load(Path(scratch, "vectors.npy")).astype(np.float64)
            vectors[name] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    reference = vectors[f"{OURS} fp32"]
    return {name: float((found * reference).sum(axis=1).min()) for name, found in vectors.items()}


def take_turn(candidate: dict[str, Any], set_name: str, texts: list[str], found: dict[str, Any]) -> None:
    """One timed pass over a set; a candidate that dies gets no more turns on this set and keeps the reason."""
    if "error" in found:
        return
    try:
        with start(set_name, candidate, PEER_BATCH[set_name]) as worker:
            worker.run(sorted(texts, key=len)[:8])
            seconds, peak = worker.run(texts)
    except EngineError as error:
        found["error"] = str(error)
        return
    found["seconds"].append(seconds)
    found["peak_bytes"] = max(found["peak_bytes"], peak)


def rows(set_name: str, num_texts: int, num_tokens: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of the table per candidate; ratio, target and verdict stand on ours."""
    medians = {name: statistics.median(one["seconds"]) for name, one in found.items() if one["seconds"]}
    best_peer = min((time for name, time in medians.items() if not name.startswith(OURS)), default=None)
    table = []
    for name, one in found.items():
        row = {"set": set_name, "candidate": name, "error": one.get("error", ""), "verdict": "", "target": ""}
        if name in medians:
            row |= {
                "texts_per_second": num_texts / medians[name],
                "tokens_per_second": num_tokens / medians[name],
                "peak_bytes": one["peak_bytes"],
                "ratio": best_peer / medians[name] if best_peer and name.startswith(OURS) else None,
            }
            if name.startswith(OURS):
                row |= judge(row, TARGET_RATIO.get((set_name, name.removeprefix(f"{OURS} "))))
        elif name.startswith(OURS):
            row["verdict"] = "fail"
        table.append(row)
    return table


def judge(row: dict[str, Any], least: float | None) -> dict[str, str]:
    """What was aimed at, and whether it was reached."""
    small = row["peak_bytes"] <= TARGET_PEAK_BYTES
    fast = least is None or row["ratio"] is None or row["ratio"] >= least
    target = f"<= {TARGET_PEAK_BYTES / 1e9:g} GB" + (f", >= {least:g}x" if least else "")
    return {"target": target, "verdict": "pass" if small and fast else "fail"}


# -- Showing.

HEADINGS = ("set", "candidate", "texts/s", "tokens/s", "peak RSS", "against the best peer", "target", "verdict")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text under `HEADINGS`."""
    if "peak_bytes" not in row:
        return [row["set"], row["candidate"], "-", "-", "-", row["error"], "", row["verdict"]]
    speed = row["texts_per_second"]
    return [
        row["set"],
        row["candidate"],
        f"{speed:,.0f}" if speed >= 1000 else f"{speed:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        f"{row['ratio']:.2f}x" if row["ratio"] else "",
        row["target"],
        row["verdict"],
    ]


def caption(report: dict[str, Any]) -> str:
    """Hardware, settings and versions: without them the table means nothing."""
    here, settings = report["machine"], report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sets = ", ".join(
        f"{name} {size['texts']} texts of {size['tokens']:,} tokens" for name, size in report["sets"].items()
    )
    return (
        f"{here['processor']}, {here['cores']} cores, {settings['threads']} threads, load {here['load_average']:.1f} "
        f"at the start; medians of {settings['rounds']} rounds; {report['date']}; {packages}. Sets: {sets}."
    )


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    table = Table(*HEADINGS, title=report["question"], caption=caption(report))
    for row, following in zip(report["rows"], [*report["rows"][1:], None], strict=True):
        table.add_row(*cells(row), end_section=following is None or following["set"] != row["set"])
    return table


def as_markdown(report: dict[str, Any]) -> str:
    """The report for a page."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row) for row in report["rows"])]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", caption(report), ""])


class OneLineParser(argparse.ArgumentParser):
    """Bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and end."""
        print(f"runtime_throughput: {message}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a number of at least 1, not {text!r}")
        return int(text)

    def directory(text: str) -> Path:
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"no directory {text!r}")
        return Path(text).resolve()

    def some_sets(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(SETS):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(SETS)}, not {', '.join(sorted(unknown))}")
        return [name for name in SETS if name in text.split(",")]

    work = Path(tempfile.gettempdir(), "modernbert-runtime-throughput")
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", type=directory, metavar="BUNDLE", help="directory that `modernbert export` wrote")
    add("--data", type=directory, required=True, metavar="DIR", help="folder with cranfield/ and longdocs/")
    add("--sets", type=some_sets, default=list(SETS), metavar="NAME,...", help=f"default: {','.join(SETS)}")
    add("--only", type=lambda text: text.split(","), metavar="NAME,...", help="candidates beside ours in fp32")
    add("--queries", type=positive, default=225, metavar="N", help="default: 225, all")
    add("--documents", type=positive, default=200, metavar="N", help="of 1,400 (default: 200)")
    add("--long", type=positive, default=4, metavar="N", help="long documents, the longest first (default: 4)")
    add("--rounds", type=positive, default=3, metavar="N", help="passes over each set (default: 3)")
    add("--threads", type=positive, default=2, metavar="N", help="default: 2")
    add("--engine", default="onnxruntime", metavar="NAME", help="of ours (default: onnxruntime)")
    add("--environments", type=Path, default=HERE.parent / ".venv-peers", metavar="DIR", help="default: .venv-peers")
    add("--work", type=Path, default=work, metavar="DIR", help=f"keeps the peer's export (default: {work})")
    add("--out", type=Path, default=measure.results_directory(), metavar="DIR", help="results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
