"""What every estimator takes and gives: the outcomes of a step in plain numbers, and what each response gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

Rows = Sequence[Sequence[float]]
"""One number a sample: [groups][samples]."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one response lies from the reference policy, in nats, l = log p_rollout - log p_reference a token.

    `kl` is the sum of l over the response (k1); `togo` and `togo_squared` sum, over its tokens, the l still to come
    from that token on (itself included), and its square.
    """

    kl: float
    togo: float = 0.0
    togo_squared: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcomes:
    """A step as the driver knows it, in groups of samples.

    `rewards` [groups][samples] are combined over objectives; `lengths` are response tokens; `drifts` are given where
    the method or `kl_coef` asks for them; `passed` says which responses passed every judge (all, when empty). `parts`
    are standardised signals by objective with their `weights` a group (GDPO). `kl_coef` is the weight of the KL taken
    off the reward (0 where it is a term of the loss), `kl_limit` the most nats a response may drift (CGPO),
    `mismatched` the mean drift of responses to other prompts (KTO).
    """

    rewards: Rows
    lengths: Sequence[Sequence[int]] = ()
    drifts: Sequence[Sequence[Drift]] = ()
    passed: Sequence[Sequence[bool]] = ()
    parts: Mapping[str, Rows] = field(default_factory=dict)
    weights: Sequence[Mapping[str, float]] = ()
    kl_coef: float = 0.0
    kl_limit: float = math.inf
    mismatched: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on an empty group, a reward that is not finite, or rows of other shape than the rewards."""
        for rewards in self.rewards:
            if not rewards or not all(map(math.isfinite, rewards)):
                raise ValueError(f"advantages need at least one reward a group, all finite, but got {list(rewards)}")
        shape = [len(row) for row in self.rewards]
        for name in ("lengths", "drifts", "passed"):
            rows = getattr(self, name)
            if rows and [len(row) for row in rows] != shape:
                raise ValueError(f"{name} must have the shape of rewards, {shape}, not {[len(row) for row in rows]}")

    @property
    def penalised(self) -> list[list[float]]:
        """Rewards less kl_coef times each response's KL (k1): KL in the reward, by response."""
        if not (self.kl_coef and self.drifts):
            return [list(row) for row in self.rewards]
        return [
            [reward - self.kl_coef * drift.kl for reward, drift in zip(rewards, drifts, strict=True)]
            for rewards, drifts in zip(self.rewards, self.drifts, strict=True)
        ]

    def passes(self, group: int, sample: int) -> bool:
        """Whether every judge passed the sample."""
        return self.passed[group][sample] if self.passed else True

    def drift(self, group: int, sample: int) -> float:
        """Nats the sample lies from the reference; 0 where drifts are not given."""
        return self.drifts[group][sample].kl if self.drifts else 0.0


@dataclass(frozen=True, slots=True)
class Gains:
    """Advantage of each sample [groups][samples]; a token's is that less `slope` times its own KL still to come."""

    values: list[list[float]]
    slope: float = 0.0


def centred(rewards: Sequence[float]) -> list[float]:
    """Rewards less their mean; exact zeros when they are equal, so that rounding never becomes an advantage."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    return [reward - mean for reward in rewards]


def sample_deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 (as torch.std has it); 0 for fewer than two values or equal ones."""
    if len(values) < 2 or min(values) == max(values):
        return 0.0
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
