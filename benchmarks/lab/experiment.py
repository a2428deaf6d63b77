"""Evaluation of policies: offline score on a fixed set of unseen prompts, and an A/B test with new simulated users.

rluf's own analysis evaluates the A/B test, as it would a real event log: users split by hash, a pre-period on the
control, delta method by user, CUPED, sample ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab.composer import ComposerPolicy
from lab.dataset import ReplyDataset
from lab.features import ObjectiveModel, ReplyFeatures
from lab.replies import GroundTruthCache, compose_texts
from numpy.typing import NDArray

from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_design import ExperimentDesign
from rluf.evaluate.events import EventLog, assign_users
from rluf.evaluate.monitors import MONITORS, MonitorSample, measure_monitors, split_words
from rluf.evaluate.two_way import ArmValues, compare_arms
from rluf.objectives.judges import RULE_JUDGES, list_failed_judges
from rluf.simulate.users import ResponseFeatures, UserPopulation, expected_love_probability, simulate_reactions
from rluf.simulate.world import WORLD, SimulatedWorld

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
METRIC_NAMES = ("love", "continued", "returned", "helpful", "safe")
DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class ReplyBatch:
    """Replies of one policy: prompt indices [N], choices [N, 5], texts [N]."""

    prompt_index: Ints
    choices: Ints
    texts: tuple[str, ...]


def generate_replies(
    dataset: ReplyDataset,
    policy: ComposerPolicy,
    prompts: Ints,
    samples_per_prompt: int,
    *,
    seed: int,
    temperature: float = 1.0,
) -> ReplyBatch:
    """Sample `samples_per_prompt` replies of `policy` to each prompt."""
    prompt_index = np.repeat(prompts, samples_per_prompt)
    choices = policy.sample(torch.as_tensor(prompt_index), torch.Generator().manual_seed(seed), temperature)[0].numpy()
    return ReplyBatch(prompt_index, choices, tuple(compose_texts(dataset, prompt_index, choices)))


def offline_score_changes(
    features: ReplyFeatures,
    objective_models: Mapping[str, ObjectiveModel],
    base_replies: ReplyBatch,
    new_replies: ReplyBatch,
) -> dict[str, dict[str, float]]:
    """Change of each objective's mean calibrated probability from the base, with its interval over prompts."""
    changes, features_of_sides = (
        {},
        [features.transform(replies.prompt_index, replies.texts) for replies in (base_replies, new_replies)],
    )
    for name, model in objective_models.items():
        probabilities = [_sigmoid(model.mean_logits(side_features)) for side_features in features_of_sides]
        comparison = compare_arms(
            ArmValues(probabilities[0], base_replies.prompt_index),
            ArmValues(probabilities[1], new_replies.prompt_index),
        )
        changes[name] = comparison.difference.as_dict() | {"base": comparison.base.mean, "new": comparison.aligned.mean}
    return changes


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def measure_reply_monitors(dataset: ReplyDataset, replies: ReplyBatch) -> dict[str, float]:
    """Mean of every reward-hacking monitor over the replies, and the share that fails each rule judge."""
    monitor_samples = [
        MonitorSample(
            str(prompt),
            dataset.entries[prompt].messages,
            text,
            round(1.3 * len(split_words(text))),
            dataset.entries[prompt].topic,
        )
        for prompt, text in zip(replies.prompt_index.tolist(), replies.texts, strict=True)
    ]
    objection_counts = Counter(
        name for reply in monitor_samples for name in list_failed_judges(reply.messages, reply.text)
    )
    objection_rates = {name: objection_counts[name] / len(monitor_samples) for name in RULE_JUDGES}
    return objection_rates | {
        name: float(monitor_values.mean())
        for name, monitor_values in measure_monitors(monitor_samples).items()
        if name in MONITORS
    }


def ground_truth_changes(
    dataset: ReplyDataset,
    truth_cache: GroundTruthCache,
    base_replies: ReplyBatch,
    new_replies: ReplyBatch,
) -> dict[str, dict[str, float]]:
    """Relative change of true helpfulness, safety, warmth, satisfaction and sign-off, with intervals over prompts."""
    truths = (
        truth_cache.truths_of(base_replies.prompt_index, base_replies.choices),
        truth_cache.truths_of(new_replies.prompt_index, new_replies.choices),
    )
    changes = {}
    for name in ("helpfulness", "safety", "warmth", "satisfaction", "signoff"):
        values = [[getattr(truth, name) for truth in reply_truths] for reply_truths in truths]
        comparison = compare_arms(
            ArmValues(values[0], base_replies.prompt_index), ArmValues(values[1], new_replies.prompt_index)
        )
        lift = None if comparison.lift is None else comparison.lift.as_dict()
        changes[name] = {"base": comparison.base.mean, "new": comparison.aligned.mean, **({} if lift is None else lift)}
    return changes


def run_ab_test(
    dataset: ReplyDataset,
    truth_cache: GroundTruthCache,
    base_replies: ReplyBatch,
    new_replies: ReplyBatch,
    *,
    seed: int,
    user_count: int = 10_000,
    mean_reads: float = 8.0,
    world: SimulatedWorld = WORLD,
) -> dict[str, Any]:
    """Lifts with intervals of an A/B test of `user_count` new users.

    Each reads about `mean_reads` replies, after as many of the control's in a pre-period.
    """
    rng = np.random.default_rng([seed, 104_651])
    population = UserPopulation.sample(user_count, rng, world)
    user_ids = tuple(f"user-{seed}-{index}" for index in range(user_count))
    arm_by_user = assign_users(user_ids, f"claims-{seed}", (0.5, 0.5))
    ground_truths = [
        *truth_cache.truths_of(base_replies.prompt_index, base_replies.choices),
        *truth_cache.truths_of(new_replies.prompt_index, new_replies.choices),
    ]
    topics = [
        dataset.entries[prompt].topic
        for prompt in (*base_replies.prompt_index.tolist(), *new_replies.prompt_index.tolist())
    ]
    features = ResponseFeatures.from_truths(ground_truths, topics)
    user_index = np.repeat(np.arange(user_count), rng.poisson(2 * rng.gamma(2.0, mean_reads / 2.0, user_count)))
    timestamps = np.sort(rng.random(len(user_index))) * 28 * DAY_SECONDS
    user_index = rng.permutation(user_index)
    arm_index = np.where(timestamps < 14 * DAY_SECONDS, 0, arm_by_user[user_index])
    first_reply, reply_count = (
        np.where(arm_index == 0, 0, len(base_replies.texts)),
        np.where(arm_index == 0, len(base_replies.texts), len(new_replies.texts)),
    )
    reply_index = first_reply + np.floor(rng.random(len(user_index)) * reply_count).astype(np.int64)
    reactions = simulate_reactions(features, population, user_index, reply_index, rng, world=world)
    metric_values = {
        "love": reactions.loved,
        "continued": reactions.continued,
        "returned": reactions.returned,
        "helpful": reactions.helpful,
        "safe": reactions.safe,
    }
    events = EventLog(
        user_index=user_index,
        conversation_index=np.arange(len(user_index)),
        arm_index=arm_index,
        arm_names=("control", "treatment"),
        user_ids=user_ids,
        timestamps=timestamps,
        metric_values={name: np.asarray(metric, np.float64) for name, metric in metric_values.items()},
        duplicate_count=0,
    )
    result = analyze_experiment(
        events,
        ExperimentDesign("control", "treatment", start_time=14 * DAY_SECONDS, metric_names=METRIC_NAMES, look_count=1),
    )
    return {"users": result["users"], "srm": result["srm"]["p"],
            **{name: _metric_lift(result["metrics"][name]) for name in METRIC_NAMES}}  # fmt: skip


def _metric_lift(metric: dict[str, Any]) -> dict[str, float]:
    effect = metric["cuped"] or metric["effect"]
    return {"lift": effect["lift"], "low": effect["lift_low"], "high": effect["lift_high"], "p": effect["p"],
            "control": metric["effect"]["control"], "treatment": metric["effect"]["treatment"],
            "error": effect["error"]}  # fmt: skip


def love_rate_by_topic(dataset: ReplyDataset, truth_cache: GroundTruthCache, replies: ReplyBatch) -> dict[str, float]:
    """True probability of a heart, mean over the replies of each topic."""
    topics = [dataset.entries[prompt].topic for prompt in replies.prompt_index.tolist()]
    probabilities = expected_love_probability(
        truth_cache.truths_of(replies.prompt_index, replies.choices), topics, user_count=100
    )
    return {topic: float(probabilities[np.array(topics) == topic].mean()) for topic in sorted(set(topics))}
