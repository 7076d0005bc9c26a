"""Error by length as a picture: a small SVG that every browser shows and that needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from modernbert_export.parity import ParityReport

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 70, 40, 210, 50
COLOURS = ("#1b6ca8", "#c2571a", "#3a7d44", "#7a3e9d", "#8a6d00", "#555555")
# Cosines of 1 and errors of 0 have no logarithm; fp32 does not resolve less.
FLOOR = 1e-9


def error_plot(reports: Sequence[ParityReport]) -> str:
    """1 - cosine of the worst token over the length, both logarithmic; a line per artifact and reference."""
    lines: dict[str, dict[int, float]] = {}
    for report in reports:
        for row in report.comparisons:
            line = lines.setdefault(f"{report.precision} against {row.reference}", {})
            error = max(FLOOR, 1 - row.min_cosine) if math.isfinite(row.min_cosine) else 1.0
            line[row.case.length] = max(line.get(row.case.length, FLOOR), error)
    lengths = sorted({length for line in lines.values() for length in line})
    decades = range(round(math.log10(FLOOR)), 1)
    span = max(math.log(lengths[-1] / lengths[0]), 1e-9)

    def x(length: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(length / lengths[0]) / span

    def y(error: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log10(error) / decades[0]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">1 - cosine of the worst token, by length of the input</text>',
    ]
    for decade in decades:
        at = y(10.0**decade)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{decade}</text>')
    previous = -math.inf
    for length in lengths:
        if x(length) - previous > 30:
            previous = x(length)
            parts.append(f'<text x="{previous:.1f}" y="{HEIGHT - 28}" text-anchor="middle">{length}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [(x(length), y(min(error, 1.0))) for length, error in sorted(line.items())]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        at = TOP + 12 + 18 * index
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{at}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
