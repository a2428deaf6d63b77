"""Difference of quantiles of a numeric column between two arms, clustered by user.

The interval of a quantile is Woodruff's (1952): the interval of the share of values below it, by the delta method over
users, read off the distribution. Both arms' limits are combined as in Newcombe's method (MOVER: Zou, Donner 2008). The
p-value is that of the share of values below the quantile of both arms together (Mood's median test, clustered).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.effects import EffectEstimate, UserTotals, estimate_ratio_effect
from rluf.utils.stats import Floats, Ints

MIN_VALUES_BEYOND = 10
"""Minimum number of values that must lie beyond the quantile in each arm."""


def estimate_quantile_effect(
    arm_values: tuple[Floats, Floats], arm_users: tuple[Ints, Ints], level: float, *, confidence: float
) -> EffectEstimate:
    """Effect on the quantile `level` of values [N] of users [N] in each arm. DataError with too few values."""
    arms = []
    for values, users in zip(arm_values, arm_users, strict=True):
        present = ~np.isnan(values)
        if min(level, 1.0 - level) * present.sum() < MIN_VALUES_BEYOND:
            raise DataError(
                f"quantile {level:g} needs {MIN_VALUES_BEYOND} values beyond it in each arm, got {present.sum()} "
                "values in one; choose a quantile nearer to 0.5"
            )
        arms.append((values[present], np.unique(users[present], return_inverse=True)[1]))
    pooled = np.quantile(np.concatenate([values for values, _ in arms]), level)
    control_shares, treated_shares = (_sum_below(values, users, pooled) for values, users in arms)
    test = estimate_ratio_effect(control_shares, treated_shares, confidence=confidence)
    limits = [_compute_woodruff_limits(values, users, level, confidence) for values, users in arms]
    (q0, low0, high0), (q1, low1, high1) = limits
    low, high = _combine_limits(limits)
    z = float(stats.norm.ppf(0.5 + confidence / 2.0))
    lift = (np.nan, np.nan, np.nan)
    if min(low0, low1) > 0.0:
        log_low, log_high = _combine_limits([(np.log(a), np.log(b), np.log(c)) for a, b, c in limits])
        lift = tuple(float(np.expm1(value)) for value in (np.log(q1 / q0), log_low, log_high))  # type: ignore[assignment]
    as_array = np.asarray
    # Equal quantiles of tied values (a median of 0) do not differ, though the share of zeros may.
    p_value = as_array(1.0) if q0 == q1 else test.p
    return replace(
        test, p=p_value, control=as_array(q0), treatment=as_array(q1), difference=as_array(q1 - q0), low=as_array(low),
        high=as_array(high), error=as_array((high - low) / (2.0 * z)), lift=as_array(lift[0]),
        lift_low=as_array(lift[1]), lift_high=as_array(lift[2]),
        control_variance=as_array(((high0 - low0) / (2.0 * z)) ** 2),
        treatment_variance=as_array(((high1 - low1) / (2.0 * z)) ** 2),
    )  # fmt: skip


def _combine_limits(limits: list[tuple[float, float, float]]) -> tuple[float, float]:
    (q0, low0, high0), (q1, low1, high1) = limits
    # Limits of a difference from those of its parts, which need not be symmetric (MOVER; Zou, Donner 2008).
    difference = q1 - q0
    return (
        difference - float(np.hypot(q1 - low1, high0 - q0)),
        difference + float(np.hypot(high1 - q1, q0 - low0)),
    )


def _sum_below(values: Floats, users: Ints, threshold: float) -> UserTotals:
    return UserTotals.from_arrays(
        np.bincount(users, weights=(values <= threshold).astype(np.float64)), np.bincount(users)
    )


def _compute_woodruff_limits(
    values: Floats, users: Ints, level: float, confidence: float
) -> tuple[float, float, float]:
    # Woodruff (1952): the interval of the share below the quantile, mapped back to values by the quantile function.
    # It needs no density estimate, and the share may be clustered by user.
    quantile = float(np.quantile(values, level))
    shares = _sum_below(values, users, quantile).linearize()
    margin = float(stats.t.ppf(0.5 + confidence / 2.0, len(shares) - 1)) * float(
        shares.std(ddof=1) / len(shares) ** 0.5
    )
    low, high = np.quantile(values, [max(0.0, level - margin), min(1.0, level + margin)])
    return quantile, float(low), float(high)
