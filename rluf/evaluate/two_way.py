"""The interval of a comparison of two policies: clustered by prompt and by user at the same time.

A comparison samples users, prompts and responses, and another draw of any of them would give another result. Responses
are nested in prompts and users differ between the arms, so the variance is two-way cluster-robust:
V = V_prompt + V_user - V_cell, where a cell holds the impressions of one user on one prompt (Cameron, Gelbach, Miller
2011, equation 2.11; for data from crossed random effects it is consistent in both, Owen 2007, section 3). It is applied
to the linearized difference and log ratio of the arms' means (delta method; Deng, Knoblich, Lu 2018).

The alternative, the pigeonhole bootstrap with product weights (Owen, Eckles 2012), counts the noise of single
impressions about three times, which makes it conservative where few hearts decide, and takes thousands of resamples.
benchmarks/aa_policies.py measures the false-alarm rate of this interval end to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.intervals import CONFIDENCE_LEVEL, IntervalEstimate
from rluf.utils.stats import Floats, Ints

POWER = 0.8
"""Probability of a decision, if the true effect is the estimated one, that `plan_more_data` asks for."""
MAX_DATA_FACTOR = 100.0
"""More than this many times the present data is not proposed: the effect is then too close to the limit to decide."""


@dataclass(frozen=True, slots=True)
class ArmValues:
    """Values [N] of one arm with their prompts [N] and, for impressions, users [N] (None for scores of a model).

    Prompts are shared by the arms; equal user labels of two arms are different users.
    """

    values: ArrayLike
    prompts: Sequence[Any] | NDArray[Any]
    users: Sequence[Any] | NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class VarianceParts:
    """Components of a variance: of prompts and their responses, of users, of single impressions."""

    prompt: float
    user: float
    cell: float
    prompt_count: int
    user_count: int
    """Users of the smaller arm; 0 without users."""

    @property
    def total(self) -> float:
        """The two-way variance. At least that of each single clustering, which noise of `cell` could undercut."""
        return max(self.prompt + self.user - self.cell, self.prompt, self.user)

    @property
    def t_quantile(self) -> float:
        """Student's quantile of the 95% interval, with the degrees of freedom of the smaller number of clusters."""
        cluster_count = min(self.prompt_count, self.user_count) if self.user_count else self.prompt_count
        return float(stats.t.ppf(0.5 + CONFIDENCE_LEVEL / 2.0, cluster_count - 1))


@dataclass(frozen=True, slots=True)
class PolicyComparison:
    """Base against aligned with 95% intervals. `lift` (aligned / base - 1) is None unless both means are positive."""

    base: IntervalEstimate
    aligned: IntervalEstimate
    difference: IntervalEstimate
    lift: IntervalEstimate | None
    log_ratio_variance: VarianceParts | None


@dataclass(frozen=True, slots=True)
class MoreData:
    """Further prompts or users per arm that would decide a check, each alone; None where it alone cannot.

    `factor` is how many times the present prompts and users together would; None above MAX_DATA_FACTOR.
    """

    prompts: int | None = None
    users: int | None = None
    factor: float | None = None


def compare_arms(base: ArmValues, aligned: ArmValues) -> PolicyComparison:
    """Compare the means of two arms. DataError for fewer than two prompts or users, or values that are not finite."""
    clusters = _encode_clusters(base, aligned)
    arms = [np.asarray(arm.values, dtype=np.float64) for arm in (base, aligned)]
    for values in arms:
        if not np.isfinite(values).all():
            invalid_count = int((~np.isfinite(values)).sum())
            raise DataError(f"{invalid_count} of {values.size} values are not finite; check the source of the scores")
    means = [float(values.mean()) for values in arms]
    # Influence of each row on its arm's mean; rows of the other arm have none.
    influences = [
        np.concatenate([(arms[0] - means[0]) / arms[0].size, np.zeros(arms[1].size)]),
        np.concatenate([np.zeros(arms[0].size), (arms[1] - means[1]) / arms[1].size]),
    ]
    is_rate = [bool(np.isin(values, (0.0, 1.0)).all()) for values in arms]
    estimates = [
        _compute_mean_interval(mean, clusters.estimate_variance(influence), is_rate=rate)
        for mean, influence, rate in zip(means, influences, is_rate, strict=True)
    ]
    difference_parts = clusters.estimate_variance(influences[1] - influences[0])
    # "0 of 500 in both arms" has variance 0 but does not prove equality: the exact limit of the rates remains.
    exact_error = _compute_exact_error(difference_parts) if all(is_rate) and difference_parts.total == 0.0 else 0.0
    margin = difference_parts.t_quantile * math.sqrt(difference_parts.total) + exact_error
    mean_change = means[1] - means[0]
    lift, log_parts = None, None
    if min(means) > 0.0:
        # On the log scale, where a ratio is closer to normal and its interval cannot fall below -100%.
        log_parts = clusters.estimate_variance(influences[1] / means[1] - influences[0] / means[0])
        log_margin = log_parts.t_quantile * math.sqrt(log_parts.total) - math.log1p(-exact_error)
        log_ratio = math.log(means[1] / means[0])
        lift = IntervalEstimate(*(math.expm1(log_ratio + shift) for shift in (0.0, -log_margin, log_margin)))
    return PolicyComparison(
        estimates[0],
        estimates[1],
        IntervalEstimate(mean_change, mean_change - margin, mean_change + margin),
        lift,
        log_parts,
    )


def plan_more_data(comparison: PolicyComparison, limit: float) -> MoreData:
    """Prompts or users to add so that the lift's interval excludes `limit` (relative) with probability POWER.

    Assumes that the true lift is the estimated one and that components of the variance fall with the inverse of their
    number. More responses per user count as users.
    """
    parts, lift = comparison.log_ratio_variance, comparison.lift
    if parts is None or lift is None:
        return MoreData()
    if parts.total == 0.0:
        # Every row agrees: only the exact limit of that many prompts stands against a decision.
        needed = math.ceil(math.log((1.0 - CONFIDENCE_LEVEL) / 2.0) / math.log1p(limit)) + 1 if limit < 0.0 else 0
        return MoreData(prompts=needed - parts.prompt_count if needed > parts.prompt_count else None)
    distance = abs(math.log1p(lift.mean) - math.log1p(limit))
    target = (distance / (parts.t_quantile + float(stats.norm.ppf(POWER)))) ** 2
    if target == 0.0:
        return MoreData()
    prompt_only, user_only = max(parts.prompt - parts.cell, 0.0), max(parts.user - parts.cell, 0.0)
    factor = parts.total / target if parts.total <= MAX_DATA_FACTOR * target else None
    if not parts.user_count:
        return MoreData(_count_additional_clusters(parts.prompt, target, parts.prompt_count), None, factor)
    return MoreData(
        _count_additional_clusters(prompt_only, target - user_only - parts.cell, parts.prompt_count),
        _count_additional_clusters(user_only + parts.cell, target - prompt_only, parts.user_count),
        factor,
    )


def _count_additional_clusters(variance: float, target: float, present_count: int) -> int | None:
    """Clusters to add so that `variance`, which is that of `present_count` clusters, falls to `target`."""
    if target <= 0.0 or (factor := variance / target) > MAX_DATA_FACTOR:
        return None
    additional = math.ceil(present_count * (factor - 1.0))
    # Two significant digits: the estimate behind it has no more.
    unit = 10 ** max(0, len(str(max(additional, 1))) - 2)
    return max(1, math.ceil(additional / unit) * unit)


@dataclass(frozen=True, slots=True)
class _Clusters:
    """Cluster indices [N] of the rows of both arms: prompts (shared by the arms), users and cells (None without)."""

    prompt_index: Ints
    prompt_count: int
    user_index: Ints | None
    user_count: int
    cell_index: Ints | None

    def estimate_variance(self, influence: Floats) -> VarianceParts:
        """Variance of a statistic with this influence of each row [N]."""
        return VarianceParts(
            _compute_clustered_variance(self.prompt_index, influence),
            0.0 if self.user_index is None else _compute_clustered_variance(self.user_index, influence),
            0.0 if self.cell_index is None else _compute_clustered_variance(self.cell_index, influence),
            self.prompt_count,
            self.user_count,
        )


def _encode_clusters(base: ArmValues, aligned: ArmValues) -> _Clusters:
    for arm in (base, aligned):
        sizes = {np.size(arm.values), len(arm.prompts), np.size(arm.values) if arm.users is None else len(arm.users)}
        if len(sizes) > 1:
            raise DataError(
                f"expected one prompt and user for each value, got {np.size(arm.values)} values and "
                f"{len(arm.prompts)} prompts"
            )
    labels, prompt_index = np.unique(
        np.concatenate([np.asarray(base.prompts), np.asarray(aligned.prompts)]), return_inverse=True
    )
    if len(labels) < 2:
        raise DataError(f"an interval needs at least 2 clusters (prompts), got {len(labels)}; evaluate on more of them")
    if base.users is None or aligned.users is None:
        return _Clusters(prompt_index, len(labels), None, 0, None)
    encoded = [np.unique(np.asarray(arm.users), return_inverse=True) for arm in (base, aligned)]
    user_count = min(len(user_labels) for user_labels, _ in encoded)
    if user_count < 2:
        raise DataError(f"an interval needs at least 2 clusters (users) per arm, got {user_count}; add users")
    user_index = np.concatenate([encoded[0][1], encoded[1][1] + len(encoded[0][0])])
    cell_index = np.unique(user_index * len(labels) + prompt_index, return_inverse=True)[1]
    return _Clusters(prompt_index, len(labels), user_index, user_count, cell_index)


def _compute_clustered_variance(cluster_index: Ints, influence: Floats) -> float:
    """Sum of the squared influence of each cluster with at least one row that counts, times C / (C - 1)."""
    cluster_sums = np.bincount(cluster_index, weights=influence)
    cluster_count = max(2, int(np.count_nonzero(np.bincount(cluster_index[influence != 0.0]))))
    return float(cluster_count / (cluster_count - 1) * np.square(cluster_sums).sum())


def _compute_exact_error(parts: VarianceParts) -> float:
    """Largest rate of exceptions that the prompts, none of which has one, leave possible (Clopper, Pearson 1934)."""
    return 1.0 - float(((1.0 - CONFIDENCE_LEVEL) / 2.0) ** (1.0 / parts.prompt_count))


def _compute_mean_interval(mean: float, parts: VarianceParts, *, is_rate: bool) -> IntervalEstimate:
    margin = parts.t_quantile * math.sqrt(parts.total)
    if not is_rate:
        return IntervalEstimate(mean, mean - margin, mean + margin)
    if mean in (0.0, 1.0):
        margin = _compute_exact_error(parts)
    return IntervalEstimate(mean, max(0.0, mean - margin), min(1.0, mean + margin))
