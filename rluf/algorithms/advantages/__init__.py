"""Advantage estimators by name, one signature: the Outcomes of a step in, Gains out.

They are plain float arithmetic on a few numbers a sample, in double precision, so that the driver needs no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from rluf.algorithms.advantages.base import Drift, Gains, Outcomes
from rluf.algorithms.advantages.cgpo import codpo, crpg, crraft
from rluf.algorithms.advantages.dr_grpo import dr_grpo
from rluf.algorithms.advantages.gae import gae_rewards
from rluf.algorithms.advantages.gdpo import gdpo
from rluf.algorithms.advantages.grpo import grpo
from rluf.algorithms.advantages.kto import kto
from rluf.algorithms.advantages.lite_ppo import batch_std
from rluf.algorithms.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from rluf.algorithms.advantages.rloo import rloo
from rluf.errors import SettingsError

Estimator = Callable[[Outcomes], Gains]

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "grpo": grpo,
        "dr_grpo": dr_grpo,
        "rloo": rloo,
        "reinforce_pp": reinforce_pp,
        "reinforce_pp_baseline": reinforce_pp_baseline,
        "batch_std": batch_std,
        "gdpo": gdpo,
        "gae": gae_rewards,
        "crpg": crpg,
        "crraft": crraft,
        "codpo": codpo,
        "kto": kto,
    }
)
"""Estimator by name; rluf.algorithms.registry says which one each `algorithm.name` takes."""


def advantages(name: str, outcomes: Outcomes) -> Gains:
    """Gains of a step by estimator `name`. Raises SettingsError for an unknown name."""
    estimator = ESTIMATORS.get(name)
    if estimator is None:
        raise SettingsError(f"{name!r} is not an advantage estimator; choose from {sorted(ESTIMATORS)}")
    return estimator(outcomes)


__all__ = ["ESTIMATORS", "Drift", "Estimator", "Gains", "Outcomes", "advantages"]
