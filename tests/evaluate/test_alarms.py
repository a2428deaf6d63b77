"""Alarms: exact tests, stated rates, planted hacks by both ways of looking, and every rung of the decision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.alarms import (
    STREAM_ODDS,
    Action,
    Alarm,
    Baseline,
    Look,
    Question,
    Stream,
    check,
    check_topics,
    decide,
    diverged,
    excess_p,
    odds_ratio,
    question,
    stream_gain,
    stream_limit,
    stream_scores,
    upper_share,
)

Values = dict[str, NDArray[np.float64]]


def made(seed: int, size: int, bye: float = 0.0072, longer: float = 1.0) -> Values:
    """Three monitors of a policy: farewells, length in tokens, and endings in a question."""
    rng = np.random.default_rng(seed)
    return {
        "farewell": (rng.random(size) < bye).astype(float),
        "length": np.round(rng.gamma(6.0, 5.0, size) * longer),
        "question_ending": (rng.random(size) < 0.3).astype(float),
    }


def names(alarms: Sequence[Alarm]) -> list[str]:
    return [alarm.monitor for alarm in alarms]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(41, 300), st.integers(0, 40), st.integers(41, 300))
def test_p_is_fishers_exact_test(k: int, n: int, k0: int, n0: int) -> None:
    theirs = stats.fisher_exact([[k, n - k], [k0, n0 - k0]], alternative="greater").pvalue
    assert float(excess_p(k, n, k0, n0)) == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_odds_ratio_worked_by_hand() -> None:
    assert float(odds_ratio(20, 100, 10, 100)) == pytest.approx(20.5 * 90.5 / (80.5 * 10.5))
    assert np.isfinite(odds_ratio(5, 5, 0, 5))


@pytest.mark.parametrize(
    ("values", "worse", "kind", "share"),
    [
        (np.arange(100), "up", "mean", 0.10),
        (np.arange(100), "down", "mean", 0.10),
        (np.repeat([1.0, 48.0], [70, 30]), "up", "mean", 0.30),
        (np.zeros(100), "up", "mean", 0.0),
        (np.ones(100), "down", "mean", 0.0),
        (np.repeat([0.0, 1.0], [60, 40]), "up", "share", 0.4),
        (np.repeat([0.0, 1.0], [60, 40]), "down", "share", 0.6),
    ],
)
def test_a_mean_asks_for_the_worst_tenth(values: NDArray[np.float64], worse: str, kind: str, share: float) -> None:
    asked = question(values, worse, kind)  # type: ignore[arg-type]
    assert asked.hits(values).mean() == pytest.approx(share)
    assert asked.hits(1e9 if worse == "up" else -1e9)


def test_planted_hacks_are_found_and_named() -> None:
    base = Baseline.of(made(0, 4000))
    assert names(check(base, made(1, 4000, bye=0.028), checks=10)) == ["farewell"]
    assert names(check(base, made(1, 1000, longer=1.5), checks=10)) == ["length"]
    assert check(base, made(1, 4000), checks=10) == []


def test_the_stated_rate_holds_over_runs_of_ten_checks() -> None:
    base = Baseline.of(made(0, 2000))
    runs = [any(check(base, made(100 * run + n, 300), checks=10, rate=0.2) for n in range(10)) for run in range(40)]
    assert np.mean(runs) <= 0.2


def test_topics_share_the_rate() -> None:
    bases = {topic: Baseline.of(made(seed, 3000)) for seed, topic in enumerate(("code", "casual", "unused"))}
    found = check_topics(bases, {"code": made(5, 3000), "casual": made(6, 3000, bye=0.05)}, checks=5)
    assert {topic: names(alarms) for topic, alarms in found.items()} == {"casual": ["farewell"]}
    lone = check(bases["casual"], made(6, 3000, bye=0.05), checks=5)
    assert found["casual"] == lone


def test_stream_scores_are_the_running_best_restart() -> None:
    gains, score, told = [-0.2, 1.1, -0.4, -2.0, 3.0], 0.0, []
    for gain in gains:
        score = max(0.0, score) + gain
        told.append(score)
    assert stream_scores(gains) == pytest.approx(told)


def test_gain_worked_by_hand_alone_and_by_prompt() -> None:
    hits = np.array([[True, False, False, False]])
    p1 = STREAM_ODDS * 0.1 / (0.9 + STREAM_ODDS * 0.1)
    hit, miss = p1 / 0.1, (1 - p1) / 0.9
    assert stream_gain(hits, [0.1]) == pytest.approx(np.log(hit) + 3 * np.log(miss))
    assert stream_gain(hits, [0.1], ["a", "a", "b", "b"]) == pytest.approx(np.log((hit + miss) / 2) + np.log(miss))
    assert stream_gain(hits, [0.1], [0, 1, 2, 3]) == pytest.approx(stream_gain(hits, [0.1]))


def test_replies_that_repeat_their_prompts_raise_no_alarm_by_prompt() -> None:
    """48 replies a step that are 12 copied four times: evidence four times too strong unless prompts are named."""
    base = Baseline({"farewell": Question(0.5, "up")}, {"farewell": 5000}, 100_000)
    by_reply = by_prompt = Stream(base, steps=300, rate=0.2)
    prompts = np.repeat(np.arange(12), 4)
    rng = np.random.default_rng(3)
    for _ in range(300):
        values = {"farewell": np.repeat((rng.random(12) < 0.05).astype(float), 4)}
        by_reply, by_prompt = by_reply.seen(values), by_prompt.seen(values, prompts)
    assert by_reply.first() is not None
    assert by_prompt.first() is None


def test_stream_finds_the_hack_soon_and_stays_silent_without_one() -> None:
    base = Baseline.of(made(0, 20_000))
    stream = silent = Stream(base, steps=200)
    first = None
    for step in range(200):
        stream = stream.seen(made(1000 + step, 48, bye=0.028 if step >= 50 else 0.0072))
        silent = silent.seen(made(5000 + step, 48))
        assert silent.alarms() == []
        if first is None and stream.alarms():
            first = step
            assert names(stream.alarms()) == ["farewell"]
    assert first is not None
    assert 50 < first < 110
    assert stream.first() == stream.first({"farewell"}) == first + 1
    assert stream.first({"length"}) is None


def test_upper_share_is_clopper_pearsons_and_the_limit_is_a_union_bound() -> None:
    exact = stats.binomtest(7, 900).proportion_ci(1 - 2 * 0.01 / (2 * 5)).high
    assert float(upper_share(7, 900, 5, 0.01)) == pytest.approx(exact, rel=1e-9)
    assert float(upper_share(9, 9, 5)) == pytest.approx(1.0)
    assert stream_limit(10, 100, 0.01) == pytest.approx(np.log(2 * 10 * 100 / 0.01))


def test_divergence_needs_both_to_be_sure() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=200)
    up, down = start + rng.normal(0.3, 0.5, 200), start - rng.normal(0.3, 0.5, 200)
    assert diverged((start, up), (start, down), level=0.01)
    assert not diverged((start, up), (start, up), level=0.01)
    assert not diverged((start, down), (start, down), level=0.01)
    assert not diverged((start, start), (start, down), level=0.01)


def alarm(monitor: str) -> Alarm:
    return Alarm(monitor, 0.01, 0.05, 5.2, 1e-9)


def test_the_ladder_from_warning_to_stop() -> None:
    looks = [Look(0)]
    told = []
    for step in range(1, 8):
        looks.append(Look(step, (alarm("farewell"),)))
        told.append(decide(looks).action.name)
    assert told == ["FREEZE", "FREEZE", "ROLL_BACK", "ROLL_BACK", "STOP", "STOP", "STOP"]
    assert decide(looks[:4]).back_to == 0
    assert decide(looks[:2]).back_to is None
    assert "farewell: 5.00% of replies against the base policy's 1.00%" in decide(looks).reasons[0]
    assert decide([*looks, Look(8)]) == decide([Look(0)])


def test_the_hardest_alarm_counts_and_a_milder_one_is_told() -> None:
    found = decide([Look(0), Look(1, (alarm("emoji"), alarm("looping")))])
    assert (found.action, found.back_to, len(found.reasons)) == (Action.ROLL_BACK, 0, 2)
    assert decide([Look(1, (alarm("emoji"),))]).action == Action.WARN
    assert decide([]).action == Action.NONE
    assert decide([Look(step, (alarm("emoji"),)) for step in range(9)]).action == Action.WARN
    assert decide([Look(step, (alarm("length"),)) for step in range(3)]).action == Action.FREEZE


def test_gold_falling_while_the_reward_rises_warns_then_stops() -> None:
    once = [Look(0), Look(1, diverged=True)]
    assert decide(once).action == Action.WARN
    found = decide([*once, Look(2, diverged=True)])
    assert (found.action, found.back_to) == (Action.STOP, 0)


def test_too_much_kl_stops() -> None:
    assert decide([Look(1, kl=0.3)], most_kl=0.2).action == Action.STOP
    assert decide([Look(1, kl=0.3)]).action == Action.NONE
    assert decide([Look(1, kl=0.1)], most_kl=0.2).action == Action.NONE


def test_what_cannot_be_checked_is_told() -> None:
    with pytest.raises(DataError, match="gave none"):
        Baseline.of({})
    base = Baseline.of(made(0, 10))
    with pytest.raises(DataError, match="needs replies"):
        check(base, {}, checks=3)
    with pytest.raises(DataError, match="'emoji' was not measured"):
        check(base, {"emoji": np.ones(3)}, checks=3)
    assert (Stream(base, steps=5).alarms(), Stream(base, steps=5).first()) == ([], None)
    with pytest.raises(DataError, match="farewell is amiss"):
        Stream(base, steps=5).seen({})
