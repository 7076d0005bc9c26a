"""A report as one HTML file: three plots as inline SVG and the tables. No script, no font, nothing fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from modernbert_runtime.bench.report import (
    LATENCY_HEADINGS,
    THROUGHPUT_HEADINGS,
    Measurement,
    Report,
    caption,
    latency_cells,
    throughput_cells,
)

# Told apart with every common kind of colour blindness (Okabe and Ito, 2008), and by marker as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 44

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222; }
figure { display: inline-block; margin: 0 .5rem 1rem 0; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.new td { border-top: 2px solid #999; }
.key span { margin-right: 1.2rem; white-space: nowrap; }
.note { color: #555; font-size: .9rem; }
"""

Points = Sequence[tuple[float, float]]
Axis = Callable[[Measurement], float]


def as_html(report: Report) -> str:
    """The whole page."""
    title = f"{html.escape(report.source)} on {html.escape(str(report.machine['processor']))}"
    names = list(dict.fromkeys(row.candidate for row in [*report.latency, *report.throughput]))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}

    def plot(title: str, unit: str, x_label: str, rows: Sequence[Measurement], x: Axis, y: Axis, *, log: bool) -> str:
        series = {name: [(x(row), y(row)) for row in rows if row.candidate == name] for name in names}
        return line_plot(title, unit, x_label, series, colours, log=log)

    key = "".join(
        f'<span><svg width="16" height="12">{_marker(index, 8, 6, colours[name])}</svg> {html.escape(name)}</span>'
        for index, name in enumerate(names)
    )
    latency, throughput = report.latency, report.throughput
    plots = [
        plot("Latency", "ms, median", "tokens", latency, _tokens, lambda row: 1e3 * row.percentile(50), log=True),
        plot(
            "Throughput", "tokens/s", "texts a call", throughput, _batch, lambda row: row.tokens_per_second, log=False
        ),
        plot("Peak memory", "GB", "tokens", latency, _tokens, lambda row: row.peak_bytes / 1e9, log=False),
    ]
    notes = [f"Not run: {name}: {why}." for name, why in report.absent.items()]
    notes += [f"Not timed: {name}: {why}." for name, why in report.disagreeing.items()]
    notes += [f"Skipped: {name}: {why}." for name, why in report.skipped.items()]
    notes += [
        f"{name}: {report.load_seconds[name]:.2f} s from a started process to the first vector; lowest cosine with the "
        f"reference {cosine:.6f}."
        for name, cosine in report.cosines.items()
    ]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style>",
            f"<h1>{title}</h1>",
            f'<p class="key">{key}</p>',
            *(f"<figure>{figure}</figure>" for figure in plots),
            "<h2>Latency of one text</h2>",
            _table(LATENCY_HEADINGS, [latency_cells(report, row) for row in report.latency]),
            "<h2>Throughput</h2>",
            _table(THROUGHPUT_HEADINGS, [throughput_cells(report, row) for row in report.throughput]),
            *(f'<p class="note">{html.escape(note)}</p>' for note in [caption(report), *notes]),
            "</html>",
            "",
        ]
    )


def line_plot(
    title: str, unit: str, x_label: str, series: Mapping[str, Points], colours: Mapping[str, str], *, log: bool
) -> str:
    """One SVG: x is logarithmic with a tick per value; y is logarithmic, or linear from 0."""
    values = [value for points in series.values() for _, value in points]
    ticks_x = sorted({x for points in series.values() for x, _ in points})
    ticks_y = _log_ticks(min(values), max(values)) if log else _linear_ticks(max(values))
    scale = math.log10 if log else float

    def place_x(x: float) -> float:
        low, high = math.log2(ticks_x[0]), math.log2(ticks_x[-1])
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        low, high = scale(ticks_y[0]), scale(ticks_y[-1])
        return _HEIGHT - _BOTTOM - (scale(y) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}, {unit}, by {x_label}">',
        f'<text x="{_LEFT}" y="16" font-weight="bold">{title} <tspan font-weight="normal">({unit})</tspan></text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
    ]
    for y in ticks_y:
        at = place_y(y)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_label(y)}</text>')
    for x in ticks_x:
        at = place_x(x)
        parts.append(f'<path d="M{at:.1f} {_HEIGHT - _BOTTOM}v5" stroke="#888"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>')
    for index, (name, points) in enumerate(series.items()):
        if not points:
            continue
        line = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        for x, y in points:
            tip = f"<title>{html.escape(name)}: {y:,.4g} {unit} at {x:,.0f} {x_label}</title>"
            parts.append(f"<g>{tip}{_marker(index, place_x(x), place_y(y), colours[name])}</g>")
    return "".join([*parts, "</svg>"])


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _marker(index: int, x: float, y: float, colour: str) -> str:
    """A square, a circle, a triangle or a diamond."""
    shapes = (
        f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        f"M{x - 5:.1f} {y + 4:.1f}h10l-5 -9z",
        f"M{x - 5:.1f} {y:.1f}l5 -5l5 5l-5 5z",
    )
    return f'<path d="{shapes[index % len(shapes)]}" fill="{colour}"/>'


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times these, the nearest around all values."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    below = max(tick for tick in ticks if tick <= low)
    above = min([tick for tick in ticks if tick >= high and tick > below] or [10 * below])
    return [tick for tick in ticks if below <= tick <= above]


def _linear_ticks(high: float) -> list[float]:
    """From 0 in four to ten round steps."""
    step = 10.0 ** math.floor(math.log10(high))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1) if high <= 8 * step * part or part == 1)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
    last = ""
    for row in rows:
        lines.append('<tr class="new">' if row[0] != last else "<tr>")
        lines += [f"<td>{html.escape(cell)}</td>" for cell in row]
        lines.append("</tr>")
        last = row[0]
    return "".join([*lines, "</table>"])


def _tokens(row: Measurement) -> float:
    return row.tokens


def _batch(row: Measurement) -> float:
    return row.batch
