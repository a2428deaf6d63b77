"""Confidence intervals of rates, lifts and paired differences for clustered observations.

A user reads many responses and a prompt gets many samples, so rows are not independent: every interval here treats
whole users or whole prompts as the unit. All intervals are two-sided, 95% by default.

Sources: delta method for ratio metrics (Deng, Knoblich, Lu 2018); small-sample widening of the percentile bootstrap
("expanded percentile", Hesterberg 2015, section 3.3); exact limits of a proportion (Clopper, Pearson 1934).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.utils.stats import Floats

CONFIDENCE_LEVEL = 0.95
_MAX_WEIGHTS_PER_CHUNK = 2_000_000
"""Maximum number of bootstrap weights in memory at a time (16 MB)."""


@dataclass(frozen=True, slots=True)
class IntervalEstimate:
    """A point estimate with its interval; `low` <= `mean` <= `high` except for skewed bootstraps."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, as written to summary.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ClusterTotals:
    """Totals per cluster: `sums` [C] of the values and `counts` [C] of the rows, C clusters in label order."""

    labels: NDArray[Any]
    sums: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        """Mean over rows: the ratio of the totals."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def variance(self) -> float:
        """Variance of `mean` by the delta method, with clusters as the independent unit.

        Var(S/N) = C/(C-1) * sum_c (S_c - R N_c)^2 / (sum_c N_c)^2, which equals
        (s_S^2 - 2 R s_SN + R^2 s_N^2) / (C mean(N)^2).
        """
        cluster_count = len(self.sums)
        residual = self.sums - self.mean * self.counts
        return float(cluster_count / (cluster_count - 1) * np.square(residual).sum() / self.counts.sum() ** 2)


def sum_by_cluster(values: ArrayLike, cluster_labels: Sequence[Any] | NDArray[Any]) -> ClusterTotals:
    """Sum `values` [N] (bool or float) by their cluster labels [N]. DataError for fewer than two clusters."""
    row_values = np.asarray(values, dtype=np.float64)
    # Sorted labels: two arms with the same prompts get the same cluster order, which paired_bootstrap relies on.
    labels, index = np.unique(np.asarray(cluster_labels), return_inverse=True)
    if row_values.shape != index.shape:
        raise DataError(f"expected one cluster label for each value, got {row_values.size} values, {index.size} labels")
    if len(labels) < 2:
        raise DataError(
            f"an interval needs at least 2 clusters (users or prompts), got {len(labels)}; evaluate on more of them"
        )
    if not np.isfinite(row_values).all():
        invalid_count = int((~np.isfinite(row_values)).sum())
        raise DataError(f"{invalid_count} of {row_values.size} values are not finite; check the source of the scores")
    counts = np.bincount(index, minlength=len(labels)).astype(np.float64)
    sums = np.bincount(index, weights=row_values, minlength=len(labels)).astype(np.float64)
    return ClusterTotals(labels, sums, counts)


def clustered_mean(
    values: ArrayLike,
    cluster_labels: Sequence[Any] | NDArray[Any],
    *,
    confidence: float = CONFIDENCE_LEVEL,
    is_rate: bool = False,
) -> IntervalEstimate:
    """Mean over rows with a delta-method interval by cluster (Student t with C - 1 degrees of freedom).

    With `is_rate` the values are 0 or 1: the interval is clipped to [0, 1], and if every row agrees (variance 0) it
    takes the exact limit of C clusters that all agree.
    """
    totals = sum_by_cluster(values, cluster_labels)
    margin = _student_t_quantile(len(totals.sums), confidence) * float(np.sqrt(totals.variance))
    mean = totals.mean
    if not is_rate:
        return IntervalEstimate(mean, mean - margin, mean + margin)
    # "0 of 500" has variance 0 but does not prove a rate of 0.
    if mean in (0.0, 1.0):
        margin = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / len(totals.sums))
    return IntervalEstimate(mean, max(0.0, mean - margin), min(1.0, mean + margin))


def relative_lift(
    base: ArrayLike,
    base_clusters: Sequence[Any] | NDArray[Any],
    aligned: ArrayLike,
    aligned_clusters: Sequence[Any] | NDArray[Any],
    *,
    confidence: float = CONFIDENCE_LEVEL,
) -> IntervalEstimate | None:
    """Relative change aligned / base - 1 of two independent arms, each clustered on its own.

    Delta method on the log of the ratio: Var(log(m1/m0)) = v1/m1^2 + v0/m0^2, then exp and minus 1, so the interval
    never goes below -100%. None when either mean is not positive: the ratio then has no logarithm.
    """
    arms = sum_by_cluster(base, base_clusters), sum_by_cluster(aligned, aligned_clusters)
    if min(arm.mean for arm in arms) <= 0.0:
        return None
    log_error = float(np.sqrt(sum(arm.variance / arm.mean**2 for arm in arms)))
    log_ratio = float(np.log(arms[1].mean / arms[0].mean))
    # Degrees of freedom of the smaller arm: conservative, and it needs no Satterthwaite approximation on the log scale.
    margin = _student_t_quantile(min(len(arm.sums) for arm in arms), confidence) * log_error
    return IntervalEstimate(*(float(np.expm1(log_ratio + shift)) for shift in (0.0, -margin, margin)))


@dataclass(frozen=True, slots=True)
class PairedEstimate:
    """Base against aligned on the same prompts. `lift` is None when the base mean is not positive."""

    base: IntervalEstimate
    aligned: IntervalEstimate
    difference: IntervalEstimate
    lift: IntervalEstimate | None


def paired_bootstrap(
    base: ArrayLike,
    base_prompts: Sequence[Any] | NDArray[Any],
    aligned: ArrayLike,
    aligned_prompts: Sequence[Any] | NDArray[Any],
    *,
    resamples: int,
    seed: int,
    confidence: float = CONFIDENCE_LEVEL,
) -> PairedEstimate:
    """Means, difference (aligned - base) and relative lift on the same prompts, by a bootstrap over prompts.

    A resampled prompt contributes all its samples of both arms, so what the arms share (an easy prompt is easy for
    both) cancels. The arms may have different numbers of samples per prompt. DataError when the sets of prompts differ.
    """
    arms = sum_by_cluster(base, base_prompts), sum_by_cluster(aligned, aligned_prompts)
    if not np.array_equal(arms[0].labels, arms[1].labels):
        unpaired = np.setxor1d(arms[0].labels, arms[1].labels)
        raise DataError(
            f"{len(unpaired)} prompts were answered by one arm only (first: {unpaired[0]}); evaluate both arms on the "
            "same prompts"
        )
    cluster_count = len(arms[0].labels)
    resampled_means: list[list[Floats]] = [[], []]
    # One weight matrix serves both arms: that is what makes the bootstrap paired.
    for weights in _bootstrap_weights(cluster_count, resamples, seed):
        for arm, means in zip(arms, resampled_means, strict=True):
            means.append((weights @ arm.sums) / (weights @ arm.counts))
    base_means, aligned_means = (np.concatenate(means) for means in resampled_means)
    lift = None
    if arms[0].mean > 0.0 and bool((base_means > 0.0).all()):
        lift = _percentile_interval(
            arms[1].mean / arms[0].mean - 1.0, aligned_means / base_means - 1.0, cluster_count, confidence
        )
    return PairedEstimate(
        base=_percentile_interval(arms[0].mean, base_means, cluster_count, confidence),
        aligned=_percentile_interval(arms[1].mean, aligned_means, cluster_count, confidence),
        difference=_percentile_interval(
            arms[1].mean - arms[0].mean, aligned_means - base_means, cluster_count, confidence
        ),
        lift=lift,
    )


def _student_t_quantile(cluster_count: int, confidence: float) -> float:
    return float(stats.t.ppf(0.5 + confidence / 2.0, cluster_count - 1))


def _bootstrap_weights(cluster_count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Bootstrap weights [k, C], the number of times each cluster is sampled, in chunks of `resamples` rows in total."""
    rng = np.random.default_rng(seed)
    chunk_size = max(1, _MAX_WEIGHTS_PER_CHUNK // cluster_count)
    # Multinomial counts are sampling with replacement; as weights they turn the resampled sums into a matrix product.
    shares = np.full(cluster_count, 1.0 / cluster_count)
    for start in range(0, resamples, chunk_size):
        size = min(chunk_size, resamples - start)
        yield rng.multinomial(cluster_count, shares, size=size).astype(np.float64)


def _percentile_interval(
    mean: float, bootstrap_values: Floats, cluster_count: int, confidence: float
) -> IntervalEstimate:
    """Expanded percentile interval (Hesterberg 2015, section 3.3).

    A plain percentile interval is too narrow for few clusters: it uses the normal quantile and the variance with
    divisor C. Student's quantile times sqrt(C / (C - 1)) corrects both; the normal CDF maps it back to a tail share.
    """
    quantile = _student_t_quantile(cluster_count, confidence) * float(np.sqrt(cluster_count / (cluster_count - 1)))
    tail = float(stats.norm.cdf(-quantile))
    low, high = np.quantile(bootstrap_values, [tail, 1.0 - tail])
    return IntervalEstimate(float(mean), float(low), float(high))
