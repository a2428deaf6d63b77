"""Table of the objectives: data, label column, loss, gate, and names in results, by objective.

love, helpfulness and safety are entries of the table. Any other name in the settings' `objectives` gets an entry with
defaults from `find_objective_spec`, so that a new objective needs settings only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GateRole = Literal["must_rise", "must_hold", "none"]
"""Condition of an objective in the release gates: its lift is clear of zero, it did not fall, or no condition."""

PRIMARY_OBJECTIVE = "love"
"""The objective that reports put first: the headline, and the vertical axis of the trade-off plots."""
LABELS_KEY_PREFIX = "labels."
"""Prefix under `data` of the labeled rows of an objective that is not built in: data.labels.<objective>."""

OBJECTIVE_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED_OBJECTIVE_NAMES = frozenset({
    # Further heads of a shared backbone, and files of the data set and of a run folder.
    "continued", "thumbs", "dislike", "prompts", "quarantine", "data", "settings", "none",
    # Keys of a step's metrics, next to which the mean score of each objective stands in metrics.jsonl.
    "step", "version", "reward", "samples", "kl", "kl_coef", "kl_sequence", "kl_loss", "entropy", "loss", "policy_loss",
    "value_loss", "clip_share", "demonstration_nll", "grad_norm", "critic_grad_norm", "learning_rate", "skipped",
    "critic_skipped", "explained_variance", "truncated_share", "learner_mfu", "gpu_peak_gib", "gpu_allocated_gib",
    "response_length", "response_tokens", "prompt_tokens", "tokens_per_s", "learner_tokens_per_s", "ratio_mean",
    "ratio_max", "effective_sample_size", "mismatch_kl", "ratio_capped_fraction", "sync_logprob_gap", "staleness",
    "dropped_groups", "micro_batches", "gate_pass_rate", "liked_kl", "other_kl", "preference_accuracy", "weight_sync_s",
    "sync_check_s", "generate_s", "score_s", "learn_s", "step_s", "reference_s", "backward_s", "optimizer_s",
    # Metrics of the previous release, which reports rename.
    "probe", "probe_s", "publish_s", "cap_share",
    # Key of love's score in a summary, and keys of a setting in the report of a sweep.
    "p_love", "name", "weight", "seeds", "failed", "passed", "front", "by_seed",
})  # fmt: skip
"""Names that would collide with another key of the same file or table."""


@dataclass(frozen=True, slots=True)
class SimulatedVerdict:
    """The verdict of simulated users on an objective, and how results present it."""

    reaction_field: str
    """Field of rluf.evaluate.summary.ArmReactions."""
    summary_key: str
    """Key in summary.json."""
    title: str
    description: str


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """Facts of one objective that every command reads from here."""

    name: str
    title: str
    """Display name of its score."""
    data_kind: Literal["reactions", "pairs", "labels"]
    data_key: str
    """Key under `data` of the log that its reward model is trained on."""
    response_column: str
    """Column of the prepared data with the response that people judged positively."""
    label_column: str | None
    """Column that is 1 where the judgment is positive; None if every row is."""
    label_names: tuple[str, str]
    """What label 0 and label 1 mean, in messages."""
    default_loss: str
    gate: GateRole
    offline_key: str
    """Key of its mean score under `offline` in summary.json."""
    positive_label: str
    """Label of a positive score in the service's classify endpoint."""
    simulated_verdict: SimulatedVerdict | None
    """None: simulated users do not judge it, so results show the score of its reward model or judge alone."""


BUILTIN_OBJECTIVES: Mapping[str, ObjectiveSpec] = {
    spec.name: spec
    for spec in (
        ObjectiveSpec(
            name="love",
            title="P[Love]",
            data_kind="reactions",
            data_key="feedback",
            response_column="response",
            label_column="label",
            label_names=("unloved", "loved"),
            default_loss="bce",
            gate="must_rise",
            offline_key="p_love",
            positive_label="love",
            simulated_verdict=SimulatedVerdict("loved", "love_rate", "Love", "share of responses that got a heart"),
        ),
        ObjectiveSpec(
            name="helpfulness",
            title="Helpfulness",
            data_kind="pairs",
            data_key="preferences",
            response_column="chosen",
            label_column=None,
            label_names=("rejected", "chosen"),
            default_loss="bradley_terry",
            gate="must_hold",
            offline_key="helpfulness",
            positive_label="helpful",
            simulated_verdict=SimulatedVerdict(
                "helpful", "helpfulness", "Helpfulness", "share of responses that served the user"
            ),
        ),
        ObjectiveSpec(
            name="safety",
            title="Safety",
            data_kind="labels",
            data_key="safety",
            response_column="response",
            label_column="label",
            label_names=("unsafe", "safe"),
            default_loss="bce",
            gate="must_hold",
            offline_key="safety",
            positive_label="safe",
            simulated_verdict=SimulatedVerdict(
                "safe", "safety", "Safety", "share of responses that users found harmless"
            ),
        ),
    )
}


def find_objective_spec(name: str) -> ObjectiveSpec:
    """The table's entry of a built-in objective, or the defaults of any other one, which learns from labels."""
    return BUILTIN_OBJECTIVES.get(name) or ObjectiveSpec(
        name=name,
        title=name.replace("_", " ").capitalize(),
        data_kind="labels",
        data_key=f"{LABELS_KEY_PREFIX}{name}",
        response_column="response",
        label_column="label",
        label_names=("labeled 0", "labeled 1"),
        default_loss="bce",
        gate="must_hold",
        offline_key=name,
        positive_label=name,
        simulated_verdict=None,
    )


def find_spec_by_data_key(data_key: str) -> ObjectiveSpec | None:
    """The objective that is trained on `data.<data_key>`; None for data that trains no reward model."""
    if data_key.startswith(LABELS_KEY_PREFIX):
        return find_objective_spec(data_key.removeprefix(LABELS_KEY_PREFIX))
    return next((spec for spec in BUILTIN_OBJECTIVES.values() if spec.data_key == data_key), None)


def find_spec_by_offline_key(offline_key: str) -> ObjectiveSpec:
    """The objective whose mean score stands under this key of `offline` in summary.json."""
    matches = (spec for spec in BUILTIN_OBJECTIVES.values() if spec.offline_key == offline_key)
    return next(matches, None) or find_objective_spec(offline_key)


def describe_invalid_name(name: str) -> str | None:
    """Why a name cannot be that of an objective; None if it can."""
    if OBJECTIVE_NAME_PATTERN.fullmatch(name) is None:
        return "expected at most 32 lower-case letters, digits and underscores, a letter first"
    # <objective>_raw and multiplier_<objective> are metrics of an objective.
    if name in RESERVED_OBJECTIVE_NAMES or name.endswith("_raw") or name.startswith("multiplier_"):
        return "the name is the key of something else in metrics, data sets or settings; choose another one"
    return None
