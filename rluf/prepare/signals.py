"""`prepare --signals`: rank user signals by volume, coverage, association with return, and ambiguity.

The association is the log-odds of return for rows with the signal against rows without, from a logistic regression that
controls for the user's activity, turn, topic, locale and response length, with intervals clustered by user (sandwich
estimator, Liang and Zeger 1986). Only dev and test rows are used: they are not sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.prepare.card_page import build_rate_figure, format_percent
from rluf.prepare.joins import bin_by_octave
from rluf.prepare.labels import normalize_reaction
from rluf.prepare.splits import assign_conversation_keys
from rluf.prepare.workspace import encode_column
from rluf.report.page import render_html_page
from rluf.utils.stats import Bools, Floats, Ints, fit_logistic, sigmoid

_Z95 = 1.959963984540054
_MIN_POSITIVE_SENTIMENT = 0.3
"""VADER's compound score from which a follow-up message counts as pleased."""

_MAX_FOLLOW_UPS = 20_000
_MAX_LEVELS = 12
_MIN_ROWS = 20
"""Rows with and without a signal below which its association is not estimated."""

RANKING_RULE = (
    "First the signals whose association with return is clearly positive, by the lower end of its interval times one "
    "minus their ambiguity; then the others, by volume."
)


@dataclass(frozen=True, slots=True)
class ReturnAssociation:
    """Log-odds of return with a signal against without it, and its standard error, clustered by user."""

    log_odds: float
    standard_error: float

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.log_odds - _Z95 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.log_odds + _Z95 * self.standard_error


def estimate_return_association(
    has_signal: Bools, returned: Bools, controls: Floats, user_code: Ints
) -> ReturnAssociation:
    """Association of a signal [N] with return [N] given controls [N, C]; rows of one user [N] are dependent."""
    inputs = np.column_stack([has_signal.astype(np.float64), controls])
    # A small ridge makes rare or collinear controls estimable; signal and intercept have none.
    ridge = np.full(inputs.shape[1] + 1, 1e-3)
    ridge[[0, -1]] = 0
    row_count = len(inputs)
    theta = fit_logistic(
        inputs, returned.astype(np.float64), np.ones(row_count), np.inf,
        quadratic_penalty=np.diag(ridge[:-1]) / row_count,
    )  # fmt: skip
    design_matrix = np.column_stack([inputs, np.ones(row_count)])
    probability = sigmoid(design_matrix @ theta)
    # Sandwich: inverse Hessian ("bread") around the outer product of the scores, summed by user ("meat").
    row_information = (design_matrix * (probability * (1 - probability))[:, None]).T @ design_matrix
    bread = np.linalg.pinv(row_information + np.diag(ridge))
    user_scores = np.zeros((int(user_code.max()) + 1, design_matrix.shape[1]))
    np.add.at(user_scores, user_code, design_matrix * (returned - probability)[:, None])
    user_scores = user_scores[user_scores.any(axis=1)]
    small_sample_factor = len(user_scores) / max(len(user_scores) - 1, 1)
    covariance = bread @ (user_scores.T @ user_scores) @ bread * small_sample_factor
    return ReturnAssociation(float(theta[0]), float(np.sqrt(covariance[0, 0])))


def _encode_one_hot(values: list[str], max_levels: int) -> Floats:
    levels, counts = np.unique(values, return_counts=True)
    # The most frequent level is the reference and has no column; rare levels join it.
    encoded_levels = levels[np.argsort(-counts)][1:max_levels]
    if not len(encoded_levels):
        return np.empty((len(values), 0))
    return np.stack([np.array(values) == level for level in encoded_levels], 1).astype(np.float64)


def _build_controls(table: pa.Table, user_code: Ints) -> Floats:
    activity = bin_by_octave(np.bincount(user_code)[user_code])
    turn = bin_by_octave(table["turn"].to_numpy() + 1)
    log_length = np.log1p([len(text) for text in table["response"].to_pylist()])
    numeric = np.stack([activity, turn, log_length], 1).astype(np.float64)
    numeric = (numeric - numeric.mean(0)) / np.maximum(numeric.std(0), 1e-9)
    one_hot = [_encode_one_hot(table[name].to_pylist(), _MAX_LEVELS) for name in ("topic", "locale")]
    return np.concatenate([numeric, *one_hot], axis=1)


def _find_positive_follow_ups(table: pa.Table) -> tuple[Bools, Bools]:
    """Whether the user's next message is pleased [N], and whether there is one [N]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    openings = pc.struct_field(pc.list_element(table["messages"], 0), "content")
    codes = [encode_column(column)[0] for column in (table["conversation_id"], openings, table["user_id"])]
    # Some products number conversations within a user: a shared id is then one chat for each user.
    chats = assign_conversation_keys(codes[0].astype(np.uint64), codes[1].astype(np.uint64), codes[2])
    turns = list(zip(chats.tolist(), table["turn"].to_pylist(), strict=True))
    row_of_turn = {turn_key: row for row, turn_key in enumerate(turns)}
    is_pleased, has_follow_up = np.zeros(len(turns), dtype=np.bool_), np.zeros(len(turns), dtype=np.bool_)
    next_rows = [(row, row_of_turn.get((chat, turn + 1))) for row, (chat, turn) in enumerate(turns)]
    # VADER takes most of the time, so only the first rows are read.
    pairs = [(row, next_row) for row, next_row in next_rows if next_row is not None][:_MAX_FOLLOW_UPS]
    contexts = table["messages"].take(pa.array([next_row for _, next_row in pairs], pa.int64())).to_pylist()
    for (row, _), messages in zip(pairs, contexts, strict=True):
        has_follow_up[row] = True
        is_pleased[row] = analyzer.polarity_scores(messages[-1]["content"])["compound"] >= _MIN_POSITIVE_SENTIMENT
    return is_pleased, has_follow_up


def _read_optional_bool_column(table: pa.Table, column_name: str) -> tuple[Bools, Bools]:
    values = table[column_name].to_pylist()
    return np.array([value is True for value in values]), np.array([value is not None for value in values])


def collect_signals(table: pa.Table) -> dict[str, tuple[Bools, Bools]]:
    """For each signal, the rows that have it [N] and the rows for which the log can show it [N]."""
    code, names = encode_column(table["reaction"])
    # By any spelling; a loved reaction is love, also a thumb up, unless a label of the config says otherwise.
    reaction = np.array([*(normalize_reaction(name or "") for name in names.to_pylist()), ""])[code]
    all_rows = np.ones(len(reaction), dtype=np.bool_)
    return {
        "love": (reaction == "love", all_rows),
        "thumbs up": (reaction == "up", all_rows),
        "thumbs down": (reaction == "down", all_rows),
        "continue": _read_optional_bool_column(table, "continued"),
        "pleased follow-up": _find_positive_follow_ups(table),
        "return": _read_optional_bool_column(table, "returned"),
    }


def rank_signals(table: pa.Table) -> list[dict[str, Any]]:
    """One row per signal, ranked by RANKING_RULE. `table` has prepared love rows (see rluf.prepare.write_pass)."""
    user_code, _ = encode_column(table["user_id"])
    signals = collect_signals(table)
    returned, return_known = signals["return"]
    continued, continue_known = signals["continue"]
    controls = _build_controls(table, user_code)
    rows = []
    for name, (has_signal, is_known) in signals.items():
        row: dict[str, Any] = {
            "signal": name, "per_1000": 1000 * float(has_signal.sum()) / len(has_signal),
            "known": float(is_known.mean()), "users": len(np.unique(user_code[has_signal])) / len(np.unique(user_code)),
            "link": None, "unadjusted": None, "ambiguity": None,
        }  # fmt: skip
        with_outcome = has_signal & return_known & continue_known
        if with_outcome.any():
            # A signal cannot contradict itself: continue and return are compared with the other one alone.
            contradiction = {"continue": ~returned, "return": ~continued}.get(name, ~returned & ~continued)
            row["ambiguity"] = float(contradiction[with_outcome].mean())
        usable = is_known & return_known
        has_both = min((has_signal & usable).sum(), (~has_signal & usable).sum()) >= _MIN_ROWS
        if name != "return" and has_both and 0 < returned[usable].mean() < 1:
            usable_rows = int(usable.sum())
            inputs = has_signal[usable], returned[usable]
            adjusted = estimate_return_association(*inputs, controls[usable], user_code[usable])
            unadjusted = estimate_return_association(*inputs, np.empty((usable_rows, 0)), user_code[usable])
            row["link"] = {
                "mean": adjusted.log_odds, "low": adjusted.low, "high": adjusted.high, "rows": usable_rows,
            }  # fmt: skip
            row["unadjusted"] = {"mean": unadjusted.log_odds, "low": unadjusted.low, "high": unadjusted.high}
        rows.append(row)
    return sorted(rows, key=_build_ranking_key, reverse=True)


def _build_ranking_key(row: Mapping[str, Any]) -> tuple[bool, float]:
    lower_end = row["link"]["low"] if row["link"] else 0.0
    is_positive = lower_end > 0
    return is_positive, lower_end * (1 - (row["ambiguity"] or 0.0)) if is_positive else row["per_1000"]


def write_signal_report(data_folder: Path) -> list[dict[str, Any]]:
    """Rank the signals of a prepared data set; write signals.json and signals.html next to its card.

    Returns the ranking. Raises DataError if the data set has no love data.
    """
    files = [data_folder / "love" / f"{split}.parquet" for split in ("dev", "test")]
    if not all(file.is_file() for file in files):
        raise DataError(f"{data_folder} has no love data; signals are ranked on a feedback log: set data.feedback")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    rows = rank_signals(table)
    report = {"rule": RANKING_RULE, "rows": table.num_rows, "signals": rows}
    (data_folder / "signals.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    associations = [(row["signal"], row["link"]) for row in rows if row["link"]]
    figure = build_rate_figure(associations, 0.0) if associations else None
    if figure is not None:
        # The figure is built for rates; associations are log-odds and may be negative.
        figure["layout"]["xaxis"] |= {"tickformat": ".1f", "rangemode": "normal"}
        figure["data"][0]["hovertemplate"] = "%{y}: %{x:.2f} in log-odds, %{customdata:,} rows<extra></extra>"
    page = render_html_page(
        "signals.html.j2", package="rluf.prepare", figures={"associations": figure} if figure else {},
        rule=RANKING_RULE, row_count=f"{table.num_rows:,}", rows=[_format_cells(row) for row in rows],
    )  # fmt: skip
    (data_folder / "signals.html").write_text(page, encoding="utf-8")
    return rows


def _format_range(estimate: Mapping[str, float] | None) -> str:
    return f"{estimate['mean']:+.2f} ({estimate['low']:+.2f} to {estimate['high']:+.2f})" if estimate else "unknown"


def _format_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    ambiguity = "unknown" if row["ambiguity"] is None else format_percent(row["ambiguity"])
    numbers = f"{row['per_1000']:.1f}", format_percent(row["known"]), format_percent(row["users"])
    return row["signal"], *numbers, _format_range(row["link"]), _format_range(row["unadjusted"]), ambiguity


def format_signal_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The ranking as a table in plain text, for the console."""
    header = ("signal", "per 1,000", "known", "users with it", "association", "unadjusted", "ambiguity")
    table_rows = [header, *(_format_cells(row) for row in rows)]
    widths = [max(len(cells[column]) for cells in table_rows) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table_rows
    ]
