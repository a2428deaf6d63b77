"""Content of summary.json: results, gates, monitors and facts of a run as one plain dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rluf.config.objectives import BUILTIN_OBJECTIVES, ObjectiveSpec, find_objective_spec
from rluf.errors import DataError
from rluf.evaluate.gates import GateEvidence, evaluate_gates
from rluf.evaluate.intervals import IntervalEstimate
from rluf.evaluate.monitors import MonitorSample, compare_monitors
from rluf.evaluate.two_way import ArmValues, PolicyComparison, compare_arms
from rluf.types import ALIGNED_ARM, BASE_ARM, CONTROL_ARM, REPEAT_ARM, PolicyAnswer, compute_mean_token_entropy

COMPARISONS = (
    ("aligned_vs_base", "Aligned against base", BASE_ARM, ALIGNED_ARM),
    ("aligned_vs_control", "Aligned against control: the base, sharpened to equal entropy", CONTROL_ARM, ALIGNED_ARM),
    ("repeat_vs_base", "A/A: another draw of the base against base", BASE_ARM, REPEAT_ARM),
)
"""Key, title and both arms of the comparisons in summary.json; one without its arms is omitted."""


class ArmReactions(Protocol):
    """Reactions of new users: arrays [N] over the responses they read."""

    @property
    def user(self) -> NDArray[Any]:
        """User number; equal numbers in two arms are still different users."""

    @property
    def item(self) -> NDArray[Any]:
        """Index of the response among the samples of the arm."""

    @property
    def loved(self) -> NDArray[Any]:
        """Whether the user put a heart."""

    @property
    def helpful(self) -> NDArray[Any]:
        """Whether the response was helpful to the user."""

    @property
    def safe(self) -> NDArray[Any]:
        """Whether the response was harmless."""


@dataclass(frozen=True, slots=True)
class EvaluatedArm:
    """One arm on the test prompts: its responses with calibrated scores, and reactions of new users if any."""

    answers: Sequence[PolicyAnswer]
    reactions: ArmReactions | None = None

    @property
    def monitor_samples(self) -> list[MonitorSample]:
        """The responses as input of the monitors."""
        return [
            MonitorSample(
                answer.prompt_id, answer.messages, answer.text, answer.tokens, answer.topic, answer.finish_reason,
                None if answer.logprob is None else -answer.logprob,
            )
            for answer in self.answers
        ]  # fmt: skip

    @property
    def truncated_share(self) -> float:
        """Share of responses that were cut at the token limit."""
        return float(np.mean([answer.finish_reason == "length" for answer in self.answers]))

    def compute_facts(self) -> dict[str, float | None]:
        """Size and text statistics of the arm; `entropy` is in nats per token."""
        return {
            "prompts": len({answer.prompt_id for answer in self.answers}),
            "responses": len(self.answers),
            "users": 0 if self.reactions is None else len(np.unique(self.reactions.user)),
            "tokens": float(np.mean([answer.tokens for answer in self.answers])),
            "truncated_share": self.truncated_share,
            "entropy": compute_mean_token_entropy(self.answers),
        }


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of the run: time, KL, size, versions, cache hits, reward cards, scores of the base policy in training.

    `final_kl` is in nats per token at the last step, `sample_count` and `token_count` were generated in training,
    `versions` are of packages or weights, `reused_artifacts` by artifact name, `reward_cards` by objective.
    """

    name: str
    seed: int
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    final_kl: float | None = None
    sample_count: int = 0
    token_count: int = 0
    versions: Mapping[str, Any] = field(default_factory=dict)
    reused_artifacts: Mapping[str, Any] = field(default_factory=dict)
    reward_cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference_statistics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def build_summary(
    run_facts: RunFacts, arms: Mapping[str, EvaluatedArm], specs: Mapping[str, ObjectiveSpec] = BUILTIN_OBJECTIVES
) -> dict[str, Any]:
    """Build the content of summary.json. `specs` have the gates of the objectives.

    `arms` are `base` and `aligned`, and optionally `base_repeat` (another draw of the base, the A/A test) and `control`
    (the base at the entropy of aligned). With reactions in both: `love_rate`, `helpfulness`, `safety`, each {base,
    aligned, difference, lift}. Always: `offline`, the same of the scores of reward models and judges, `comparisons`
    with the lifts of every pair of arms, and `arms` with the facts of each. All 95% intervals are compare_arms'. The
    gates use the users' verdicts if there are any, else the scores; an objective that users do not judge is always
    checked on its own scores. A lift is null if it is undefined (a mean not positive). DataError when base or aligned
    is empty or their prompts differ.
    """
    base_arm, aligned_arm = _require_paired_arms(arms)
    offline = _compare_scores(base_arm, aligned_arm)
    by_users = compare_reactions(base_arm, aligned_arm)
    # Users decide if there are any: the reward models are what the policy was optimized against.
    compared = {**offline, **by_users}
    judged_by = {name: "simulated users" if name in by_users else "reward models" for name in compared}
    monitors = compare_monitors(base_arm.monitor_samples, aligned_arm.monitor_samples)
    alarm_labels = {name: item["label"] for name, item in monitors["items"].items() if item["alarm"]}
    evidence = GateEvidence(compared, judged_by, alarm_labels, aligned_arm.truncated_share)
    arm_facts = {name: arm.compute_facts() for name, arm in arms.items()}
    verdicts = {name: spec.simulated_verdict for name, spec in BUILTIN_OBJECTIVES.items()}
    return {
        "name": run_facts.name,
        "seed": run_facts.seed,
        **{
            verdict.summary_key: _build_comparison_dict(by_users[name])
            for name, verdict in verdicts.items()
            if name in by_users and verdict is not None
        },
        "offline": {
            find_objective_spec(name).offline_key: _build_comparison_dict(comparison)
            for name, comparison in offline.items()
        },
        "gates": evaluate_gates(evidence, specs),
        "comparisons": _list_comparisons(arms),
        "arms": arm_facts,
        "monitors": monitors,
        "phases": dict(run_facts.phase_seconds),
        "kl": run_facts.final_kl,
        "reference": {name: dict(row) for name, row in run_facts.reference_statistics.items()},
        "samples": run_facts.sample_count,
        "tokens": run_facts.token_count,
        "versions": dict(run_facts.versions),
        "reused": dict(run_facts.reused_artifacts),
        "reward_cards": {name: flatten_numbers(card) for name, card in run_facts.reward_cards.items()},
    }


def _require_paired_arms(arms: Mapping[str, EvaluatedArm]) -> tuple[EvaluatedArm, EvaluatedArm]:
    """Base and aligned. DataError when one has no responses or they answered different prompts."""
    prompt_ids = []
    for name in (BASE_ARM, ALIGNED_ARM):
        if name not in arms or not arms[name].answers:
            raise DataError(f"the {name} policy gave no responses to compare; set evaluate.prompts to 2 or more")
        prompt_ids.append({answer.prompt_id for answer in arms[name].answers})
    if unpaired := sorted(prompt_ids[0] ^ prompt_ids[1]):
        raise DataError(
            f"{len(unpaired)} prompts were answered by one arm only (first: {unpaired[0]}); evaluate both arms on the "
            "same prompts"
        )
    return arms[BASE_ARM], arms[ALIGNED_ARM]


def flatten_numbers(card: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Plain numbers of a card with dotted names for nested ones (test.auroc); lists and texts are dropped."""
    numbers: dict[str, float] = {}
    for key, value in card.items():
        if isinstance(value, Mapping):
            numbers |= flatten_numbers(value, f"{prefix}{key}.")
        # bool is a subclass of int and is not a number here.
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _compare_scores(base_arm: EvaluatedArm, other_arm: EvaluatedArm) -> dict[str, PolicyComparison]:
    """Comparison of the scores of reward models and judges, by objective."""
    return {
        objective: compare_arms(*(
            ArmValues([answer.scores[objective] for answer in arm.answers], [a.prompt_id for a in arm.answers])
            for arm in (base_arm, other_arm)
        ))
        for objective in base_arm.answers[0].scores
    }  # fmt: skip


def compare_reactions(base_arm: EvaluatedArm, other_arm: EvaluatedArm) -> dict[str, PolicyComparison]:
    """Comparison of the users' verdicts by objective; empty without users in both arms."""
    arm_reactions = [(arm, arm.reactions) for arm in (base_arm, other_arm) if arm.reactions is not None]
    if len(arm_reactions) < 2:
        return {}
    prompts = [
        np.asarray([answer.prompt_id for answer in arm.answers])[reactions.item] for arm, reactions in arm_reactions
    ]
    return {
        objective: compare_arms(*(
            ArmValues(getattr(reactions, spec.simulated_verdict.reaction_field), prompt_ids, reactions.user)
            for (_, reactions), prompt_ids in zip(arm_reactions, prompts, strict=True)
        ))
        for objective, spec in BUILTIN_OBJECTIVES.items()
        if spec.simulated_verdict is not None
    }  # fmt: skip


def _list_comparisons(arms: Mapping[str, EvaluatedArm]) -> dict[str, dict[str, Any]]:
    """Lifts by objective of every pair of arms in COMPARISONS: by users if there are any, else by scores."""
    comparisons = {}
    for key, title, reference_name, arm_name in COMPARISONS:
        if reference_name not in arms or arm_name not in arms:
            continue
        pair = arms[reference_name], arms[arm_name]
        compared = {**_compare_scores(*pair), **compare_reactions(*pair)}
        lifts = {name: _estimate_dict(comparison.lift) for name, comparison in compared.items()}
        comparisons[key] = {"title": title, "reference": reference_name, "arm": arm_name, "lifts": lifts}
    return comparisons


def _build_comparison_dict(comparison: PolicyComparison) -> dict[str, Any]:
    return {
        "base": comparison.base.as_dict(),
        "aligned": comparison.aligned.as_dict(),
        "difference": comparison.difference.as_dict(),
        "lift": _estimate_dict(comparison.lift),
    }


def _estimate_dict(estimate: IntervalEstimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate.as_dict()
