"""Judgment of a policy on unseen prompts: new simulated users, ground truth, judges, and the offline score.

Every comparison of two policies goes through rluf.evaluate.two_way: clustered by user and by prompt, replies resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab.composer import ComposerPolicy
from lab.dataset import ReplyDataset
from lab.features import ObjectiveModel, ReplyFeatures
from lab.replies import GroundTruthCache, compose_texts
from numpy.typing import NDArray

from rluf.evaluate.monitors import MonitorSample, split_words
from rluf.evaluate.two_way import ArmValues, PolicyComparison, compare_arms
from rluf.objectives.judges import list_failed_judges
from rluf.simulate.users import ResponseFeatures, UserPopulation, expected_love_probability, simulate_reactions
from rluf.simulate.world import WORLD, SimulatedWorld

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
REACTIONS = ("loved", "continued", "returned")
TRUTHS = ("helpfulness", "safety", "satisfaction", "signoff")
COUNTED_JUDGES = ("unprompted_farewell", "false_refusal")
USER_COUNT, READS_PER_USER = 10_000, 8
"""New users of each policy, and the replies that each reads."""


@dataclass(frozen=True, slots=True)
class ReplyBatch:
    """Replies of one policy: prompt indices [N], choices [N, 5], texts [N]."""

    prompt_index: Ints
    choices: Ints
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyJudgment:
    """One policy, judged: reactions, prompts and users of impressions [I], and the rest of replies [N].

    `scores` are calibrated probabilities of the reward models on other replies, of prompts `score_prompts`.
    """

    reply_prompts: Ints
    truths: Mapping[str, Floats]
    failed_judges: Mapping[str, Floats]
    true_love: Floats
    impression_prompts: Ints
    impression_users: Ints
    reactions: Mapping[str, Floats]
    score_prompts: Ints
    scores: Mapping[str, Floats]

    def compute_rates(self, topics: Sequence[str]) -> dict[str, Any]:
        """Means as plain numbers; `topics` [P] are those of all prompts."""
        reply_topics = np.array(topics)[self.reply_prompts]
        return {
            **{name: float(values.mean()) for name, values in (*self.reactions.items(), *self.truths.items())},
            # Half a reply more in numerator and one in the denominator: ratios stay finite where none fails.
            **{name: float((v.sum() + 0.5) / (v.size + 1)) for name, v in self.failed_judges.items()},
            "score": float(self.scores["love"].mean()),
            "true_love": float(self.true_love.mean()),
            "love_by_topic": {
                topic: float(self.true_love[reply_topics == topic].mean()) for topic in sorted(set(reply_topics))
            },
        }


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


def judge_policy(
    dataset: ReplyDataset,
    truth_cache: GroundTruthCache,
    features: ReplyFeatures,
    models: Mapping[str, ObjectiveModel],
    replies: ReplyBatch,
    score_replies: ReplyBatch,
    *,
    seed: int,
    world: SimulatedWorld = WORLD,
) -> PolicyJudgment:
    """Let USER_COUNT new users read `replies`, and score `score_replies` with the reward models."""
    truths = truth_cache.truths_of(replies.prompt_index, replies.choices)
    topics = [dataset.entries[prompt].topic for prompt in replies.prompt_index.tolist()]
    rng = np.random.default_rng([seed, 104_651])
    user_index = np.repeat(np.arange(USER_COUNT), READS_PER_USER)
    reply_index = rng.integers(0, len(replies.texts), len(user_index))
    reactions = simulate_reactions(
        ResponseFeatures.from_truths(truths, topics),
        UserPopulation.sample(USER_COUNT, rng, world),
        user_index,
        reply_index,
        rng,
        world=world,
    )
    score_features = features.transform(score_replies.prompt_index, score_replies.texts)
    return PolicyJudgment(
        replies.prompt_index,
        {name: np.array([getattr(truth, name) for truth in truths]) for name in TRUTHS},
        count_failed_judges(dataset, replies),
        expected_love_probability(truths, topics, user_count=100, world=world),
        replies.prompt_index[reply_index],
        user_index,
        {name: np.asarray(getattr(reactions, name), np.float64) for name in REACTIONS},
        score_replies.prompt_index,
        {name: 1.0 / (1.0 + np.exp(-model.mean_logits(score_features))) for name, model in models.items()},
    )


def count_failed_judges(dataset: ReplyDataset, replies: ReplyBatch) -> dict[str, Floats]:
    """Whether each reply [N] fails each of COUNTED_JUDGES."""
    keys = list(zip(replies.prompt_index.tolist(), replies.texts, strict=True))
    failed_by_key = {key: list_failed_judges(dataset.entries[key[0]].messages, key[1]) for key in dict.fromkeys(keys)}
    return {name: np.array([float(name in failed_by_key[key]) for key in keys]) for name in COUNTED_JUDGES}


def compare_judgments(control: PolicyJudgment, treatment: PolicyJudgment) -> dict[str, PolicyComparison]:
    """Compare love of users, helpfulness and safety of replies, and the offline score of two policies."""
    judgments = (control, treatment)
    comparisons = {
        "loved": compare_arms(
            *(
                ArmValues(judgment.reactions["loved"], judgment.impression_prompts, judgment.impression_users)
                for judgment in judgments
            )
        )
    }
    comparisons |= {
        name: compare_arms(*(ArmValues(judgment.truths[name], judgment.reply_prompts) for judgment in judgments))
        for name in ("helpfulness", "safety")
    }
    comparisons["score"] = compare_arms(
        *(ArmValues(judgment.scores["love"], judgment.score_prompts) for judgment in judgments)
    )
    return comparisons


def build_monitor_samples(dataset: ReplyDataset, replies: ReplyBatch, replies_per_prompt: int) -> list[MonitorSample]:
    """The first replies to each prompt as input of rluf's monitors."""
    seen: dict[int, int] = {}
    samples = []
    for prompt, text in zip(replies.prompt_index.tolist(), replies.texts, strict=True):
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] <= replies_per_prompt:
            entry = dataset.entries[prompt]
            samples.append(
                MonitorSample(str(prompt), entry.messages, text, round(1.3 * len(split_words(text))), entry.topic)
            )
    return samples
