"""Plain SVG figures for the claims page: points with error bars and lines on two axes."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 170, 40, 50
COLORS = ("#c2185b", "#3949ab", "#00897b", "#f9a825", "#6d4c41", "#546e7a")


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) of one color, optionally with low and high limits and joined by a line."""

    label: str
    points: Sequence[tuple[float, float]]
    limits: Sequence[tuple[float, float]] = ()
    point_names: Sequence[str] = ()
    has_line: bool = False
    has_dots: bool = True


@dataclass(slots=True)
class Figure:
    """Two linear axes with series; `percent_axes` names the axes (x, y) that show shares."""

    title: str
    x_label: str
    y_label: str
    percent_axes: str = ""
    series: list[Series] = field(default_factory=list)

    def svg(self) -> str:
        """The figure as an SVG document on white."""
        x_values = [point[0] for series in self.series for point in series.points]
        y_values = [point[1] for series in self.series for point in series.points]
        y_values += [value for series in self.series for pair in series.limits for value in pair]
        (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = _axis_range(x_values), _axis_range(y_values)

        def to_pixels(x: float, y: float) -> tuple[float, float]:
            return (
                LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
            )

        elements = [
            _text(LEFT, 22, self.title, 15),
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, self.x_label, 12, "middle"),
            f'<g transform="rotate(-90)">{_text(-HEIGHT / 2, 16, self.y_label, 12, "middle")}</g>',
        ]
        for tick in x_ticks:
            x_pixel = to_pixels(tick, y_low)[0]
            elements += [
                _line(x_pixel, TOP, x_pixel, HEIGHT - BOTTOM, "#e6e6ea"),
                _text(x_pixel, HEIGHT - BOTTOM + 16, _format_tick(tick, "x" in self.percent_axes), 11, "middle"),
            ]
        for tick in y_ticks:
            y_pixel = to_pixels(x_low, tick)[1]
            elements += [
                _line(LEFT, y_pixel, WIDTH - RIGHT, y_pixel, "#9a9aa4" if tick == 0 else "#e6e6ea"),
                _text(LEFT - 6, y_pixel + 4, _format_tick(tick, "y" in self.percent_axes), 11, "end"),
            ]
        for index, series in enumerate(self.series):
            elements += _draw_series(series, COLORS[index % len(COLORS)], to_pixels)
            if series.label:
                legend_y = TOP + 18 * index
                color = COLORS[index % len(COLORS)]
                elements += [f'<circle cx="{WIDTH - RIGHT + 16}" cy="{legend_y}" r="5" fill="{color}"/>',
                          _text(WIDTH - RIGHT + 26, legend_y + 4, series.label, 12)]  # fmt: skip
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" role="img"><title>{html.escape(self.title)}</title>'
            f'<rect width="100%" height="100%" fill="#fff"/>{"".join(elements)}</svg>\n'
        )


def _draw_series(series: Series, color: str, to_pixels: Callable[[float, float], tuple[float, float]]) -> list[str]:
    pixels = [to_pixels(*point) for point in series.points]
    elements = []
    if series.has_line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        elements.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    for (x, _), (low, high) in zip(series.points, series.limits, strict=False):
        (x_pixel, low_pixel), (_, high_pixel) = to_pixels(x, low), to_pixels(x, high)
        elements.append(_line(x_pixel, low_pixel, x_pixel, high_pixel, color))
    if series.has_dots:
        elements += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}" fill-opacity="0.8"/>' for x, y in pixels]
    elements += [_text(x + 6, y - 5, name, 10) for (x, y), name in zip(pixels, series.point_names, strict=False)]
    return elements


def _axis_range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and round ticks of an axis that covers `values`, and 0 if that is close."""
    low, high = min(values), max(values)
    low, high = min(low, 0.0) if low < 0.3 * high or low < 0 else low, max(high, 0.0)
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(n * step, 10) for n in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _format_tick(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent and abs(value * 100 - round(value * 100)) < 1e-6 else (
        f"{value:.1%}" if percent else f"{value:g}"
    )  # fmt: skip


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {attributes} fill="#222">{html.escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, color: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}"/>'
