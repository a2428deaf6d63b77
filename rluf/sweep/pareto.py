"""Several policies, several goods: who is dominated by nobody, how much the front covers, and which one to take.

Points are [P, goods], more is better in every column. A point dominates another when it is nowhere worse and somewhere
better. Hypervolume is the volume that the points dominate above a reference point (Zitzler and Thiele 1999), found by
slicing along the last good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rluf.errors import DataError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def on_front(points: ArrayLike) -> Bools:
    """Which points [P] no other point dominates; equal points do not dominate each other."""
    values = _checked(points)
    least = (values[:, None, :] >= values[None, :, :]).all(-1)
    most = (values[:, None, :] > values[None, :, :]).any(-1)
    return np.asarray(~(least & most).any(axis=0), dtype=np.bool_)


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume between the points and the reference point; points that are not above it in every good add nothing.

    Only volumes to the same reference can be compared.
    """
    values = _checked(points)
    floor = np.asarray(reference, dtype=np.float64)
    if floor.shape != values.shape[1:]:
        raise DataError(f"the reference point has {floor.size} goods, the points have {values.shape[1]}")
    return _volume(values[(values > floor).all(1)], floor)


def _volume(values: Floats, floor: Floats) -> float:
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max() - floor[0])
    total = 0.0
    levels = np.unique(values[:, -1])
    for low, high in zip(np.concatenate([floor[-1:], levels[:-1]]), levels, strict=True):
        total += (high - low) * _volume(values[values[:, -1] >= high][:, :-1], floor[:-1])
    return float(total)


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of a sweep over several seeds: `lifts` [seeds, goods], love first, and whether each seed `held`.

    A seed whose run failed has no lifts and did not hold.
    """

    name: str
    lifts: tuple[tuple[float, ...], ...]
    held: tuple[bool, ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean lift of each good over the seeds."""
        return tuple(float(value) for value in np.mean(np.asarray(self.lifts, dtype=np.float64), axis=0))


def recommended(choices: Sequence[Choice]) -> Choice | None:
    """The setting with the most love on average among those that held on every seed and whose love rose on every seed;
    None where there is none. The rule looks at the worst seed, so one lucky run launches nothing."""
    fit = [one for one in choices if all(one.held) and min(row[0] for row in one.lifts) > 0.0]
    return max(fit, key=lambda one: one.mean[0], default=None)


def _checked(points: ArrayLike) -> Floats:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise DataError(f"a front needs one row of finite numbers a policy, got an array of shape {values.shape}")
    return values
