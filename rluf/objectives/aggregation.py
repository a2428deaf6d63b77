"""How the opinions of several objectives become one reward: standardise on the reference policy, weigh, add.

R = sum_k w_k (s_k - mean_k) / sd_k, by objective name. The signal s of a model is the logit of its calibrated value
(probabilities near the base rate barely spread), that of a judge its 0 or 1. mean and sd are frozen on responses of the
reference policy, so that a weight means the same all through a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from rluf.errors import SettingsError
from rluf.types import Score

CLIP = 1e-6


def signal(score: Score, pessimism: float = 0.0) -> float:
    """What is standardised: logit of a model's value (clipped to [1e-6, 1 - 1e-6]), a judge's value as it is.

    `pessimism` k takes k standard deviations over an ensemble's members off its value first (Coste et al., arXiv
    2310.02743), so that responses on which the members disagree are not sought.
    """
    if score.verdict is not None:
        return score.value
    value = min(max(score.value - pessimism * score.spread, CLIP), 1 - CLIP)
    return math.log(value) - math.log1p(-value)


@dataclass(frozen=True, slots=True)
class Standardiser:
    """Mean and standard deviation of each objective's signal on the reference policy."""

    mean: Mapping[str, float]
    sd: Mapping[str, float]

    @classmethod
    def fit(cls, signals: Mapping[str, Sequence[float]]) -> Standardiser:
        """Freeze the statistics of reference-policy signals, by objective name.

        An objective whose signal does not vary gets sd 1. Raises SettingsError for an objective without signals.
        """
        for name, values in signals.items():
            if not values:
                raise SettingsError(f"objective {name} has no scores on the reference policy to be standardised with")
        spread = {name: pstdev(values) for name, values in signals.items()}
        means = {name: fmean(values) for name, values in signals.items()}
        tiny = {name: 1e-9 * max(1.0, abs(mean)) for name, mean in means.items()}
        return cls(means, {name: sd if sd > tiny[name] else 1.0 for name, sd in spread.items()})

    def apply(self, name: str, values: Sequence[float]) -> list[float]:
        """Standardised signals of one objective: in reference-policy standard deviations from its mean."""
        if name not in self.mean:
            known = ", ".join(sorted(self.mean))
            raise SettingsError(f"objective {name} was not scored on the reference policy (scored: {known})")
        return [(value - self.mean[name]) / self.sd[name] for value in values]


def combine(
    signals: Mapping[str, Sequence[float]], weights: Mapping[str, float], standardiser: Standardiser
) -> list[float]:
    """Reward of each sample: the weighted sum of standardised signals, matched by objective name, never by position.

    Objectives of weight 0 may be missing. Raises SettingsError for a weighted objective without scores, for scores
    without a weight, and for lists of different length.
    """
    missing = [name for name, weight in weights.items() if weight and name not in signals]
    unknown = [name for name in signals if name not in weights]
    if missing or unknown:
        raise SettingsError(
            f"objectives and scores do not match: weighted but not scored: {', '.join(missing) or 'none'}; "
            f"scored but without a weight: {', '.join(unknown) or 'none'}"
        )
    lengths = {name: len(values) for name, values in signals.items()}
    if len(set(lengths.values())) > 1:
        raise SettingsError(f"objectives scored different numbers of samples: {lengths}")
    total = [0.0] * max(lengths.values(), default=0)
    for name in sorted(signals):
        if weights[name]:
            for index, value in enumerate(standardiser.apply(name, signals[name])):
                total[index] += weights[name] * value
    return total
