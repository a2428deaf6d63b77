"""Content of summary.json (results, monitors, facts of a run as one plain dictionary) and the release gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rluf.config.objectives import BUILTIN_OBJECTIVES, ObjectiveSpec, find_objective_spec
from rluf.errors import DataError
from rluf.evaluate.intervals import IntervalEstimate, clustered_mean, paired_bootstrap, relative_lift
from rluf.evaluate.monitors import MonitorSample, compare_monitors


def is_clear_rise(lift: IntervalEstimate | None) -> bool:
    """Whether the whole interval is above zero. An undefined lift has not risen."""
    return lift is not None and lift.low > 0.0


def is_not_clear_fall(lift: IntervalEstimate | None, margin: float) -> bool:
    """Whether there is no significant fall, or one smaller than `margin` (relative). An undefined lift fails.

    The first half is absence of evidence, not evidence of absence: with few users everything passes. `proven` in the
    verdict shows where the interval also excludes a fall by the margin, which is non-inferiority proper.
    """
    return lift is not None and (lift.high >= 0.0 or lift.low >= -margin)


def format_gate_rule(specs: Iterable[ObjectiveSpec]) -> str:
    """The rule of the gates of these objectives in one sentence."""
    rising = [spec.name for spec in specs if spec.gate == "must_rise"]
    holding = [spec.name for spec in specs if spec.gate == "must_hold"]
    clauses = []
    if rising:
        verb = "passes" if len(rising) == 1 else "pass"
        clauses.append(f"{_join_names(rising)} {verb} if the interval of its lift is above zero")
    if holding:
        verb = "passes" if len(holding) == 1 else "pass"
        clauses.append(
            f"{_join_names(holding)} {verb} unless the interval is entirely below zero, and then still pass if it is "
            "entirely above minus the margin"
        )
    return "; ".join([*clauses, "a monitor alarm turns a pass into a warning"])


def _join_names(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def evaluate_gates(
    lifts: Mapping[str, IntervalEstimate | None],
    *,
    margin: float,
    verdict_source: str,
    alarm_names: Sequence[str],
    specs: Mapping[str, ObjectiveSpec] = BUILTIN_OBJECTIVES,
    check_sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Gate checks and verdict of one comparison: pass, warn (passes, but with monitor alarms) or fail.

    `lifts` are relative lifts by objective, `margin` is the largest relative fall that a must_hold objective may have,
    `verdict_source` names whose reactions or scores the lifts are of, and `check_sources` another source for single
    objectives. `specs` have the gate of each objective.
    """
    checks: list[dict[str, Any]] = []
    gated_specs = [spec for spec in specs.values() if spec.gate != "none"]
    for spec in sorted(gated_specs, key=lambda spec: spec.gate != "must_rise"):
        if spec.name not in lifts:
            continue
        lift = lifts[spec.name]
        if spec.gate == "must_rise":
            criterion, passed = "up, clear of zero", is_clear_rise(lift)
            proven = passed
        else:
            criterion, passed = f"not below, margin {margin:.0%}", is_not_clear_fall(lift, margin)
            proven = lift is not None and lift.low >= -margin
        checks.append({
            "name": spec.name, "gate": spec.gate, "wanted": criterion, "passed": passed, "proven": proven,
            "judged_by": (check_sources or {}).get(spec.name, verdict_source),
            "lift": None if lift is None else lift.as_dict(),
        })  # fmt: skip
    # No objective at all is not a pass: nothing was shown.
    passed = bool(checks) and all(check["passed"] for check in checks)
    return {
        "verdict": "fail" if not passed else "warn" if alarm_names else "pass", "judged_by": verdict_source,
        "margin": margin, "rule": format_gate_rule(gated_specs), "checks": checks, "alarms": list(alarm_names),
    }  # fmt: skip


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
    """One policy on the test prompts: samples, calibrated scores [N] by objective, user reactions if there are any."""

    samples: Sequence[MonitorSample]
    scores: Mapping[str, Sequence[float]]
    reactions: ArmReactions | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of the run: time, KL, size, versions, cache hits, reward cards.

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


def build_summary(
    run_facts: RunFacts,
    base_arm: EvaluatedArm,
    aligned_arm: EvaluatedArm,
    *,
    resamples: int,
    margin: float,
    seed: int,
    specs: Mapping[str, ObjectiveSpec] = BUILTIN_OBJECTIVES,
) -> dict[str, Any]:
    """Build the content of summary.json. `specs` have the gates of the objectives.

    With reactions in both arms: `love_rate`, `helpfulness`, `safety`, each {base, aligned, lift, lift_by_prompt}; base,
    aligned and lift have 95% intervals clustered by user. lift_by_prompt (the same reactions) has one by a bootstrap
    over prompts and shows whether the lift generalizes to other prompts. Always: `offline` with the reward models'
    means on the same prompts. The gates use the users' lifts if there are any, else those of the reward models; an
    objective that users do not judge is always checked on its own scores. A lift is null if it is undefined (base mean
    not positive). DataError when an arm is empty or the arms' prompts differ.
    """
    for name, arm in (("base", base_arm), ("aligned", aligned_arm)):
        if not arm.samples:
            raise DataError(f"the {name} policy gave no responses to compare; set evaluate.prompts to 2 or more")
    offline, lifts = _offline_results(base_arm, aligned_arm, resamples=resamples, seed=seed)
    summary: dict[str, Any] = {"name": run_facts.name, "seed": run_facts.seed}
    # Users decide if there are any: the reward models are what the policy was optimized against.
    verdict_source, check_sources = "reward models", {}
    if base_arm.reactions is not None and aligned_arm.reactions is not None:
        online, user_lifts = _online_results(
            base_arm, base_arm.reactions, aligned_arm, aligned_arm.reactions, resamples=resamples, seed=seed
        )
        check_sources = {name: verdict_source for name in lifts if find_objective_spec(name).simulated_verdict is None}
        lifts = {**user_lifts, **{name: lifts[name] for name in check_sources}}
        verdict_source = "simulated users"
        summary |= online
    monitors = compare_monitors(base_arm.samples, aligned_arm.samples)
    alarm_names = [name for name, item in monitors["items"].items() if item["alarm"]]
    summary |= {
        "offline": offline,
        "gates": evaluate_gates(
            lifts,
            margin=margin,
            verdict_source=verdict_source,
            alarm_names=alarm_names,
            specs=specs,
            check_sources=check_sources,
        ),
        "monitors": monitors,
        "evaluated": {
            "prompts": len({sample.prompt_id for sample in base_arm.samples}),
            "responses": {"base": len(base_arm.samples), "aligned": len(aligned_arm.samples)},
            "users": {
                name: _count_users(arm.reactions) for name, arm in (("base", base_arm), ("aligned", aligned_arm))
            },
        },
        "phases": dict(run_facts.phase_seconds),
        "kl": run_facts.final_kl,
        "samples": run_facts.sample_count,
        "tokens": run_facts.token_count,
        "versions": dict(run_facts.versions),
        "reused": dict(run_facts.reused_artifacts),
        "reward_cards": {name: flatten_numbers(card) for name, card in run_facts.reward_cards.items()},
    }
    return summary


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


def _count_users(reactions: ArmReactions | None) -> int:
    return 0 if reactions is None else len(np.unique(reactions.user))


def _online_results(
    base_arm: EvaluatedArm,
    base_reactions: ArmReactions,
    aligned_arm: EvaluatedArm,
    aligned_reactions: ArmReactions,
    *,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, IntervalEstimate | None]]:
    summary: dict[str, Any] = {}
    lifts: dict[str, IntervalEstimate | None] = {}
    prompt_ids = [
        np.asarray([sample.prompt_id for sample in arm.samples])[reactions.item]
        for arm, reactions in ((base_arm, base_reactions), (aligned_arm, aligned_reactions))
    ]
    # Users of the two arms are different people, so the lifts are unpaired; prompts are shared, hence lift_by_prompt.
    for objective, spec in BUILTIN_OBJECTIVES.items():
        verdict = spec.simulated_verdict
        if verdict is None:
            continue
        base_values, aligned_values = (
            np.asarray(getattr(reactions, verdict.reaction_field), dtype=np.float64)
            for reactions in (base_reactions, aligned_reactions)
        )
        lifts[objective] = relative_lift(base_values, base_reactions.user, aligned_values, aligned_reactions.user)
        lift_by_prompt = _lift_by_prompt(base_values, aligned_values, prompt_ids, resamples=resamples, seed=seed)
        summary[verdict.summary_key] = {
            "base": clustered_mean(base_values, base_reactions.user, is_rate=True).as_dict(),
            "aligned": clustered_mean(aligned_values, aligned_reactions.user, is_rate=True).as_dict(),
            "lift": _estimate_dict(lifts[objective]),
            "lift_by_prompt": _estimate_dict(lift_by_prompt),
        }
    return summary, lifts


def _lift_by_prompt(
    base_values: NDArray[np.float64],
    aligned_values: NDArray[np.float64],
    prompt_ids: Sequence[NDArray[Any]],
    *,
    resamples: int,
    seed: int,
) -> IntervalEstimate | None:
    """Lift on the prompts that users of both arms read; None with fewer than two of them."""
    # Users read random responses: with few users some prompts are read in one arm only.
    shared_prompts = np.intersect1d(prompt_ids[0], prompt_ids[1])
    if len(shared_prompts) < 2:
        return None
    base_rows, aligned_rows = (np.isin(labels, shared_prompts) for labels in prompt_ids)
    return paired_bootstrap(
        base_values[base_rows],
        prompt_ids[0][base_rows],
        aligned_values[aligned_rows],
        prompt_ids[1][aligned_rows],
        resamples=resamples,
        seed=seed,
    ).lift


def _offline_results(
    base_arm: EvaluatedArm, aligned_arm: EvaluatedArm, *, resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, IntervalEstimate | None]]:
    summary: dict[str, Any] = {}
    lifts: dict[str, IntervalEstimate | None] = {}
    prompt_ids = [[sample.prompt_id for sample in arm.samples] for arm in (base_arm, aligned_arm)]
    for objective in base_arm.scores:
        estimate = paired_bootstrap(
            base_arm.scores[objective],
            prompt_ids[0],
            aligned_arm.scores[objective],
            prompt_ids[1],
            resamples=resamples,
            seed=seed,
        )
        lifts[objective] = estimate.lift
        summary[find_objective_spec(objective).offline_key] = {
            "base": estimate.base.as_dict(),
            "aligned": estimate.aligned.as_dict(),
            "difference": estimate.difference.as_dict(),
            "lift": _estimate_dict(estimate.lift),
        }
    return summary, lifts


def _estimate_dict(estimate: IntervalEstimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate.as_dict()
