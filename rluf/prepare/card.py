"""The data card (JSON): rows in and out with reasons, natural love rates, abuse weights, sampling and drift."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rluf.errors import DataError
from rluf.prepare.schema import SCHEMA_VERSION, find_data_kind, order_kinds
from rluf.prepare.splits import SamplingQuota
from rluf.prepare.workspace import RowCount


def count_rows_by_outcome(
    row_counts: Sequence[RowCount], written_rows: Mapping[tuple[str, str], int]
) -> dict[str, dict[str, Any]]:
    """Counts by kind: in, dropped and quarantined by reason, kept (rows in the files; reactions: joined to a row).

    `written_rows` are the rows by kind and split. Raises DataError unless in = kept + dropped + quarantined: a bug in
    rluf, never a problem of the log.
    """
    counts: dict[str, dict[str, Any]] = {}
    for kind in order_kinds(row_count.kind_name for row_count in row_counts):
        rows_by_outcome: dict[str, Counter[str]] = defaultdict(Counter)
        for row_count in row_counts:
            if row_count.kind_name == kind:
                rows_by_outcome[row_count.outcome][row_count.reason] += row_count.rows
        rows_in = rows_by_outcome["in"].total()
        if not rows_in:
            continue
        rows_written = sum(rows for (written_kind, _), rows in written_rows.items() if written_kind == kind)
        rows_kept = rows_written + rows_by_outcome["joined"].total()
        dropped, quarantined = rows_by_outcome["dropped"], rows_by_outcome["quarantined"]
        if rows_in != rows_kept + dropped.total() + quarantined.total():
            raise DataError(
                f"data.{kind}: counts do not add up: {rows_in} rows in, but {rows_kept} kept + {dropped.total()} "
                f"dropped + {quarantined.total()} quarantined; this is a bug in rluf: please report it with the log's "
                "reader and format"
            )
        counts[kind] = {
            "in": rows_in,
            "kept": rows_kept,
            "dropped": dict(dropped.most_common()),
            "quarantined": dict(quarantined.most_common()),
        }
    return counts


_COMMON_STATISTICS = ("topics", "finish_reasons", "duplicates", "samples", "labels")
"""Statistics that all kinds of data have; those of feedback are in the card's section love."""


def build_love_section(statistics: Mapping[str, Any], quota: SamplingQuota) -> dict[str, Any]:
    """Natural love rates before sampling, weight removed by the abuse rules, sampling of train, and times of splits."""
    return {
        **{name: value for name, value in statistics.items() if name not in _COMMON_STATISTICS},
        "sampling": {
            "loved": {"rows": quota.positives, "kept": quota.sampled_positives, "weight": quota.positive_weight},
            "unloved": {"rows": quota.negatives, "kept": quota.sampled_negatives, "weight": quota.negative_weight},
            "factor": quota.negative_weight / quota.positive_weight,
            "train_share": quota.sampled_positives / (quota.sampled_positives + quota.sampled_negatives),
        },
    }


def measure_drift(card: Mapping[str, Any], previous_card: Mapping[str, Any]) -> dict[str, Any]:
    """Drift of the love data against an earlier card: love rates with intervals, and the population stability index
    (PSI) of topics, locales and model versions. A PSI above 0.2 is usually taken as a shift to investigate.

    PSI = sum over levels of (p - q) ln(p / q), with shares p now and q before, each at least 1e-4.
    """
    love, previous_love = card.get("love") or {}, previous_card.get("love") or {}
    if not (previous_love.get("base_rate") and love.get("base_rate")):
        return {}
    rate, previous_rate = love["base_rate"], previous_love["base_rate"]
    drift: dict[str, Any] = {"created": previous_card.get("created"), "base_rate": [previous_rate, rate]}
    drift["base_rate_differs"] = previous_rate["high"] < rate["low"] or rate["high"] < previous_rate["low"]
    for name in ("topic", "locale", "model"):
        key = f"base_rate_by_{name}"
        rates, previous_rates = love.get(key), previous_love.get(key)
        if not rates or not previous_rates:
            continue
        levels = {*previous_rates, *rates}
        shares = [(_compute_level_share(rates, level), _compute_level_share(previous_rates, level)) for level in levels]
        drift[f"{name}_psi"] = sum((p - q) * math.log(p / q) for p, q in shares)
    return drift


def measure_entry_drift(card: Mapping[str, Any], previous_card: Mapping[str, Any]) -> list[str]:
    """Shares of rows that differ from an earlier card's by more than ENTRY_DRIFT_LIMIT, each in a sentence.

    Of each entry: rows in which a path led to a value, and rows by label of their reaction; of each kind of data: rows
    by label and by script. An entry whose path is new (logs of another month) is compared with the one in its position.
    """
    changes = []
    previous_entries = {(entry["kind"], entry["path"]): entry for entry in previous_card.get("entries", [])}
    positions = {(entry["kind"], position): entry for position, entry in _list_entry_positions(previous_card)}
    for position, entry in _list_entry_positions(card):
        kind = entry["kind"]
        previous = previous_entries.get((kind, entry["path"])) or positions.get((kind, position))
        if previous is not None:
            name = f"data.{kind} ({entry['path']})"
            changes += _list_changes(name, _list_entry_shares(entry), _list_entry_shares(previous))
    for section, noun in (("labels", "rows with label"), ("scripts", "rows in script")):
        for name, counts in card.get(section, {}).items():
            previous_counts = previous_card.get(section, {}).get(name)
            if previous_counts:
                shares = (
                    {f"{noun} {level}": rows / max(sum(values.values()), 1) for level, rows in values.items()}
                    for values in (counts, previous_counts)
                )
                changes += _list_changes(name, *shares)
    return changes


def _list_entry_positions(card: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """Entries of a card, each with its position among those of its kind."""
    positions: Counter[str] = Counter()
    numbered = []
    for entry in card.get("entries", []):
        numbered.append((positions[entry["kind"]], entry))
        positions[entry["kind"]] += 1
    return numbered


def _list_changes(name: str, shares: Mapping[str, float], previous_shares: Mapping[str, float]) -> list[str]:
    values = [(key, previous_shares.get(key, 0.0), shares.get(key, 0.0)) for key in sorted({*shares, *previous_shares})]
    return [
        f"{name}: {key} {before:.0%} before, {now:.0%} now"
        for key, before, now in values
        if abs(now - before) > ENTRY_DRIFT_LIMIT
    ]


def _list_entry_shares(entry: Mapping[str, Any]) -> dict[str, float]:
    """Share of an entry's rows with a value, by path, and with a reaction, by label."""
    shares = {f"rows with columns.{name}": item["share"] for name, item in entry["paths"].items()}
    for reaction in entry["reactions"]:
        key = f"rows with a reaction that is {reaction['label']}"
        shares[key] = shares.get(key, 0.0) + reaction["rows"] / max(entry["valid_rows"], 1)
    return shares


def _compute_level_share(rates: Mapping[str, Mapping[str, float]], level: str) -> float:
    rows = rates[level]["rows"] if level in rates else 0.0
    # The lower bound makes the logarithm finite for a level that only one of the cards has.
    return max(rows / sum(rate["rows"] for rate in rates.values()), 1e-4)


def build_data_card(
    row_counts: Sequence[RowCount],
    written_rows: Mapping[tuple[str, str], int],
    split_summaries: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Mapping[str, Any]],
    **run_fields: Any,
) -> dict[str, Any]:
    """The whole card. `split_summaries` have users (love), groups or prompts, and quotas; `statistics` are by kind.

    `run_fields` are copied: created, seed, settings, sources, redacted. `topics` and `finish_reasons` count rows before
    sampling.
    """
    splits: dict[str, dict[str, Any]] = defaultdict(dict)
    for summary in split_summaries:
        kind = find_data_kind(summary["kind"])
        unit_name = {"user_id": "users", "group": "groups"}.get(kind.split_key)
        entry = {"rows": written_rows[kind.name, summary["split"]]}
        splits[kind.output_name][summary["split"]] = entry | ({unit_name: summary["units"]} if unit_name else {})
    duplicates = {kind: values["duplicates"] for kind, values in statistics.items() if "duplicates" in values}
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **run_fields,
        "counts": count_rows_by_outcome(row_counts, written_rows),
        "splits": dict(splits),
        "duplicates": duplicates,
        **{
            name: {
                find_data_kind(kind).output_name: kind_statistics[name]
                for kind, kind_statistics in statistics.items()
                if name in kind_statistics
            }
            for name in ("samples", "labels")
        },
        "topics": {
            find_data_kind(kind).output_name: kind_statistics["topics"]
            for kind, kind_statistics in statistics.items()
            if "topics" in kind_statistics
        },
        "finish_reasons": {
            find_data_kind(kind).output_name: kind_statistics["finish_reasons"]
            for kind, kind_statistics in statistics.items()
            if kind_statistics.get("finish_reasons")
        },
    }
    if "feedback" in statistics:
        train_summaries = (s for s in split_summaries if s["kind"] == "feedback" and s["split"] == "train")
        card["love"] = build_love_section(statistics["feedback"], next(train_summaries)["quota"])
    return card


CUT_SHARE_LIMIT = 0.1
"""Share of rows that a reward model would cut above which the card warns."""

RATED_SHARE_LIMIT = 0.9
"""Share of rows with a reaction from which a log is one of rated rows; users react to far fewer responses."""

ENTRY_DRIFT_LIMIT = 0.1
"""Change of a share of rows since the previous data set that is a warning."""

NEAR_DUPLICATE_LIMIT = 0.01
"""Share of rows that nearly repeat another one from which the card warns; a few are in every log."""

USER_ID_NOTE = "users, devices or authors that look like e-mail addresses, phone numbers or IP addresses"
OTHER_ID_NOTE = "other ids that look like e-mail addresses, phone numbers or IP addresses"
ROUNDED_ID_NOTE = "ids whose last digits a spreadsheet has cut"

_NOTED_WARNINGS = {
    ROUNDED_ID_NOTE: "several users or rows may have become one; export ids as text",
    USER_ID_NOTE: "set RLUF_USER_SALT to hash them",
    OTHER_ID_NOTE: 'no salt hashes them; give other ids (columns: {id: "#"} is a hash of the row)',
    "times without zone, read as UTC": "give times with a zone if they are not UTC",
    "several reactions in one row": "prepare.contradictions says which one counts",
    "prompts with the marks of a chat template": "give the messages, or the text without its template",
    "responses in JSON": "give the path of the text in them, if they are not the answers themselves",
}
"""Notes that need the user's attention, and what to do. Others say what a format has and rluf's records have not."""


def list_warnings(card: Mapping[str, Any], max_rows: int | None) -> list[str]:
    """What a reader of the card should look at before training, in plain sentences."""
    warnings, has_rated_entry = [], False
    for kind, counts in card["counts"].items():
        cut_rows = counts["dropped"].get("above prepare.max_rows", 0)
        if cut_rows:
            loved = card["love"]["sampling"]["loved"] if kind == "feedback" else None
            loved_text = f", {loved['rows'] - loved['kept']} of them loved" if loved else ""
            warnings.append(f"data.{kind}: prepare.max_rows={max_rows} left out {cut_rows} rows{loved_text}; raise it")
    empty_events = card["counts"].get("reactions", {}).get("dropped", {}).get("no reaction", 0)
    if empty_events:
        warnings.append(
            f"data.reactions: {empty_events} events have no reaction (null, none) and change nothing; an event that "
            "withdraws a reaction names it, and has retracted: true (columns: {retracted: path})"
        )
    for entry in card["entries"]:
        name = f"data.{entry['kind']} ({entry['path']})"
        labels: Counter[str] = Counter()
        for reaction in entry["reactions"]:
            labels[reaction["label"]] += reaction["rows"]
        if labels["unknown"]:
            names = ", ".join(reaction["name"] for reaction in entry["reactions"] if reaction["label"] == "unknown")
            warnings.append(
                f"{name}: {labels['unknown']} reactions have no label and are left out: {names}; set prepare.labels"
            )
        rated = labels.total() - labels["none"]
        if entry["kind"] == "feedback" and rated >= RATED_SHARE_LIMIT * max(entry["valid_rows"], 1):
            warnings.append(_describe_rated_rows(name, rated / entry["valid_rows"]))
            has_rated_entry = True
        warnings += [
            f"{name}: columns.{path_name} leads to a value in some files more often than in others; is it renamed?"
            for path_name in entry["uneven_paths"]
        ]
        warnings += [
            f"{name}: where.{path}: the path led to no value in any row, so this condition left out none or all of them"
            for path in entry["unmet_conditions"]
        ]
        warnings += [
            f"{name}: {note}: {entry['notes'][note]}; {advice}"
            for note, advice in _NOTED_WARNINGS.items()
            if entry["notes"].get(note)
        ]
    for kind, statistics in card["duplicates"].items():
        if statistics["exact"]:
            warnings.append(
                f"data.{kind}: {statistics['exact']} rows repeat the prompt and response of another row"
                + (" of the same user" if kind == "feedback" else "")
                + "; prepare.drop_duplicates=exact removes them"
            )
        if statistics["near"] >= NEAR_DUPLICATE_LIMIT * statistics["rows"] > 0:
            warnings.append(
                f"data.{kind}: {statistics['near']} rows ({statistics['near'] / statistics['rows']:.0%}) differ from "
                "another row in a few words only; prepare.drop_duplicates=near removes them"
            )
        if statistics["contradictory"]:
            warnings.append(
                f"data.{kind}: {statistics['contradictory']} rows contradict another one (the reverse pair, or "
                "the other label of the same response); prepare.contradictions=ignored drops them"
            )
    warnings += [
        f"data.{kind}: about {length['cut_share']:.0%} of the rows are longer than max_tokens={length['max_tokens']} "
        f"of their reward model and would be cut; 95% have at most {length['tokens_p95']} tokens (estimated)"
        for kind, length in card["lengths"].items()
        if length["cut_share"] >= CUT_SHARE_LIMIT
    ]
    love = card.get("love") or {}
    # Of rows with the reactions of data.reactions, which an entry alone does not have.
    if love.get("rated_share", 0.0) >= RATED_SHARE_LIMIT and not has_rated_entry:
        warnings.append(_describe_rated_rows("data.feedback", love["rated_share"]))
    if love.get("rows_of_reused_conversation_ids"):
        warnings.append(
            f"data.feedback: {love['rows_of_reused_conversation_ids']} rows have a conversation id that users share "
            "for different chats; it is read as one conversation for each user"
        )
    if love.get("contradictory_rows"):
        warnings.append(
            f"data.feedback: {love['contradictory_rows']} responses have loved and not loved reactions; "
            f"prepare.contradictions={card['settings']['contradictions']} decides"
        )
    return warnings


def _describe_rated_rows(name: str, share: float) -> str:
    return f"{name}: {share:.0%} of the rows have a reaction, so the love rate is one of rated rows, not a base rate"


def _format_entry_lines(entry: Mapping[str, Any]) -> list[str]:
    """Reactions, paths and losses of one entry of data.*."""
    name, lines = f"{entry['kind']} ({entry['path']})", []
    if entry["reactions"]:
        reactions = [f"{item['name']} {item['rows']} {item['label']}" for item in entry["reactions"][:12]]
        omitted = f" and {len(entry['reactions']) - 12} more" if len(entry["reactions"]) > 12 else ""
        lines.append(f"{name}: reactions: {', '.join(reactions)}{omitted}")
    if entry["paths"]:
        shares = [f"{field} {item['share']:.0%}" for field, item in entry["paths"].items()]
        lines.append(f"{name}: rows with a value: {', '.join(shares)}")
    if entry["notes"]:
        lines.append(f"{name}: " + ", ".join(f"{note} {count}" for note, count in entry["notes"].items()))
    return lines


def format_card_lines(card: Mapping[str, Any]) -> list[str]:
    """The card's main numbers as plain lines, for the console."""
    lines = []
    for kind, counts in card["counts"].items():
        dropped, quarantined = counts["dropped"], counts["quarantined"]
        line = f"{kind}: {counts['in']} in = {counts['kept']} kept + {sum(dropped.values())} dropped"
        line += f" + {sum(quarantined.values())} quarantined"
        reasons = [f"{reason} {rows}" for reason, rows in [*dropped.items(), *quarantined.items()]]
        lines.append(line + (f" ({', '.join(reasons)})" if reasons else ""))
    for entry in card["entries"]:
        lines += _format_entry_lines(entry)
    for output_name, splits in card["splits"].items():
        lines.append(f"{output_name}: " + ", ".join(f"{split} {entry['rows']}" for split, entry in splits.items()))
    for output_name, scripts in card.get("scripts", {}).items():
        shares = [f"{name} {rows / sum(scripts.values()):.0%}" for name, rows in list(scripts.items())[:5]]
        lines.append(f"{output_name}: scripts: {', '.join(shares)}")
    if card.get("redacted"):
        redactions = ", ".join(f"{kind} {count}" for kind, count in sorted(card["redacted"].items()))
        lines.append(f"redacted: {redactions}")
    if "love" in card:
        lines += _format_love_lines(card["love"])
    if card.get("drift"):
        drift = card["drift"]
        previous_rate = drift["base_rate"][0]
        lines.append(
            f"previous data set ({drift['created']}): love rate {previous_rate['mean']:.2%} "
            f"({previous_rate['low']:.2%} to {previous_rate['high']:.2%})"
            + (", outside the current interval" if drift["base_rate_differs"] else "")
        )
    return lines + [f"warning: {text}" for text in card["warnings"]]


def _format_love_lines(love: Mapping[str, Any]) -> list[str]:
    rate, sampling = love["base_rate"], love["sampling"]
    lines = [
        f"love rate {rate['mean']:.2%} ({rate['low']:.2%} to {rate['high']:.2%}); {sampling['train_share']:.0%} of "
        f"training rows loved, unloved rows weigh {sampling['factor']:.2f} times as much"
    ]
    rules = [f"{name} {rule['rows']} rows" for name, rule in love["abuse"].items() if rule["rows"]]
    if rules:
        lines.append(
            f"abuse rules reduced the weight of {love['trust']['rows_below_one']} rows ({', '.join(rules)}); "
            f"love rate with these weights {love['base_rate_trusted']:.2%}"
        )
    return lines
