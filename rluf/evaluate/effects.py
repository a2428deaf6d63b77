"""Effect of a treatment: estimate, interval and p-value, for one experiment or for thousands at once.

Every function works along the last axis (users) and broadcasts over leading axes (experiments), so a simulation of
2,000 A/A tests runs the same code as the analysis of a real experiment. Users are the independent unit throughout.

Fixed-horizon tests. Ratio metrics: delta method (Deng, Knoblich, Lu 2018). Unequal variances: Welch (1947).
Proportions: pooled two-sample test with Newcombe's hybrid score interval (1998, method 10). CUPED: Deng, Xu, Kohavi,
Walker (2013).

Always-valid tests hold at every look, so an experiment may be monitored and stopped at any time. The estimate of an
experiment that gathers users behaves like Brownian motion in information time (1 / variance), and a normal mixture over
the effect size gives a martingale: by Ville's inequality the probability that an interval ever misses the truth is at
most alpha, whatever the number of looks. This is the mixture sequential probability ratio test (Robbins 1970; Johari,
Koomen, Pekelis, Walsh 2017) and, in terms of n, the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha,
Kennedy, Ramdas (2021), theorem 2.2. It is asymptotic: the first look needs enough users.

Sample size (plan_experiment) is that of the two-sided normal test (statsmodels' NormalIndPower). Responses of one user
are correlated, so the variance of a user's rate is p (1 - p) (1 + (m - 1) ICC) / m for m responses; CUPED reduces it by
the squared correlation; always-valid intervals cost the squared ratio of the boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import lambertw

from rluf.errors import DataError, SettingsError
from rluf.evaluate.intervals import CONFIDENCE_LEVEL
from rluf.utils.stats import Floats, wilson_interval

MIN_USERS_PER_ARM = 100
"""Minimum users in each arm at a look; with fewer the estimate is not close enough to normal for these intervals."""


@dataclass(frozen=True, slots=True)
class UserTotals:
    """Per-user totals of one arm: `sums` [..., U] (hearts per user) and `counts` [..., U] (responses per user)."""

    sums: Floats
    counts: Floats

    @staticmethod
    def from_arrays(sums: ArrayLike, counts: ArrayLike | None = None) -> UserTotals:
        """Totals from array-likes; without counts each user has one value, so the ratio is a plain mean."""
        user_sums = np.asarray(sums, dtype=np.float64)
        user_counts = np.ones_like(user_sums) if counts is None else np.asarray(counts, dtype=np.float64)
        return UserTotals(user_sums, user_counts)

    @property
    def user_count(self) -> int:
        """Users in the arm, U."""
        return int(self.sums.shape[-1])

    @property
    def ratio(self) -> Floats:
        """Hearts over responses [...]; nan without any response."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios: Floats = self.sums.sum(-1) / self.counts.sum(-1)
        return ratios

    def linearize(self, ratio: Floats | None = None) -> Floats:
        """Linearized value of each user [..., U]: R + (S_u - R N_u) / mean(N).

        The mean over users is R and the variance over U users, divided by U, is the delta method's variance of R.
        """
        center = (self.ratio if ratio is None else ratio)[..., None]
        linearized: Floats = center + (self.sums - center * self.counts) / self.counts.mean(-1, keepdims=True)
        return linearized


@dataclass(frozen=True, slots=True)
class EffectEstimate:
    """Treatment minus control, all [...] (scalars as 0-d arrays). `error` is a standard error, `df` of Student's t.

    `lift` is treatment over control minus 1 with its own interval (delta method on the log), nan where undefined.
    """

    control: Floats
    treatment: Floats
    difference: Floats
    error: Floats
    df: Floats
    low: Floats
    high: Floats
    p: Floats
    lift: Floats
    lift_low: Floats
    lift_high: Floats

    def as_dict(self) -> dict[str, float]:
        """Plain numbers of a single experiment."""
        return {name: float(getattr(self, name)) for name in self.__slots__}


def mean_effect(control: Floats, treatment: Floats, *, confidence: float = CONFIDENCE_LEVEL) -> EffectEstimate:
    """Difference of two means of per-user values [..., U]; Welch's t with Satterthwaite's degrees of freedom.

    DataError for fewer than two users in an arm.
    """
    if min(control.shape[-1], treatment.shape[-1]) < 2:
        raise DataError(
            f"expected 2 or more users in each arm, got {control.shape[-1]} in control and {treatment.shape[-1]} in "
            "treatment; collect more users"
        )
    means = control.mean(-1), treatment.mean(-1)
    user_counts = control.shape[-1], treatment.shape[-1]
    mean_variances = control.var(-1, ddof=1) / user_counts[0], treatment.var(-1, ddof=1) / user_counts[1]
    return _welch_effect(means, mean_variances, user_counts, confidence)


def ratio_effect(control: UserTotals, treatment: UserTotals, *, confidence: float = CONFIDENCE_LEVEL) -> EffectEstimate:
    """Difference of two ratios (love per response), clustered by user (delta method); Welch's test for counts of 1."""
    return mean_effect(control.linearize(), treatment.linearize(), confidence=confidence)


def crossed_effect(
    control: UserTotals, treatment: UserTotals, *, confidence: float = CONFIDENCE_LEVEL
) -> EffectEstimate:
    """Difference of two ratios when responses were randomized, so the same users [..., U] are in both arms.

    A user's contributions to the two ratios are combined, so traits of the user cancel. A user without responses in an
    arm contributes nothing to its ratio; if no user is in both arms this is the two-sample delta method.
    """
    user_count = control.user_count
    if user_count < 2 or user_count != treatment.user_count:
        raise DataError(
            f"a crossed effect needs the same 2 or more users in both arms, got {user_count} and {treatment.user_count}"
        )
    means = control.ratio, treatment.ratio
    with np.errstate(invalid="ignore", divide="ignore"):
        absolute = [
            (totals.sums - mean[..., None] * totals.counts) / totals.counts.sum(-1, keepdims=True)
            for totals, mean in zip((control, treatment), means, strict=True)
        ]
        relative = [residual / mean[..., None] for residual, mean in zip(absolute, means, strict=True)]
        # Sum of squared linearized contributions, each already divided by the total count, so no division by U is left;
        # U / (U - 1) makes the variance unbiased.
        standard_errors = [
            np.sqrt(user_count / (user_count - 1) * np.square(second - first).sum(-1))
            for first, second in (absolute, relative)
        ]
    df = np.full(np.shape(standard_errors[0]), user_count - 1.0)
    return _student_t_effect(means, standard_errors[0], standard_errors[1], df, confidence)


def _welch_effect(
    means: tuple[Floats, Floats], mean_variances: tuple[Floats, Floats], user_counts: tuple[int, int], confidence: float
) -> EffectEstimate:
    """Welch's effect from the means and their variances; for arms without variance p is 1 if equal, else 0."""
    total = mean_variances[0] + mean_variances[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        df = total**2 / (mean_variances[0] ** 2 / (user_counts[0] - 1) + mean_variances[1] ** 2 / (user_counts[1] - 1))
        # 0 / 0 when neither arm varies: fall back to the pooled degrees of freedom.
        df = np.where(np.isfinite(df), df, sum(user_counts) - 2.0)
        log_standard_error = np.sqrt(mean_variances[0] / means[0] ** 2 + mean_variances[1] / means[1] ** 2)
    return _student_t_effect(means, np.sqrt(total), log_standard_error, df, confidence)


def _student_t_effect(
    means: tuple[Floats, Floats], standard_error: Floats, log_standard_error: Floats, df: Floats, confidence: float
) -> EffectEstimate:
    """Student's t on the difference, and on the log of the ratio for the lift."""
    difference = means[1] - means[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        p_value = np.where(
            standard_error > 0.0, 2.0 * stats.t.sf(np.abs(difference) / standard_error, df), difference == 0.0
        )
        quantile = stats.t.ppf(0.5 + confidence / 2.0, df)
        positive = (means[0] > 0.0) & (means[1] > 0.0)
        # The inner where keeps log() away from ratios that the outer where replaces by nan anyway.
        log_ratio = np.where(positive, np.log(np.where(positive, means[1] / means[0], 1.0)), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        # Sign 0 skips the margin: 0 * inf would turn a defined lift into nan.
        lifts = [
            np.expm1(log_ratio + sign * quantile * log_standard_error) if sign else np.expm1(log_ratio)
            for sign in (0, -1, 1)
        ]
    return EffectEstimate(
        control=means[0], treatment=means[1], difference=difference, error=standard_error, df=df, p=p_value,
        low=difference - quantile * standard_error, high=difference + quantile * standard_error,
        lift=lifts[0], lift_low=lifts[1], lift_high=lifts[2],
    )  # fmt: skip


def proportion_effect(
    hit_counts: tuple[ArrayLike, ArrayLike],
    user_counts: tuple[ArrayLike, ArrayLike],
    *,
    confidence: float = CONFIDENCE_LEVEL,
) -> EffectEstimate:
    """Difference of two shares of users: `hit_counts` [...] of `user_counts` [...], control first.

    The p-value is that of the pooled z test. The interval is Newcombe's (each arm's Wilson limits combined), which
    covers well at small shares; the two may disagree in the third digit. The interval of the lift is computed on the
    log of the ratio.
    """
    k0, k1 = (np.asarray(count, dtype=np.float64) for count in hit_counts)
    n0, n1 = (np.asarray(count, dtype=np.float64) for count in user_counts)
    if bool(np.any(n0 < 1)) or bool(np.any(n1 < 1)):
        raise DataError("a proportion needs at least one user in each arm; check how users are assigned to arms")
    p0, p1 = k0 / n0, k1 / n1
    pooled = (k0 + k1) / (n0 + n1)
    null_error = np.sqrt(pooled * (1.0 - pooled) * (1.0 / n0 + 1.0 / n1))
    difference = p1 - p0
    with np.errstate(invalid="ignore", divide="ignore"):
        p_value = np.where(null_error > 0.0, 2.0 * stats.norm.sf(np.abs(difference) / null_error), 1.0)
        log_error = np.sqrt((1.0 - p0) / k0 + (1.0 - p1) / k1)
        log_ratio = np.where((k0 > 0) & (k1 > 0), np.log(p1 / p0), np.nan)
    low0, high0 = wilson_interval(k0, n0, confidence=confidence)
    low1, high1 = wilson_interval(k1, n1, confidence=confidence)
    quantile = stats.norm.ppf(0.5 + confidence / 2.0)
    return EffectEstimate(
        control=p0, treatment=p1, difference=difference, p=p_value, df=np.full(np.shape(p_value), np.inf),
        error=np.sqrt(p0 * (1.0 - p0) / n0 + p1 * (1.0 - p1) / n1),
        low=difference - np.sqrt((p1 - low1) ** 2 + (high0 - p0) ** 2),
        high=difference + np.sqrt((high1 - p1) ** 2 + (p0 - low0) ** 2),
        lift=np.expm1(log_ratio), lift_low=np.expm1(log_ratio - quantile * log_error),
        lift_high=np.expm1(log_ratio + quantile * log_error),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CupedEffect:
    """Effect after CUPED: `theta` [...] of the covariate, `correlation` [...] of values and covariate over users."""

    effect: EffectEstimate
    theta: Floats
    correlation: Floats


def cuped_effect(
    values: tuple[Floats, Floats], pre_period_values: tuple[Floats, Floats], *, confidence: float = CONFIDENCE_LEVEL
) -> CupedEffect:
    """Effect on per-user values [..., U] after regressing out the pre-period values [..., U]; control first.

    Y' = Y - theta (X - mean X) with theta = cov(X, Y) / var(X), both pooled within arms; the variance of the difference
    falls by the squared correlation. X must predate the experiment: then it cannot carry any of the effect.
    """
    xx, xy, yy = (np.zeros(values[0].shape[:-1]) for _ in range(3))
    # Center within each arm: centering on the common mean would let the treatment effect leak into theta.
    for y, x in zip(values, pre_period_values, strict=True):
        centered_x, centered_y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        xx = xx + np.square(centered_x).sum(-1)
        xy = xy + (centered_x * centered_y).sum(-1)
        yy = yy + np.square(centered_y).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        theta = np.where(xx > 0.0, xy / xx, 0.0)
        correlation = np.where((xx > 0.0) & (yy > 0.0), xy / np.sqrt(xx * yy), 0.0)
    center = np.concatenate(pre_period_values, axis=-1).mean(-1, keepdims=True)
    adjusted = [y - theta[..., None] * (x - center) for y, x in zip(values, pre_period_values, strict=True)]
    return CupedEffect(mean_effect(adjusted[0], adjusted[1], confidence=confidence), theta, correlation)


def pre_period_covariate(pre_period_totals: tuple[UserTotals, UserTotals]) -> tuple[Floats, Floats]:
    """CUPED covariate of both arms [..., U]: linearized pre-period values, centered on the ratio of both arms together.

    A user without a pre-period gets the value at the common ratio, where it has no influence.
    """
    counts = np.concatenate([totals.counts for totals in pre_period_totals], axis=-1)
    sums = np.concatenate([totals.sums for totals in pre_period_totals], axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        center = np.where(counts.sum(-1) > 0.0, sums.sum(-1) / counts.sum(-1), 0.0)[..., None]
    mean_count = np.maximum(counts.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
    control, treatment = ((totals.sums - center * totals.counts) / mean_count for totals in pre_period_totals)
    return control, treatment


def sample_ratio_test(user_counts: ArrayLike, shares: Sequence[float]) -> tuple[Floats, Floats]:
    """Chi-square and p [...] for `user_counts` [..., arms] against assignment by `shares`; DataError for bad shares."""
    observed = np.asarray(user_counts, dtype=np.float64)
    expected = np.asarray(shares, dtype=np.float64)
    if expected.shape[-1] != observed.shape[-1] or bool((expected <= 0.0).any()):
        raise DataError(
            f"expected one share above 0 for each of {observed.shape[-1]} arms, got {list(shares)}; correct --shares"
        )
    expected = expected / expected.sum() * observed.sum(-1, keepdims=True)
    result = stats.chisquare(observed, expected, axis=-1)
    return np.asarray(result.statistic), np.asarray(result.pvalue)


def holm_adjust(p_values: ArrayLike) -> Floats:
    """Adjust p-values [..., tests] so that the family-wise error rate stays at the level (Holm 1979).

    Valid under any dependence between tests. statsmodels' multipletests agrees for one family, but it collects garbage
    at each call (60 ms), which a simulation of thousands of families cannot afford.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=-1, kind="stable")
    scaled = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    # The running maximum keeps adjusted p-values in the order of the raw ones.
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0), -1)
    return adjusted


def mixture_variance(planned_variance: ArrayLike, alpha: float) -> Floats:
    """Mixture variance tau^2 for which the always-valid interval is tightest at `planned_variance` [...].

    The squared margin at variance V is V (1 + 1/x) log((1 + x) / alpha^2) with x = tau^2 / V; its minimum is where
    log((1 + x) / alpha^2) = x, so 1 + x = -W(-alpha^2 / e) on the lower branch of Lambert's W.
    """
    if not 0.0 < alpha < 1.0:
        raise DataError(f"expected a false-positive rate alpha between 0 and 1, got {alpha}; use for example 0.05")
    best_ratio = -float(lambertw(-(alpha**2) / np.e, k=-1).real) - 1.0
    tau: Floats = best_ratio * np.asarray(planned_variance, dtype=np.float64)
    return tau


def always_valid_margin(variance: ArrayLike, tau: ArrayLike, alpha: float) -> Floats:
    """Half-width [...] of the interval at a look where the estimate has that `variance`; `tau` is the mixture's."""
    v, mixture = np.asarray(variance, dtype=np.float64), np.asarray(tau, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = v * (v + mixture) / mixture * np.log((v + mixture) / (v * alpha**2))
    # No variance yet means no information: the interval is unbounded rather than empty.
    margin: Floats = np.where(v > 0.0, np.sqrt(squared), np.inf)
    return margin


def always_valid_p_values(difference: ArrayLike, variance: ArrayLike, tau: ArrayLike) -> Floats:
    """Non-increasing p-values [..., looks]: at any look the probability of one at or below alpha is at most alpha.

    The running minimum of 1 / likelihood ratio; below alpha exactly when an interval up to now has excluded zero.
    """
    d, v, mixture = (np.asarray(array, dtype=np.float64) for array in (difference, variance, tau))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_ratio = 0.5 * np.log(v / (v + mixture)) + mixture * d**2 / (2.0 * v * (v + mixture))
    log_ratio = np.where(v > 0.0, log_ratio, 0.0)
    p_values: Floats = np.exp(-np.maximum.accumulate(np.maximum(log_ratio, 0.0), axis=-1))
    return p_values


def sequential_width_factor(alpha: float) -> float:
    """Margin over standard error at the planned end (3.03 for alpha 0.05; a single look has 1.96)."""
    return float(always_valid_margin(1.0, mixture_variance(1.0, alpha), alpha))


DAYS_PER_WEEK = 7


@dataclass(frozen=True, slots=True)
class PowerQuery:
    """Inputs of the planner.

    `base_rate` is the love rate per response of the control, `lift` the relative change to detect, `responses` per user
    during the experiment, `icc` the correlation of hearts on two responses within a user, `correlation` that of user
    rates with the pre-period (0: no CUPED), `metrics` the number of metrics that share alpha (the first of Holm's
    levels), `daily_users` new users per day over both arms, `treated` the share of users in the treatment arm.
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
    if query.daily_users is not None and query.daily_users <= 0.0:
        raise SettingsError(f"--daily-users {query.daily_users:g} must be above 0")


def required_users(effect: float, variance: float, *, alpha: float, power: float, treated_share: float = 0.5) -> float:
    """Users over both arms to detect a difference `effect` of means when the value of a user has that `variance`."""
    from statsmodels.stats.power import NormalIndPower

    treatment_ratio = treated_share / (1.0 - treated_share)
    control_users: float = NormalIndPower().solve_power(
        effect_size=abs(effect) / math.sqrt(variance), alpha=alpha, power=power, ratio=treatment_ratio
    )
    return control_users * (1.0 + treatment_ratio)


def compute_design_effect(responses: float, icc: float) -> float:
    """Factor by which correlated responses of a user inflate the variance: 1 + (m - 1) ICC (Kish 1965)."""
    return 1.0 + (responses - 1.0) * icc


def plan_experiment(query: PowerQuery) -> dict[str, Any]:
    """Users and days for three designs: one look, one look with CUPED, always valid with CUPED.

    Days are rounded up, and given in full weeks as well, because users differ by day of the week. SettingsError for
    invalid inputs.
    """
    check_query(query)
    alpha = query.alpha / query.metrics
    rates = query.base_rate, query.base_rate * (1.0 + query.lift)
    noise = sum(rate * (1.0 - rate) for rate in rates) / 2.0
    variance = noise * compute_design_effect(query.responses, query.icc) / query.responses
    # CUPED and sequential looks change the sample size in proportion to the variance and the squared boundary.
    single = required_users(rates[1] - rates[0], variance, alpha=alpha, power=query.power, treated_share=query.treated)
    adjusted = single * (1.0 - query.correlation**2)
    z_power = float(stats.norm.ppf(query.power))
    single_look_factor = float(stats.norm.isf(alpha / 2.0)) + z_power
    inflation = ((sequential_width_factor(alpha) + z_power) / single_look_factor) ** 2
    designs = {"one_look": single, "one_look_cuped": adjusted, "always_valid_cuped": adjusted * inflation}
    return {
        "question": asdict(query),
        "rates": list(rates),
        "alpha_each": alpha,
        "design_effect": compute_design_effect(query.responses, query.icc),
        "sequential_inflation": inflation,
        "designs": {name: _design_cost(user_count, query) for name, user_count in designs.items()},
    }


def _design_cost(user_count: float, query: PowerQuery) -> dict[str, Any]:
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
