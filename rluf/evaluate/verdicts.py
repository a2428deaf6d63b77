"""Verdicts of an A/B test: pass, undecided (with the users still needed) or fail.

A primary metric passes when it is significantly higher than the control and fails when it is significantly lower. A
guardrail passes when harm beyond its margin is ruled out (non-inferiority), and fails when harm beyond it is proven.
"Not significantly different" decides neither: it is undecided.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.ab_design import Guardrail
from rluf.evaluate.effects import EffectEstimate, TestQuantiles, compute_equality_p

PASS, UNDECIDED, FAIL = "pass", "undecided", "fail"


def count_users_still_needed(
    effect: EffectEstimate, detectable: float, user_count: int, alpha: float, power: float
) -> int | None:
    """Users over all arms, beyond `user_count`, to detect a difference `detectable` with `power`; 0 if enough.

    None where it cannot be said: without variance yet, or for a share of a control without any event.
    """
    if detectable == 0.0 or not math.isfinite(detectable) or not float(effect.error) > 0.0:
        return None
    z_sum = float(stats.norm.isf(alpha / 2.0) + stats.norm.ppf(power))
    # The variance of a difference of means falls in proportion to the users.
    needed = user_count * (z_sum * float(effect.error) / detectable) ** 2
    return max(0, math.ceil(needed) - user_count)


def judge_primary(
    effect: EffectEstimate,
    adjusted_p: float,
    *,
    user_count: int,
    lift: float,
    alpha: float,
    power: float,
    test_count: int = 1,
) -> dict[str, Any]:
    """Verdict of a primary metric from its Holm-adjusted p; `lift` is the relative change worth detecting.

    The users still needed are for alpha / `test_count`, the first of Holm's levels, as in the plan.
    """
    if adjusted_p < alpha:
        return {"verdict": PASS if float(effect.difference) > 0.0 else FAIL, "more_users": 0}
    more_users = count_users_still_needed(effect, lift * float(effect.control), user_count, alpha / test_count, power)
    return {"verdict": UNDECIDED, "more_users": more_users}


def judge_guardrail(
    guardrail: Guardrail,
    effect: EffectEstimate,
    quantiles: TestQuantiles,
    *,
    user_count: int,
    alpha: float,
    power: float,
    smaller_arm: int = 2,
) -> dict[str, Any]:
    """Verdict of a guardrail, with the one-sided p-value of "harm beyond the margin" (passes below alpha / 2).

    A relative margin is tested on treatment - (1 + margin) control (Fieller 1954), so that the noise of the control's
    value counts. The interval is that of the lift, or of the difference for an absolute margin. Where nothing varies,
    the number of users of the `smaller_arm` decides. DataError for a relative margin of a control below zero.
    """
    if guardrail.is_relative and float(effect.control) < 0.0:
        raise DataError(
            f"--guard {guardrail.metric}: the control's value is {float(effect.control):g}, below zero, where a "
            f"percentage has no meaning; give the margin in the metric's unit, such as {guardrail.metric}:-0.1"
        )
    margin = guardrail.margin
    ratio, shift = (1.0 + margin, 0.0) if guardrail.is_relative else (1.0, margin)
    distance = float(effect.treatment - ratio * effect.control) - shift
    variance = float(effect.treatment_variance - 2.0 * ratio * effect.covariance + ratio**2 * effect.control_variance)
    error = math.sqrt(max(variance, 0.0))
    # The sign that makes a positive distance good.
    sign = 1.0 if margin < 0.0 else -1.0
    if error > 0.0:
        below, above = quantiles.measure_tail_shares(np.asarray(distance / error), effect.df)
        p_harm, p_safe = (float(above), float(below)) if sign > 0.0 else (float(below), float(above))
    else:
        # No user differs: chance of that if the share of users that the margin needs did.
        share = abs(distance / float(effect.control) if effect.control else distance)
        p_equal = float(compute_equality_p(share, smaller_arm))
        p_harm, p_safe = (p_equal, 1.0) if sign * distance > 0.0 else (1.0, p_equal)
    verdict = PASS if p_harm < alpha / 2.0 else FAIL if p_safe < alpha / 2.0 else UNDECIDED
    low, high = (effect.lift_low, effect.lift_high) if guardrail.is_relative else (effect.low, effect.high)
    result = {"verdict": verdict, "margin": margin, "is_relative": guardrail.is_relative, "p": p_harm,
              "low": float(low), "high": float(high), "more_users": 0}  # fmt: skip
    if verdict == UNDECIDED:
        # As planned, for a treatment without an effect; if that many users are here already, from the estimate.
        unchanged = margin * float(effect.control) if guardrail.is_relative else margin
        more_users = count_users_still_needed(effect, unchanged, user_count, alpha, power)
        if more_users == 0:
            more_users = count_users_still_needed(effect, distance, user_count, alpha, power)
        result["more_users"] = more_users
    return result
