"""Advantage estimators by name, with one signature: the AdvantageInputs of a step to Advantages.

They are plain float arithmetic on a few numbers per sample, in double precision, so that the driver needs no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages, SampleKL
from rluf.algorithms.advantages.cgpo import codpo, crpg, crraft
from rluf.algorithms.advantages.gae import pass_through_rewards
from rluf.algorithms.advantages.grpo import dr_grpo, gdpo, grpo, lite_ppo, rloo
from rluf.algorithms.advantages.kto import kto
from rluf.algorithms.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from rluf.utils.plugins import load_plugin

AdvantageEstimator = Callable[[AdvantageInputs], Advantages]

ADVANTAGE_ESTIMATORS: Mapping[str, AdvantageEstimator] = MappingProxyType(
    {
        "grpo": grpo,
        "dr_grpo": dr_grpo,
        "rloo": rloo,
        "reinforce_pp": reinforce_pp,
        "reinforce_pp_baseline": reinforce_pp_baseline,
        "lite_ppo": lite_ppo,
        "gdpo": gdpo,
        "gae": pass_through_rewards,
        "crpg": crpg,
        "crraft": crraft,
        "codpo": codpo,
        "kto": kto,
    }
)
"""Estimator by name; rluf.algorithms.registry maps each `algorithm.name` to one."""


def compute_advantages(estimator_name: str, inputs: AdvantageInputs) -> Advantages:
    """Advantages of a step by an estimator, given by name or as package.module:function.

    Raises SettingsError for an unknown name.
    """
    estimator = ADVANTAGE_ESTIMATORS.get(estimator_name)
    if estimator is None:
        estimator = load_plugin(
            estimator_name,
            kind="advantage estimator",
            known_names=ADVANTAGE_ESTIMATORS,
            signature="a function (AdvantageInputs) -> Advantages",
        )
    advantages: Advantages = estimator(inputs)
    return advantages


__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "AdvantageEstimator",
    "AdvantageInputs",
    "Advantages",
    "SampleKL",
    "compute_advantages",
]
