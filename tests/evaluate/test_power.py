"""The planner: the method's worked sample sizes, statsmodels' power back again, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower

from rluf.errors import SettingsError
from rluf.evaluate.power import Question, plan, users_needed
from rluf.evaluate.sequential import width_factor


@pytest.mark.parametrize(
    ("base", "lift", "users"),
    [
        (0.005, 0.0973, 346_000),
        (0.005, 0.28, 45_000),
        (0.01, 0.0973, 172_000),
        (0.02, 0.28, 11_000),
        (0.05, 0.28, 4300),
    ],
)
def test_the_published_lifts_need_so_many_responses(base: float, lift: float, users: int) -> None:
    assert plan(Question(base, lift))["designs"]["one_look"]["control_users"] == pytest.approx(users, rel=0.02)


def test_the_sample_size_gives_the_power_back() -> None:
    total = users_needed(0.1, 4.0, alpha=0.01, power=0.9, treated=0.25)
    power = NormalIndPower().power(0.05, nobs1=0.75 * total, alpha=0.01, ratio=1 / 3)
    assert power == pytest.approx(0.9, abs=1e-9)


def test_what_makes_it_dearer_and_cheaper() -> None:
    plain = Question(0.05, 0.1, responses=10.0, daily_users=1000.0)
    base = plan(plain)
    alike = plan(replace(plain, icc=0.1))
    assert alike["design_effect"] == pytest.approx(1.9)
    users = {name: one["control_users"] for name, one in plan(replace(plain, correlation=0.6))["designs"].items()}
    assert users["one_look_cuped"] == pytest.approx(0.64 * users["one_look"], rel=1e-3)
    assert alike["designs"]["one_look"]["control_users"] == pytest.approx(
        1.9 * base["designs"]["one_look"]["control_users"], rel=1e-3
    )
    inflation = ((width_factor(0.05) + 0.841621) / (1.959964 + 0.841621)) ** 2
    assert base["sequential_inflation"] == pytest.approx(inflation, rel=1e-5)
    one = base["designs"]["one_look"]
    assert one["days"] == -(-2 * one["control_users"] // 1000)
    assert one["weeks"] == -(-one["days"] // 7)
    assert plan(replace(plain, metrics=5))["alpha_each"] == pytest.approx(0.01)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 0.4), st.floats(0.02, 0.5))
def test_a_smaller_lift_never_needs_fewer_users(base: float, lift: float) -> None:
    wide, narrow = (plan(Question(base, one))["designs"]["one_look"]["control_users"] for one in (lift, lift / 2))
    assert narrow >= wide


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (Question(0.0, 0.1), "--base-rate 0"),
        (Question(0.6, 0.9), "from 0.6 to 1.14"),
        (Question(0.1, 0.0), "--lift 0"),
        (Question(0.1, 0.1, power=1.0), "--power 1"),
        (Question(0.1, 0.1, icc=2.0), "--icc 2"),
        (Question(0.1, 0.1, responses=0.5), "--responses-per-user 0.5"),
        (Question(0.1, 0.1, daily_users=0.0), "--daily-users 0"),
    ],
)
def test_numbers_that_make_no_experiment_are_refused(question: Question, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        plan(question)
