"""The data card: what came in, what became of it, and the natural love rate, as JSON beside the data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rluf.errors import DataError
from rluf.feedback.schema import KINDS, SCHEMA_VERSION
from rluf.feedback.tasks import Tally, Written

_Z95 = 1.959963984540054


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


def funnel(tallies: Sequence[Tally], written: Sequence[Written]) -> dict[str, dict[str, Any]]:
    """Counts by kind: in, dropped and quarantined by reason, kept (rows in the files).

    Raises DataError when in is not kept + dropped + quarantined: a fault of rluf, never of the log.
    """
    counts: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        reasons: dict[str, Counter[str]] = defaultdict(Counter)
        for tally in tallies:
            if tally.kind == kind:
                reasons[tally.event][tally.reason] += tally.rows
        entered, passed = reasons["in"].total(), reasons["kept"].total()
        if not entered:
            continue
        kept = sum(part.rows for part in written if part.kind == kind)
        if passed > kept:
            reasons["dropped"]["sampled out of train"] = passed - kept
        dropped, bad = reasons["dropped"], reasons["quarantined"]
        if entered != kept + dropped.total() + bad.total():
            raise DataError(
                f"data.{kind}: counts do not add up: {entered} rows in, but {kept} kept + {dropped.total()} dropped + "
                f"{bad.total()} quarantined; this is a fault of rluf: please report it with the log's reader and format"
            )
        counts[kind] = {
            "in": entered,
            "kept": kept,
            "dropped": dict(dropped.most_common()),
            "quarantined": dict(bad.most_common()),
        }
    return counts


def _topics(rows: Iterable[Tally]) -> dict[str, dict[str, float]]:
    hits: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for tally in rows:
        total[tally.topic] += tally.rows
        hits[tally.topic] += tally.rows * (tally.label == 1)
    return {topic: wilson(hits[topic], count) for topic, count in total.most_common(50)}


def _rate(rows: Sequence[Tally]) -> dict[str, float]:
    return wilson(sum(t.rows for t in rows if t.label == 1), sum(t.rows for t in rows))


def _times(rows: Sequence[Tally]) -> list[str] | None:
    """First and last time, None without rows. All times are UTC with equal layout but for microseconds."""
    firsts, lasts = sorted(t.first for t in rows if t.first), sorted(t.last for t in rows if t.last)
    return [firsts[0], lasts[-1]] if firsts else None


def love_card(tallies: Sequence[Tally], written: Sequence[Written]) -> dict[str, Any]:
    """Natural love rate before sampling (in all, by split and topic), how train was sampled, and the splits' times."""
    kept = [tally for tally in tallies if tally.kind == "feedback" and tally.event == "kept"]
    sides = {name: [tally for tally in kept if tally.side == name] for name in KINDS["feedback"].splits}
    times = {name: _times(rows) for name, rows in sides.items()}
    train, test = times["train"], times["test"]
    plan = next(part.quota for part in written if part.kind == "feedback" and part.side == "train")
    return {
        "base_rate": _rate(kept),
        "base_rate_by_split": {name: _rate(rows) for name, rows in sides.items()},
        "base_rate_by_topic": _topics(kept),
        "sampling": {
            "loved": {"rows": plan.positives, "kept": plan.keep_positives, "weight": plan.positive_weight},
            "unloved": {"rows": plan.negatives, "kept": plan.keep_negatives, "weight": plan.negative_weight},
            "factor": plan.negative_weight / plan.positive_weight,
            "train_share": plan.keep_positives / (plan.keep_positives + plan.keep_negatives),
        },
        "time": times,
        "test_later_than_train": bool(train and test and test[0] > train[1]),
    }


def data_card(
    tallies: Sequence[Tally],
    written: Sequence[Written],
    *,
    sources: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    seed: int,
    created: str,
) -> dict[str, Any]:
    """The whole card. `splits` hold rows and distinct users (love) or groups; `topics` count rows before sampling."""
    splits: dict[str, dict[str, Any]] = defaultdict(dict)
    for part in written:
        if part.kind in KINDS:
            unit = {"user_id": "users", "group": "groups"}.get(KINDS[part.kind].split_by)
            splits[KINDS[part.kind].output][part.side] = {"rows": part.rows} | ({unit: part.units} if unit else {})
    topics: dict[str, Counter[str]] = defaultdict(Counter)
    for tally in tallies:
        if tally.event == "kept":
            topics[KINDS[tally.kind].output][tally.topic] += tally.rows
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": created,
        "seed": seed,
        "settings": dict(settings),
        "sources": [dict(source) for source in sources],
        "counts": funnel(tallies, written),
        "splits": dict(splits),
        "topics": {name: dict(count.most_common(50)) for name, count in topics.items()},
    }
    if any(part.kind == "feedback" for part in written):
        card["love"] = love_card(tallies, written)
    return card


def funnel_lines(card: Mapping[str, Any]) -> list[str]:
    """The card's counts in plain lines, for the console."""
    lines = []
    for kind, count in card["counts"].items():
        dropped, bad = count["dropped"], count["quarantined"]
        line = f"{kind}: {count['in']} in = {count['kept']} kept + {sum(dropped.values())} dropped"
        line += f" + {sum(bad.values())} quarantined"
        reasons = [f"{reason} {rows}" for reason, rows in [*dropped.items(), *bad.items()]]
        lines.append(line + (f" ({', '.join(reasons)})" if reasons else ""))
    for name, parts in card["splits"].items():
        lines.append(f"{name}: " + ", ".join(f"{side} {part['rows']}" for side, part in parts.items()))
    if "love" in card:
        rate, sampling = card["love"]["base_rate"], card["love"]["sampling"]
        lines.append(
            f"love rate {rate['mean']:.2%} ({rate['low']:.2%} to {rate['high']:.2%}); {sampling['train_share']:.0%} of "
            f"training rows loved, unloved rows weigh {sampling['factor']:.2f} times as much"
        )
    return lines
