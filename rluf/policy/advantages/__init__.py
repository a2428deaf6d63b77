"""Advantage estimators by name: a group's rewards [G] in, one advantage a sample [G] out; numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rluf.errors import SettingsError
from rluf.policy.advantages.grpo import grpo

Estimator = Callable[[Sequence[float]], list[float]]

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"grpo": grpo})
"""Estimator by the name that `algorithm.name` gives."""


def advantages(name: str, rewards: Sequence[float]) -> list[float]:
    """Advantages [G] of one group's `rewards` [G] by estimator `name`. Raises SettingsError for an unknown name."""
    estimator = ESTIMATORS.get(name)
    if estimator is None:
        raise SettingsError(f"algorithm.name={name!r} is not an advantage estimator; choose from {sorted(ESTIMATORS)}")
    return estimator(rewards)


__all__ = ["ESTIMATORS", "Estimator", "advantages"]
