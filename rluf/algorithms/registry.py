"""What an algorithm's name stands for: its estimator, its loss, how it weighs tokens, and what it asks of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rluf.algorithms.advantages import Gains, Outcomes, advantages
from rluf.config.policy import AlgorithmSettings

Weighing = Literal["sequence", "token", "constant", "sum", "prompt"]


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the literature.

    `estimator` names an advantage estimator, `loss` a policy loss. `weighing` is what a token of a response of n tokens
    counts in a step of N responses to P prompts: sequence 1 / (n N), token 1 / all tokens, constant 1 / (longest
    response allowed * N), sum 1 / N, prompt 1 / P. `drifts`: advantages need each response's KL to the reference.
    `refills`: groups without spread are dropped and others generated (DAPO). `critic`: learners turn rewards into
    advantages by token with a critic of their own (PPO). `logged`: it learns from reactions in the log, not from the
    policy's own responses (KTO).
    """

    estimator: str
    loss: str
    weighing: Weighing
    drifts: bool = False
    refills: bool = False
    critic: bool = False
    logged: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "grpo": Method("grpo", "ppo", "sequence"),
        "ppo": Method("gae", "ppo", "token", critic=True),
        "dr_grpo": Method("dr_grpo", "ppo", "constant"),
        "rloo": Method("rloo", "reinforce", "sum"),
        "reinforce_pp": Method("reinforce_pp", "ppo", "token"),
        "reinforce_pp_baseline": Method("reinforce_pp_baseline", "ppo", "token"),
        "dapo": Method("grpo", "ppo", "token", refills=True),
        "lite_ppo": Method("batch_std", "ppo", "token"),
        "crpg": Method("crpg", "reinforce", "sequence", drifts=True),
        "crraft": Method("crraft", "reinforce", "prompt", drifts=True),
        "codpo": Method("codpo", "reinforce", "prompt", drifts=True),
        "kto": Method("kto", "reinforce", "sum", logged=True),
    }
)
"""Method by the name that `algorithm.name` gives."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the learners are told of a step beside its samples.

    `advantages` and `weights` [groups][samples] are those of every token of a response (`weights`: its share of the
    loss); `slope` see Gains; `kl_coef` weighs the KL in the loss (0 where it is in the reward); `loss` names the policy
    loss. With `critic`, advantages are still rewards, `reward_kl` is taken off them by token, and the learners' critic
    makes advantages of them.
    """

    advantages: list[list[float]]
    weights: list[list[float]]
    loss: str = "ppo"
    kl_coef: float = 0.0
    slope: float = 0.0
    critic: bool = False
    reward_kl: float = 0.0


def needs_drifts(algorithm: AlgorithmSettings) -> bool:
    """Whether advantages wait for the reference policy's opinion of each response."""
    method = METHODS[algorithm.name]
    return method.drifts or (algorithm.kl_in == "reward" and algorithm.kl_coef > 0 and not method.critic)


def make_lesson(
    algorithm: AlgorithmSettings,
    outcomes: Outcomes,
    *,
    longest: int,
    kl_coef: float,
    by_objective: bool = False,
    shown: Sequence[int] = (),
) -> Lesson:
    """The lesson of a step: advantages by the method's estimator (GDPO's when `by_objective`), weights by its rule.

    `longest` is the most response tokens allowed, `kl_coef` the KL's weight now, `shown` the lengths of demonstrations,
    each of which joins as a group of one response with advantage 1.
    """
    method = METHODS[algorithm.name]
    gains: Gains = advantages("gdpo" if by_objective else method.estimator, outcomes)
    lengths = [*map(list, outcomes.lengths), *([length] for length in shown)]
    loss = algorithm.loss or method.loss
    return Lesson(
        advantages=[*gains.values, *([1.0] for _ in shown)],
        weights=token_weights("sequence" if loss == "gspo" else method.weighing, lengths, longest),
        loss=loss,
        kl_coef=kl_coef if algorithm.kl_in == "loss" else 0.0,
        slope=gains.slope,
        critic=method.critic,
        reward_kl=kl_coef if method.critic and algorithm.kl_in == "reward" else 0.0,
    )


def token_weights(weighing: Weighing, lengths: Sequence[Sequence[int]], longest: int) -> list[list[float]]:
    """What a token of each response counts [groups][samples], see Method; `lengths` are response tokens.

    Sources: mean by sequence as in GRPO, arXiv 2402.03300; by token as in DAPO, arXiv 2503.14476; a constant as in
    Dr. GRPO, arXiv 2503.20783.
    """
    samples, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    whole = {
        "token": 1.0 / max(1, tokens),
        "constant": 1.0 / (max(1, longest) * max(1, samples)),
        "sum": 1.0 / max(1, samples),
        "prompt": 1.0 / max(1, len(lengths)),
    }
    if weighing == "sequence":
        return [[1.0 / (max(1, length) * samples) for length in row] for row in lengths]
    return [[whole[weighing]] * len(row) for row in lengths]


def varied(signals: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> bool:
    """Whether any objective that counts tells a group's samples apart; DAPO drops groups where none does."""
    return any(max(row) > min(row) for name, row in signals.items() if weights.get(name))
