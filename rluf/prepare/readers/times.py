"""Times of any export as ISO 8601 with zone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from email.utils import parsedate_to_datetime
from zoneinfo import ZoneInfo

from rluf.prepare.readers.chats import decode_json_text

_TIME_KEYS = ("$date", "$numberLong", "$timestamp", "t", "_seconds", "seconds", "value", "iso")
"""Keys of a time that is an object, as MongoDB, Firestore, protobuf and Parse write it."""

_EPOCH_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""Lowest magnitude of epoch times in nano-, micro- and milliseconds, and units per second; below are seconds."""

NUMERIC_DATE_PATTERN = re.compile(r"\s*\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}(?!\d)")
"""A date such as 03/04/2025, which is in April in some countries and in March in others."""

_YEAR_FIRST = re.compile(r"(\d{4})\s?(?:[/.年-]|년)\s?(\d{1,2})\s?(?:[/.月-]|월)\s?(\d{1,2})(?:日|일|\.)?(?!\d)")
_DATE_WORD = re.compile(r"(?:mon|tue|wed|thu|fri|sat|sun|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*", re.I)
_DOTNET_TIME = re.compile(r"/Date\((\d+)(?:[+-]\d{4})?\)/")
_ZONE_NAME = re.compile(r"(?<=\d)\s?((?:[A-Z][A-Za-z_]+)/[A-Za-z_/+-]+)$")


def normalize_time(value: object, notes: Counter[str] | None = None) -> object:
    """A time as ISO 8601 with zone: from an epoch (s, ms, us, ns), ISO 8601 or RFC 2822, or with the year first or the
    month's name; other values as they are.

    A text without zone is UTC, which `notes` counts.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = decode_json_text(value)
    if isinstance(value, Mapping):
        inner = next((value[key] for key in _TIME_KEYS if key in value), None)
        return value if inner is None else normalize_time(inner, notes)
    if isinstance(value, str) and (match := _DOTNET_TIME.fullmatch(value.strip())):
        value = match[1]
    if isinstance(value, str) and re.fullmatch(r"\d{9,19}(\.\d+)?|\d\.\d{1,20}[eE]\+?(09|9|1[0-8])", value.strip()):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        unit = next((unit for limit, unit in _EPOCH_UNITS if value > limit), 1.0)
        # Infinite and later than the year 9999: no time.
        return datetime.fromtimestamp(value / unit, UTC).isoformat() if abs(value / unit) < 2.5e11 else str(value)
    if not isinstance(value, str):
        return value
    # JavaScript writes GMT+0100 (Central European Standard Time), Go +0100 CET, Java +01:00[Europe/Berlin].
    text = re.sub(r"([+-]\d\d:?\d\d)\s*(?:\([^()]{1,60}\)|\[[\w/+-]{1,40}\]|[A-Z]{3,5})$", r"\1", value.strip())
    text = re.sub(r"(?<=\d)\s+(?:GMT|UTC)?(?=[+-]\d\d:?\d\d$)", "", text)
    text, zone_names = re.subn(r"\s*\b(?:UTC|GMT|Z)$", "", text)
    text, zone = _split_zone(text)
    # The parser of RFC 2822 would ignore the half of the day.
    half_day = re.search(r"(?<=\d)\s?([AP])\.?M\.?(?=\s|$)", text, re.IGNORECASE)
    text = text[: half_day.start()] + text[half_day.end() :] if half_day else text
    parsed = _parse_text(text)
    if parsed is None:
        return value
    if half_day:
        parsed = parsed.replace(hour=parsed.hour % 12 + 12 * (half_day[1] in "pP"))
    if parsed.tzinfo is None:
        if notes is not None and not zone_names and zone is None:
            notes["times without zone, read as UTC"] += 1
        parsed = parsed.replace(tzinfo=zone or UTC)
    return parsed.isoformat()


def _split_zone(text: str) -> tuple[str, tzinfo | None]:
    """The time and the zone whose name is at its end, as in 10:00 Europe/Berlin (Trino)."""
    match = _ZONE_NAME.search(text)
    if match is None:
        return text, None
    try:
        return text[: match.start()], ZoneInfo(match[1])
    except (KeyError, ValueError, OSError):  # no such zone
        return text, None


def _parse_text(text: str) -> datetime | None:
    """A time in ISO 8601 with any usual separator, or with the month's name; None for anything else."""
    if match := _YEAR_FIRST.match(text):
        time_text = re.sub(r"^[T\s,]+(\d):", r" 0\1:", text[match.end() :])
        text = f"{match[1]}-{int(match[2]):02}-{int(match[3]):02}{time_text}"
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        pass
    # The parser of RFC 2822 needs a time of day.
    for candidate in (text, f"{text.rstrip(',')} 00:00:00"):
        try:
            parsed = parsedate_to_datetime(candidate)
        except (ValueError, TypeError):
            continue
        # The parser ignores zones that it does not know (CET), and so would read them as UTC.
        words = re.findall(r"[^\W\d_]+", candidate) if parsed.tzinfo is None else []
        return parsed if all(map(_DATE_WORD.fullmatch, words)) else None
    return None


def is_time(text: str) -> bool:
    """Whether `normalize_time` has read a text."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def parse_time(text: str, time_format: str) -> str:
    """A time in a format of strptime as ISO 8601, with a zone if the format has one. Raises ValueError."""
    return datetime.strptime(text.strip(), time_format.strip()).isoformat()
