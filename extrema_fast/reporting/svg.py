"""Line charts as inline SVG text: no scripts, colours from CSS variables, hover by `<title>`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 40
MAX_POINTS = 400
MAX_TITLES = 60

CSS = """
.chart{margin:0;min-width:0}
.chart h3{margin:0 0 .2rem;font-size:1rem}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:12px;fill:var(--muted)}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart .axis{stroke:var(--muted);stroke-width:1}
.chart polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .dashed{stroke-dasharray:6 5;stroke-width:1.6}
.chart .hit{fill:transparent;stroke:none;pointer-events:all}
.chart figcaption{display:flex;flex-wrap:wrap;gap:.15rem 1rem;font-size:.82rem;color:var(--muted);
 padding-left:.2rem}
.chart .key{display:inline-block;width:1.3em;height:0;border-top:3px solid;vertical-align:middle;
 margin-right:.4em}
.chart .key.dashed{border-top-style:dashed;border-top-width:2px}
""" + "".join(
    f".c{i}{{stroke:var(--c{i});border-color:var(--c{i})!important}}.chart circle.c{i}{{fill:var(--c{i})}}"
    for i in range(6)
)


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y); y None or not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    dashed: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) that cover [low, high] from inside."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # dividing by the inverse of a small step keeps 0.3 from becoming 0.30000000000000004
    return [i * step if step >= 1 else i / round(1 / step, 9) for i in range(first, last + 1)]


def tick_label(value: float, percent: bool = False) -> str:
    """Short text for an axis: 1500, 0.25, 2e-04, 35%."""
    if percent:
        return f"{value * 100:.6g}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def thin(
    points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS
) -> list[tuple[float, float | None]]:
    """At most `limit` points: means over equal runs of points (the last point stays itself)."""
    if len(points) <= limit:
        return list(points)
    out: list[tuple[float, float | None]] = []
    size = len(points) / (limit - 1)
    for i in range(limit - 1):
        run = points[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))]
        ys = [y for _, y in run if _finite(y)]
        out.append((sum(x for x, _ in run) / len(run), sum(ys) / len(ys) if ys else None))
    return [*out, points[-1]]


def _finite(y: float | None) -> bool:
    return isinstance(y, (int, float)) and math.isfinite(y)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    percent: bool = False,
    zero: bool = False,
    note: str = "",
) -> str:
    """A `<figure>` with axes, legend and hover titles; "" when no series holds a finite point.

    percent: y values are shares, shown as percentages; zero: the y axis starts at 0
    """
    series = [s for s in series if any(_finite(y) for _, y in s.points)]
    if not series:
        return ""
    xs = [x for s in series for x, y in s.points if _finite(y)]
    ys = [y for s in series for _, y in s.points if _finite(y)]
    x0, x1 = min(xs), max(xs)
    # steps are counted from 0; a first log line at step 10 should not look like the start
    x0 = 0.0 if 0 < x0 < 0.3 * x1 else x0
    y0, y1 = (min(0.0, *ys) if zero or len(ys) == 1 else min(ys)), max(ys)
    if x1 == x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.05 or 0.5
    y0, y1 = (y0 if zero and y0 == 0 else y0 - pad), y1 + pad

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for v in nice_ticks(y0, y1, 6):
        y = f"{py(v):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 7}" y="{y}" text-anchor="end" dominant-baseline="middle">'
            f"{tick_label(v, percent)}</text>"
        )
    base = HEIGHT - BOTTOM
    for v in nice_ticks(x0, x1):
        x = f"{px(v):.1f}"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{tick_label(v)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for s in series:
        parts.append(_curve(s, px, py, x_label, percent))
    keys = "".join(
        f'<span><span class="key c{s.color}{" dashed" if s.dashed else ""}"></span>{escape(s.name)}</span>'
        for s in series
    )
    names = ", ".join(s.name for s in series)
    note = f"<span>{escape(note)}</span>" if note else ""
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(names)}">'
        f"{''.join(parts)}</svg><figcaption>{keys}{note}</figcaption></figure>"
    )


def _curve(s: Series, px, py, x_label: str, percent: bool) -> str:
    points = thin(s.points)
    parts, run = [], []
    for x, y in [*points, (0.0, None)]:
        if _finite(y):
            run.append(f"{px(x):.1f},{py(y):.1f}")
        elif run:
            # a lone point between gaps would be invisible as a line of no length
            run = run * 2 if len(run) == 1 else run
            dashed = " dashed" if s.dashed else ""
            parts.append(f'<polyline class="c{s.color}{dashed}" points="{" ".join(run)}"/>')
            run = []
    finite = [(x, y) for x, y in points if _finite(y)]
    every = max(1, -(-len(finite) // MAX_TITLES))
    mark = f'class="c{s.color}" r="3"' if len(finite) <= 25 and not s.dashed else 'class="hit" r="7"'
    for x, y in finite[::every]:
        value = tick_label(round(y, 4), True) if percent else f"{y:.5g}"
        title = escape(f"{s.name}, {x_label} {x:.6g}: {value}")
        parts.append(f'<circle {mark} cx="{px(x):.1f}" cy="{py(y):.1f}"><title>{title}</title></circle>')
    return "".join(parts)
