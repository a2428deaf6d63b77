"""Intervals of rates, lifts and paired differences when observations come in clusters.

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

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 2_000_000
"""Largest number of resampling weights held in memory at a time (16 MB)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point estimate with its interval; `low` <= `mean` <= `high` but for skewed bootstraps."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The estimate as it stands in summary.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Clustered:
    """Rows added up by cluster: `sums` [C] of the values and `counts` [C] of the rows, C clusters in order of label."""

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
        size = len(self.sums)
        residual = self.sums - self.mean * self.counts
        return float(size / (size - 1) * np.square(residual).sum() / self.counts.sum() ** 2)


def cluster(values: ArrayLike, clusters: Sequence[Any] | NDArray[Any]) -> Clustered:
    """Add `values` [N] (bool or float) up by their cluster labels [N]. DataError for fewer than two clusters."""
    rows = np.asarray(values, dtype=np.float64)
    labels, index = np.unique(np.asarray(clusters), return_inverse=True)
    if rows.shape != index.shape:
        raise DataError(f"{rows.size} values came with {index.size} cluster labels; give each value one label")
    if len(labels) < 2:
        raise DataError(f"an interval needs at least 2 clusters (users or prompts), got {len(labels)}; add more")
    if not np.isfinite(rows).all():
        raise DataError(f"{int((~np.isfinite(rows)).sum())} of {rows.size} values are not finite; look at their source")
    counts = np.bincount(index, minlength=len(labels)).astype(np.float64)
    sums = np.bincount(index, weights=rows, minlength=len(labels)).astype(np.float64)
    return Clustered(labels, sums, counts)


def clustered_mean(
    values: ArrayLike, clusters: Sequence[Any] | NDArray[Any], *, confidence: float = CONFIDENCE, rate: bool = False
) -> Estimate:
    """Mean over rows with a delta-method interval clustered by `clusters` (Student t with C - 1 degrees of freedom).

    With `rate` the values are 0 or 1: the interval is kept within [0, 1], and where every row agrees (variance 0) it
    takes the exact limit of C clusters that all agree, since "0 of 500" does not prove a rate of zero.
    """
    data = cluster(values, clusters)
    margin = _quantile_t(len(data.sums), confidence) * float(np.sqrt(data.variance))
    mean = data.mean
    if not rate:
        return Estimate(mean, mean - margin, mean + margin)
    if mean in (0.0, 1.0):
        reach = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / len(data.sums))
        return Estimate(mean, max(0.0, mean - reach), min(1.0, mean + reach))
    return Estimate(mean, max(0.0, mean - margin), min(1.0, mean + margin))


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    *,
    resamples: int,
    seed: int,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean over rows with a cluster bootstrap: whole clusters are drawn with replacement (expanded percentile)."""
    data = cluster(values, clusters)
    draws = np.concatenate([(w @ data.sums) / (w @ data.counts) for w in _weights(len(data.sums), resamples, seed)])
    return _percentile(data.mean, draws, len(data.sums), confidence)


def relative_lift(
    base: ArrayLike,
    base_clusters: Sequence[Any] | NDArray[Any],
    aligned: ArrayLike,
    aligned_clusters: Sequence[Any] | NDArray[Any],
    *,
    confidence: float = CONFIDENCE,
) -> Estimate | None:
    """Relative change aligned / base - 1 of two independent arms, each clustered on its own.

    Delta method on the log of the ratio: Var(log(m1/m0)) = v1/m1^2 + v0/m0^2, then exp and minus 1, so that the
    interval never goes below -100%. None when either mean is not positive: the ratio then has no logarithm.
    """
    arms = cluster(base, base_clusters), cluster(aligned, aligned_clusters)
    if min(arm.mean for arm in arms) <= 0.0:
        return None
    error = float(np.sqrt(sum(arm.variance / arm.mean**2 for arm in arms)))
    log_ratio = float(np.log(arms[1].mean / arms[0].mean))
    margin = _quantile_t(min(len(arm.sums) for arm in arms), confidence) * error
    return Estimate(*(float(np.expm1(log_ratio + shift)) for shift in (0.0, -margin, margin)))


@dataclass(frozen=True, slots=True)
class Paired:
    """Base against aligned on the same prompts. `lift` is None when the base mean is not positive."""

    base: Estimate
    aligned: Estimate
    difference: Estimate
    lift: Estimate | None


def paired_bootstrap(
    base: ArrayLike,
    base_prompts: Sequence[Any] | NDArray[Any],
    aligned: ArrayLike,
    aligned_prompts: Sequence[Any] | NDArray[Any],
    *,
    resamples: int,
    seed: int,
    confidence: float = CONFIDENCE,
) -> Paired:
    """Means, difference (aligned - base) and relative lift over the same prompts, by a bootstrap over prompts.

    A drawn prompt brings all its samples of both arms along, so what the arms share (an easy prompt is easy for both)
    cancels. The arms may have different numbers of samples a prompt. DataError when the sets of prompts differ.
    """
    arms = cluster(base, base_prompts), cluster(aligned, aligned_prompts)
    if not np.array_equal(arms[0].labels, arms[1].labels):
        odd = np.setxor1d(arms[0].labels, arms[1].labels)
        raise DataError(
            f"{len(odd)} prompts were answered by one arm only (first: {odd[0]}); give both arms the same prompts"
        )
    size = len(arms[0].labels)
    draws: list[list[Floats]] = [[], []]
    for weights in _weights(size, resamples, seed):
        for arm, means in zip(arms, draws, strict=True):
            means.append((weights @ arm.sums) / (weights @ arm.counts))
    first, second = (np.concatenate(means) for means in draws)
    lift = None
    if arms[0].mean > 0.0 and bool((first > 0.0).all()):
        lift = _percentile(arms[1].mean / arms[0].mean - 1.0, second / first - 1.0, size, confidence)
    return Paired(
        base=_percentile(arms[0].mean, first, size, confidence),
        aligned=_percentile(arms[1].mean, second, size, confidence),
        difference=_percentile(arms[1].mean - arms[0].mean, second - first, size, confidence),
        lift=lift,
    )


def two_proportion_z(base: ArrayLike, aligned: ArrayLike) -> float:
    """z of aligned against base for two shares (values 0 or 1) with the pooled rate; 0.0 when neither arm varies."""
    first, second = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    pooled = float((first.sum() + second.sum()) / (first.size + second.size))
    error = float(np.sqrt(pooled * (1.0 - pooled) * (1.0 / first.size + 1.0 / second.size)))
    return float((second.mean() - first.mean()) / error) if error > 0.0 else 0.0


def welch_z(base: ArrayLike, aligned: ArrayLike) -> float:
    """z of aligned against base for two means with unequal variances; 0.0 when neither arm varies."""
    first, second = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    if min(first.size, second.size) < 2:
        return 0.0
    error = float(np.sqrt(first.var(ddof=1) / first.size + second.var(ddof=1) / second.size))
    return float((second.mean() - first.mean()) / error) if error > 0.0 else 0.0


def _quantile_t(clusters: int, confidence: float) -> float:
    return float(stats.t.ppf(0.5 + confidence / 2.0, clusters - 1))


def _weights(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Bootstrap weights [k, C]: how often each cluster is drawn, in chunks that together make `resamples` rows."""
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // clusters)
    shares = np.full(clusters, 1.0 / clusters)
    for start in range(0, resamples, step):
        yield rng.multinomial(clusters, shares, size=min(step, resamples - start)).astype(np.float64)


def _percentile(mean: float, draws: Floats, clusters: int, confidence: float) -> Estimate:
    """Percentile interval, widened so that C clusters cover as Student's t would (expanded percentile)."""
    reach = _quantile_t(clusters, confidence) * float(np.sqrt(clusters / (clusters - 1)))
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Estimate(float(mean), float(low), float(high))
