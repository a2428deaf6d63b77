"""Conditions that a row must meet (`where` of an entry of data.*)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rluf.prepare.labels import parse_truth
from rluf.prepare.readers.chats import RowShapeError, decode_json_text
from rluf.prepare.readers.columns import format_scalar, get_by_path
from rluf.prepare.readers.times import normalize_time

_CONDITION = re.compile(r"(!=|>=|<=|>|<)\s*(.*)", re.DOTALL)


def find_failed_condition(
    where: Mapping[str, Any], raw_row: Mapping[str, Any], row: Mapping[str, Any], path_counts: Counter[str]
) -> str | None:
    """Path of the first condition that a row does not meet; None if it meets all.

    A field of rluf has its converted value; any other path leads into the raw row. `path_counts` counts the rows in
    which each path led to a value, as `where <path>`.
    """
    for path, condition in where.items():
        value = _decode_list(row[path] if path in row else get_by_path(raw_row, path))
        path_counts[f"where {path}"] += value is not None
        conditions = list(condition) if isinstance(condition, list | tuple) else [condition]
        excluded = [item for item in conditions if isinstance(item, str) and item.startswith("!=")]
        wanted = [item for item in conditions if item not in excluded]
        if not all(_is_met(item, value) for item in excluded):
            return path
        if wanted and not any(_is_met(item, value) for item in wanted):
            return path
    return None


def _decode_list(value: Any) -> Any:
    """A list that is JSON in a text as a list, as paths step through one; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        decoded = decode_json_text(value)
    except RowShapeError:
        return value
    return decoded if isinstance(decoded, list) else value


def _is_met(condition: Any, value: Any) -> bool:
    match = _CONDITION.fullmatch(condition) if isinstance(condition, str) else None
    sign, text = match.groups() if match else ("", "null" if condition is None else format_scalar(condition))
    text = text.strip()
    if value is None:
        return sign in ("", "!=") and (text == "null") == (sign == "")
    if sign in ("", "!="):
        return _is_match(text, value) == (sign == "")
    left, right = _to_comparable(value), _to_comparable(text)
    if isinstance(left, float) and isinstance(right, datetime):
        left = _to_comparable(normalize_time(left))
    if type(left) is not type(right):
        return False
    return bool({">=": left >= right, "<=": left <= right, ">": left > right, "<": left < right}[sign])


def _is_match(pattern: str, value: Any) -> bool:
    """Whether a value is the pattern, in which * stands for any text; of an array, whether an item is."""
    if isinstance(value, list):
        return any(_is_match(pattern, item) for item in value)
    if pattern == "null":
        return value is None
    # Databases and spreadsheets write truth values as numbers, t and f, or True and False.
    if pattern in ("true", "false"):
        return parse_truth(value) is (pattern == "true")
    pattern = ".*".join(map(re.escape, format_scalar(pattern).split("*")))
    return re.fullmatch(pattern, format_scalar(value), re.DOTALL) is not None


def _to_comparable(value: Any) -> Any:
    """A number, a time, or a text, for comparison with another of the same type."""
    if isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value)):
        return float(value)
    time = normalize_time(value)
    try:
        return datetime.fromisoformat(str(time))
    except ValueError:
        return str(value)
