"""Numbers of the report as text: shares, changes, intervals, percentage points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_percent(value: float | None, *, with_sign: bool = False) -> str:
    """Format a share with about three digits: 0.72%, 6.1%, 97.4%, +28%; minus is U+2212."""
    if value is None:
        return "–"
    percent_size = abs(value) * 100
    # The limits are where the next shorter format would round up to the same text (0.995 -> 1.0, 99.95 -> 100).
    digit_count = 2 if percent_size < 0.995 else 1 if percent_size < (9.95 if with_sign else 99.95) else 0
    if value == 0:
        digit_count = 0
    return f"{value * 100:{'+' if with_sign and value else ''}.{digit_count}f}%".replace("-", "−")


def format_change(value: float) -> str:
    """Format the size of a relative change without its sign, as in "28% more"."""
    return format_percent(abs(value), with_sign=True).lstrip("+")


def format_number(value: Any) -> str:
    """Format any value as short text: numbers with four digits and thousands separators, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−")


def format_interval(estimate: Mapping[str, float], *, with_sign: bool = False) -> str:
    """Format the interval of an estimated share: "5.6% to 6.7%"."""
    low, high = (format_percent(estimate[end], with_sign=with_sign) for end in ("low", "high"))
    return f"{low} to {high}"


def format_points(value: float) -> str:
    """Format a difference of two shares in percentage points; one that rounds to zero has no sign."""
    points_text = f"{value * 100:+.2f}"
    return f"{points_text[1:] if float(points_text) == 0 else points_text} pp".replace("-", "−")
