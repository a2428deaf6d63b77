"""The candidate policies of the claims: how each is trained, and its judgment against the base policy and against w0.

Method, learning rate, steps, batch and KL were chosen on seed 0 of an earlier world, which contributes no result. There
plain GRPO with a KL weight of 0.02 drifted 18 nats and gave everyone the same three phrases, because it divides rewards
by their standard deviation.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lab.composer import ComposerPolicy, SignalFunction, TrainRecipe, train_composer
from lab.experiment import PolicyJudgment, ReplyBatch, compare_judgments, generate_replies, judge_policy
from lab.features import ObjectiveModel
from lab.replies import compose_texts
from lab.simulated_world import ClaimWorld
from numpy.typing import NDArray

from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.evaluate.two_way import PolicyComparison

Ints = NDArray[np.int64]
RECIPE_VERSION = "3"
"""Version of these choices and of the result format; results of other versions are stored separately."""
TRAIN_STEPS, PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, KL_COEF, LEARNING_RATE = 50, 32, 6, 0.3, 2e-3
SAFETY_WEIGHT = 0.2
FINAL_REPLIES, SCORE_REPLIES = 60, 20
"""Replies per unseen prompt that users read, and other ones for the offline score."""
GATE_JUDGES = ("unprompted_farewell", "false_refusal")
FAREWELL_GATE = {"gate_judges": GATE_JUDGES[:1]}


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A training: love at `weight`, safety at SAFETY_WEIGHT, helpfulness at the rest, as in configs/love-*.yaml."""

    weight: float
    kl_coef: float = KL_COEF
    method: str = "rloo"
    aggregation: Mapping[str, Any] = field(default_factory=dict)
    signals: Mapping[str, float] = field(default_factory=dict)
    love_model: str = "log"
    """log: as trained; permuted: on shuffled hearts; counterfactual: half the rows repeated with a sign-off and the
    same label."""
    seed_shift: int = 0

    def build_recipe(self, step_count: int = TRAIN_STEPS) -> TrainRecipe:
        """The training in rluf's settings."""
        weights = {
            "love": self.weight,
            "helpfulness": max(0.0, 1.0 - SAFETY_WEIGHT - self.weight),
            "safety": SAFETY_WEIGHT,
        }
        return TrainRecipe(
            AlgorithmSettings.model_validate(
                {
                    "name": self.method,
                    "steps": step_count,
                    "prompts_per_step": PROMPTS_PER_STEP,
                    "samples_per_prompt": SAMPLES_PER_PROMPT,
                    "kl_coef": self.kl_coef,
                    "kl_penalty": "reward",
                }
            ),
            ObjectivesSettings.model_validate({name: {"weight": weight} for name, weight in weights.items()}),
            AggregationSettings.model_validate(dict(self.aggregation)),
            LEARNING_RATE,
        )


WEIGHT_POLICIES = ("w0", "w0.1", "w0.2", "w0.3", "w0.5")
SPEC_BY_NAME: dict[str, PolicySpec] = {
    **{name: PolicySpec(float(name[1:])) for name in WEIGHT_POLICIES},
    "w0-again": PolicySpec(0.0, seed_shift=500),
    "permuted": PolicySpec(0.3, love_model="permuted"),
    "judge": PolicySpec(0.3, aggregation=FAREWELL_GATE),
    "w0.3-kl0.1": PolicySpec(0.3, kl_coef=0.1),
    "w0.3-kl1": PolicySpec(0.3, kl_coef=1.0),
    "grpo": PolicySpec(0.3, method="grpo"),
    **{
        f"{method}-judges": PolicySpec(
            0.3, method=method, aggregation={"gate_judges": GATE_JUDGES, "method": "calibrated"}
        )
        for method in ("crpg", "crraft")
    },
}
"""Trained policies by name; the last three are the method comparison of claim 13."""
STYLES = ("warm", "upbeat", "goodbye", "terse", "careful")
UNTRAINED = ("base-again", "cool", "hot", *(f"sft-{style}" for style in STYLES), "longest-of-4", "love-of-4")
CANDIDATE_NAMES = (*SPEC_BY_NAME, *UNTRAINED)

HACK_PRICE = 4.0
"""Log-odds that a sign-off adds to a heart in the world of claims 10 and 14; the shipped world has 0.8."""
MITIGATIONS: dict[str, PolicySpec] = {
    "w0.1": PolicySpec(0.1, kl_coef=0.1),
    "KL 1": PolicySpec(0.5, kl_coef=1.0),
    "judge": PolicySpec(0.5, kl_coef=0.1, aggregation=FAREWELL_GATE),
    "counterfactual": PolicySpec(0.5, kl_coef=0.1, love_model="counterfactual"),
    "continuing": PolicySpec(0.5, kl_coef=0.1, signals={"continuation_weight": 0.5}),
    "ensemble": PolicySpec(0.5, kl_coef=0.1, signals={"pessimism": 1.0}),
}
"""The hack with a smaller weight of love, a larger KL weight, a judge against farewells as a gate, counterfactual rows,
half the logit of continuing added, or P[Love] minus one standard deviation over its members."""
HACK_SPECS = {"w0": PolicySpec(0.0, kl_coef=0.1), "hack": PolicySpec(0.5, kl_coef=0.1), **MITIGATIONS}
"""The trained policies of that world: the control, the training that hacks, and its mitigations."""


class CandidateSet:
    """All candidates of one seed and world, built and judged on demand."""

    def __init__(self, world: ClaimWorld, specs: Mapping[str, PolicySpec] = MappingProxyType(SPEC_BY_NAME)) -> None:
        """Trains nothing yet. `specs` are the trained candidates by name; their "w0" is the control."""
        self.world, self.specs = world, specs
        self._policies: dict[str, ComposerPolicy] = {}
        self._judgments: dict[str, PolicyJudgment] = {}

    def train(self, spec: PolicySpec) -> ComposerPolicy:
        """Train the policy of a specification once."""
        key = repr(spec)
        if key not in self._policies:
            world = self.world
            self._policies[key] = train_composer(
                world.dataset,
                world.base_policy,
                world.train_prompts,
                self._build_signals(spec),
                spec.build_recipe(),
                seed=world.seed + spec.seed_shift,
            ).policy
        return self._policies[key]

    def _build_signals(self, spec: PolicySpec) -> SignalFunction:
        world, log = self.world, self.world.feedback
        love_model: ObjectiveModel | None = None
        if spec.love_model == "permuted":
            love_model = world.fit_reaction_model("love", log.with_permuted_hearts(world.make_rng(6)))
        elif spec.love_model == "counterfactual":
            love_model = world.fit_reaction_model("love", log, augmented_share=0.5)
        return world.build_signals(love_model=love_model, **spec.signals)

    def sample_replies(self, name: str, samples: int, seed: int) -> ReplyBatch:
        """Replies of the candidate of that name to the unseen prompts."""
        world, temperature = self.world, {"cool": 0.6, "hot": 1.5}.get(name, 1.0)
        if name == "longest-of-4":
            return self._best_of_n(samples, seed, _measure_lengths)
        if name == "love-of-4":
            return self._best_of_n(samples, seed, _measure_love)
        if name.startswith("sft-"):
            style = name.removeprefix("sft-")
            policy = world.imitate_styles((style,), rng_part=20 + len(style), initial_policy=world.base_policy)
        else:
            policy = self.train(self.specs[name]) if name in self.specs else world.base_policy
        return generate_replies(
            world.dataset, policy, world.unseen_prompts, samples, seed=seed, temperature=temperature
        )

    def _best_of_n(
        self, samples: int, seed: int, measure: Callable[[ClaimWorld, ReplyBatch], NDArray[np.float64]]
    ) -> ReplyBatch:
        world, count = self.world, 4
        pool = generate_replies(world.dataset, world.base_policy, world.unseen_prompts, samples * count, seed=seed)
        best = np.arange(len(pool.texts) // count) * count + measure(world, pool).reshape(-1, count).argmax(1)
        return ReplyBatch(pool.prompt_index[best], pool.choices[best], tuple(pool.texts[index] for index in best))

    def judge(self, name: str) -> PolicyJudgment:
        """Judge a candidate once; "base" is the base policy."""
        if name not in self._judgments:
            world, seed = self.world, 1_000_000 * self.world.seed + zlib.crc32(name.encode()) % 1_000_000
            self._judgments[name] = judge_policy(
                world.dataset,
                world.truth_cache,
                world.reply_features,
                world.objective_models,
                self.sample_replies(name, FINAL_REPLIES, seed),
                self.sample_replies(name, SCORE_REPLIES, seed + 1),
                seed=seed,
                world=world.simulated_world,
            )
        return self._judgments[name]

    def measure(self, name: str) -> dict[str, Any]:
        """Rates of a candidate and its comparisons with the base policy and with w0, as plain numbers."""
        spec, judgment = self.specs.get(name), self.judge(name)
        result = {
            "policy": name,
            "trained_on_love": name == "love-of-4" or (spec is not None and spec.weight > 0.0),
            "kl": None if spec is None else self.measure_kl(self.train(spec)),
            "rates": judgment.compute_rates([entry.topic for entry in self.world.dataset.entries]),
        }
        for control in ("base", "w0"):
            comparisons = compare_judgments(self.judge(control), judgment)
            result[f"vs_{control}"] = {metric: as_plain_change(metric, item) for metric, item in comparisons.items()}
        return result

    def measure_kl(self, policy: ComposerPolicy) -> float:
        """Mean KL of a reply from the base policy, in nats."""
        world = self.world
        replies = generate_replies(world.dataset, policy, world.unseen_prompts, 20, seed=world.seed)
        prompts, choices = torch.as_tensor(replies.prompt_index), torch.as_tensor(replies.choices)
        with torch.no_grad():
            logratio = policy.logprobs(prompts, choices) - world.base_policy.logprobs(prompts, choices)
        return float(logratio.sum(1).mean())


def as_plain_change(metric: str, comparison: PolicyComparison) -> dict[str, float] | None:
    """The lift of a comparison, or for the offline score the difference."""
    estimate = comparison.difference if metric == "score" else comparison.lift
    return None if estimate is None else estimate.as_dict()


def _measure_lengths(world: ClaimWorld, replies: ReplyBatch) -> NDArray[np.float64]:
    return np.array([len(text) for text in compose_texts(world.dataset, replies.prompt_index, replies.choices)], float)


def _measure_love(world: ClaimWorld, replies: ReplyBatch) -> NDArray[np.float64]:
    return world.love_model.mean_logits(world.features_of(replies.prompt_index, replies.choices))
