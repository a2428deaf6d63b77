"""Small counts against exact tests: one response per user, a few users, no event at all, tied values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_design import ExperimentDesign, Guardrail, QuantileMetric
from rluf.evaluate.ab_tables import format_abtest_report
from rluf.evaluate.abtest import main
from rluf.evaluate.effects import UserTotals, estimate_ratio_effect, rerandomize_quantiles
from rluf.evaluate.events import EventLog


def make_users(hits: int, users: int) -> UserTotals:
    """Users with one response each, `hits` of them with a heart."""
    return UserTotals.from_arrays(np.repeat([1, 0], [hits, users - hits]))


@pytest.mark.parametrize(
    ("control", "treatment"),
    [((10, 2000), (1, 20)), ((10, 2000), (0, 20)), ((5, 500), (2, 50)), ((3, 5), (0, 5)), ((30, 60), (15, 20))],
)
def test_rerandomized_p_is_fishers_where_users_have_one_response(
    control: tuple[int, int], treatment: tuple[int, int]
) -> None:
    """Many re-randomized arms tie with the observed one: all of them are as extreme, whatever their last digit."""
    pair = make_users(*control), make_users(*treatment)
    effect = estimate_ratio_effect(*pair, quantiles=rerandomize_quantiles([pair])[0])
    hearts = stats.hypergeom(control[1] + treatment[1], control[0] + treatment[0], treatment[1])
    exact = 2 * min(hearts.cdf(treatment[0]), hearts.sf(treatment[0] - 1))
    assert float(effect.p) == pytest.approx(min(1.0, exact), abs=0.03)
    assert (float(effect.low) > 0 or float(effect.high) < 0) == (float(effect.p) < 0.05)


def make_log(responses: list[tuple[int, int, float]], *, values: dict[str, list[float]] | None = None) -> EventLog:
    """A log of (user, arm, love); `values` are further columns."""
    users, arms, love = (np.array(column) for column in zip(*responses, strict=True))
    return EventLog(
        user_index=users.astype(int), conversation_index=np.arange(len(users)), arm_index=arms.astype(int),
        arm_names=("control", "treatment"), user_ids=tuple(map(str, range(int(users.max()) + 1))),
        timestamps=np.arange(len(users)) * 600.0, duplicate_count=0,
        metric_values={"love": love.astype(float), **{name: np.array(v) for name, v in (values or {}).items()}},
    )  # fmt: skip


def make_arms(control: tuple[int, int], treatment: tuple[int, int]) -> EventLog:
    """A log of users with one response each: (hearts, users) of both arms."""
    hits = [(arm, 1.0) for arm, (k, _) in enumerate((control, treatment)) for _ in range(k)]
    misses = [(arm, 0.0) for arm, (k, n) in enumerate((control, treatment)) for _ in range(n - k)]
    return make_log([(user, *row) for user, row in enumerate([*hits, *misses])])


DESIGN = ExperimentDesign("control", "treatment")
SHARE_METRICS = ("love", "users_who_loved")


@pytest.mark.parametrize("metric", SHARE_METRICS)
@pytest.mark.parametrize(("control", "treatment"), [((10, 2000), (1, 20)), ((2, 2), (0, 2)), ((3, 5), (0, 5))])
def test_a_few_users_prove_nothing(metric: str, control: tuple[int, int], treatment: tuple[int, int]) -> None:
    result = analyze_experiment(make_arms(control, treatment), replace(DESIGN, primary_names=(metric,)))
    assert result["metrics"][metric]["primary"]["verdict"] == "undecided"


@pytest.mark.parametrize("metric", SHARE_METRICS)
def test_no_heart_in_a_small_arm_does_not_fail_a_guardrail(metric: str) -> None:
    design = replace(DESIGN, guardrails=(Guardrail(metric, -0.1, is_relative=True),), shares=(0.99, 0.01))
    result = analyze_experiment(make_arms((10, 2000), (0, 20)), design)["metrics"][metric]
    assert result["guardrail"]["verdict"] == "undecided"
    assert result["guardrail"]["more_users"] > 0


@pytest.mark.parametrize(("control", "treatment"), [((0, 2), (2, 2)), ((0, 6), (3, 6)), ((2, 200), (1, 20))])
def test_a_guardrail_of_a_small_arm_counts_ties(control: tuple[int, int], treatment: tuple[int, int]) -> None:
    """The margin moves the statistic between the few values of a small arm: p is not below that of the next one."""
    design = replace(DESIGN, guardrails=(Guardrail("love", -0.1, is_relative=True),))
    guardrail = analyze_experiment(make_arms(control, treatment), design)["metrics"]["love"]["guardrail"]
    # Exact one-sided p-values without a margin: 0.17, 0.09 and 0.25.
    assert guardrail["verdict"] == "undecided"
    assert guardrail["p"] > 0.03


@pytest.mark.parametrize(("users", "verdict"), [(2, "undecided"), (100, "undecided"), (400, "pass")])
@pytest.mark.parametrize("metric", SHARE_METRICS)
def test_no_heart_at_all_does_not_prove_that_nothing_was_lost(metric: str, users: int, verdict: str) -> None:
    """A share of 1% without an event in n users: (1 - 0.01)^n is below 0.025 from 368 users on."""
    design = replace(DESIGN, guardrails=(Guardrail(metric, -0.01, is_relative=False),))
    result = analyze_experiment(make_arms((0, users), (0, users)), design)["metrics"][metric]
    assert result["guardrail"]["verdict"] == verdict
    assert result["guardrail"]["p"] == pytest.approx(0.99**users)
    assert result["effect"]["high"] == pytest.approx(1 - 0.025 ** (1 / users))
    assert result["effect"]["p"] == 1.0


def test_without_events_the_users_needed_are_unknown_not_enough() -> None:
    report = analyze_experiment(make_arms((0, 100), (0, 100)), DESIGN)
    assert report["metrics"]["love"]["primary"] == {"verdict": "undecided", "more_users": None}
    assert "too few events to say how many more users" in format_abtest_report(report)


def test_crossed_responses_in_a_small_share_are_tested_exactly() -> None:
    """20 users with 20 responses each, one of them treated; 40 hearts, none of them under the treatment."""
    rows = [(user, int(n == 0), float(n in (1, 2))) for user in range(20) for n in range(20)]
    design = replace(DESIGN, is_crossed=True, shares=(0.95, 0.05), guardrails=(Guardrail("love", -0.1, True),))
    love = analyze_experiment(make_log(rows), design)["metrics"]["love"]
    exact = 2 * stats.hypergeom(400, 40, 20).cdf(0)
    assert love["p"] == pytest.approx(exact, abs=0.03)
    assert (love["primary"]["verdict"], love["guardrail"]["verdict"]) == ("undecided", "undecided")


def test_a_tied_quantile_that_is_equal_does_not_differ() -> None:
    """Half of the values or more are 0 in both arms: the medians are equal, whatever the shares of zeros."""
    rows = [(user, user % 2, 0.0) for user in range(600)]
    seconds = [float(user // 2 % 20 > (11 if user % 2 else 15)) * (user % 7 + 1) for user in range(600)]
    design = replace(DESIGN, quantile_metrics=(QuantileMetric("seconds", 0.5),), metric_names=("seconds_p50",))
    report = analyze_experiment(make_log(rows, values={"seconds": seconds}), design)
    result = report["metrics"]["seconds_p50"]
    assert (result["effect"]["difference"], result["p"], result["significant"]) == (0.0, 1.0, False)
    assert report["primary"] == ["seconds_p50"]
    assert result["primary"]["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guardrails": (Guardrail("love", -2.0, False),)}, r"love:-2 is in the metric's unit.*write love:-2%"),
        ({"guardrails": (Guardrail("love", -0.1, True), Guardrail("love", 0.1, True))}, "names 'love' 2 times"),
        ({"guardrails": (Guardrail("mood", -0.02, True),)}, "--guard mood: the control's value is -0.5, below zero"),
        ({"is_crossed": True, "primary_names": ("responses",)}, "'responses' is a metric of users.*--crossed"),
        ({"is_crossed": True, "guardrails": (Guardrail("users_who_loved", -0.1, True),)}, "is a metric of users"),
    ],
)  # fmt: skip
def test_designs_that_cannot_be_judged_are_refused(changes: dict[str, Any], message: str) -> None:
    log = make_log([(user, user % 2, float(user % 3 == 0)) for user in range(60)], values={"mood": [-0.5] * 60})
    with pytest.raises(DataError, match=message):
        analyze_experiment(log, replace(DESIGN, **changes))


@pytest.mark.parametrize(
    ("option", "value"), [("--planned-users", "-5"), ("--lift", "0"), ("--shares", "nan"), ("--seed", "-1")]
)
def test_options_without_a_meaning_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = [value, "0.5"] if option == "--shares" else [value]
    with pytest.raises(SystemExit) as exit_info:
        main(["--data", "x.jsonl", option, *values])
    assert exit_info.value.code == 2
    assert option in capsys.readouterr().err
