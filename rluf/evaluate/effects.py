"""Effect of a treatment: estimate, interval and p-value, for one experiment or for thousands at once.

Every function works along the last axis (users) and broadcasts over leading axes (experiments), so a simulation of
2,000 A/A tests runs the same code as the analysis of a real experiment. Users are the independent unit throughout.

Ratio metrics: delta method (Deng, Knoblich, Lu 2018) with the variance of compute_ratio_variances(), which does not
vanish in a small arm without hearts; with few carriers of the variance the quantiles of Student's t are replaced by
those of re-randomized arms (Fisher's randomization test of the studentized difference: Chung, Romano 2013), whose
error rate is alpha for any distribution. Lifts: Fieller's interval (1954), none where the control is not clear of
zero. Proportions: pooled two-sample test with Newcombe's hybrid score interval (1998, method 10). CUPED: Deng, Xu,
Kohavi, Walker (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.intervals import CONFIDENCE_LEVEL
from rluf.utils.stats import Floats, wilson_interval

RERANDOMIZATION_COUNT = 1998
"""Re-randomized arms; no multiple of 2 / 1,999 equals 0.05, so p and interval never disagree by a tie."""
MIN_NORMAL_INFORMATION = 200.0
"""Information in the smaller arm from which the estimate is close enough to normal for Student's t."""
_TIE_TOLERANCE = 1e-9
"""Relative difference of tied statistics: where users have one response each, most re-randomized arms tie with the
observed ones, and sums in another order differ in their last digits."""
_CELLS_PER_CHUNK = 4_000_000
"""Users times re-randomizations in memory at a time (32 MB)."""


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
class TestQuantiles:
    """Quantiles of the studentized difference without an effect: `low` below zero, `high` above.

    `sorted_statistics` [B] are those of re-randomized arms; None means Student's t.
    """

    low: Floats
    high: Floats
    sorted_statistics: Floats | None = None

    def measure_tail_shares(self, statistic: Floats, df: Floats) -> tuple[Floats, Floats]:
        """P(T <= statistic) and P(T >= statistic) [...] without an effect."""
        tails = stats.t.cdf(statistic, df), stats.t.sf(statistic, df)
        if self.sorted_statistics is None:
            return tails
        shares = [
            _measure_upper_share(values, sign * statistic, tail)
            for values, sign, tail in (
                (-self.sorted_statistics[::-1], -1.0, tails[0]), (self.sorted_statistics, 1.0, tails[1])
            )
        ]  # fmt: skip
        return shares[0], shares[1]


def _measure_upper_share(values: Floats, statistic: Floats, tail: Floats) -> Floats:
    """Share of the sorted `values` [B], and of the observed one, at or above `statistic` [...], between ties linear.

    A guardrail's margin shifts the statistic off the few values that a small arm can have: without interpolation any
    shift, however small, would count the tied values as less extreme. Beyond all values Student's `tail` decides.
    """
    count = len(values)
    tolerance = _TIE_TOLERANCE * np.maximum(np.abs(statistic), 1.0)
    reached = np.searchsorted(values, statistic + tolerance, side="right")
    lower, upper = values[np.maximum(reached - 1, 0)], values[np.minimum(reached, count - 1)]
    at_lower = count - np.searchsorted(values, lower - tolerance, side="left")
    gap = np.where(upper > lower, upper - lower, 1.0)
    weight = np.where(statistic > lower + tolerance, np.clip((statistic - lower) / gap, 0.0, 1.0), 0.0)
    hits = np.where(reached > 0, at_lower + weight * (count - reached - at_lower), count)
    is_beyond = statistic > values[-1] + tolerance
    share = (np.where(is_beyond, at_lower, hits) + 1.0) / (count + 1.0)
    return np.asarray(np.where(is_beyond, np.minimum(tail, share), share))


@dataclass(frozen=True, slots=True)
class EffectEstimate:
    """Treatment minus control, all [...] (scalars as 0-d arrays). `error` is a standard error, `df` of Student's t.

    `lift` is treatment over control minus 1 with Fieller's interval; nan where undefined. `control_variance`,
    `treatment_variance` and `covariance` are those of the two means, `quantile_low` and `quantile_high` the quantiles
    behind the intervals.
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
    control_variance: Floats
    treatment_variance: Floats
    covariance: Floats
    quantile_low: Floats
    quantile_high: Floats

    def as_dict(self) -> dict[str, float]:
        """Plain numbers of a single experiment."""
        return {name: float(getattr(self, name)) for name in self.__slots__}


def estimate_mean_effect(control: Floats, treatment: Floats, *, confidence: float = CONFIDENCE_LEVEL) -> EffectEstimate:
    """Difference of two means of per-user values [..., U]; Welch's t with Satterthwaite's degrees of freedom.

    DataError for fewer than two users in an arm.
    """
    _check_user_counts(control.shape[-1], treatment.shape[-1])
    user_counts = control.shape[-1], treatment.shape[-1]
    variances = control.var(-1, ddof=1) / user_counts[0], treatment.var(-1, ddof=1) / user_counts[1]
    df = _compute_satterthwaite_df(variances, user_counts)
    return _build_effect((control.mean(-1), treatment.mean(-1)), variances, df, confidence=confidence)


def _check_user_counts(control_users: int, treatment_users: int) -> None:
    if min(control_users, treatment_users) < 2:
        raise DataError(
            f"expected 2 or more users in each arm, got {control_users} in control and {treatment_users} in "
            "treatment; collect more users"
        )


def estimate_ratio_effect(
    control: UserTotals,
    treatment: UserTotals,
    *,
    confidence: float = CONFIDENCE_LEVEL,
    quantiles: TestQuantiles | None = None,
) -> EffectEstimate:
    """Difference of two ratios (love per response) of users [..., U] in separate arms; Student's t by default."""
    _check_user_counts(control.user_count, treatment.user_count)
    means = control.ratio, treatment.ratio
    variances = compute_ratio_variances(
        *(_compute_residual_moments(totals) for totals in _subtract_mean(control, treatment))
    )
    user_counts = control.user_count, treatment.user_count
    df = _compute_satterthwaite_df(variances, user_counts)
    effect = _build_effect(means, variances, df, confidence=confidence, quantiles=quantiles)
    return _adjust_without_variance(effect, min(user_counts), confidence)


def compute_equality_p(share: ArrayLike, user_count: int) -> Floats:
    """Probability [...] that none of `user_count` users differs if a `share` of them does (Clopper, Pearson 1934)."""
    return np.asarray((1.0 - np.clip(share, 0.0, 1.0)) ** user_count)


def _adjust_without_variance(effect: EffectEstimate, user_count: int, confidence: float) -> EffectEstimate:
    """Intervals where no user of either arm differs: 0 hearts of 100 in each arm do not prove equality."""
    share = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / user_count)
    margin = np.where(effect.error > 0.0, 0.0, share)
    unit = np.where(effect.control == 0.0, 1.0, np.abs(effect.control))
    return replace(
        effect, low=effect.low - margin * unit, high=effect.high + margin * unit, lift_low=effect.lift_low - margin,
        lift_high=effect.lift_high + margin,
    )  # fmt: skip


def _subtract_mean(control: UserTotals, treatment: UserTotals) -> tuple[UserTotals, UserTotals]:
    """Totals with the ratio of both arms together subtracted: sums become residuals."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (control.sums.sum(-1) + treatment.sums.sum(-1)) / (control.counts.sum(-1) + treatment.counts.sum(-1))
    ratio = ratio[..., None]
    centered = [UserTotals(totals.sums - ratio * totals.counts, totals.counts) for totals in (control, treatment)]
    return centered[0], centered[1]


def _compute_user_moments(centered: UserTotals) -> tuple[Floats, ...]:
    """e, N, e^2, e N and N^2 of each user [..., U], for residuals e and counts N."""
    e, n = centered.sums, centered.counts
    return e, n, e * e, e * n, n * n


def _compute_residual_moments(centered: UserTotals) -> tuple[Floats, ...]:
    """Number of users, and the sums over users [...] of _compute_user_moments()."""
    moments = [values.sum(-1) for values in _compute_user_moments(centered)]
    return np.full(moments[0].shape, float(centered.user_count)), *moments


def compute_ratio_variances(control: tuple[Floats, ...], treatment: tuple[Floats, ...]) -> tuple[Floats, Floats]:
    """Variance [...] of the ratio of each arm, from the moments of _compute_residual_moments().

    The larger of two sums: the delta method within each arm, and the same with the residuals of both arms pooled, as
    if there were no effect. A small arm with no heart has a variance of zero by the first alone, and its interval would
    exclude any other rate.
    """
    moments = control, treatment
    user_count = control[0] + treatment[0]
    pooled_square = (control[3] + treatment[3]) / (user_count - 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        within, pooled = [], []
        for users, e, n, ee, en, nn in moments:
            shift = e / n
            within.append(users / (users - 1.0) * (ee - 2.0 * shift * en + shift**2 * nn) / n**2)
            pooled.append(users * pooled_square / n**2)
        use_pooled = sum(pooled) > sum(within)
    variances = [np.where(use_pooled, second, first) for first, second in zip(within, pooled, strict=True)]
    return variances[0], variances[1]


def measure_information(control: UserTotals, treatment: UserTotals) -> float:
    """Effective number of users of the smaller arm that carry the variance of a single experiment.

    Kish's (sum e^2)^2 / sum e^4 over the residuals e of both arms, times the smaller arm's share of users: about the
    number of users with a heart if hearts are rare, and few if some users are far more active than others.
    """
    squares = np.concatenate([totals.sums for totals in _subtract_mean(control, treatment)]) ** 2
    largest = squares.max(initial=0.0)
    if largest <= 0.0:
        return 0.0
    share = min(control.user_count, treatment.user_count) / len(squares)
    return float(share * squares.sum() ** 2 / np.square(squares / largest).sum() / largest**2)


def rerandomize_quantiles(
    arm_totals: Sequence[tuple[UserTotals, UserTotals]], *, confidence: float = CONFIDENCE_LEVEL, seed: int = 0
) -> list[TestQuantiles]:
    """Quantiles of the studentized difference of each metric (control, treatment) over re-randomized arms.

    All metrics are of the same users, whose arms are permuted RERANDOMIZATION_COUNT times.
    """
    pooled = [
        UserTotals(np.concatenate([control.sums, treatment.sums]), np.concatenate([control.counts, treatment.counts]))
        for control, treatment in arm_totals
    ]
    treated_count = arm_totals[0][1].user_count
    all_statistics = rerandomize_statistics(pooled, treated_count, count=RERANDOMIZATION_COUNT, seed=seed)
    return [_select_quantiles(np.sort(statistics), confidence) for statistics in all_statistics]


def rerandomize_statistics(
    metric_totals: Sequence[UserTotals], treated_count: int, *, count: int, seed: int
) -> list[Floats]:
    """Studentized differences [count] of each metric, with `treated_count` of the users [U] treated at random."""
    moments = []
    for totals in metric_totals:
        residuals = _subtract_mean(totals, UserTotals(totals.sums[:0], totals.counts[:0]))[0]
        moments.append(np.stack(_compute_user_moments(residuals), axis=-1))
    columns = np.concatenate(moments, axis=-1)
    user_count = len(columns)
    is_treated = np.arange(user_count) < treated_count
    rng = np.random.default_rng(seed)
    chunk_size = max(1, _CELLS_PER_CHUNK // user_count)
    treated_sums = np.concatenate([
        rng.permuted(np.tile(is_treated, (min(chunk_size, count - start), 1)), axis=1).astype(float) @ columns
        for start in range(0, count, chunk_size)
    ])  # fmt: skip
    control_sums = columns.sum(0) - treated_sums
    statistics = []
    for first in range(0, columns.shape[-1], 5):
        treated, control = (
            (np.full(count, float(users)), *sums[:, first : first + 5].T)
            for users, sums in ((treated_count, treated_sums), (user_count - treated_count, control_sums))
        )
        variances = compute_ratio_variances(control, treated)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = (treated[1] / treated[2] - control[1] / control[2]) / np.sqrt(variances[0] + variances[1])
        # No variance, or an arm without rows, is no evidence of an effect.
        statistics.append(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))
    return statistics


def _select_quantiles(statistics: Floats, confidence: float) -> TestQuantiles:
    # An interval excludes zero exactly when fewer than this many statistics are as extreme as the observed one.
    count = len(statistics)
    rank = min(max(math.floor((1.0 - confidence) / 2.0 * (count + 1)) - 1, 0), count - 1)
    low, high = min(statistics[rank], 0.0), max(statistics[count - 1 - rank], 0.0)
    # A statistic that ties with a quantile is not beyond it.
    widening = 1.0 + _TIE_TOLERANCE
    return TestQuantiles(np.asarray(low * widening), np.asarray(high * widening), statistics)


def estimate_crossed_effect(
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
        # Linearized contributions, each already divided by the total count, so no division by U is left;
        # U / (U - 1) makes the variances unbiased.
        first, second = (
            (totals.sums - mean[..., None] * totals.counts) / totals.counts.sum(-1, keepdims=True)
            for totals, mean in zip((control, treatment), means, strict=True)
        )
    correction = user_count / (user_count - 1)
    variances = correction * np.square(first).sum(-1), correction * np.square(second).sum(-1)
    covariance = correction * (first * second).sum(-1)
    df = np.full(np.shape(covariance), user_count - 1.0)
    return _build_effect(means, variances, df, covariance=covariance, confidence=confidence)


def _compute_satterthwaite_df(variances: tuple[Floats, Floats], user_counts: tuple[int, int]) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        df = (variances[0] + variances[1]) ** 2 / (
            variances[0] ** 2 / (user_counts[0] - 1) + variances[1] ** 2 / (user_counts[1] - 1)
        )
    # 0 / 0 when neither arm varies: fall back to the pooled degrees of freedom.
    return np.where(np.isfinite(df), df, sum(user_counts) - 2.0)


def _build_effect(
    means: tuple[Floats, Floats],
    variances: tuple[Floats, Floats],
    df: Floats,
    *,
    confidence: float,
    covariance: Floats | None = None,
    quantiles: TestQuantiles | None = None,
) -> EffectEstimate:
    """Effect from means and their variances; p is 1 if the arms are equal and have no variance, else 0."""
    covariance = np.zeros(np.shape(df)) if covariance is None else covariance
    difference = means[1] - means[0]
    if quantiles is None:
        quantile = np.asarray(stats.t.ppf(0.5 + confidence / 2.0, df))
        quantiles = TestQuantiles(-quantile, quantile)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Rounding may leave a tiny negative number when the arms are perfectly correlated.
        error = np.sqrt(np.maximum(variances[0] + variances[1] - 2.0 * covariance, 0.0))
        tails = quantiles.measure_tail_shares(difference / error, df)
        p_value = np.where(error > 0.0, np.minimum(1.0, 2.0 * np.minimum(*tails)), difference == 0.0)
        lift = np.where(means[0] > 0.0, means[1] / means[0] - 1.0, np.nan)
    lift_low = _compute_fieller_limit(means, variances, covariance, quantiles.high, -1.0)
    lift_high = _compute_fieller_limit(means, variances, covariance, quantiles.low, 1.0)
    # One limit alone would read as a proven lift.
    has_limits = np.isfinite(lift_low) & np.isfinite(lift_high)
    return EffectEstimate(
        control=means[0], treatment=means[1], difference=difference, error=error, df=df, p=p_value,
        low=difference - quantiles.high * error, high=difference - quantiles.low * error,
        lift=lift, lift_low=np.where(has_limits, lift_low, np.nan), lift_high=np.where(has_limits, lift_high, np.nan),
        control_variance=variances[0], treatment_variance=variances[1], covariance=covariance,
        quantile_low=quantiles.low, quantile_high=quantiles.high,
    )  # fmt: skip


def _compute_fieller_limit(
    means: tuple[Floats, Floats], variances: tuple[Floats, Floats], covariance: Floats, quantile: Floats, sign: float
) -> Floats:
    """Limit of the lift [...]: where m1 - ratio m0 lies `quantile` standard errors from zero (Fieller 1954).

    nan where the control mean is not clear of zero: the set of ratios that the data allow is then unbounded.
    """
    square = np.square(quantile)
    with np.errstate(invalid="ignore", divide="ignore"):
        a = means[0] ** 2 - square * variances[0]
        b = means[0] * means[1] - square * covariance
        c = means[1] ** 2 - square * variances[1]
        ratio = (b + sign * np.sqrt(np.maximum(b**2 - a * c, 0.0))) / a
    limit: Floats = np.where((a > 0.0) & (means[0] > 0.0), np.maximum(ratio, 0.0) - 1.0, np.nan)
    return limit


def estimate_proportion_effect(
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
    quantile = np.asarray(stats.norm.ppf(0.5 + confidence / 2.0))
    return EffectEstimate(
        control=p0, treatment=p1, difference=difference, p=p_value, df=np.full(np.shape(p_value), np.inf),
        error=np.sqrt(p0 * (1.0 - p0) / n0 + p1 * (1.0 - p1) / n1),
        low=difference - np.sqrt((p1 - low1) ** 2 + (high0 - p0) ** 2),
        high=difference + np.sqrt((high1 - p1) ** 2 + (p0 - low0) ** 2),
        lift=np.expm1(log_ratio), lift_low=np.expm1(log_ratio - quantile * log_error),
        lift_high=np.expm1(log_ratio + quantile * log_error),
        control_variance=p0 * (1.0 - p0) / n0, treatment_variance=p1 * (1.0 - p1) / n1, covariance=np.zeros_like(p0),
        quantile_low=-quantile, quantile_high=quantile,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CupedTotals:
    """Totals after CUPED, control first; `theta` [...] of the covariate, `correlation` [...] with it over users."""

    totals: tuple[UserTotals, UserTotals]
    theta: Floats
    correlation: Floats


def adjust_totals_by_cuped(arm_totals: tuple[UserTotals, UserTotals], covariates: tuple[Floats, Floats]) -> CupedTotals:
    """Totals with the pre-period covariate [..., U] regressed out of their sums; control first.

    S' = S - mean(N) theta (X - mean X), so that ratios, variances and re-randomized arms work as without CUPED.
    theta = cov(X, Y) / var(X) within arms, Y the linearized values; the variance of the difference falls by the squared
    correlation. X must predate the experiment: then it cannot carry any of the effect.
    """
    xx, xy, yy = (np.zeros(arm_totals[0].sums.shape[:-1]) for _ in range(3))
    # Center within each arm: centering on the common mean would let the treatment effect leak into theta.
    for totals, x in zip(arm_totals, covariates, strict=True):
        y = totals.linearize()
        centered_x, centered_y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        xx = xx + np.square(centered_x).sum(-1)
        xy = xy + (centered_x * centered_y).sum(-1)
        yy = yy + np.square(centered_y).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        theta = np.where(xx > 0.0, xy / xx, 0.0)
        correlation = np.where((xx > 0.0) & (yy > 0.0), xy / np.sqrt(xx * yy), 0.0)
    center = np.concatenate(covariates, axis=-1).mean(-1, keepdims=True)
    mean_count = np.concatenate([totals.counts for totals in arm_totals], axis=-1).mean(-1, keepdims=True)
    adjusted = [
        UserTotals(totals.sums - mean_count * theta[..., None] * (x - center), totals.counts)
        for totals, x in zip(arm_totals, covariates, strict=True)
    ]
    return CupedTotals((adjusted[0], adjusted[1]), theta, correlation)


def build_pre_period_covariate(pre_period_totals: tuple[UserTotals, UserTotals]) -> tuple[Floats, Floats]:
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


def adjust_by_holm(p_values: ArrayLike) -> Floats:
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
