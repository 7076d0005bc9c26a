"""How many texts a second does our runtime embed in bulk, and in how much memory, against the tools people use?

Parts: Cranfield queries (short), Cranfield documents (medium), long documents cut at 8,192 tokens, and a mix of all
three, shuffled. Candidates, on one bundle and with the same threads: this runtime on ONNX Runtime in every precision
that the bundle has, and on OpenVINO; sentence-transformers on torch and on ONNX; fastembed; and what transformers'
exporter writes, with hand-written padding. The peers compute in fp32; those on ONNX but the last run our own export, so
what differs there is the runtime alone.

    python benchmarks/runtime_throughput.py BUNDLE --data FOLDER             # 20 minutes on two quiet cores, 20 GB
    python benchmarks/runtime_throughput.py BUNDLE --data FOLDER --parts queries --minutes 2      # a first look

BUNDLE must hold the checkpoint (model.safetensors), as `modernbert export` leaves it there. FOLDER has
`cranfield/queries.jsonl`, `cranfield/documents.jsonl` and `longdocs/documents.jsonl`. Tools that want versions of their
own come from the environments that `make peers` makes; what is not there is left out, and the report says why.

First all embed the same few texts, and their vectors must agree (cosine with ours in fp32: 0.9999, int8 0.99). Then
they take turns over the texts of a part, A B C A B C ..., each turn a fresh process: start, load and one warm-up are
not timed, peak memory is that of the process. Every part gets one round; what is left of `--minutes` goes to more
rounds, up to `--rounds`, the cheap parts first. Results so far are on disk after every round. Text to vector is timed,
tokenizing included.

Peers take texts in batches of a fixed number, sorted by length, by themselves or by us. For each part they get the
number that loses least to padding and to calls (`peer_batch`), within 8,192 padded tokens, for which the last of them
needs 16 GB.

Targets against the best peer of a part: 1.3x on queries, 1.5x on the mix in fp32, 3x in int8, and never above 2.5 GB
(10^9 bytes). Exit codes: 0 fine, 1 vectors differ or a target is missed, 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
from command import OneLineParser, complain, positive
from export_latency import export_peer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from modernbert_runtime.bench.candidates import MIN_COSINE, Candidate
from modernbert_runtime.bench.run import Worker
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import EngineError, ModernBertRuntimeError

HERE = Path(__file__).resolve().parent
PARTS = ("queries", "documents", "mix", "long")
PEER_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# What a call costs a peer beside its tokens, in tokens, and the most padded tokens of one call.
CALL_TOKENS = 64
MOST_TOKENS = 8192
LONGEST = 8192
FP32_MIN_COSINE = 0.9999
TARGET_RATIO = {("queries", "fp32"): 1.3, ("mix", "fp32"): 1.5, ("mix", "int8"): 3.0}  # ours / best peer, at least
TARGET_PEAK_BYTES = 2.5e9
OURS = "ours"
REFERENCE = "ours onnxruntime fp32"

progress_to = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse(arguments)
    files = [options.out / f"runtime_throughput.{suffix}" for suffix in ("json", "md")]

    def keep(report: dict[str, Any]) -> None:
        for file, text in zip(files, (json.dumps(report, indent=1) + "\n", as_markdown(report)), strict=True):
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text(text)
            partial.rename(file)

    try:
        options.out.mkdir(parents=True, exist_ok=True)
        report = benchmark(options, keep)
    except (ModernBertRuntimeError, OSError, ValueError, KeyError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain(f"interrupted; rounds that were done are in {files[0]}", 130)
    Console(width=None if sys.stdout.isatty() else 140).print(as_table(report))
    progress_to.print(f"Raw samples, table: {options.out}/runtime_throughput.json, .md", soft_wrap=True)
    failed = report["disagreeing"] or any("fail" in row["verdict"] for row in report["rows"])
    return 1 if failed else 0


def benchmark(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything from the texts to the table's rows; `keep` gets the report so far after every round."""
    end = time.monotonic() + 60 * options.minutes
    here = measure.machine()
    if here["load_average"] > 0.3:
        progress_to.print(
            f"[yellow]The machine is busy (load {here['load_average']:.1f}): publish no times from this run."
        )
    bundle = Bundle.open(options.bundle)
    tokenizer = Tokenizer.from_file(str(bundle.path_of("tokenizer.json")))
    texts = read_parts(options, tokenizer, min(LONGEST, bundle.manifest.max_length))
    lengths = {part: [len(encoding.ids) for encoding in tokenizer.encode_batch(texts[part])] for part in options.parts}
    batches = {part: peer_batch(lengths[part]) for part in options.parts}
    candidates, absent = find_candidates(bundle, options)
    with progress_to.status("comparing vectors") as status:
        cosines = agreement(candidates, check_texts(texts), absent, status.update)
    disagreeing = {name: cosine for name, cosine in cosines.items() if not cosine >= least_cosine(candidates[name])}
    for name, cosine in cosines.items():
        progress_to.print(f"{name}: lowest cosine {cosine:.6f}{' - not timed' if name in disagreeing else ''}")
    timed = [name for name in candidates if name in cosines and name not in disagreeing]
    found: dict[str, dict[str, Any]] = {
        part: {name: {"seconds": [], "peak_bytes": 0} for name in timed} for part in options.parts
    }

    def report() -> dict[str, Any]:
        measured = [part for part in options.parts if any(one["seconds"] for one in found[part].values())]
        return {
            "question": "our runtime against the tools people use: texts a second in bulk, and memory",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": here,
            "versions": measure.versions(
                "modernbert-deploy", "onnxruntime", "openvino", "transformers", "torch", "numpy"
            ),
            "settings": {"threads": options.threads, "peer_batch": batches},
            "sets": {part: {"texts": len(lengths[part]), "tokens": sum(lengths[part])} for part in options.parts},
            "absent": absent,
            "cosines": cosines,
            "disagreeing": disagreeing,
            "samples": found,
            "rows": [row for part in measured for row in rows(part, lengths[part], found[part])],
        }

    spent: dict[str, float] = {}
    for number in range(options.rounds):
        for part in options.parts:
            if number and spent[part] > end - time.monotonic():
                continue  # another round of it would not fit in
            begin = time.monotonic()
            for name in timed:
                with progress_to.status(f"{part}, round {number + 1} of at most {options.rounds}: {name}"):
                    take_turn(candidates[name], part, texts[part], batches[part], found[part][name])
            spent[part] = time.monotonic() - begin
            progress_to.print(f"{part}, round {number + 1}: {spent[part]:.0f} s", highlight=False)
            keep(report())
    return report()


# -- Texts.


def read_parts(options: argparse.Namespace, tokenizer: Tokenizer, longest: int) -> dict[str, list[str]]:
    """The texts of every part. The first of each file, so that smaller runs are parts of larger ones."""

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


def check_texts(texts: dict[str, list[str]]) -> list[str]:
    """A few of each length but the longest, which would take the peers minutes."""
    return [*texts["queries"][:4], *texts["documents"][:4], *(text[:6000] for text in texts["long"][:1])]


def peer_batch(lengths: Sequence[int]) -> int:
    """Texts of a call with which a tool that sorts by length, and then takes so many at a time, works least."""

    def tokens(batch: int) -> int:
        order = sorted(lengths, reverse=True)
        calls = [order[start : start + batch] for start in range(0, len(order), batch)]
        return sum(len(call) * call[0] + CALL_TOKENS for call in calls)

    fitting = [batch for batch in PEER_BATCHES if batch * max(lengths) <= MOST_TOKENS]
    return min(fitting or [1], key=tokens)


# -- Candidates.


def find_candidates(bundle: Bundle, options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> interpreter, loader, options and precision; and those that are left out, with the reason."""
    found: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    common = {"bundle": str(bundle.root), "threads": options.threads}
    for engine, precision in own_pairs(bundle):
        name = f"{OURS} {engine} {precision}"
        if importlib.util.find_spec(engine) is None:
            absent[name] = f"{engine} is not installed"
            continue
        own = {**common, "engine": engine, "precision": precision}
        found[name] = {"python": sys.executable, "loader": "runtime", "options": own}
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
        found = {name: value for name, value in found.items() if name in options.only or name == REFERENCE}
    for name, why in absent.items():
        progress_to.print(f"{name} is left out: {why}", highlight=False)
    return found, absent


def own_pairs(bundle: Bundle) -> list[tuple[str, str]]:
    """Engine and precision: ONNX Runtime in all, OpenVINO in fp32 and in what was lowered for it."""
    artifacts = bundle.manifest.artifacts
    pairs = [("onnxruntime", artifact.precision) for artifact in artifacts if artifact.target == "portable"]
    pairs += [("openvino", "fp32")]
    pairs += [("openvino", artifact.precision) for artifact in artifacts if artifact.target == "openvino"]
    return list(dict.fromkeys(pairs))


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


def agreement(
    candidates: dict[str, dict[str, Any]], texts: Sequence[str], absent: dict[str, str], tell: Any
) -> dict[str, float]:
    """Candidate -> lowest cosine with ours in fp32. One that cannot run goes to `absent` with the reason."""
    vectors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, candidate in candidates.items():
            tell(f"comparing vectors: {name}")
            try:
                with start(name, candidate, 2) as worker:
                    worker.run(texts, save=Path(scratch, "vectors.npy"))
            except EngineError as error:
                if name == REFERENCE:
                    raise
                absent[name] = str(error)
                progress_to.print(f"{name} is left out: {error}", highlight=False)
                continue
            raw = np.load(Path(scratch, "vectors.npy")).astype(np.float64)
            vectors[name] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    reference = vectors[REFERENCE]
    return {name: float((found * reference).sum(axis=1).min()) for name, found in vectors.items()}


def take_turn(candidate: dict[str, Any], part: str, texts: list[str], batch: int, found: dict[str, Any]) -> None:
    """One timed pass over a part; a candidate that dies gets no more turns on it and keeps the reason."""
    if "error" in found:
        return
    try:
        with start(part, candidate, batch) as worker:
            worker.run(sorted(texts, key=len)[:8])
            seconds, peak = worker.run(texts)
    except EngineError as error:
        found["error"] = str(error)
        return
    found["seconds"].append(seconds)
    found["peak_bytes"] = max(found["peak_bytes"], peak)


def rows(part: str, lengths: list[int], found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of the table per candidate; ratio, target and verdict stand on ours."""
    medians = {name: statistics.median(one["seconds"]) for name, one in found.items() if one["seconds"]}
    best_peer = min((time for name, time in medians.items() if not name.startswith(OURS)), default=None)
    table = []
    for name, one in found.items():
        row = {"set": part, "candidate": name, "error": one.get("error", ""), "verdict": "", "target": ""}
        if name in medians:
            row |= {
                "texts_per_second": len(lengths) / medians[name],
                "tokens_per_second": sum(lengths) / medians[name],
                "peak_bytes": one["peak_bytes"],
                "rounds": len(one["seconds"]),
                "ratio": best_peer / medians[name] if best_peer and name.startswith(OURS) else None,
            }
            if name.startswith(OURS):
                row |= judge(row, TARGET_RATIO.get((part, name.split()[-1])))
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

HEADINGS = ("set", "candidate", "texts/s", "tokens/s", "rounds", "peak RSS", "ours / best peer", "target", "verdict")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text under `HEADINGS`."""
    if "peak_bytes" not in row:
        return [row["set"], row["candidate"], "-", "-", "0", "-", row["error"], "", row["verdict"]]
    speed = row["texts_per_second"]
    return [
        row["set"],
        row["candidate"],
        f"{speed:,.0f}" if speed >= 1000 else f"{speed:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        str(row["rounds"]),
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        f"{row['ratio']:.2f}x" if row["ratio"] else "",
        row["target"],
        row["verdict"],
    ]


def caption(report: dict[str, Any]) -> str:
    """Hardware, settings and versions: without them the table means nothing."""
    settings = report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sets = ", ".join(
        f"{name} {size['texts']} texts of {size['tokens']:,} tokens" for name, size in report["sets"].items()
    )
    batches = ", ".join(f"{name} {batch}" for name, batch in settings["peer_batch"].items())
    absent = "".join(f" Left out: {name}: {why}." for name, why in report["absent"].items())
    return (
        f"{measure.described(report['machine'], settings['threads'])}; medians of the rounds; {report['date']}; "
        f"{packages}. Sets: {sets}. Texts a call of the peers: {batches}.{absent}"
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""

    def directory(text: str) -> Path:
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"no directory {text!r}")
        return Path(text).resolve()

    def some_parts(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(PARTS):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
        return [name for name in PARTS if name in text.split(",")]

    work = Path(tempfile.gettempdir(), "modernbert-runtime-throughput")
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", type=directory, metavar="BUNDLE", help="directory that `modernbert export` wrote")
    add("--data", type=directory, required=True, metavar="DIR", help="folder with cranfield/ and longdocs/")
    add("--parts", type=some_parts, default=list(PARTS), metavar="NAME,...", help=f"default: {','.join(PARTS)}")
    add("--only", type=lambda text: text.split(","), metavar="NAME,...", help=f"candidates beside {REFERENCE!r}")
    add("--queries", type=positive, default=225, metavar="N", help="default: 225, all")
    add("--documents", type=positive, default=100, metavar="N", help="of 1,400 (default: 100)")
    add("--long", type=positive, default=2, metavar="N", help="long documents, the longest first (default: 2)")
    add("--minutes", type=float, default=18.0, metavar="M", help="for all, about; a round of each part at least")
    add("--rounds", type=positive, default=5, metavar="N", help="passes over a part at most (default: 5)")
    add("--threads", type=positive, default=2, metavar="N", help="default: 2")
    add("--environments", type=Path, default=HERE.parent / ".venv-peers", metavar="DIR", help="default: .venv-peers")
    add("--work", type=Path, default=work, metavar="DIR", help=f"keeps the peer's export (default: {work})")
    add("--out", type=Path, default=measure.results_directory(), metavar="DIR", help="results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
