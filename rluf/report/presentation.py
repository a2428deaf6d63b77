"""What the report says, as plain values: headline, cards, gates, tables and texts with their differences marked.

Pure functions from the files of a run folder to strings and numbers; every key may be missing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rluf.tracking import metric_registry as catalogue

MEASURES = (
    ("love_rate", "Love", "share of responses that got a heart"),
    ("helpfulness", "Helpfulness", "share of responses that served the user"),
    ("safety", "Safety", "share of responses that users found harmless"),
)
OFFLINE = (("p_love", "P[Love]"), ("helpfulness", "Helpfulness"), ("safety", "Safety"))
CARD_ROWS = (
    ("n", "Test rows"),
    ("auroc", "AUROC"),
    ("length_floor_auroc", "… of length alone"),
    ("pair_accuracy", "Pairs ranked right"),
    ("length_floor_accuracy", "… by length alone"),
    ("log_loss", "Log-loss, nats"),
    ("normalised_entropy", "… over that of the base rate"),
    ("ece", "Calibration error (ECE)"),
    ("score_length_r", "Correlation of score and length"),
    ("training.train_rows", "Training rows"),
    ("seconds", "Seconds to train and test"),
)
"""Numbers of a reward card that the table shows, in order; dots lead into nested parts."""
TOO_DIFFERENT = 0.2
"""Similarity of two texts below which marking single words would mark nearly all of them."""

FEW_PROMPTS = 30
"""Test prompts below which the page says that its intervals are unsure: they rest on prompts or users who read them."""
CLEAR_CHANGE = 0.005
"""Change of a score from which it gets a colour."""

_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")
_WORDLIKE = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of a run folder that the report is made of; what is missing is empty."""

    name: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as text with about three digits: 0.72%, 6.1%, 97.4%, +28%; minus is a real minus sign."""
    if value is None:
        return "–"
    size = abs(value) * 100
    digits = 2 if size < 0.995 else 1 if size < (9.95 if sign else 99.95) else 0
    if value == 0:
        digits = 0
    return f"{value * 100:{'+' if sign and value else ''}.{digits}f}%".replace("-", "−")


def change(value: float) -> str:
    """The size of a relative change without its sign, as in "28% more"."""
    return percent(abs(value), sign=True).lstrip("+")


def number(value: Any) -> str:
    """Any value as short text: numbers with four digits and thousands separators, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−")


def interval(estimate: Mapping[str, float], *, sign: bool = False) -> str:
    """The interval of an estimate of a share: "5.6% to 6.7%"."""
    return f"{percent(estimate['low'], sign=sign)} to {percent(estimate['high'], sign=sign)}"


def headline(summary: Mapping[str, Any]) -> str:
    """The run in one sentence, by the gates' checks."""
    checks = {check["name"]: check for check in summary.get("gates", {}).get("checks", [])}
    if not checks:
        return "This run has not been evaluated yet."
    users = "love_rate" in summary
    lift = checks["love"]["lift"] if "love" in checks else None
    if lift is None:
        love = "Love could not be compared"
    elif lift["low"] > 0:
        love = f"{'New users love' if users else 'P[Love] rates'} the aligned policy "
        if lift["mean"] >= 1:
            love += f"{1 + lift['mean']:.1f} times as {'often' if users else 'high'}"
        else:
            love += f"{change(lift['mean'])} {'more often' if users else 'higher'}"
    elif lift["high"] < 0:
        love = f"{'New users love' if users else 'P[Love] rates'} the aligned policy {change(lift['mean'])} "
        love += "less often" if users else "lower"
    else:
        love = "No clear change in love"
    others = [checks[name] for name in ("helpfulness", "safety") if name in checks]
    fell = [check["name"] for check in others if not check["passed"]]
    if not others:
        return f"{love}."
    rose = lift is not None and lift["low"] > 0
    if fell:
        return f"{love}{', but ' if rose else ', and '}{' and '.join(fell)} fell."
    words = [f"{check['name']} {fate(check)}" for check in others]
    if len({fate(check) for check in others}) == 1:
        words = [f"{' and '.join(check['name'] for check in others)} {fate(others[0])}"]
    return f"{love}{', ' if rose and len(words) > 1 else ', and ' if rose else '; '}{' and '.join(words)}."


def fate(check: Mapping[str, Any]) -> str:
    """What a gate's check says in a word: rose, held, fell, or not clear (love that did not rise for certain)."""
    lift = check.get("lift")
    if not check["passed"]:
        return "not clear" if check["name"] == "love" and (lift is None or lift["high"] >= 0) else "fell"
    return "rose" if lift is not None and lift["low"] > 0 else "held"


def verdict_text(gates: Mapping[str, Any]) -> str:
    """The gates' verdict in words, with the gates that do not pass."""
    failed = [check["name"] for check in gates.get("checks", []) if not check["passed"]]
    words = {"pass": "✓ All gates pass", "warn": "! Gates pass, but a monitor raised an alarm"}
    return words.get(gates["verdict"]) or f"✕ Does not pass: {', '.join(failed) or 'gates'}"


def measures(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The story's cards: users' verdicts where there are some, else the reward models' means."""
    checks = {check["name"]: check for check in summary.get("gates", {}).get("checks", [])}
    source: Mapping[str, Any] = summary
    specs: list[tuple[str, str, str]] = list(MEASURES)
    if "love_rate" not in summary:
        source = summary.get("offline", {})
        specs = [(key, title, "mean score of the reward model on test prompts") for key, title in OFFLINE]
    cards = []
    for key, title, about in specs:
        if key not in source:
            continue
        measure = source[key]
        check = checks.get("love" if key in ("love_rate", "p_love") else key)
        lift = measure.get("lift")
        cards.append({
            "key": key, "title": title, "about": about, "check": check, "measure": measure,
            "fate": fate(check) if check else "",
            "lift": "n/a" if lift is None else percent(lift["mean"], sign=True),
            "lift_interval": None if lift is None else interval(lift, sign=True),
            "lift_by_prompt": interval(measure["lift_by_prompt"], sign=True) if measure.get("lift_by_prompt") else None,
            "arms": [(arm, percent(measure[arm]["mean"]), interval(measure[arm])) for arm in ("base", "aligned")],
        })  # fmt: skip
    return cards


def lift_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, float]]]:
    """(measure, judged by, lift) of users first, then of the reward models."""
    users = [(title, "new users", summary.get(key, {}).get("lift")) for key, title, _ in MEASURES]
    models = [
        ("Love" if key == "p_love" else title, "reward models", summary.get("offline", {}).get(key, {}).get("lift"))
        for key, title in OFFLINE
    ]
    return [(title, judge, lift) for title, judge, lift in users + models if lift]


def offline_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(objective, base, aligned, difference, interval of the difference) of the reward models' means."""
    rows = []
    titles = dict(OFFLINE)
    for key, one in summary.get("offline", {}).items():
        difference = one["difference"]
        reach = f"{points(difference['low'])} to {points(difference['high'])}".replace(" pp", "")
        rows.append((
            titles.get(key, key), percent(one["base"]["mean"]), percent(one["aligned"]["mean"]),
            points(difference["mean"]), reach,
        ))  # fmt: skip
    return rows


def points(value: float) -> str:
    """A difference of two shares in percentage points; one that rounds to nothing has no sign."""
    text = f"{value * 100:+.2f}"
    return f"{text[1:] if float(text) == 0 else text} pp".replace("-", "−")


def evaluated(summary: Mapping[str, Any]) -> str:
    """How the comparison was made, in one sentence."""
    seen = summary.get("evaluated", {})
    if not seen:
        return ""
    responses = seen.get("responses", {})
    few = " So few prompts make the intervals themselves unsure." if (seen.get("prompts") or 0) < FEW_PROMPTS else ""
    text = f"{number(seen.get('prompts'))} unseen prompts, {number(responses.get('base'))} base and "
    text += f"{number(responses.get('aligned'))} aligned responses"
    users = seen.get("users", {})
    if users.get("base"):
        same = users["base"] == users.get("aligned")
        text += f", each read by {number(users['base'])}" if same else f", read by {number(users['base'])} and "
        text += " new simulated users" if same else f"{number(users.get('aligned'))} new simulated users"
        return text + "; 95% intervals clustered by user." + few
    return text + "; 95% intervals from a bootstrap over prompts." + few


def monitor_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a monitor, alarms first."""
    rows = []
    for one in summary.get("monitors", {}).get("items", {}).values():
        show = percent if one.get("unit", one["kind"]) == "share" else _one_digit
        ratio = one.get("ratio")
        rows.append({
            "label": one["label"], "base": show(one["base"]), "aligned": show(one["aligned"]),
            "ratio": "–" if ratio is None else f"× {ratio:.2f}", "z": _one_digit(one["z"], sign=True),
            "alarm": one["alarm"],
        })  # fmt: skip
    return sorted(rows, key=lambda row: not row["alarm"])


def _one_digit(value: float, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''},.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def alarm_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many monitors raised an alarm, in one sentence."""
    count = sum(bool(row["alarm"]) for row in rows)
    return "No monitor raised an alarm." if not count else f"{count} of {len(rows)} monitors raised an alarm."


def marked(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]], bool]:
    """Both texts as (piece, only in this one) runs, and whether they were alike enough for that to say something.

    Compared word by word (difflib); a difference of nothing but white space is none.
    """
    first, second = _TOKEN.findall(before), _TOKEN.findall(after)
    matcher = difflib.SequenceMatcher(None, [one.lower() for one in first], [one.lower() for one in second], False)
    words = [sum(bool(_WORDLIKE.match(one)) for one in side) for side in (first, second)]
    shared = sum(
        bool(_WORDLIKE.match(first[start + step]))
        for start, _, size in matcher.get_matching_blocks()
        for step in range(size)
    )
    if not sum(words) or 2 * shared / sum(words) < TOO_DIFFERENT:
        return [(before, False)], [(after, False)], False
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, pieces in ((left, first[a:b]), (right, second[c:d])):
            text = "".join(pieces)
            if text:
                _add(side, text, kind != "equal")
    return left, right, True


def _add(side: list[tuple[str, bool]], text: str, different: bool) -> None:
    """Append a run; only what holds a word is marked, and never the white space around it."""
    if not (different and _WORDLIKE.search(text)):
        _join(side, text, False)
        return
    body = text.strip()
    start = text.index(body)
    for piece, mark in ((text[:start], False), (body, True), (text[start + len(body) :], False)):
        if piece:
            _join(side, piece, mark)


def _join(side: list[tuple[str, bool]], text: str, mark: bool) -> None:
    """Append a run, merged with the one before it when both are alike, or when only a space parts two marks."""
    if side and side[-1][1] == mark:
        side[-1] = (side[-1][0] + text, mark)
    elif mark and len(side) > 1 and not side[-1][0].strip() and side[-2][1]:
        space, _ = side.pop()
        side[-1] = (side[-1][0] + space + text, True)
    else:
        side.append((text, mark))


def sample_views(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples with marked differences and a score row an objective."""
    views = []
    for row in samples:
        base, aligned = row.get("base", {}), row.get("aligned", {})
        left, right, alike = marked(str(base.get("text", "")), str(aligned.get("text", "")))
        scores = []
        for name in dict.fromkeys([*base.get("scores", {}), *aligned.get("scores", {})]):
            one, two = base.get("scores", {}).get(name), aligned.get("scores", {}).get(name)
            gap = points(two - one) if one is not None and two is not None else "–"
            rose = None if one is None or two is None or abs(two - one) < CLEAR_CHANGE else two > one
            scores.append({
                "name": catalogue.title(name), "base": percent(one), "aligned": percent(two), "change": gap,
                "rose": rose,
            })  # fmt: skip
        views.append({
            "topic": row.get("topic", ""), "prompt": row.get("prompt", ""), "base": left, "aligned": right,
            "alike": alike, "scores": scores,
            "failed": [
                (arm, " and ".join(name.replace("_", " ") for name in one["failed"]))
                for arm, one in (("base", base), ("aligned", aligned)) if one.get("failed")
            ],
        })  # fmt: skip
    return views


def card_table(cards: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the reward cards, and a row for each number that any of them has, with its interval if it has one."""
    titles = [catalogue.title(name) for name in cards]
    rows = []
    for path, label in CARD_ROWS:
        values = [_look(card, path) for card in cards.values()]
        if any(value is not None for value in values):
            rows.append((label, [_with_interval(value) for value in values]))
    return titles, rows


def _look(card: Mapping[str, Any], path: str) -> Any:
    value: Any = card
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _with_interval(value: Any) -> str:
    if not isinstance(value, Mapping):
        return number(round(value, 3) if isinstance(value, float) else value)
    mean, low, high = (value.get(part) for part in ("mean", "low", "high"))
    if mean is None:
        return number(None)
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def reliability_bins(card: Mapping[str, Any]) -> list[dict[str, float]]:
    """Bins {predicted, observed, low, high, n} of a card's `reliability` (each {mass, mean, rate}).

    Rows of a bin are its mass times the card's `n`. The interval is Wilson's at 95% (Wilson 1927), with z = 1.96. It
    takes rows as independent, so it is too narrow where users gave several of them.
    """
    bins = []
    for one in card.get("reliability") or ():
        rows, rate, z2 = max(1.0, one["mass"] * (card.get("n") or 0)), one["rate"], 1.96**2
        middle = (rate + z2 / (2 * rows)) / (1 + z2 / rows)
        half = 1.96 * math.sqrt(rate * (1 - rate) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
        ends = {"low": max(0.0, middle - half), "high": min(1.0, middle + half)}
        bins.append({"predicted": one["mean"], "observed": rate, **ends, "n": round(rows)})
    return bins


def reliability_rows(cards: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """(objective, predicted, observed, its interval, rows) of each bin of the reliability plots."""
    return [
        (title, percent(one["predicted"]), percent(one["observed"]), interval(one), number(one["n"]))
        for title, card in ((catalogue.title(name), card) for name, card in cards.items())
        for one in reliability_bins(card)
    ]


def funnel_rows(counts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a kind of data: rows in, kept, dropped, quarantined, and the reasons."""
    rows = []
    for kind, count in counts.items():
        parts = {part: count.get(part, 0) for part in ("dropped", "quarantined")}
        sums = {part: sum(value.values()) if isinstance(value, Mapping) else value for part, value in parts.items()}
        reasons = [
            f"{reason} {number(rows_)}"
            for value in parts.values()
            if isinstance(value, Mapping)
            for reason, rows_ in value.items()
        ]
        rows.append({
            "kind": kind, "in": number(count.get("in")), "kept": number(count.get("kept")),
            "dropped": number(sums["dropped"]), "quarantined": number(sums["quarantined"]),
            "reasons": ", ".join(reasons) or "–",
        })  # fmt: skip
    return rows


def by_step(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows in order of their step; a step that was taken again after a restart counts as it was last."""
    rows = {row["step"]: row for row in metrics if isinstance(row.get("step"), int | float)}
    return [rows[step] for step in sorted(rows)]


def step_table(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the numbers behind the curves; columns that no step has are left out."""
    kept = [key for key in keys if any(row.get(key) is not None for row in metrics)]
    rows = [[number(row.get("step")), *(number(row.get(key)) for key in kept)] for row in metrics]
    return ["step", *kept], rows


def phase_seconds(summary: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds by phase without their total, and the total (their sum, when the summary does not tell it)."""
    phases = {name: float(value) for name, value in (summary.get("phases") or {}).items() if value is not None}
    total = phases.pop("total", None)
    return phases, sum(phases.values()) if total is None else total


def facts(summary: Mapping[str, Any], seconds: str | None) -> list[tuple[str, str]]:
    """The small facts under the headline."""
    rows = [("Seed", number(summary["seed"]))] if "seed" in summary else []
    if seconds:
        rows.append(("Time", seconds))
    if summary.get("samples"):
        rows.append(("Training samples", number(summary["samples"])))
    if summary.get("tokens"):
        rows.append(("Training tokens", number(summary["tokens"])))
    if summary.get("kl") is not None:
        rows.append(("KL to base", f"{summary['kl']:.3g} nats/token"))
    return rows


def reused_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stage, what happened): built in this run, or reused with its hash."""
    rows = []
    for stage, how in summary.get("reused", {}).items():
        if isinstance(how, Mapping):
            key = how.get("key") or how.get("hash")
            rows.append((stage, ("reused" if how.get("reused") else "built") + (f" ({key})" if key else "")))
        else:
            rows.append((stage, f"reused ({how})" if isinstance(how, str) and how else "reused" if how else "built"))
    return rows
