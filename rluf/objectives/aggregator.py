"""The combination that `objectives.combine` names: a step's scores in, one reward a sample out.

It holds what must outlive a step: the statistics of the reference policy, its replies' scores, and the multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rluf.config.reward import ObjectivesSettings
from rluf.objectives.aggregation import Standardiser, combine
from rluf.objectives.multipliers import Multipliers


@dataclass(frozen=True, slots=True)
class Opinions:
    """What is known of one group: its prompt, each objective's signals [samples], and the judges' verdicts."""

    prompt_id: str
    topic: str
    signals: Mapping[str, Sequence[float]]
    passed: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class Combined:
    """Rewards [groups][samples], the standardised signals they were made of, their weights, and metrics to log."""

    rewards: list[list[float]]
    parts: dict[str, list[list[float]]]
    weights: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)


class Combiner:
    """Combines objectives by name for one run. The first batch must come from the reference policy."""

    def __init__(self, objectives: ObjectivesSettings) -> None:
        """Take the combination from `objectives`."""
        self.objectives = objectives
        self.standardiser: Standardiser | None = None
        self.replies: dict[str, dict[str, float]] = {}
        self.multipliers = Multipliers(objectives.bounds)
        self.frozen: frozenset[str] = frozenset()
        """Objectives that count for nothing now, whatever their weights: an alarm asked for it."""

    def remember(self, prompt_id: str, signals: Mapping[str, Sequence[float]]) -> None:
        """Keep the base policy's reply to a prompt (the mean of its signals) to calibrate against."""
        self.replies[prompt_id] = {name: fmean(values) for name, values in signals.items()}

    def state(self) -> dict[str, Any]:
        """All of it as plain JSON, for a checkpoint."""
        statistics = None if self.standardiser is None else asdict(self.standardiser)
        return {"standardiser": statistics, "replies": self.replies, "multipliers": asdict(self.multipliers)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; floors are those of the settings."""
        kept = state["standardiser"]
        self.standardiser = None if kept is None else Standardiser(**kept)
        self.replies = {str(name): dict(reply) for name, reply in state["replies"].items()}
        self.multipliers = Multipliers(**{**state["multipliers"], "floors": self.objectives.bounds})

    def combine(self, batch: Sequence[Opinions], *, gate: bool = True) -> Combined:
        """Rewards of a batch. With `gate`, what failed a judge earns the least of the step (0 where calibrated).

        Raises SettingsError when objectives and scores do not match.
        """
        names = list(batch[0].signals)
        if self.standardiser is None:
            pooled = {name: [value for group in batch for value in group.signals[name]] for name in names}
            self.standardiser = Standardiser.fit(pooled)
        standardiser = self.standardiser
        parts = {name: [standardiser.apply(name, group.signals[name]) for group in batch] for name in names}
        weights = [
            {name: 0.0 if name in self.frozen else weight for name, weight in self.objectives.weights(g.topic).items()}
            for g in batch
        ]
        metrics: dict[str, float] = {}
        if self.objectives.combine == "calibrated":
            rewards = [self._calibrated(group, w) for group, w in zip(batch, weights, strict=True)]
        else:
            if self.objectives.combine == "constrained":
                weights = self._constrained(batch, parts, weights)
                metrics = {f"multiplier_{name}": value for name, value in self.multipliers.values.items()}
            rewards = [combine(group.signals, w, standardiser) for group, w in zip(batch, weights, strict=True)]
        if gate:
            least = 0.0 if self.objectives.combine == "calibrated" else min(map(min, rewards))
            rewards = [gated(row, group.passed, least) for row, group in zip(rewards, batch, strict=True)]
            for name, rows in parts.items():
                floor = min(map(min, rows))
                parts[name] = [gated(row, group.passed, floor) for row, group in zip(rows, batch, strict=True)]
        if any(group.passed for group in batch):
            metrics["passed"] = fmean(float(passed) for group in batch for passed in group.passed)
        return Combined(rewards, parts, weights, metrics)

    def _calibrated(self, group: Opinions, weights: Mapping[str, float]) -> list[float]:
        """sum_k w_k s(r_k - r_k of the base policy's reply) / sum_k w_k, in (0, 1): CGPO, arXiv 2409.20370, eq. 7.

        A prompt whose base reply is not known is calibrated against the mean of its own responses.
        """
        counted = {name: weight for name, weight in weights.items() if weight}
        own = {name: fmean(values) for name, values in group.signals.items()}
        reply, scale = self.replies.get(group.prompt_id, own), sum(counted.values()) or 1.0
        size = len(next(iter(group.signals.values())))
        return [
            sum(w * sigmoid(group.signals[name][i] - reply[name]) for name, w in sorted(counted.items())) / scale
            for i in range(size)
        ]

    def _constrained(
        self, batch: Sequence[Opinions], parts: Mapping[str, list[list[float]]], weights: Sequence[Mapping[str, float]]
    ) -> list[dict[str, float]]:
        """Weights (w_k + multiplier_k) / (1 + sum of multipliers), the Lagrangian's, kept at the scale of the weights.

        Topics that one objective owns keep their weights, and count only for that objective's floor. Source: Safe RLHF,
        arXiv 2310.12773, eq. 11 and its published code.
        """
        owners = self.objectives.owners
        means = {}
        for name in self.objectives.bounds:
            counted = [
                value
                for group, row in zip(batch, parts[name], strict=True)
                if owners.get(group.topic, name) == name
                for value in row
            ]
            if counted:
                means[name] = fmean(counted)
        pushes = self.multipliers.update(means)
        scale = 1.0 + sum(pushes.values())
        return [
            dict(w)
            if group.topic in owners
            else {name: (weight + pushes.get(name, 0.0)) / scale for name, weight in w.items()}
            for group, w in zip(batch, weights, strict=True)
        ]


def gated(values: Sequence[float], passed: Sequence[bool], least: float) -> list[float]:
    """`values` with `least` where a judge did not pass the response; as they are without verdicts."""
    if not passed:
        return list(values)
    return [value if good else least for value, good in zip(values, passed, strict=True)]


def sigmoid(value: float) -> float:
    """1 / (1 + e^-value) without overflow."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))
