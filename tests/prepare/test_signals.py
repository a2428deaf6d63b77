"""The ranking of signals equals plain loops and dense matrices, for few users and for many."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize

from rluf.prepare.joins import detect_continued, detect_returned
from rluf.prepare.signals import collect_signals, estimate_return_association, rank_signals

DAY_US = 24 * 3_600_000_000
SPAN_DAYS = 60
Rows = list[dict[str, Any]]


def simulate_rows(user_count: int, seed: int) -> Rows:
    """Visits of users over two months: lovers come back within the window far more often than others."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for user in range(user_count):
        is_lover = bool(rng.random() < 0.5)
        day = float(rng.uniform(0, 20))
        for visit in range(3):
            time_us = 1_772_323_200_000_000 + int(day * DAY_US)
            turns = int(rng.integers(1, 3))
            for turn in range(turns):
                reaction = "love" if is_lover and rng.random() < 0.7 else "like" if rng.random() < 0.05 else None
                rows.append({
                    "user_id": f"u{user}", "conversation_id": f"{user}-{visit}", "turn": turn, "topic": "t",
                    "locale": "en", "time": time_us + turn * 60_000_000, "reaction": reaction,
                    "response": "x" * int(rng.integers(1, 40)),
                    "messages": [{"role": "user", "content": "great, thank you!" if rng.random() < 0.3 else "and?"}],
                })  # fmt: skip
            day += float(rng.uniform(1, 6)) if is_lover else float(rng.uniform(8, 20))
    return rows


def join_actions(rows: Rows) -> pa.Table:
    """The rows as a prepared table: `returned` and `continued` by the functions that prepare uses."""
    user_code = np.unique([row["user_id"] for row in rows], return_inverse=True)[1].astype(np.int64)
    conversation = np.unique([row["conversation_id"] for row in rows], return_inverse=True)[1].astype(np.uint64)
    time_us, turn = (np.array([row[name] for row in rows]) for name in ("time", "turn"))
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    for name, (values, known) in (
        ("returned", detect_returned(user_code, time_us, 7)),
        ("continued", detect_continued(conversation, turn, time_us)),
    ):  # fmt: skip
        columns[name] = [bool(value) if is_known else None for value, is_known in zip(values, known, strict=True)]
    return pa.table(columns)


def count_by_loop(rows: Rows) -> dict[str, tuple[int, set[str]]]:
    """Rows and users with each signal, one row at a time, from the definitions in docs/data.md."""
    times_of_user, turns_of_chat = defaultdict(list), defaultdict(dict)
    for row in rows:
        times_of_user[row["user_id"]].append(row["time"])
        turns_of_chat[row["conversation_id"]][row["turn"]] = row
    hits: Counter[str] = Counter()
    users: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        later_turns = [turn for turn in turns_of_chat[row["conversation_id"]] if turn > row["turn"]]
        follow_up = turns_of_chat[row["conversation_id"]].get(row["turn"] + 1)
        pauses = [time - row["time"] for time in times_of_user[row["user_id"]]]
        for name, has_signal in (
            ("love", row["reaction"] == "love"), ("thumbs up", row["reaction"] == "like"),
            ("continue", bool(later_turns)),
            ("pleased follow-up", follow_up is not None and "great" in follow_up["messages"][0]["content"]),
            ("return", any(DAY_US // 4 <= pause <= 7 * DAY_US for pause in pauses)),
        ):  # fmt: skip
            if has_signal:
                hits[name] += 1
                users[name].add(row["user_id"])
    return {name: (count, users[name]) for name, count in hits.items()}


@pytest.mark.parametrize("user_count", [300, 5_000, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_signals_equal_a_plain_loop(user_count: int) -> None:
    rows = simulate_rows(user_count, seed=user_count)
    table = join_actions(rows)
    ranking = {row["signal"]: row for row in rank_signals(table)}
    expected = count_by_loop(rows)
    for name, (count, users) in expected.items():
        if name != "pleased follow-up" or count < 4000:  # follow-ups are read up to a limit
            assert ranking[name]["per_1000"] == pytest.approx(1000 * count / len(rows))
            assert ranking[name]["users"] == pytest.approx(len(users) / user_count)
    # The link of love with return, from a table of counts: a logistic regression on one binary signal is exact there.
    counts: Counter[tuple[bool, bool]] = Counter()
    for row, returned in zip(rows, table["returned"].to_pylist(), strict=True):
        if returned is not None:
            counts[row["reaction"] == "love", returned] += 1
    log_odds = math.log(counts[True, True] * counts[False, False] / counts[True, False] / counts[False, True])
    assert ranking["love"]["unadjusted"]["mean"] == pytest.approx(log_odds, abs=2e-3)
    assert ranking["love"]["unadjusted"]["low"] > 1


def test_the_adjusted_link_equals_a_dense_sandwich() -> None:
    rng = np.random.default_rng(3)
    user_code = np.repeat(np.arange(100), 5)
    controls = np.column_stack([rng.normal(size=500), rng.integers(0, 2, 500)]).astype(float)
    has_signal = rng.random(500) < 0.4
    returned = rng.random(500) < 1 / (
        1 + np.exp(-(has_signal + 0.5 * controls[:, 0] + rng.normal(size=100)[user_code]))
    )
    design = np.column_stack([has_signal, controls, np.ones(500)])
    ridge = np.diag([0, 1e-3, 1e-3, 0])

    def loss(theta: Any) -> Any:
        z = design @ theta
        return np.logaddexp(0, z).sum() - z[returned].sum() + theta @ ridge @ theta / 2

    theta = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    probability = 1 / (1 + np.exp(-design @ theta))
    bread = np.linalg.inv(design.T @ np.diag(probability * (1 - probability)) @ design + ridge)
    meat = np.zeros((4, 4))
    for user in range(100):
        score = design[user_code == user].T @ (returned - probability)[user_code == user]
        meat += np.outer(score, score)
    expected = np.sqrt((bread @ meat @ bread)[0, 0] * 100 / 99)
    association = estimate_return_association(has_signal, returned, controls, user_code)
    assert association.log_odds == pytest.approx(theta[0], abs=1e-3)
    assert association.standard_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("conversation_ids", [("1", "1"), ("default", "default"), ("a", "b")])
def test_a_follow_up_belongs_to_its_own_chat(conversation_ids: tuple[str, str]) -> None:
    def build_row(user: str, conversation_id: str, turn: int, *contents: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": content} for content in contents]
        return {
            "user_id": user,
            "conversation_id": conversation_id,
            "turn": turn,
            "reaction": None,
            "messages": messages,
        }

    first, second = conversation_ids
    rows = [
        build_row("u0", first, 0, "hello"), build_row("u0", first, 1, "hello", "this is wonderful, I love it"),
        build_row("u1", second, 0, "good day"), build_row("u1", second, 1, "good day", "this is awful, I hate it"),
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows).append_column("continued", pa.nulls(4, pa.bool_()))
    table = table.append_column("returned", pa.nulls(4, pa.bool_()))
    is_pleased, has_follow_up = collect_signals(table)["pleased follow-up"]
    assert is_pleased.tolist() == [True, False, False, False] and has_follow_up.tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["thumbs_down", "👎", ":thumbsdown:", "Dislike", "-1", "downvote", "down"])
def test_a_thumb_down_counts_in_any_spelling(name: str) -> None:
    names = [name, None, "love", "custom", "👍"]
    messages = [[{"role": "user", "content": "hello"}]] * 5
    columns = {"user_id": list("abcde"), "conversation_id": list("abcde"), "turn": [0] * 5, "reaction": names}
    table = pa.table(columns | {"messages": messages, "continued": [False] * 5, "returned": [False] * 5})
    signals = collect_signals(table)
    assert signals["thumbs down"][0].tolist() == [True, False, False, False, False]
    assert signals["love"][0].tolist() == [False, False, True, False, False]
    assert signals["thumbs up"][0].tolist() == [False, False, False, False, True]
