"""Each rule takes weight from what it is about and from nobody else; formulas agree with scipy and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom
from sklearn.linear_model import LogisticRegression

from rluf.prepare.abuse import FLOOR, RULES, Log, _log_chance, _upper_tail, ordinary, tail_chance, trust
from rluf.prepare.propensity import _logistic, octaves, propensity

SECOND = 1_000_000


def honest(users: int, seed: int = 1) -> Log:
    """Users with some rows each over a month, 8% loved, nothing shared."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 40, users))
    rate = rng.beta(2, 23, users)
    count = len(user)
    return Log(
        user=user, group=np.arange(count), answer=np.arange(count), device=np.full(count, -1),
        time=rng.integers(0, 28 * 86400, count) * SECOND, loved=rng.random(count) < rate[user],
        own=np.zeros(count, dtype=np.bool_), cap=200,
    )  # fmt: skip


def with_rows(log: Log, rows: int, **columns: object) -> tuple[Log, np.ndarray]:
    """The log and `rows` more of a new user, with some columns given; and which rows these are."""
    count = len(log.user)
    more = {
        "user": np.full(rows, log.user.max() + 1), "group": count + np.arange(rows), "answer": count + np.arange(rows),
        "device": np.full(rows, -1), "time": np.sort(np.random.default_rng(3).integers(0, 28 * 86400, rows)) * SECOND,
        "loved": np.arange(rows) % 12 == 0, "own": np.zeros(rows, dtype=np.bool_),
    } | columns  # fmt: skip
    parts = {name: np.concatenate([getattr(log, name), np.broadcast_to(value, rows)]) for name, value in more.items()}
    return replace(log, **parts), np.arange(count + rows) >= count


def test_honest_users_lose_next_to_nothing() -> None:
    weight, each = trust(honest(2000), list(RULES))
    assert {name: float((1 - values).sum()) for name, values in each.items() if (values < 1).any()} == {}
    assert (weight == 1).all()


CASES = {
    "rate": {"loved": np.arange(50) % 10 != 0},
    "burst": {"time": np.arange(50) * SECOND},
    "timing": {"time": np.arange(50) * 3600 * SECOND},
    "copies": {"group": 5},
    "self_love": {"own": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_planted_user_is_caught_and_nobody_else(name: str) -> None:
    log, planted = with_rows(honest(500), 50, **CASES[name])
    weight, _ = trust(log, [name])
    assert weight[planted].mean() < 0.5
    assert (weight[~planted] == 1).mean() > 0.999


def test_a_farm_is_caught_by_its_devices_and_by_its_copied_prompts() -> None:
    log = honest(800)
    group = 10**5 + np.arange(15)
    mask = np.zeros(len(log.user), dtype=np.bool_)
    for _ in range(10):
        log, mine = with_rows(log, 15, device=7, group=group, loved=np.arange(15) % 4 != 0)
        mask = np.concatenate([mask, np.ones(15, dtype=np.bool_)])
    assert mine.sum() == 15
    for name in ("device", "copies"):
        weight, _ = trust(log, [name])
        assert weight[mask & log.loved].mean() < 0.5
        assert (weight[~mask] == 1).all()


def test_prompts_that_all_share_are_judged_by_one_another() -> None:
    rng = np.random.default_rng(2)
    log = honest(1500)
    taste = rng.beta(1.5, 15, 60)  # some prompts are loved four times as often as others
    group = rng.integers(0, 60, len(log.user))
    shared = replace(log, group=group, loved=rng.random(len(group)) < taste[group])
    assert (trust(shared, ["copies"])[0] == 1).mean() > 0.99


def test_the_cap_holds_a_users_total() -> None:
    log, mine = with_rows(honest(50), 500)
    assert trust(log, ["cap"])[0][mine].sum() == pytest.approx(200)


def test_a_tenth_of_bots_cannot_hide_by_stretching_the_fit() -> None:
    rng = np.random.default_rng(4)
    trials = rng.integers(20, 60, 1000)
    bots = np.arange(1000) < 100
    hits = np.where(bots, rng.binomial(trials, 0.8), rng.binomial(trials, rng.beta(2, 30, 1000)))
    chance = tail_chance(trials, hits, ordinary(trials, hits))
    assert (chance[bots] < 1e-4).all()
    assert (chance[~bots] < 0.01).sum() <= 3


@given(st.integers(1, 200), st.data(), st.floats(0.1, 50), st.floats(0.1, 50))
@settings(deadline=None)
def test_beta_binomial_agrees_with_scipy(trials: int, data: st.DataObject, alpha: float, beta: float) -> None:
    hits = data.draw(st.integers(0, trials))
    n, k = np.array([trials]), np.array([hits])
    assert _log_chance(n, k, alpha, beta)[0] == pytest.approx(betabinom.logpmf(hits, trials, alpha, beta), abs=1e-6)
    assert _upper_tail(n, k, alpha, beta)[0] == pytest.approx(betabinom.sf(hits - 1, trials, alpha, beta), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 100), st.booleans()), max_size=40))
@settings(deadline=None, max_examples=60)
def test_weights_are_weights_whatever_the_log(rows: list[tuple[int, int, int, bool]]) -> None:
    user, group, time, loved = (
        (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        if rows
        else (np.empty(0, dtype=np.int64),) * 4
    )
    log = Log(user, group, group, group - 1, time * SECOND, loved.astype(np.bool_), loved == 2, 3)
    weight, _ = trust(log, list(RULES))
    assert ((weight >= FLOOR) & (weight <= 1)).all() and len(weight) == len(rows)


def test_the_logistic_regression_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    design = np.eye(6)[rng.integers(0, 6, 40)]
    hits, misses = rng.integers(0, 30, 40).astype(float), rng.integers(0, 90, 40).astype(float)
    logits, coefficients = _logistic(design, hits, misses)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000)
    theirs.fit(np.concatenate([design, design]), [1] * 40 + [0] * 40, sample_weight=np.concatenate([hits, misses]))
    assert coefficients == pytest.approx(theirs.coef_[0], abs=2e-3)
    assert logits == pytest.approx(theirs.decision_function(design), abs=2e-3)


def test_propensity_finds_who_reacts() -> None:
    rng = np.random.default_rng(1)
    turn, locale = rng.integers(0, 4, 20_000), rng.integers(0, 2, 20_000)
    truth = 1 / (1 + np.exp(-(-3 + 0.5 * turn + 1.0 * locale)))
    chance, coefficients = propensity({"turn": turn, "locale": locale}, rng.random(20_000) < truth)
    assert np.corrcoef(chance, truth)[0, 1] > 0.99
    assert abs(chance - truth).max() < 0.05
    assert set(coefficients) == {"turn", "locale"}
    assert propensity({"turn": turn[:3]}, np.ones(3, dtype=np.bool_))[0].tolist() == [1, 1, 1]
    assert octaves(np.array([0, 1, 2, 3, 4, 1000])).tolist() == [0, 0, 1, 1, 2, 9]
