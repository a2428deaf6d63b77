"""What a treatment did against a control: effect, interval and p-value, for one experiment or thousands at once.

Every function works along the last axis (users) and broadcasts over leading axes (experiments), so that a simulation
of 2,000 A/A tests runs the very code that judges a real one. Users are the independent unit throughout.

Sources: ratio metrics by the delta method (Deng, Knoblich, Lu 2018); unequal variances (Welch 1947); pooled two-sample
test of proportions, with Newcombe's hybrid score interval (1998, method 10); CUPED (Deng, Xu, Kohavi, Walker 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rluf.errors import DataError

Floats = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Totals:
    """What users did in one arm: `sums` [..., U] (hearts of each user) and `counts` [..., U] (responses of each)."""

    sums: Floats
    counts: Floats

    @staticmethod
    def of(sums: ArrayLike, counts: ArrayLike | None = None) -> Totals:
        """Totals from array-likes; without counts each user has one value, so that the ratio is a plain mean."""
        values = np.asarray(sums, dtype=np.float64)
        return Totals(values, np.ones_like(values) if counts is None else np.asarray(counts, dtype=np.float64))

    @property
    def users(self) -> int:
        """Users in the arm, U."""
        return int(self.sums.shape[-1])

    @property
    def ratio(self) -> Floats:
        """Hearts over responses [...]; nan where nobody read anything."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = self.sums.sum(-1) / self.counts.sum(-1)
        return found

    def linear(self, ratio: Floats | None = None) -> Floats:
        """Each user's part in the ratio [..., U]: R + (S_u - R N_u) / mean(N).

        The mean over users is R and the variance over U users, divided by U, is the delta method's variance of R.
        """
        centre = (self.ratio if ratio is None else ratio)[..., None]
        parts: Floats = centre + (self.sums - centre * self.counts) / self.counts.mean(-1, keepdims=True)
        return parts


@dataclass(frozen=True, slots=True)
class Effect:
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
        """One experiment's effect in plain numbers."""
        return {name: float(getattr(self, name)) for name in self.__slots__}


def mean_effect(control: Floats, treatment: Floats, *, confidence: float = CONFIDENCE) -> Effect:
    """Difference of two means of users' values [..., U], Welch's t with Satterthwaite's degrees of freedom.

    DataError for fewer than two users in an arm.
    """
    if min(control.shape[-1], treatment.shape[-1]) < 2:
        raise DataError(
            f"an effect needs 2 or more users in each arm, got {control.shape[-1]} and {treatment.shape[-1]}"
        )
    means = control.mean(-1), treatment.mean(-1)
    sizes = control.shape[-1], treatment.shape[-1]
    spreads = control.var(-1, ddof=1) / sizes[0], treatment.var(-1, ddof=1) / sizes[1]
    return _effect(means, spreads, sizes, confidence)


def ratio_effect(control: Totals, treatment: Totals, *, confidence: float = CONFIDENCE) -> Effect:
    """Difference of two ratios (love per response), clustered by user (delta method); Welch's test for counts of 1."""
    return mean_effect(control.linear(), treatment.linear(), confidence=confidence)


def crossed_effect(control: Totals, treatment: Totals, *, confidence: float = CONFIDENCE) -> Effect:
    """Difference of two ratios where the same users [..., U] read responses of both arms: responses were split.

    A user's parts in both ratios are taken together, so that what users have in common with themselves cancels. Users
    with nothing in an arm add nothing to its ratio; with no user in both it is the delta method of two samples.
    """
    size = control.users
    if size < 2 or size != treatment.users:
        raise DataError(f"a crossed effect needs the same 2 or more users in both arms, got {size}, {treatment.users}")
    means = control.ratio, treatment.ratio
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [
            (one.sums - mean[..., None] * one.counts) / one.counts.sum(-1, keepdims=True)
            for one, mean in zip((control, treatment), means, strict=True)
        ]
        shares = [part / mean[..., None] for part, mean in zip(parts, means, strict=True)]
        errors = [np.sqrt(size / (size - 1) * np.square(second - first).sum(-1)) for first, second in (parts, shares)]
    return _student(means, errors[0], errors[1], np.full(np.shape(errors[0]), size - 1.0), confidence)


def _effect(
    means: tuple[Floats, Floats], spreads: tuple[Floats, Floats], sizes: tuple[int, int], confidence: float
) -> Effect:
    """`spreads` are the variances of the means. Arms that do not vary at all have p = 1 where equal, else 0."""
    total = spreads[0] + spreads[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        df = total**2 / (spreads[0] ** 2 / (sizes[0] - 1) + spreads[1] ** 2 / (sizes[1] - 1))
        df = np.where(np.isfinite(df), df, sum(sizes) - 2.0)
        log_error = np.sqrt(spreads[0] / means[0] ** 2 + spreads[1] / means[1] ** 2)
    return _student(means, np.sqrt(total), log_error, df, confidence)


def _student(means: tuple[Floats, Floats], error: Floats, log_error: Floats, df: Floats, confidence: float) -> Effect:
    """Student's t on the difference, and on the log of the ratio for the lift."""
    difference = means[1] - means[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(error > 0.0, 2.0 * stats.t.sf(np.abs(difference) / error, df), difference == 0.0)
        reach = stats.t.ppf(0.5 + confidence / 2.0, df)
        positive = (means[0] > 0.0) & (means[1] > 0.0)
        log = np.where(positive, np.log(np.where(positive, means[1] / means[0], 1.0)), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        lifts = [np.expm1(log + sign * reach * log_error) if sign else np.expm1(log) for sign in (0, -1, 1)]
    return Effect(
        control=means[0], treatment=means[1], difference=difference, error=error, df=df, p=p,
        low=difference - reach * error, high=difference + reach * error,
        lift=lifts[0], lift_low=lifts[1], lift_high=lifts[2],
    )  # fmt: skip


def proportion_effect(
    hits: tuple[ArrayLike, ArrayLike], sizes: tuple[ArrayLike, ArrayLike], *, confidence: float = CONFIDENCE
) -> Effect:
    """Difference of two shares of users: `hits` [...] of `sizes` [...], control first.

    The p-value is that of the pooled z test, the interval Newcombe's (each arm's Wilson limits combined), which keeps
    its word at small shares; the two may disagree in the third digit. The lift's interval is on the log of the ratio.
    """
    k0, k1 = (np.asarray(one, dtype=np.float64) for one in hits)
    n0, n1 = (np.asarray(one, dtype=np.float64) for one in sizes)
    if bool(np.any(n0 < 1)) or bool(np.any(n1 < 1)):
        raise DataError("a share needs at least one user in each arm; look at how users are assigned")
    p0, p1 = k0 / n0, k1 / n1
    pooled = (k0 + k1) / (n0 + n1)
    under_null = np.sqrt(pooled * (1.0 - pooled) * (1.0 / n0 + 1.0 / n1))
    difference = p1 - p0
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(under_null > 0.0, 2.0 * stats.norm.sf(np.abs(difference) / under_null), 1.0)
        log_error = np.sqrt((1.0 - p0) / k0 + (1.0 - p1) / k1)
        log = np.where((k0 > 0) & (k1 > 0), np.log(p1 / p0), np.nan)
    low0, high0 = wilson(k0, n0, confidence=confidence)
    low1, high1 = wilson(k1, n1, confidence=confidence)
    reach = stats.norm.ppf(0.5 + confidence / 2.0)
    return Effect(
        control=p0, treatment=p1, difference=difference, p=p, df=np.full(np.shape(p), np.inf),
        error=np.sqrt(p0 * (1.0 - p0) / n0 + p1 * (1.0 - p1) / n1),
        low=difference - np.sqrt((p1 - low1) ** 2 + (high0 - p0) ** 2),
        high=difference + np.sqrt((high1 - p1) ** 2 + (p0 - low0) ** 2),
        lift=np.expm1(log), lift_low=np.expm1(log - reach * log_error), lift_high=np.expm1(log + reach * log_error),
    )  # fmt: skip


def wilson(hits: ArrayLike, sizes: ArrayLike, *, confidence: float = CONFIDENCE) -> tuple[Floats, Floats]:
    """Score limits of a share (Wilson 1927), [...] each."""
    k, n = np.asarray(hits, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    z = float(stats.norm.ppf(0.5 + confidence / 2.0))
    share = k / n
    centre = (share + z**2 / (2.0 * n)) / (1.0 + z**2 / n)
    reach = z / (1.0 + z**2 / n) * np.sqrt(share * (1.0 - share) / n + z**2 / (4.0 * n**2))
    return centre - reach, centre + reach


@dataclass(frozen=True, slots=True)
class Adjusted:
    """An effect after CUPED: `theta` [...] of the covariate and `correlation` [...] of values and covariate by user."""

    effect: Effect
    theta: Floats
    correlation: Floats


def cuped_effect(
    values: tuple[Floats, Floats], before: tuple[Floats, Floats], *, confidence: float = CONFIDENCE
) -> Adjusted:
    """Effect on users' values [..., U] after taking out what their pre-period values [..., U] foretell; control first.

    Y' = Y - theta (X - mean X) with theta = cov(X, Y) / var(X), both pooled within arms; the variance of the difference
    falls by the squared correlation. X must be from before the experiment: then it cannot carry any of the effect.
    """
    xx, xy, yy = (np.zeros(values[0].shape[:-1]) for _ in range(3))
    for y, x in zip(values, before, strict=True):
        centred_x, centred_y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        xx = xx + np.square(centred_x).sum(-1)
        xy = xy + (centred_x * centred_y).sum(-1)
        yy = yy + np.square(centred_y).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        theta = np.where(xx > 0.0, xy / xx, 0.0)
        correlation = np.where((xx > 0.0) & (yy > 0.0), xy / np.sqrt(xx * yy), 0.0)
    centre = np.concatenate(before, axis=-1).mean(-1, keepdims=True)
    cut = [y - theta[..., None] * (x - centre) for y, x in zip(values, before, strict=True)]
    return Adjusted(mean_effect(cut[0], cut[1], confidence=confidence), theta, correlation)


def before_values(before: tuple[Totals, Totals]) -> tuple[Floats, Floats]:
    """Both arms' covariate for CUPED [..., U]: users' parts in the pre-period ratio, about the ratio of both arms.

    A user without a pre-period stands at the common ratio, where it neither helps nor harms.
    """
    counts = np.concatenate([one.counts for one in before], axis=-1)
    sums = np.concatenate([one.sums for one in before], axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(counts.sum(-1) > 0.0, sums.sum(-1) / counts.sum(-1), 0.0)[..., None]
    mean = np.maximum(counts.mean(-1, keepdims=True), np.finfo(np.float64).tiny)
    control, treatment = ((one.sums - centre * one.counts) / mean for one in before)
    return control, treatment


def sample_ratio(users: ArrayLike, shares: Sequence[float]) -> tuple[Floats, Floats]:
    """Chi-square and p [...] that `users` [..., arms] were assigned by `shares`. DataError for bad shares."""
    observed = np.asarray(users, dtype=np.float64)
    expected = np.asarray(shares, dtype=np.float64)
    if expected.shape[-1] != observed.shape[-1] or bool((expected <= 0.0).any()):
        raise DataError(
            f"{observed.shape[-1]} arms came with the shares {list(shares)}; give each arm one share above 0"
        )
    expected = expected / expected.sum() * observed.sum(-1, keepdims=True)
    found = stats.chisquare(observed, expected, axis=-1)
    return np.asarray(found.statistic), np.asarray(found.pvalue)


def holm(p_values: ArrayLike) -> Floats:
    """p-values [..., tests] adjusted so that the chance of any false finding among the tests stays at the level.

    Holm 1979; whatever the dependence between tests. statsmodels' multipletests gives the same for one family, but
    collects garbage at each call (60 ms), which a simulation of thousands of families cannot afford.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(ranked, axis=-1), 1.0), -1)
    return adjusted
