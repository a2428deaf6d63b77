"""Sample size of an A/B test on a rate: users and days for a lift, a power and a design.

The sample size is that of the two-sided normal test (statsmodels' NormalIndPower). Responses of one user are
correlated, so the variance of an arm's rate over U users with m responses each is p (1 - p) D / (U m), where
D = 1 + (m' - 1) ICC. If users differ in activity, m' = E[m^2] / E[m] = m (1 + CV^2): active users weigh more, and with
the usual formula (m' = m, Kish 1965) the experiment is too short. CUPED reduces the variance by the squared
correlation; always-valid intervals cost the squared ratio of the boundaries.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from rluf.errors import SettingsError
from rluf.evaluate.sequential import compute_sequential_width

DAYS_PER_WEEK = 7


@dataclass(frozen=True, slots=True)
class PowerQuery:
    """Inputs of the planner.

    `base_rate` is the love rate per response of the control, `lift` the relative change to detect, `responses` per user
    during the experiment and `activity_cv` their standard deviation over users divided by their mean, `icc` the
    correlation of hearts on two responses within a user, `correlation` that of user rates with the pre-period (0: no
    CUPED), `metrics` the number of tests that share alpha (primary metrics times treatments; the first of Holm's
    levels), `daily_users` new users per day over both arms, `treated` the share of users in the treatment arm.
    """

    base_rate: float
    lift: float
    responses: float = 1.0
    activity_cv: float = 0.0
    icc: float = 0.0
    correlation: float = 0.0
    alpha: float = 0.05
    power: float = 0.8
    metrics: int = 1
    treated: float = 0.5
    daily_users: float | None = None


def check_query(query: PowerQuery) -> None:
    """Raise SettingsError that names an invalid value and its range."""
    limits = (
        ("base-rate", query.base_rate, 0.0, 1.0), ("alpha", query.alpha, 0.0, 1.0), ("power", query.power, 0.0, 1.0),
        ("treated", query.treated, 0.0, 1.0),
    )  # fmt: skip
    for name, value, low, high in limits:
        if not low < value < high:
            raise SettingsError(f"--{name} {value:g} must be between {low:g} and {high:g}")
    if query.lift == 0.0 or not 0.0 < query.base_rate * (1.0 + query.lift) < 1.0:
        raise SettingsError(
            f"--lift {query.lift:g} would move the rate from {query.base_rate:g} to "
            f"{query.base_rate * (1 + query.lift):g}; choose a lift other than 0 with a rate between 0 and 1"
        )
    if query.responses < 1.0 or query.metrics < 1:
        raise SettingsError(
            f"--responses-per-user {query.responses:g} and the {query.metrics} metrics must be 1 or more"
        )
    if not 0.0 <= query.icc <= 1.0 or not -1.0 < query.correlation < 1.0:
        raise SettingsError(f"--icc {query.icc:g} must be in [0, 1] and --correlation {query.correlation:g} in (-1, 1)")
    if not 0.0 <= query.activity_cv < 1000.0:
        raise SettingsError(
            f"--activity-cv {query.activity_cv:g} must be 0 or more: the standard deviation of responses per user "
            "divided by their mean"
        )
    if query.daily_users is not None and query.daily_users <= 0.0:
        raise SettingsError(f"--daily-users {query.daily_users:g} must be above 0")


def compute_required_users(
    effect: float, variance: float, *, alpha: float, power: float, treated_share: float = 0.5
) -> float:
    """Users over both arms to detect a difference `effect` of means when the value of a user has that `variance`."""
    from statsmodels.stats.power import NormalIndPower

    treatment_ratio = treated_share / (1.0 - treated_share)
    control_users: float = NormalIndPower().solve_power(
        effect_size=abs(effect) / math.sqrt(variance), alpha=alpha, power=power, ratio=treatment_ratio
    )
    return control_users * (1.0 + treatment_ratio)


def compute_design_effect(responses: float, icc: float, activity_cv: float = 0.0) -> float:
    """Factor by which correlated responses of a user inflate the variance: 1 + (E[m^2] / E[m] - 1) ICC."""
    return 1.0 + (responses * (1.0 + activity_cv**2) - 1.0) * icc


def plan_experiment(query: PowerQuery) -> dict[str, Any]:
    """Users and days for three designs: one look, one look with CUPED, always valid with CUPED.

    Days are rounded up, and given in full weeks as well, because users differ by day of the week. SettingsError for
    invalid inputs.
    """
    check_query(query)
    alpha = query.alpha / query.metrics
    rates = query.base_rate, query.base_rate * (1.0 + query.lift)
    design_effect = compute_design_effect(query.responses, query.icc, query.activity_cv)
    # The variance at which two arms of equal variance are as precise: the smaller arm's rate counts for more.
    noise = query.treated * rates[0] * (1.0 - rates[0]) + (1.0 - query.treated) * rates[1] * (1.0 - rates[1])
    variance = noise * design_effect / query.responses
    # CUPED and sequential looks change the sample size in proportion to the variance and the squared boundary.
    single = compute_required_users(
        rates[1] - rates[0], variance, alpha=alpha, power=query.power, treated_share=query.treated
    )
    adjusted = single * (1.0 - query.correlation**2)
    z_power = float(stats.norm.ppf(query.power))
    single_look_factor = float(stats.norm.isf(alpha / 2.0)) + z_power
    inflation = ((compute_sequential_width(alpha) + z_power) / single_look_factor) ** 2
    designs = {"one_look": single, "one_look_cuped": adjusted, "always_valid_cuped": adjusted * inflation}
    return {
        "question": asdict(query),
        "rates": list(rates),
        "alpha_each": alpha,
        "design_effect": design_effect,
        "sequential_inflation": inflation,
        "designs": {name: _compute_design_cost(user_count, query) for name, user_count in designs.items()},
    }


def _compute_design_cost(user_count: float, query: PowerQuery) -> dict[str, Any]:
    # Whole users per arm first: rounding the total would leave the smaller arm short.
    control = math.ceil(user_count * (1.0 - query.treated))
    treated = math.ceil(user_count * query.treated)
    total = control + treated
    days = None if query.daily_users is None else math.ceil(total / query.daily_users)
    weeks = None if days is None else math.ceil(days / DAYS_PER_WEEK)
    return {
        "control_users": control,
        "treatment_users": treated,
        "responses": math.ceil(total * query.responses),
        "days": days,
        "weeks": weeks,
    }
