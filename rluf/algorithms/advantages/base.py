"""Inputs and outputs of the advantage estimators, as plain numbers per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

SampleValues = Sequence[Sequence[float]]
"""One number per sample: [groups][samples]."""


@dataclass(frozen=True, slots=True)
class SampleKL:
    """KL statistics of one response in nats, from l = log p_rollout - log p_reference per token.

    `kl_sum` is the sum of l over the response (k1). `kl_to_go_sum` and `kl_to_go_squared_sum` are sums over its tokens
    of the KL to go (the sum of l from that token to the end, itself included) and of its square.
    """

    kl_sum: float
    kl_to_go_sum: float = 0.0
    kl_to_go_squared_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """Driver-side numbers of one step, by group and sample.

    `rewards` [groups][samples] are aggregated over objectives; `response_lengths` are in tokens. `sample_kl` is set
    where the algorithm or `kl_coef` needs it. `passed_judges` says which responses passed every judge (empty: all did).
    `objective_rewards` are normalized signals by objective, with one mapping of `objective_weights` per group (GDPO).
    `kl_coef` is the coefficient of the KL subtracted from the reward (0 where the KL is a term of the loss),
    `max_response_kl` the largest KL of a response in nats (CGPO), `mismatched_kl` the mean KL of responses paired with
    other prompts (KTO).
    """

    rewards: SampleValues
    response_lengths: Sequence[Sequence[int]] = ()
    sample_kl: Sequence[Sequence[SampleKL]] = ()
    passed_judges: Sequence[Sequence[bool]] = ()
    objective_rewards: Mapping[str, SampleValues] = field(default_factory=dict)
    objective_weights: Sequence[Mapping[str, float]] = ()
    kl_coef: float = 0.0
    max_response_kl: float = math.inf
    mismatched_kl: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on an empty group, a reward that is not finite, or a field of another shape than rewards."""
        for group_rewards in self.rewards:
            if not group_rewards or not all(map(math.isfinite, group_rewards)):
                raise ValueError(
                    f"advantages: expected at least one reward per group, all finite, got {list(group_rewards)}"
                )
        group_sizes = [len(group_rewards) for group_rewards in self.rewards]
        for field_name in ("response_lengths", "sample_kl", "passed_judges"):
            field_sizes = [len(group) for group in getattr(self, field_name)]
            # These fields are optional: empty means that the algorithm does not use them.
            if field_sizes and field_sizes != group_sizes:
                raise ValueError(f"{field_name}: expected the shape of rewards, {group_sizes}, got {field_sizes}")

    @property
    def kl_penalized_rewards(self) -> list[list[float]]:
        """Rewards minus kl_coef times the KL of each response (k1): the KL penalty at response level."""
        if not (self.kl_coef and self.sample_kl):
            return [list(group_rewards) for group_rewards in self.rewards]
        return [
            [reward - self.kl_coef * response_kl.kl_sum for reward, response_kl in zip(rewards, group_kl, strict=True)]
            for rewards, group_kl in zip(self.rewards, self.sample_kl, strict=True)
        ]

    def has_passed_judges(self, group_index: int, sample_index: int) -> bool:
        """Whether the sample passed every judge."""
        return self.passed_judges[group_index][sample_index] if self.passed_judges else True

    def get_response_kl(self, group_index: int, sample_index: int) -> float:
        """KL of the sample to the reference policy in nats; 0 where sample_kl is empty."""
        return self.sample_kl[group_index][sample_index].kl_sum if self.sample_kl else 0.0


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantage of each sample [groups][samples].

    The advantage of one token is `sample_advantages` minus `kl_to_go_coef` times the KL to go at that token.
    """

    sample_advantages: list[list[float]]
    kl_to_go_coef: float = 0.0


def subtract_mean(values: Sequence[float]) -> list[float]:
    """Values minus their mean; exact zeros where all are equal."""
    # The mean of equal floats can differ from them in the last bit, and dividing by a standard deviation of the same
    # size would turn that bit into an advantage of order 1.
    if min(values) == max(values):
        return [0.0] * len(values)
    mean = fmean(values)
    return [value - mean for value in values]


def compute_sample_std(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 (as torch.std); 0 for fewer than two values or equal ones."""
    if len(values) < 2 or min(values) == max(values):
        return 0.0
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
