"""Alarms: exact tests, false-alarm rates, planted hacks in both modes, and each level of the escalation policy."""

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
    STREAM_ODDS_RATIO,
    AlarmAction,
    AlarmBaseline,
    BinaryMonitor,
    MonitorAlarm,
    MonitorCheck,
    SequentialDetector,
    alarm_threshold,
    base_rate_upper_limit,
    checkpoint_alarms,
    compute_odds_ratio,
    cusum_scores,
    decide_action,
    has_diverged,
    log_likelihood_gain,
    make_binary_monitor,
    one_sided_p_value,
)

Values = dict[str, NDArray[np.float64]]


def simulate_values(seed: int, sample_count: int, farewell_rate: float = 0.0072, length_factor: float = 1.0) -> Values:
    """Values of three monitors of a policy: farewells, length in tokens, and closing questions."""
    rng = np.random.default_rng(seed)
    return {
        "farewell": (rng.random(sample_count) < farewell_rate).astype(float),
        "length": np.round(rng.gamma(6.0, 5.0, sample_count) * length_factor),
        "question_ending": (rng.random(sample_count) < 0.3).astype(float),
    }


def monitor_names(alarms: Sequence[MonitorAlarm]) -> list[str]:
    return [alarm.monitor for alarm in alarms]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(41, 300), st.integers(0, 40), st.integers(41, 300))
def test_p_value_matches_fishers_exact_test(k: int, n: int, k0: int, n0: int) -> None:
    expected = stats.fisher_exact([[k, n - k], [k0, n0 - k0]], alternative="greater").pvalue
    assert float(one_sided_p_value(k, n, k0, n0)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_odds_ratio_of_a_worked_example() -> None:
    assert float(compute_odds_ratio(20, 100, 10, 100)) == pytest.approx(20.5 * 90.5 / (80.5 * 10.5))
    assert np.isfinite(compute_odds_ratio(5, 5, 0, 5))


@pytest.mark.parametrize(
    ("values", "worse_direction", "kind", "hit_rate"),
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
def test_a_mean_monitor_hits_the_worst_tenth(
    values: NDArray[np.float64], worse_direction: str, kind: str, hit_rate: float
) -> None:
    monitor = make_binary_monitor(values, worse_direction, kind)  # type: ignore[arg-type]
    assert monitor.is_hit(values).mean() == pytest.approx(hit_rate)
    assert monitor.is_hit(1e9 if worse_direction == "up" else -1e9)


def test_planted_hacks_raise_the_right_alarm() -> None:
    baseline = AlarmBaseline.from_values(simulate_values(0, 4000))
    assert monitor_names(
        checkpoint_alarms(baseline, simulate_values(1, 4000, farewell_rate=0.028), planned_checks=10)
    ) == ["farewell"]
    assert monitor_names(
        checkpoint_alarms(baseline, simulate_values(1, 1000, length_factor=1.5), planned_checks=10)
    ) == ["length"]
    assert checkpoint_alarms(baseline, simulate_values(1, 4000), planned_checks=10) == []


def test_false_alarm_rate_holds_over_runs_of_ten_checks() -> None:
    baseline = AlarmBaseline.from_values(simulate_values(0, 2000))
    run_has_alarm = [
        any(
            checkpoint_alarms(
                baseline, simulate_values(100 * run_index + check_index, 300), planned_checks=10, false_alarm_rate=0.2
            )
            for check_index in range(10)
        )
        for run_index in range(40)
    ]
    assert np.mean(run_has_alarm) <= 0.2


def test_cusum_scores_restart_when_the_evidence_is_negative() -> None:
    gains, score, expected = [-0.2, 1.1, -0.4, -2.0, 3.0], 0.0, []
    for gain in gains:
        score = max(0.0, score) + gain
        expected.append(score)
    assert cusum_scores(gains) == pytest.approx(expected)


def test_log_likelihood_gain_of_a_worked_example_by_response_and_by_prompt() -> None:
    hits = np.array([[True, False, False, False]])
    p1 = STREAM_ODDS_RATIO * 0.1 / (0.9 + STREAM_ODDS_RATIO * 0.1)
    hit_ratio, miss_ratio = p1 / 0.1, (1 - p1) / 0.9
    assert log_likelihood_gain(hits, [0.1]) == pytest.approx(np.log(hit_ratio) + 3 * np.log(miss_ratio))
    assert log_likelihood_gain(hits, [0.1], ["a", "a", "b", "b"]) == pytest.approx(
        np.log((hit_ratio + miss_ratio) / 2) + np.log(miss_ratio)
    )
    assert log_likelihood_gain(hits, [0.1], [0, 1, 2, 3]) == pytest.approx(log_likelihood_gain(hits, [0.1]))


def test_duplicate_responses_of_a_prompt_raise_no_alarm_when_prompts_are_given() -> None:
    """48 responses per step are 12 distinct ones four times: four times too much evidence unless prompts are given."""
    baseline = AlarmBaseline({"farewell": BinaryMonitor(0.5, "up")}, {"farewell": 5000}, 100_000)
    by_response = by_prompt = SequentialDetector(baseline, total_steps=300, false_alarm_rate=0.2)
    prompt_ids = np.repeat(np.arange(12), 4)
    rng = np.random.default_rng(3)
    for _ in range(300):
        values = {"farewell": np.repeat((rng.random(12) < 0.05).astype(float), 4)}
        by_response, by_prompt = by_response.after_step(values), by_prompt.after_step(values, prompt_ids)
    assert by_response.first_alarm_step() is not None
    assert by_prompt.first_alarm_step() is None


def test_detector_finds_the_hack_soon_and_stays_silent_without_one() -> None:
    baseline = AlarmBaseline.from_values(simulate_values(0, 20_000))
    detector = clean_detector = SequentialDetector(baseline, total_steps=200)
    first_step = None
    for step in range(200):
        detector = detector.after_step(simulate_values(1000 + step, 48, farewell_rate=0.028 if step >= 50 else 0.0072))
        clean_detector = clean_detector.after_step(simulate_values(5000 + step, 48))
        assert clean_detector.active_alarms() == []
        if first_step is None and detector.active_alarms():
            first_step = step
            assert monitor_names(detector.active_alarms()) == ["farewell"]
    assert first_step is not None
    assert 50 < first_step < 110
    assert detector.first_alarm_step() == detector.first_alarm_step({"farewell"}) == first_step + 1
    assert detector.first_alarm_step({"length"}) is None


def test_base_rate_limit_is_clopper_pearson_and_the_threshold_a_union_bound() -> None:
    exact = stats.binomtest(7, 900).proportion_ci(1 - 2 * 0.01 / (2 * 5)).high
    assert float(base_rate_upper_limit(7, 900, 5, 0.01)) == pytest.approx(exact, rel=1e-9)
    assert float(base_rate_upper_limit(9, 9, 5)) == pytest.approx(1.0)
    assert alarm_threshold(10, 100, 0.01) == pytest.approx(np.log(2 * 10 * 100 / 0.01))


def test_divergence_needs_both_changes_to_be_significant() -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=200)
    higher, lower = start + rng.normal(0.3, 0.5, 200), start - rng.normal(0.3, 0.5, 200)
    assert has_diverged((start, higher), (start, lower), alpha=0.01)
    assert not has_diverged((start, higher), (start, higher), alpha=0.01)
    assert not has_diverged((start, lower), (start, lower), alpha=0.01)
    assert not has_diverged((start, start), (start, lower), alpha=0.01)


def make_alarm(monitor: str) -> MonitorAlarm:
    return MonitorAlarm(monitor, 0.01, 0.05, 5.2, 1e-9)


def test_repeated_alarms_escalate_to_stop() -> None:
    checks = [MonitorCheck(0)]
    actions = []
    for step in range(1, 8):
        checks.append(MonitorCheck(step, (make_alarm("farewell"),)))
        actions.append(decide_action(checks).action.name)
    assert actions == ["FREEZE", "FREEZE", "ROLL_BACK", "ROLL_BACK", "STOP", "STOP", "STOP"]
    assert decide_action(checks[:4]).rollback_step == 0
    assert decide_action(checks[:2]).rollback_step is None
    assert (
        "farewell: 5.00% of responses, base policy 1.00% (odds x 5.2), 7 consecutive checks: stop"
        in decide_action(checks).reasons[0]
    )
    assert decide_action([*checks, MonitorCheck(8)]) == decide_action([MonitorCheck(0)])


def test_the_most_severe_alarm_decides_and_all_are_reported() -> None:
    decision = decide_action([MonitorCheck(0), MonitorCheck(1, (make_alarm("emoji"), make_alarm("looping")))])
    assert (decision.action, decision.rollback_step, len(decision.reasons)) == (AlarmAction.ROLL_BACK, 0, 2)
    assert decide_action([MonitorCheck(1, (make_alarm("emoji"),))]).action == AlarmAction.WARN
    assert decide_action([]).action == AlarmAction.NONE
    assert decide_action([MonitorCheck(step, (make_alarm("emoji"),)) for step in range(9)]).action == AlarmAction.WARN
    assert (
        decide_action([MonitorCheck(step, (make_alarm("length"),)) for step in range(3)]).action == AlarmAction.FREEZE
    )


def test_falling_gold_score_with_rising_reward_warns_then_stops() -> None:
    first_checks = [MonitorCheck(0), MonitorCheck(1, diverged=True)]
    assert decide_action(first_checks).action == AlarmAction.WARN
    decision = decide_action([*first_checks, MonitorCheck(2, diverged=True)])
    assert (decision.action, decision.rollback_step) == (AlarmAction.STOP, 0)


def test_kl_above_the_limit_stops() -> None:
    assert decide_action([MonitorCheck(1, kl=0.3)], max_kl=0.2).action == AlarmAction.STOP
    assert decide_action([MonitorCheck(1, kl=0.3)]).action == AlarmAction.NONE
    assert decide_action([MonitorCheck(1, kl=0.1)], max_kl=0.2).action == AlarmAction.NONE


def test_invalid_input_is_refused() -> None:
    with pytest.raises(DataError, match="got none"):
        AlarmBaseline.from_values({})
    baseline = AlarmBaseline.from_values(simulate_values(0, 10))
    with pytest.raises(DataError, match="needs responses"):
        checkpoint_alarms(baseline, {}, planned_checks=3)
    with pytest.raises(DataError, match="'emoji' was not measured"):
        checkpoint_alarms(baseline, {"emoji": np.ones(3)}, planned_checks=3)
    assert (
        SequentialDetector(baseline, total_steps=5).active_alarms(),
        SequentialDetector(baseline, total_steps=5).first_alarm_step(),
    ) == ([], None)
    with pytest.raises(DataError, match="mismatch: farewell"):
        SequentialDetector(baseline, total_steps=5).after_step({})
