"""Numbers for the data card, from the index of all rows: love rates with intervals, times, what the rules took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rluf.prepare.validate_pass import SIDES

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

_Z95 = 1.959963984540054
_LEVELS = 50
"""Commonest topics, versions and locales that the card lists."""

_DAYS = 400
"""Latest days that the card lists."""


def wilson(hits: int, rows: int) -> dict[str, float]:
    """Share of hits with its 95% Wilson score interval (Wilson 1927); all of [0, 1] when there are no rows.

    It takes rows as independent: where a few users give many rows the true interval is wider.
    """
    if not rows:
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "rows": 0, "hits": 0}
    mean, z2 = hits / rows, _Z95**2
    middle = (mean + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _Z95 / (1 + z2 / rows) * math.sqrt(mean * (1 - mean) / rows + z2 / (4 * rows**2))
    return {"mean": mean, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "rows": rows, "hits": hits}


def _rate(loved: Bools) -> dict[str, float]:
    return wilson(int(loved.sum()), len(loved))


def _by(values: pa.ChunkedArray, loved: Bools, most: int) -> dict[str, dict[str, float]]:
    """Love rate by value, the commonest first."""
    grouped = pa.table({"value": values, "loved": pa.array(loved).cast(pa.int64())}).group_by("value")
    rows = grouped.aggregate([("loved", "count"), ("loved", "sum")]).to_pylist()
    rows.sort(key=lambda row: (-row["loved_count"], row["value"]))
    return {row["value"]: wilson(row["loved_sum"], row["loved_count"]) for row in rows[:most]}


def _moment(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat()


def love_facts(
    table: pa.Table, loved: Bools, user: Ints, side: Ints, trust: Floats, each: Mapping[str, Floats]
) -> dict[str, Any]:
    """Natural love rates before sampling, and what each abuse rule took. Arrays are [N], of the rows that are in."""
    time = table["time"].cast(pa.int64()).to_numpy()
    masks = {name: side == code for code, name in enumerate(SIDES)}
    days = table["time"].cast(pa.date32(), safe=False).cast(pa.string())
    by_day = _by(days, loved, 10**6)
    spans = {name: time[mask] for name, mask in masks.items()}
    times = {name: [_moment(t.min()), _moment(t.max())] if len(t) else None for name, t in spans.items()}
    both = masks["train"].any() and masks["test"].any()
    return {
        "base_rate": _rate(loved),
        "base_rate_trusted": float((trust * loved).sum() / trust.sum()) if len(loved) else 0.0,
        "base_rate_by_split": {name: _rate(loved[mask]) for name, mask in masks.items()},
        "base_rate_by_topic": _by(table["topic"], loved, _LEVELS),
        "base_rate_by_model": _by(table["model_version"], loved, _LEVELS),
        "base_rate_by_locale": _by(table["locale"], loved, _LEVELS),
        "base_rate_by_day": {day: by_day[day] for day in sorted(by_day)[-_DAYS:]},
        "users": len(np.unique(user)),
        "time": times,
        "test_later_than_train": bool(both and time[masks["test"]].min() > time[masks["train"]].max()),
        "abuse": {
            name: {
                "rows": int((weight < 1).sum()),
                "users": len(np.unique(user[weight < 1])),
                "weight_taken": float((1 - weight).sum()),
                "loved_weight_taken": float((1 - weight)[loved].sum()),
            }
            for name, weight in each.items()
        },
        "trust": {"mean": float(trust.mean()) if len(trust) else 1.0, "rows_below_one": int((trust < 1).sum())},
    }


def topic_facts(table: pa.Table, keep: Bools) -> dict[str, int]:
    """Rows that are in by topic, the commonest first, before sampling."""
    counted = pc.value_counts(table["topic"].filter(pa.array(keep))).to_pylist()
    counted.sort(key=lambda row: (-row["counts"], row["values"]))
    return {row["values"]: row["counts"] for row in counted[:_LEVELS]}
