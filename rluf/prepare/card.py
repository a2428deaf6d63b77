"""The data card: what came in, what became of it, and the natural love rate, as JSON beside the data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rluf.errors import DataError
from rluf.prepare.sampling import Quota
from rluf.prepare.schema import KINDS, SCHEMA_VERSION
from rluf.prepare.tables import Tally


def funnel(tallies: Sequence[Tally], written: Mapping[tuple[str, str], int]) -> dict[str, dict[str, Any]]:
    """Counts by kind: in, dropped and quarantined by reason, kept (rows in the files; reactions: joined to a row).

    `written` are the rows by kind and side. Raises DataError when in is not kept + dropped + quarantined: a fault of
    rluf, never of the log.
    """
    counts: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        reasons: dict[str, Counter[str]] = defaultdict(Counter)
        for tally in tallies:
            if tally.kind == kind:
                reasons[tally.event][tally.reason] += tally.rows
        entered = reasons["in"].total()
        if not entered:
            continue
        kept = sum(rows for (name, _), rows in written.items() if name == kind) + reasons["joined"].total()
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


def love_card(facts: Mapping[str, Any], plan: Quota) -> dict[str, Any]:
    """Natural love rates before sampling, what the abuse rules took, how train was sampled, and the splits' times."""
    return {
        **{name: value for name, value in facts.items() if name != "topics"},
        "sampling": {
            "loved": {"rows": plan.positives, "kept": plan.keep_positives, "weight": plan.positive_weight},
            "unloved": {"rows": plan.negatives, "kept": plan.keep_negatives, "weight": plan.negative_weight},
            "factor": plan.negative_weight / plan.positive_weight,
            "train_share": plan.keep_positives / (plan.keep_positives + plan.keep_negatives),
        },
    }


def drift(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """How the love data differ from an earlier card's: rates with their intervals, and how topics, locales and model
    versions have shifted (population stability index; above 0.2 is usually taken as a shift worth a look).

    PSI = sum over levels of (p - q) ln(p / q), shares p now and q before, each at least 1e-4.
    """
    old, new = before.get("love") or {}, now.get("love") or {}
    if not (old.get("base_rate") and new.get("base_rate")):
        return {}
    found: dict[str, Any] = {"created": before.get("created"), "base_rate": [old["base_rate"], new["base_rate"]]}
    apart = old["base_rate"]["high"] < new["base_rate"]["low"] or new["base_rate"]["high"] < old["base_rate"]["low"]
    found["base_rate_differs"] = apart
    for name in ("topic", "locale", "model"):
        key = f"base_rate_by_{name}"
        one, two = old.get(key), new.get(key)
        if not one or not two:
            continue
        shares = [(_share(two, level), _share(one, level)) for level in {*one, *two}]
        found[f"{name}_psi"] = sum((p - q) * math.log(p / q) for p, q in shares)
    return found


def _share(rates: Mapping[str, Mapping[str, float]], level: str) -> float:
    rows = rates[level]["rows"] if level in rates else 0.0
    return max(rows / sum(rate["rows"] for rate in rates.values()), 1e-4)


def data_card(
    tallies: Sequence[Tally],
    written: Mapping[tuple[str, str], int],
    parts: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    **about: Any,
) -> dict[str, Any]:
    """The whole card. `parts` are the sides with users (love), groups or prompts and quotas; `facts` go by kind.

    `about` goes in as it is: created, seed, settings, sources, redacted. `topics` count rows before sampling.
    """
    splits: dict[str, dict[str, Any]] = defaultdict(dict)
    for part in parts:
        kind = KINDS[part["kind"]]
        unit = {"user_id": "users", "group": "groups"}.get(kind.split_by)
        splits[kind.output][part["side"]] = {"rows": written[kind.name, part["side"]]}
        splits[kind.output][part["side"]] |= {unit: part["units"]} if unit else {}
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "counts": funnel(tallies, written),
        "splits": dict(splits),
        "topics": {KINDS[kind].output: found["topics"] for kind, found in facts.items() if "topics" in found},
    }
    if "feedback" in facts:
        plan = next(p["quota"] for p in parts if p["kind"] == "feedback" and p["side"] == "train")
        card["love"] = love_card(facts["feedback"], plan)
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
    if card.get("redacted"):
        found = ", ".join(f"{kind} {count}" for kind, count in sorted(card["redacted"].items()))
        lines.append(f"redacted: {found}")
    if "love" in card:
        love = card["love"]
        rate, sampling = love["base_rate"], love["sampling"]
        lines.append(
            f"love rate {rate['mean']:.2%} ({rate['low']:.2%} to {rate['high']:.2%}); {sampling['train_share']:.0%} of "
            f"training rows loved, unloved rows weigh {sampling['factor']:.2f} times as much"
        )
        rules = [f"{name} {rule['rows']} rows" for name, rule in love["abuse"].items() if rule["rows"]]
        if rules:
            lines.append(
                f"abuse rules took weight from {love['trust']['rows_below_one']} rows ({', '.join(rules)}); "
                f"love rate {love['base_rate_trusted']:.2%} with it"
            )
    if card.get("drift"):
        change = card["drift"]
        before = change["base_rate"][0]
        lines.append(
            f"before ({change['created']}): love rate {before['mean']:.2%} "
            f"({before['low']:.2%} to {before['high']:.2%})"
            + (", clear of today's interval" if change["base_rate_differs"] else "")
        )
    return lines
