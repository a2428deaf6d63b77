"""Pareto front over several objectives: optimal points, hypervolume, and the setting to recommend.

Points are [P, objectives], more is better in every column. A point dominates another if it is at least as good in every
objective and better in one. Hypervolume is the volume that the points dominate above a reference point (Zitzler and
Thiele 1999), computed by slicing along the last objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rluf.errors import DataError
from rluf.utils.stats import Bools, Floats


def is_pareto_optimal(points: ArrayLike) -> Bools:
    """Whether each point [P] is not dominated by another; equal points do not dominate each other."""
    values = _validate_points(points)
    # Compare every point (axis 0) with every other (axis 1).
    is_at_least = (values[:, None, :] >= values[None, :, :]).all(-1)
    is_better = (values[:, None, :] > values[None, :, :]).any(-1)
    return np.asarray(~(is_at_least & is_better).any(axis=0), dtype=np.bool_)


def compute_hypervolume(points: ArrayLike, reference_point: Sequence[float]) -> float:
    """Volume dominated above the reference point; points that are not above it in every objective add nothing.

    Only volumes with the same reference point are comparable.
    """
    values = _validate_points(points)
    reference = np.asarray(reference_point, dtype=np.float64)
    if reference.shape != values.shape[1:]:
        raise DataError(
            f"expected a reference point with {values.shape[1]} objectives like the points, got {reference.size}"
        )
    return _recursive_volume(values[(values > reference).all(1)], reference)


def _recursive_volume(values: Floats, reference_point: Floats) -> float:
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max() - reference_point[0])
    # Between two levels of the last objective the dominated slice is constant: the volume of the points at or above
    # the upper level, without the last objective, times the height of the slice.
    total = 0.0
    levels = np.unique(values[:, -1])
    for low, high in zip(np.concatenate([reference_point[-1:], levels[:-1]]), levels, strict=True):
        total += (high - low) * _recursive_volume(values[values[:, -1] >= high][:, :-1], reference_point[:-1])
    return float(total)


@dataclass(frozen=True, slots=True)
class SweepSetting:
    """One setting of a sweep: `seed_lifts` [seeds, objectives], love first, and whether each seed passed the gates.

    A seed whose run failed has no lifts and did not pass.
    """

    name: str
    seed_lifts: tuple[tuple[float, ...], ...]
    passed_gates: tuple[bool, ...]

    @property
    def mean_lifts(self) -> tuple[float, ...]:
        """Mean lift of each objective over the seeds."""
        return tuple(float(value) for value in np.mean(np.asarray(self.seed_lifts, dtype=np.float64), axis=0))


def recommend_setting(settings: Sequence[SweepSetting]) -> SweepSetting | None:
    """Setting with the highest mean love lift among those that passed, with love up, on every seed; None if none did.

    The rule depends on the worst seed, so a single lucky run is not enough.
    """
    candidates = [
        setting
        for setting in settings
        if all(setting.passed_gates) and min(lifts[0] for lifts in setting.seed_lifts) > 0.0
    ]
    return max(candidates, key=lambda setting: setting.mean_lifts[0], default=None)


def _validate_points(points: ArrayLike) -> Floats:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise DataError(f"a front needs one row of finite numbers per policy, got an array of shape {values.shape}")
    return values
