"""Is it faster to embed packed tokens than sorted, padded batches, and for which texts?

    modernbert export MODEL --out BUNDLE --packed --precision fp32,int8
    python benchmarks/packed_batches.py BUNDLE                        # 20 minutes for the base model
    python benchmarks/packed_batches.py BUNDLE --sets queries,mixed --rounds 3

One process holds both embedders of a precision, on one thread. They embed the same random tokens in turns, A B A B,
after one turn that is not timed and in which their vectors must agree (cosine 0.9999; int8 0.99, where the neighbours
of a text have a say in how its inputs are rounded). CPU time of the process is what counts, so that a busy machine does
less harm; planning the batches is in it, tokenizing is not. A ratio above 1 means that packed is faster.

Exit codes: 0 fine, 1 vectors differ, 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np
from command import OneLineParser, complain, positive
from rich.console import Console
from rich.table import Table

from modernbert_runtime import Embedder
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import InputError, ModernBertRuntimeError
from modernbert_runtime.manifest import PACKED
from modernbert_runtime.tokenizer import TokenizedText

MIN_COSINE = {"fp32": 0.9999, "int8": 0.99}


def _between(low: int, high: int, count: int) -> Callable[[np.random.Generator], list[int]]:
    """Lengths drawn evenly on a logarithmic scale: many short texts and a few long ones, as collections have them."""
    return lambda generator: np.exp(generator.uniform(np.log(low), np.log(high), count)).astype(int).tolist()


SETS: Mapping[str, Callable[[np.random.Generator], list[int]]] = {
    "queries": _between(5, 25, 300),
    "16 queries": _between(5, 25, 16),
    "mixed": _between(20, 1000, 60),
    "8 mixed": _between(20, 1000, 8),
    "alike": lambda generator: [256] * 16,
    "2048": lambda generator: [2048],
    "8192": lambda generator: [8192],
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse(arguments)
    try:
        report = benchmark(options)
    except (ModernBertRuntimeError, OSError) as error:
        return complain(error, 2)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "packed_batches.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 120).print(as_table(report))
    print(f"Raw samples: {file}", file=sys.stderr)
    return 0 if all(row["cosine"] >= MIN_COSINE[row["precision"]] for row in report["rows"]) else 1


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Every set in every precision that the bundle has in both forms."""
    manifest = Bundle.open(options.bundle, verify_hashes=False).manifest
    precisions = [one.precision for one in manifest.artifacts if one.target == PACKED]
    if not precisions:
        raise InputError("the bundle has no packed artifact: export it with --packed")
    rows = []
    for precision in precisions:
        load = dict(precision=precision, threads=1, engine="onnxruntime", verify_hashes=False)
        with (
            Embedder.load(options.bundle, packed=False, **load) as padded,
            Embedder.load(options.bundle, packed=True, **load) as packed,
        ):
            for name in options.sets:
                print(f"{precision}, {name}", file=sys.stderr)
                rows.append(compare(padded, packed, name, options.rounds) | {"precision": precision})
    return {
        "question": "packed tokens against sorted, padded batches: CPU seconds",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "versions": measure.versions("modernbert-deploy", "onnxruntime", "numpy"),
        "rows": rows,
    }


def compare(padded: Embedder, packed: Embedder, name: str, rounds: int) -> dict[str, Any]:
    """Both on one set: samples, the ratio of their medians, and the lowest cosine between their vectors."""
    generator = np.random.default_rng(0)
    lengths = [min(length, padded.max_length) for length in SETS[name](generator)]
    # Ids above those of special tokens, in a vocabulary of any usual size.
    texts = [TokenizedText(generator.integers(10, 1000, length, dtype=np.int32), 0) for length in lengths]
    vectors = [one.embed_tokens(texts).astype(np.float64) for one in (padded, packed)]
    norms = [np.linalg.norm(x, axis=1) for x in vectors]
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(rounds):
        for form, one in (("padded", padded), ("packed", packed)):
            begin = time.process_time()
            one.embed_tokens(texts)
            seconds[form].append(time.process_time() - begin)
    medians = {form: statistics.median(samples) for form, samples in seconds.items()}
    return {
        "set": name,
        "texts": len(lengths),
        "tokens": sum(lengths),
        "cosine": float(((vectors[0] * vectors[1]).sum(1) / (norms[0] * norms[1])).min()),
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["padded"] / medians["packed"],
        "pairs": [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)],
    }


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    here = report["machine"]
    table = Table(
        *("precision", "set", "texts", "tokens", "padded", "packed", "faster (range of pairs)", "cosine"),
        title=report["question"],
        caption=f"{here['processor']}, one thread, load {here['load_average']:.1f} at the end; {report['date']}",
    )
    for row in report["rows"]:
        table.add_row(
            row["precision"],
            row["set"],
            str(row["texts"]),
            f"{row['tokens']:,}",
            *(f"{row['medians'][form]:.3g} s" for form in ("padded", "packed")),
            f"{row['ratio']:.2f}x ({min(row['pairs']):.2f}-{max(row['pairs']):.2f})",
            f"{row['cosine']:.6f}",
        )
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""

    def some_sets(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(SETS):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(SETS)}, not {', '.join(sorted(unknown))}")
        return text.split(",")

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="directory that `modernbert export --packed` wrote")
    add("--sets", type=some_sets, default=list(SETS), metavar="NAME,...", help=f"default: {','.join(SETS)}")
    add("--rounds", type=positive, default=5, metavar="N", help="turns of each (default: 5)")
    add("--out", type=Path, default=measure.results_directory(), metavar="DIR", help="results (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
