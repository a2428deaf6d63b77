"""How many users and days an experiment needs before it is worth starting.

The sample size is that of the two-sided normal test (statsmodels' NormalIndPower). Responses of one user are alike, so
the variance of a user's rate is p (1 - p) (1 + (m - 1) ICC) / m for m responses; CUPED takes off the squared
correlation; always-valid looking costs the squared ratio of the boundaries.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from rluf.errors import SettingsError
from rluf.evaluate.sequential import width_factor

DAYS_OF_WEEK = 7


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the planner.

    `base_rate` is love per response of the control, `lift` the relative change to be found, `responses` per user in the
    experiment, `icc` the correlation of two responses' hearts within a user, `correlation` of a user's rate with the
    pre-period's (0: no CUPED), `metrics` how many share alpha (the first of Holm's levels), `daily_users` new users a
    day over both arms, `treated` the share of users in the treatment arm.
    """

    base_rate: float
    lift: float
    responses: float = 1.0
    icc: float = 0.0
    correlation: float = 0.0
    alpha: float = 0.05
    power: float = 0.8
    metrics: int = 1
    treated: float = 0.5
    daily_users: float | None = None


def check(question: Question) -> None:
    """SettingsError that names the value and its range."""
    q = question
    limits = (
        ("base-rate", q.base_rate, 0.0, 1.0), ("alpha", q.alpha, 0.0, 1.0), ("power", q.power, 0.0, 1.0),
        ("treated", q.treated, 0.0, 1.0),
    )  # fmt: skip
    for name, value, low, high in limits:
        if not low < value < high:
            raise SettingsError(f"--{name} {value:g} must lie between {low:g} and {high:g}")
    if q.lift == 0.0 or not 0.0 < q.base_rate * (1.0 + q.lift) < 1.0:
        raise SettingsError(
            f"--lift {q.lift:g} would take the rate from {q.base_rate:g} to {q.base_rate * (1 + q.lift):g}; "
            "choose a lift other than 0 that keeps the rate between 0 and 1"
        )
    if q.responses < 1.0 or q.metrics < 1:
        raise SettingsError(f"--responses-per-user {q.responses:g} and the {q.metrics} metrics must be 1 or more")
    if not 0.0 <= q.icc <= 1.0 or not -1.0 < q.correlation < 1.0:
        raise SettingsError(f"--icc {q.icc:g} must lie in [0, 1] and --correlation {q.correlation:g} in (-1, 1)")
    if q.daily_users is not None and q.daily_users <= 0.0:
        raise SettingsError(f"--daily-users {q.daily_users:g} must be above 0")


def users_needed(effect: float, variance: float, *, alpha: float, power: float, treated: float = 0.5) -> float:
    """Users in both arms to find a difference `effect` of means when one user's value has that `variance`."""
    from statsmodels.stats.power import NormalIndPower

    odds = treated / (1.0 - treated)
    control: float = NormalIndPower().solve_power(
        effect_size=abs(effect) / math.sqrt(variance), alpha=alpha, power=power, ratio=odds
    )
    return control * (1.0 + odds)


def design_effect(responses: float, icc: float) -> float:
    """By how much correlated responses of a user inflate the variance: 1 + (m - 1) ICC (Kish 1965)."""
    return 1.0 + (responses - 1.0) * icc


def plan(question: Question) -> dict[str, Any]:
    """Users over both arms and days for three designs: one look, one look with CUPED, always valid with CUPED.

    Days are rounded up, and to whole weeks beside it, since users differ by day of the week. SettingsError for numbers
    that make no experiment.
    """
    check(question)
    q = question
    alpha = q.alpha / q.metrics
    rates = q.base_rate, q.base_rate * (1.0 + q.lift)
    noise = sum(rate * (1.0 - rate) for rate in rates) / 2.0
    variance = noise * design_effect(q.responses, q.icc) / q.responses
    single = users_needed(rates[1] - rates[0], variance, alpha=alpha, power=q.power, treated=q.treated)
    adjusted = single * (1.0 - q.correlation**2)
    z_power = float(stats.norm.ppf(q.power))
    reach = float(stats.norm.isf(alpha / 2.0)) + z_power
    inflation = ((width_factor(alpha) + z_power) / reach) ** 2
    designs = {"one_look": single, "one_look_cuped": adjusted, "always_valid_cuped": adjusted * inflation}
    return {
        "question": asdict(q),
        "rates": list(rates),
        "alpha_each": alpha,
        "design_effect": design_effect(q.responses, q.icc),
        "sequential_inflation": inflation,
        "designs": {name: _cost(users, q) for name, users in designs.items()},
    }


def _cost(users: float, question: Question) -> dict[str, Any]:
    control = math.ceil(users * (1.0 - question.treated))
    treated = math.ceil(users * question.treated)
    total = control + treated
    days = None if question.daily_users is None else math.ceil(total / question.daily_users)
    weeks = None if days is None else math.ceil(days / DAYS_OF_WEEK)
    return {
        "control_users": control,
        "treatment_users": treated,
        "responses": math.ceil(total * question.responses),
        "days": days,
        "weeks": weeks,
    }
