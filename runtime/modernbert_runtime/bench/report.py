"""What a benchmark found: raw samples, and the few numbers that people read from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The samples of one candidate on texts of one length.

    Args:
        candidate: its name.
        tokens: of each text, special tokens included.
        batch: texts of one call.
        seconds: of each call, in the order taken.
        peak_bytes: memory high-water mark of its process when the last call was over; small calls came first.
        flops: useful arithmetic of one call; see `model_flops`.
    """

    candidate: str
    tokens: int
    batch: int
    seconds: Sequence[float]
    peak_bytes: int
    flops: int

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the calls did not exceed, by nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]

    @property
    def tokens_per_second(self) -> float:
        """By the median call."""
        return self.batch * self.tokens / self.percentile(50)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a benchmark found.

    Args:
        bundle: its path.
        source: the checkpoint that the bundle came from.
        machine, versions: where and with what.
        matrix_rate: best fp32 matrix product rate of this machine on the model's shapes, in FLOP/s.
        load_seconds: candidate -> cold start: seconds from a started process to its first vector, with everything that
            it imports, loads and checks; its files are in memory already.
        cosines: candidate -> lowest cosine with the reference over the texts that all embedded.
        latency: batches of one text.
        throughput: batches of several texts of one length.
        absent: candidate -> why it could not run, or not to the end: what it did before stands in its rows.
        disagreeing: candidate -> why its times were not taken.
        skipped: rows -> why they were not measured.
    """

    bundle: str
    source: str
    machine: dict[str, Any]
    versions: dict[str, str]
    matrix_rate: float
    load_seconds: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    latency: list[Measurement] = field(default_factory=list)
    throughput: list[Measurement] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    disagreeing: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def share_of_matrix_rate(self, row: Measurement) -> float:
        """Useful arithmetic of the median call per second, as a share of `matrix_rate`; above 1 where int8 beats it."""
        return row.flops / row.percentile(50) / self.matrix_rate

    def to_json(self) -> str:
        """Everything, raw samples included."""
        return json.dumps(asdict(self), indent=1)


LATENCY_HEADINGS = ("tokens", "candidate", "p50 ms", "p95 ms", "p99 ms", "calls", "of matrix rate", "peak memory")
THROUGHPUT_HEADINGS = ("texts", "candidate", "texts/s", "tokens/s", "calls", "of matrix rate", "peak memory")


def latency_cells(report: Report, row: Measurement) -> list[str]:
    """A row as text under `LATENCY_HEADINGS`."""
    milliseconds = [_number(1e3 * row.percentile(percent)) for percent in (50, 95, 99)]
    return [f"{row.tokens:,}", row.candidate, *milliseconds, *_common(report, row)]


def throughput_cells(report: Report, row: Measurement) -> list[str]:
    """A row as text under `THROUGHPUT_HEADINGS`."""
    texts = _number(row.batch / row.percentile(50))
    return [f"{row.batch} x {row.tokens}", row.candidate, texts, f"{row.tokens_per_second:,.0f}", *_common(report, row)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _common(report: Report, row: Measurement) -> list[str]:
    return [str(len(row.seconds)), f"{report.share_of_matrix_rate(row):.0%}", f"{row.peak_bytes / 1e9:.2f} GB"]


def caption(report: Report) -> str:
    """Where the numbers come from; without it they mean nothing."""
    here = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{here['processor']}, {here['cores']} cores, {here['threads'] or 'default'} threads, load "
        f"{here['load_average']:.1f} at the start; {versions}. Text in, vector out: tokenizing is part of the time, "
        f"loading is not. Matrix rate: {report.matrix_rate / 1e9:.0f} GFLOP/s in fp32. Candidates take turns, each in "
        "a process of its own."
    )


def model_flops(tokens: int, config: dict[str, Any]) -> int:
    """Useful FLOP of one forward pass over one text: linear layers, and attention over the keys that a layer sees.

    A sliding layer sees |q - k| <= local_attention // 2. Arithmetic on padding or masked keys counts as lost.
    """
    hidden, radius = config["hidden_size"], config["local_attention"] // 2
    radius = min(radius, tokens - 1)
    near = tokens * (2 * radius + 1) - radius * (radius + 1)
    linear = 2 * tokens * sum(k * n for k, n in weight_shapes(config))
    every = config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or [
        "sliding_attention" if index % every else "full_attention" for index in range(config["num_hidden_layers"])
    ]
    return sum(linear + 4 * hidden * (near if kind == "sliding_attention" else tokens * tokens) for kind in kinds)


def weight_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """[in, out] of a layer's four linear maps: Wqkv, Wo, Wi, mlp.Wo."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
