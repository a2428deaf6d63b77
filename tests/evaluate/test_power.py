"""A/B test planner: published sample sizes, agreement with statsmodels, and refused inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower

from rluf.errors import SettingsError
from rluf.evaluate.power import PowerQuery, compute_required_users, plan_experiment
from rluf.evaluate.sequential import compute_sequential_width


@pytest.mark.parametrize(
    ("base_rate", "lift", "control_users"),
    [
        (0.005, 0.0973, 346_000),
        (0.005, 0.28, 45_000),
        (0.01, 0.0973, 172_000),
        (0.02, 0.28, 11_000),
        (0.05, 0.28, 4300),
    ],
)
def test_published_lifts_need_the_published_sample_size(base_rate: float, lift: float, control_users: int) -> None:
    cost = plan_experiment(PowerQuery(base_rate, lift))["designs"]["one_look"]
    assert cost["control_users"] == pytest.approx(control_users, rel=0.02)


def test_the_sample_size_has_the_requested_power() -> None:
    total = compute_required_users(0.1, 4.0, alpha=0.01, power=0.9, treated_share=0.25)
    power = NormalIndPower().power(0.05, nobs1=0.75 * total, alpha=0.01, ratio=1 / 3)
    assert power == pytest.approx(0.9, abs=1e-9)


def test_icc_cuped_and_sequential_looks_change_the_cost() -> None:
    query = PowerQuery(0.05, 0.1, responses=10.0, daily_users=1000.0)
    plan = plan_experiment(query)
    correlated = plan_experiment(replace(query, icc=0.1))
    assert correlated["design_effect"] == pytest.approx(1.9)
    designs = plan_experiment(replace(query, correlation=0.6))["designs"]
    control_users = {name: cost["control_users"] for name, cost in designs.items()}
    assert control_users["one_look_cuped"] == pytest.approx(0.64 * control_users["one_look"], rel=1e-3)
    assert correlated["designs"]["one_look"]["control_users"] == pytest.approx(
        1.9 * plan["designs"]["one_look"]["control_users"], rel=1e-3
    )
    inflation = ((compute_sequential_width(0.05) + 0.841621) / (1.959964 + 0.841621)) ** 2
    assert plan["sequential_inflation"] == pytest.approx(inflation, rel=1e-5)
    cost = plan["designs"]["one_look"]
    assert cost["days"] == -(-2 * cost["control_users"] // 1000)
    assert cost["weeks"] == -(-cost["days"] // 7)
    assert plan_experiment(replace(query, metrics=5))["alpha_each"] == pytest.approx(0.01)


@settings(max_examples=25)
@given(st.floats(0.01, 0.4), st.floats(0.02, 0.5))
def test_a_smaller_lift_never_needs_fewer_users(base_rate: float, lift: float) -> None:
    large_lift_users, small_lift_users = (
        plan_experiment(PowerQuery(base_rate, value))["designs"]["one_look"]["control_users"]
        for value in (lift, lift / 2)
    )
    assert small_lift_users >= large_lift_users


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (PowerQuery(0.0, 0.1), "--base-rate 0"),
        (PowerQuery(0.6, 0.9), "from 0.6 to 1.14"),
        (PowerQuery(0.1, 0.0), "--lift 0"),
        (PowerQuery(0.1, 0.1, power=1.0), "--power 1"),
        (PowerQuery(0.1, 0.1, icc=2.0), "--icc 2"),
        (PowerQuery(0.1, 0.1, responses=0.5), "--responses-per-user 0.5"),
        (PowerQuery(0.1, 0.1, daily_users=0.0), "--daily-users 0"),
    ],
)
def test_invalid_inputs_are_refused(query: PowerQuery, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan_experiment(query)
