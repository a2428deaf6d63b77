"""`prepare --signals`: which signal of users is worth learning from, by volume, coverage, link to return and ambiguity.

The link is the log-odds of coming back for rows with the signal against rows without, from a logistic regression that
also holds the user's activity, the turn, the topic, the locale and the response's length, with intervals clustered by
user (sandwich, Liang and Zeger 1986). Only dev and test rows count: they are not sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import rluf
from rluf.errors import DataError
from rluf.prepare.card_page import percent, rate_figure
from rluf.prepare.propensity import octaves

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_Z95 = 1.959963984540054
_POSITIVE = 0.3
"""VADER's compound score from which a follow-up message is taken as pleased."""

_MOST_TEXTS = 20_000
_TOPICS = 12
_FEWEST = 20
"""Rows with and without a signal below which its link is not told."""

RULE = (
    "First the signals whose link to return is clear of zero, by the lower end of its interval times one minus their "
    "ambiguity; then the others, by volume."
)


@dataclass(frozen=True, slots=True)
class Link:
    """Log-odds of return with a signal against without it, and its standard error, clustered by user."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.value - _Z95 * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.value + _Z95 * self.error


def link(signal: Bools, returned: Bools, controls: Floats, user: Ints) -> Link:
    """Link of a signal [N] to return [N] beside controls [N, C], with rows of one user [N] taken as dependent."""
    from scipy.optimize import minimize
    from scipy.special import expit

    design = np.column_stack([signal.astype(np.float64), np.ones(len(signal)), controls])
    ridge = np.full(design.shape[1], 1e-3)
    ridge[:2] = 0

    def loss(theta: Floats) -> tuple[float, Floats]:
        logits = design @ theta
        value = np.logaddexp(0, np.where(returned, -logits, logits)).sum() + (ridge * theta**2).sum() / 2
        return float(value), design.T @ (expit(logits) - returned) + ridge * theta

    theta = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    chance = expit(design @ theta)
    bread = np.linalg.pinv((design * (chance * (1 - chance))[:, None]).T @ design + np.diag(ridge))
    scores = np.zeros((int(user.max()) + 1, design.shape[1]))
    np.add.at(scores, user, design * (returned - chance)[:, None])
    scores = scores[scores.any(axis=1)]
    spread = bread @ (scores.T @ scores) @ bread * len(scores) / max(len(scores) - 1, 1)
    return Link(float(theta[0]), float(np.sqrt(spread[0, 0])))


def _one_hot(values: list[str], most: int) -> Floats:
    names, count = np.unique(values, return_counts=True)
    common = names[np.argsort(-count)][1:most]
    return (
        np.stack([np.array(values) == name for name in common], 1).astype(np.float64)
        if len(common)
        else np.empty((len(values), 0))
    )


def _controls(table: pa.Table, user: Ints) -> Floats:
    lengths = np.log1p([len(text) for text in table["response"].to_pylist()])
    columns = [octaves(np.bincount(user)[user]), octaves(table["turn"].to_numpy() + 1), lengths]
    plain = np.stack(columns, 1).astype(np.float64)
    plain = (plain - plain.mean(0)) / np.maximum(plain.std(0), 1e-9)
    groups = [_one_hot(table[name].to_pylist(), _TOPICS) for name in ("topic", "locale")]
    return np.concatenate([plain, *groups], axis=1)


def _follow_ups(table: pa.Table) -> tuple[Bools, Bools]:
    """Whether the user's next message is pleased [N], and whether there is one [N]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    talk, turn = table["conversation_id"].to_pylist(), table["turn"].to_pylist()
    last = {key: row for row, key in enumerate(zip(talk, turn, strict=True))}
    pleased, told = np.zeros(len(talk), dtype=np.bool_), np.zeros(len(talk), dtype=np.bool_)
    after = [(row, last.get((key, number + 1))) for row, (key, number) in enumerate(zip(talk, turn, strict=True))]
    pairs = [(row, following) for row, following in after if following is not None][:_MOST_TEXTS]
    texts = table["messages"].take(pa.array([following for _, following in pairs], pa.int64())).to_pylist()
    for (row, _), messages in zip(pairs, texts, strict=True):
        told[row] = True
        pleased[row] = judge.polarity_scores(messages[-1]["content"])["compound"] >= _POSITIVE
    return pleased, told


def _tri(table: pa.Table, name: str) -> tuple[Bools, Bools]:
    values = table[name].to_pylist()
    return np.array([value is True for value in values]), np.array([value is not None for value in values])


def candidates(table: pa.Table) -> dict[str, tuple[Bools, Bools]]:
    """Each signal's rows that have it [N] and rows where the log can tell [N]."""
    reaction = np.array([value or "" for value in table["reaction"].to_pylist()])
    every = np.ones(len(reaction), dtype=np.bool_)
    return {
        "love": (reaction == "love", every),
        "thumbs up": (np.isin(reaction, ["thumbs_up", "like"]), every),
        "thumbs down": (np.isin(reaction, ["thumbs_down", "dislike"]), every),
        "continue": _tri(table, "continued"),
        "pleased follow-up": _follow_ups(table),
        "return": _tri(table, "returned"),
    }


def rank_signals(table: pa.Table) -> list[dict[str, Any]]:
    """One row a signal, the best first by RULE. `table` are prepared love rows (see rluf.prepare.write_pass)."""
    user = table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    found = candidates(table)
    returned, can_tell = found["return"]
    onward, onward_told = found["continue"]
    controls = _controls(table, user)
    rows = []
    for name, (has, told) in found.items():
        here = told & can_tell
        row: dict[str, Any] = {
            "signal": name,
            "per_1000": 1000 * float(has.sum()) / len(has),
            "told": float(told.mean()),
            "users": len(np.unique(user[has])) / len(np.unique(user)),
            "link": None,
            "unadjusted": None,
            "ambiguity": None,
        }
        both = has & can_tell & onward_told
        if both.any():
            against = ~returned if name == "continue" else ~onward if name == "return" else ~returned & ~onward
            row["ambiguity"] = float(against[both].mean())
        enough = min((has & here).sum(), (~has & here).sum()) >= _FEWEST and 0 < returned[here].mean() < 1
        if name != "return" and enough:
            made = link(has[here], returned[here], controls[here], user[here])
            bare = link(has[here], returned[here], np.empty((int(here.sum()), 0)), user[here])
            row["link"] = {"mean": made.value, "low": made.low, "high": made.high, "rows": int(here.sum())}
            row["unadjusted"] = {"mean": bare.value, "low": bare.low, "high": bare.high}
        rows.append(row)
    return sorted(rows, key=_merit, reverse=True)


def _merit(row: Mapping[str, Any]) -> tuple[bool, float]:
    lowest = row["link"]["low"] if row["link"] else 0.0
    clear = lowest > 0
    return clear, lowest * (1 - (row["ambiguity"] or 0.0)) if clear else row["per_1000"]


def write_signals(data: Path) -> list[dict[str, Any]]:
    """Rank the signals of a prepared data set; signals.json and signals.html beside its card. Returns the ranking.

    Raises DataError when it has no love data.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    files = [data / "love" / f"{side}.parquet" for side in ("dev", "test")]
    if not all(file.is_file() for file in files):
        raise DataError(f"{data} holds no love data; signals are ranked on a log of feedback: set data.feedback")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    rows = rank_signals(table)
    report = {"rule": RULE, "rows": table.num_rows, "signals": rows}
    (data / "signals.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    linked = [(row["signal"], row["link"]) for row in rows if row["link"]]
    figure = rate_figure(linked, 0.0) if linked else None
    if figure is not None:
        figure["layout"]["xaxis"] |= {"tickformat": ".1f", "rangemode": "normal"}
        figure["data"][0]["hovertemplate"] = "%{y}: %{x:.2f} in log-odds, %{customdata:,} rows<extra></extra>"
    loader = ChoiceLoader([PackageLoader("rluf.prepare", ""), PackageLoader("rluf.report", "")])
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("signals.html.j2")
    text = page.render(
        rule=RULE, count=f"{table.num_rows:,}", rows=[_cells(row) for row in rows], plotly_js=get_plotlyjs(),
        figures={"links": figure} if figure else {}, rluf_version=rluf.__version__,
    )  # fmt: skip
    (data / "signals.html").write_text(text, encoding="utf-8")
    return rows


def _range(value: Mapping[str, float] | None) -> str:
    return f"{value['mean']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})" if value else "not told"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    ambiguity = "not told" if row["ambiguity"] is None else percent(row["ambiguity"])
    numbers = f"{row['per_1000']:.1f}", percent(row["told"]), percent(row["users"])
    return row["signal"], *numbers, _range(row["link"]), _range(row["unadjusted"]), ambiguity


def signal_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The ranking in plain lines, for the console."""
    head = ("signal", "per 1,000", "told", "users with it", "link to return", "unadjusted", "ambiguity")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
