"""Plain SVG figures for the claims page: points with error bars and lines on two axes, nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 170, 40, 50
COLOURS = ("#c2185b", "#3949ab", "#00897b", "#f9a825", "#6d4c41", "#546e7a")


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) of one colour, with low and high limits where given, joined by a line where asked."""

    label: str
    points: Sequence[tuple[float, float]]
    limits: Sequence[tuple[float, float]] = ()
    names: Sequence[str] = ()
    line: bool = False
    dots: bool = True


@dataclass(slots=True)
class Figure:
    """Two linear axes and what is drawn on them; `percent` says which axes (x, y) show shares."""

    title: str
    x: str
    y: str
    percent: str = ""
    series: list[Series] = field(default_factory=list)

    def svg(self) -> str:
        """The figure as an SVG document on white."""
        xs = [point[0] for one in self.series for point in one.points]
        ys = [point[1] for one in self.series for point in one.points]
        ys += [value for one in self.series for pair in one.limits for value in pair]
        (x0, x1, xticks), (y0, y1, yticks) = _axis(xs), _axis(ys)

        def at(x: float, y: float) -> tuple[float, float]:
            return (
                LEFT + (x - x0) / (x1 - x0) * (WIDE - LEFT - RIGHT),
                HIGH - BOTTOM - (y - y0) / (y1 - y0) * (HIGH - TOP - BOTTOM),
            )

        parts = [_text(LEFT, 22, self.title, 15), _text((LEFT + WIDE - RIGHT) / 2, HIGH - 10, self.x, 12, "middle"),
                 f'<g transform="rotate(-90)">{_text(-HIGH / 2, 16, self.y, 12, "middle")}</g>']  # fmt: skip
        for tick in xticks:
            px = at(tick, y0)[0]
            parts += [_line(px, TOP, px, HIGH - BOTTOM, "#e6e6ea"),
                      _text(px, HIGH - BOTTOM + 16, _number(tick, "x" in self.percent), 11, "middle")]  # fmt: skip
        for tick in yticks:
            py = at(x0, tick)[1]
            parts += [_line(LEFT, py, WIDE - RIGHT, py, "#9a9aa4" if tick == 0 else "#e6e6ea"),
                      _text(LEFT - 6, py + 4, _number(tick, "y" in self.percent), 11, "end")]  # fmt: skip
        for number, one in enumerate(self.series):
            parts += _drawn(one, COLOURS[number % len(COLOURS)], at)
            if one.label:
                top = TOP + 18 * number
                colour = COLOURS[number % len(COLOURS)]
                parts += [f'<circle cx="{WIDE - RIGHT + 16}" cy="{top}" r="5" fill="{colour}"/>',
                          _text(WIDE - RIGHT + 26, top + 4, one.label, 12)]  # fmt: skip
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE}" height="{HIGH}" viewBox="0 0 {WIDE} {HIGH}" '
            f'font-family="sans-serif" role="img"><title>{html.escape(self.title)}</title>'
            f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
        )


def _drawn(one: Series, colour: str, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    spots = [place(*point) for point in one.points]
    parts = []
    if one.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for (x, _), (low, high) in zip(one.points, one.limits, strict=False):
        (px, py0), (_, py1) = place(x, low), place(x, high)
        parts.append(_line(px, py0, px, py1, colour))
    if one.dots:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.8"/>' for x, y in spots]
    parts += [_text(x + 6, y - 5, name, 10) for (x, y), name in zip(spots, one.names, strict=False)]
    return parts


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and round ticks of an axis that holds `values` and 0 where that is near."""
    low, high = min(values), max(values)
    low, high = min(low, 0.0) if low < 0.3 * high or low < 0 else low, max(high, 0.0)
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(n * step, 10) for n in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _number(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent and abs(value * 100 - round(value * 100)) < 1e-6 else (
        f"{value:.1%}" if percent else f"{value:g}"
    )  # fmt: skip


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {where} fill="#222">{html.escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, colour: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"/>'
