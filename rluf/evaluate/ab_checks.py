"""A/A check of the tests on the control's users, and the planner's inputs measured on the control."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.ab_analysis import MIN_CUPED_USERS, count_lovers, has_few_events
from rluf.evaluate.ab_design import ANY_LOVE_METRIC, ExperimentDesign, assign_arms, select_metrics
from rluf.evaluate.effects import (
    MIN_NORMAL_INFORMATION,
    UserTotals,
    adjust_totals_by_cuped,
    build_pre_period_covariate,
    estimate_proportion_effect,
    measure_information,
    rerandomize_quantiles,
    rerandomize_statistics,
)
from rluf.evaluate.events import EventLog, cap_values, sum_by_user
from rluf.utils.stats import Floats, Ints


def run_aa_check(events: EventLog, design: ExperimentDesign, *, split_count: int, seed: int) -> dict[str, Any]:
    """False-positive rate of every test over `split_count` random splits of the control's users.

    The splits have the shares of the design's control and smallest treatment, because a test that holds for equal arms
    may fail for a canary. A rate far from alpha means that the users of the metric are dependent or too few, and its
    p-values are unreliable. `low` and `high` are the 99.9% binomial limits of a valid test.
    """
    if design.is_crossed:
        raise DataError("an A/A check randomizes users, but --crossed means that responses were; remove one of the two")
    assignment = assign_arms(events, design)
    if design.cap is not None:
        events = cap_values(events, design.cap)
    users = assignment.arm_users[0] if design.assignment_salt is None else np.concatenate(assignment.arm_users)
    treated_share = min(design.shares[1:]) / (design.shares[0] + min(design.shares[1:]))
    treated_count = round(treated_share * len(users))
    if min(treated_count, len(users) - treated_count) < 2:
        raise DataError(
            f"an A/A check needs 2 or more users in each split, but {len(users)} users of the control give "
            f"{treated_count} at a share of {treated_share:.1%}"
        )
    totals = sum_by_user(events, assignment.arm_rows[0], users)
    before = None
    if assignment.pre_period_rows.any() and min(treated_count, len(users) - treated_count) >= MIN_CUPED_USERS:
        before = sum_by_user(events, assignment.pre_period_rows, users)
    tested: dict[str, UserTotals] = {}
    rates: dict[str, float] = {}
    for metric in select_metrics(events, design)[0]:
        if metric == ANY_LOVE_METRIC:
            lovers = count_lovers(totals)
            if has_few_events(*_split_first(lovers, treated_count)) and lovers.sums.std() > 0.0:
                tested[metric] = lovers
            else:
                rates[metric] = _compute_proportion_rate(lovers.sums, treated_count, split_count, design.alpha, seed)
        elif float(totals[metric].linearize().std()) > 0.0:
            tested[metric] = totals[metric]
            if before is not None:
                # Both arms of the function are the same users here: the slope is that of all of them.
                covariate = build_pre_period_covariate((before[metric], before[metric]))
                tested[f"{metric}_cuped"] = adjust_totals_by_cuped((totals[metric],) * 2, covariate).totals[0]
    rates |= _compute_ratio_rates(tested, treated_count, split_count, design.alpha, seed)
    low, high = (float(stats.binom.ppf(tail, split_count, design.alpha)) / split_count for tail in (0.0005, 0.9995))
    return {
        "splits": split_count, "users": [len(users) - treated_count, treated_count], "alpha": design.alpha,
        "low": low, "high": high, "false_positives": rates,
        "suspect": [name for name, rate in rates.items() if not low <= rate <= high],
    }  # fmt: skip


def _compute_proportion_rate(has_loved: Any, treated_count: int, split_count: int, alpha: float, seed: int) -> float:
    user_count, hit_count = len(has_loved), int(has_loved.sum())
    rng = np.random.default_rng(seed)
    treated_hits = rng.hypergeometric(hit_count, user_count - hit_count, treated_count, size=split_count)
    effect = estimate_proportion_effect(
        (hit_count - treated_hits, treated_hits), (user_count - treated_count, treated_count)
    )
    return float((effect.p < alpha).mean())


def _compute_ratio_rates(
    tested: dict[str, UserTotals], treated_count: int, split_count: int, alpha: float, seed: int
) -> dict[str, float]:
    """Share of random splits in which the test of the analysis, re-randomized or Student's, rejects."""
    if not tested:
        return {}
    statistics = rerandomize_statistics(list(tested.values()), treated_count, count=split_count, seed=seed)
    pairs = [_split_first(totals, treated_count) for totals in tested.values()]
    # Another seed than that of the splits: a test on its own reference set cannot fail.
    quantiles = rerandomize_quantiles(pairs, confidence=1.0 - alpha, seed=seed + 1)
    rates = {}
    for name, values, pair, limits in zip(tested, statistics, pairs, quantiles, strict=True):
        low, high = float(limits.low), float(limits.high)
        if measure_information(*pair) >= MIN_NORMAL_INFORMATION:
            high = float(stats.t.ppf(1.0 - alpha / 2.0, min(pair[0].user_count, pair[1].user_count) - 1))
            low = -high
        rates[name] = float(((values < low) | (values > high)).mean())
    return rates


def _split_first(totals: UserTotals, treated_count: int) -> tuple[UserTotals, UserTotals]:
    return (UserTotals(totals.sums[treated_count:], totals.counts[treated_count:]),
            UserTotals(totals.sums[:treated_count], totals.counts[:treated_count]))  # fmt: skip


def measure_planning_inputs(events: EventLog, design: ExperimentDesign) -> dict[str, float]:
    """Inputs of the planner from the control: base_rate, responses, activity_cv, icc and correlation of the primary.

    The correlation of responses within a user comes from the clustered variance: (design effect - 1) divided by
    (E[m^2] / E[m] - 1). That holds for yes/no values; DataError for other metrics. Without a pre-period the correlation
    is 0.
    """
    assignment = assign_arms(events, design)
    metric = select_metrics(events, design)[1][0]
    users: Ints = assignment.arm_users[0]
    if metric not in events.metric_values or not events.is_yes_no(metric):
        raise DataError(f"the planner needs a rate per response, and {metric!r} is not one; choose it with --primary")
    totals = sum_by_user(events, assignment.arm_rows[0], users)[metric]
    rate, counts = float(totals.ratio), totals.counts
    if not 0.0 < rate < 1.0:
        raise DataError(f"{metric} is {rate:g} in the control arm, so nothing can be planned from it; give --base-rate")
    linearized: Floats = totals.linearize()
    mean_responses = float(counts.mean())
    weighted_responses = float(np.square(counts).mean()) / mean_responses
    design_effect = float(linearized.var(ddof=1)) * mean_responses / (rate * (1.0 - rate))
    icc = 0.0
    if weighted_responses > 1.0:
        icc = min(1.0, max(0.0, (design_effect - 1.0) / (weighted_responses - 1.0)))
    correlation = 0.0
    if assignment.pre_period_rows.any():
        before = sum_by_user(events, assignment.pre_period_rows, users)[metric]
        covariate = build_pre_period_covariate((before, before))[0]
        if covariate.std() > 0.0:
            correlation = float(np.corrcoef(linearized, covariate)[0, 1])
    return {
        "base_rate": rate, "responses": max(1.0, mean_responses), "activity_cv": float(counts.std()) / mean_responses,
        "icc": icc, "correlation": correlation,
    }  # fmt: skip
