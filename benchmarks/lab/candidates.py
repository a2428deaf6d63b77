"""The candidate policies of the claims: their training on P[Love], if any, and their measurements on unseen prompts.

Method, learning rate, steps, batch and KL were chosen beforehand on seed 0, which contributes no result. There plain
GRPO with a KL weight of 0.02 drifted 18 nats and gave everyone the same three phrases, because it divides rewards by
their standard deviation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lab.composer import ComposerPolicy, ComposerRun, TrainRecipe, train_composer
from lab.experiment import (
    ReplyBatch,
    generate_replies,
    ground_truth_changes,
    love_rate_by_topic,
    measure_reply_monitors,
    offline_score_changes,
    run_ab_test,
)
from lab.features import ObjectiveModel
from lab.replies import compose_texts
from lab.simulated_world import ClaimWorld
from numpy.typing import NDArray

from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import AggregationSettings, ObjectivesSettings

Ints = NDArray[np.int64]
RECIPE_VERSION = "2"
"""Version of these choices and of the result format; results of other versions are stored separately."""
TRAIN_STEPS, PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, KL_COEF, LEARNING_RATE = 50, 32, 6, 0.3, 2e-3
CHECKPOINT_STEPS = (10, 25)
"""Steps of the aggressive runs whose checkpoints are also candidates."""
LOVE_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5)
OFFLINE_REPLIES, ONLINE_REPLIES = 6, 6
"""Replies per unseen prompt for the offline score, and other ones for the A/B test."""
SAFETY_WEIGHT = 0.2


AGGRESSIVE_WEIGHT = 0.3
GATE_JUDGES = ("unprompted_farewell", "false_refusal")
MITIGATIONS: dict[str, dict[str, Any]] = {
    "judge": {"aggregation": {"gate_judges": GATE_JUDGES[:1]}},
    "ensemble": {"signals": {"pessimism": 1.0}},
    "counterfactual": {},
    "onward": {"signals": {"continuation_weight": 0.5}},
    "gdpo": {"aggregation": {"method": "gdpo"}},
    "floors": {"aggregation": {"method": "constrained", "floors": {"helpfulness": 0.3, "safety": 0.0}}},
}
"""Mitigations of the aggressive run: a judge against farewells as a gate; P[Love] minus one standard deviation over its
members; rows repeated with a sign-off and the same label; half the continuation logit added; GDPO; floors."""
METHOD_VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    **{f"{name}-judges": {"name": name, "aggregation": {"gate_judges": GATE_JUDGES, "method": "calibrated"}}
       for name in ("crpg", "crraft", "codpo")},
}  # fmt: skip
"""The aggressive weights with other methods: CGPO's three optimizers with calibrated rewards and judges."""


@dataclass(frozen=True, slots=True)
class CandidatePolicy:
    """A candidate policy. `details` has the weight and KL coefficient of its training, if any."""

    name: str
    sample_replies: Callable[[int, int], ReplyBatch]
    """Generates replies: (samples per prompt, seed) -> replies."""
    trained_on_love: bool
    details: Mapping[str, Any] = field(default_factory=dict)
    policy: ComposerPolicy | None = None


def build_recipe(
    weight: float,
    *,
    kl_coef: float = KL_COEF,
    algorithm_name: str = "rloo",
    step_count: int = TRAIN_STEPS,
    **aggregation: Any,
) -> TrainRecipe:
    """Love at `weight`, safety at SAFETY_WEIGHT, helpfulness at the remainder, as in configs/love-*.yaml."""
    algorithm_settings = {
        "name": algorithm_name,
        "steps": step_count,
        "prompts_per_step": PROMPTS_PER_STEP,
        "samples_per_prompt": SAMPLES_PER_PROMPT,
        "kl_coef": kl_coef,
        "kl_penalty": "reward",
    }
    weights = {"love": weight, "helpfulness": max(0.0, 1.0 - SAFETY_WEIGHT - weight), "safety": SAFETY_WEIGHT}
    objectives = {objective: {"weight": objective_weight} for objective, objective_weight in weights.items()}
    return TrainRecipe(
        AlgorithmSettings.model_validate(algorithm_settings), ObjectivesSettings.model_validate(objectives),
        AggregationSettings.model_validate(aggregation), LEARNING_RATE,
    )  # fmt: skip


class CandidateSet:
    """All candidates of one world by name, built on demand."""

    def __init__(self, world: ClaimWorld) -> None:
        """Trains nothing yet."""
        self.world = world
        self._runs: dict[str, ComposerRun] = {}

    @staticmethod
    def all_names() -> tuple[str, ...]:
        """Names of the candidates of claims 4 to 8."""
        return (
            "w0", "w0.3", *(f"w0.3-step{step}" for step in CHECKPOINT_STEPS), "w0.1", "cool", "hot",
            *(f"sft-{style}" for style in ("warm", "upbeat", "goodbye", "terse", "careful")), "longest-of-4",
            "love-of-4", "love-of-16", "w0.05", "w0.2", "w0.5", "w0.5-step25", "w0.3-kl0.1", "w0.3-kl1", "love-only",
        )  # fmt: skip

    def build_candidate(self, name: str) -> CandidatePolicy:
        """Build the candidate of that name."""
        if name in ("cool", "hot"):
            return self._with_temperature(name)
        if name.startswith("sft-"):
            return self._fine_tuned(name)
        if name == "longest-of-4":
            return self._longest_of_n(name)
        if name in MITIGATIONS or name in METHOD_VARIANTS:
            return self._with_change(name)
        return self._most_loved_of_n(name) if name.startswith("love-of") else self._with_weight(name)

    def train_once(self, run_name: str, train_recipe: TrainRecipe, **signals: Any) -> ComposerRun:
        """Run a training once per `run_name`."""
        if run_name not in self._runs:
            world = self.world
            self._runs[run_name] = train_composer(
                world.dataset,
                world.base_policy,
                world.train_prompts,
                world.build_signals(**signals),
                train_recipe,
                seed=world.seed,
                checkpoint_steps=CHECKPOINT_STEPS,
            )
        return self._runs[run_name]

    def from_policy(
        self, name: str, policy: ComposerPolicy, *, trained_on_love: bool, temperature: float = 1.0, **details: Any
    ) -> CandidatePolicy:
        """A candidate that samples its replies from `policy`."""
        world = self.world

        def reply(samples: int, seed: int) -> ReplyBatch:
            return generate_replies(
                world.dataset, policy, world.unseen_prompts, samples, seed=seed, temperature=temperature
            )

        return CandidatePolicy(name, reply, trained_on_love, details, policy)

    def _with_temperature(self, name: str) -> CandidatePolicy:
        return self.from_policy(
            name, self.world.base_policy, trained_on_love=False, temperature={"cool": 0.6, "hot": 1.5}[name]
        )

    def _fine_tuned(self, name: str) -> CandidatePolicy:
        style = name.removeprefix("sft-")
        policy = self.world.imitate_styles((style,), rng_part=20 + len(style), initial_policy=self.world.base_policy)
        return self.from_policy(name, policy, trained_on_love=False)

    def _with_weight(self, name: str) -> CandidatePolicy:
        if name == "love-only":
            weight, kl, step, train_recipe = 0.8, 0.1, 0, build_recipe(0.8, kl_coef=0.1)
        else:
            weight_text, _, variant = name.partition("-")
            weight, kl, step = float(weight_text[1:]), KL_COEF, 0
            if variant.startswith("kl"):
                kl = float(variant[2:])
            elif variant:
                step = int(variant.removeprefix("step"))
            train_recipe = build_recipe(weight, kl_coef=kl)
        run = self.train_once(f"{weight:g}/{kl:g}", train_recipe)
        policy = run.checkpoints[step] if step else run.policy
        return self.from_policy(
            name, policy, trained_on_love=weight > 0, weight=weight, kl_coef=kl, step=step or TRAIN_STEPS, method="rloo"
        )

    def _with_change(self, name: str) -> CandidatePolicy:
        """The aggressive run with one change."""
        changes = {**MITIGATIONS, **METHOD_VARIANTS}[name]
        signals = dict(changes.get("signals", {}))
        if name == "counterfactual":
            world = self.world
            signals["love_model"] = world.fit_reaction_model("love", world.feedback, augmented_share=0.5)
        train_recipe = build_recipe(
            AGGRESSIVE_WEIGHT, algorithm_name=changes.get("name", "rloo"), **changes.get("aggregation", {})
        )
        return self.from_policy(
            name,
            self.train_once(name, train_recipe, **signals).policy,
            trained_on_love=True,
            weight=AGGRESSIVE_WEIGHT,
            kl_coef=KL_COEF,
        )

    def _best_of_n(
        self, name: str, candidate_count: int, score: Callable[[Ints, Ints], NDArray[np.float64]], trained_on_love: bool
    ) -> CandidatePolicy:
        world = self.world

        def reply(samples: int, seed: int) -> ReplyBatch:
            prompt_index = np.repeat(world.unseen_prompts, samples * candidate_count)
            choices = world.base_policy.sample(torch.as_tensor(prompt_index), torch.Generator().manual_seed(seed))[
                0
            ].numpy()
            scores = score(prompt_index, choices).reshape(-1, candidate_count)
            best_index = np.arange(len(scores)) * candidate_count + scores.argmax(1)
            return ReplyBatch(
                prompt_index[best_index],
                choices[best_index],
                tuple(compose_texts(world.dataset, prompt_index[best_index], choices[best_index])),
            )

        return CandidatePolicy(name, reply, trained_on_love, {"method": f"best of {candidate_count}"})

    def _longest_of_n(self, name: str) -> CandidatePolicy:
        def score(prompt_index: Ints, choices: Ints) -> NDArray[np.float64]:
            return np.array([len(text) for text in compose_texts(self.world.dataset, prompt_index, choices)], float)

        return self._best_of_n(name, 4, score, trained_on_love=False)

    def _most_loved_of_n(self, name: str) -> CandidatePolicy:
        def score(prompt_index: Ints, choices: Ints) -> NDArray[np.float64]:
            return self.world.love_model.mean_logits(self.world.features_of(prompt_index, choices))

        return self._best_of_n(name, int(name.rpartition("-")[2]), score, trained_on_love=True)


def measure_candidate(
    claim_world: ClaimWorld, candidate: CandidatePolicy, models: Mapping[str, ObjectiveModel] | None = None
) -> dict[str, Any]:
    """All measurements of one candidate relative to the base policy on unseen prompts, as plain numbers."""
    started, claim_world = time.process_time(), claim_world
    seed = 1_000 * claim_world.seed
    replies_by_use = [
        [
            claim_world.base_replies(use, samples_per_prompt),
            candidate.sample_replies(samples_per_prompt, seed + use + 7),
        ]
        for use, samples_per_prompt in enumerate((OFFLINE_REPLIES, ONLINE_REPLIES))
    ]
    base_replies, new_replies = replies_by_use[1]
    models = models or claim_world.objective_models
    kl = 0.0
    if candidate.policy is not None:
        prompt_tensor, choice_tensor = torch.as_tensor(new_replies.prompt_index), torch.as_tensor(new_replies.choices)
        with torch.no_grad():
            kl = float(
                (
                    candidate.policy.logprobs(prompt_tensor, choice_tensor)
                    - claim_world.base_policy.logprobs(prompt_tensor, choice_tensor)
                )
                .sum(1)
                .mean()
            )
    return {
        "policy": candidate.name,
        "seed": claim_world.seed,
        "trained_on_love": candidate.trained_on_love,
        **candidate.details,
        "kl": kl,
        "replies": len(new_replies.texts),
        "offline": offline_score_changes(claim_world.reply_features, models, *replies_by_use[0]),
        "gold": ground_truth_changes(claim_world.dataset, claim_world.truth_cache, base_replies, new_replies),
        "ab": run_ab_test(
            claim_world.dataset,
            claim_world.truth_cache,
            base_replies,
            new_replies,
            seed=seed + len(candidate.name) + sum(map(ord, candidate.name)),
        ),
        "monitors": {
            "base": claim_world.base_monitors(base_replies),
            "new": measure_reply_monitors(claim_world.dataset, new_replies),
        },
        "topics": {
            "base": love_rate_by_topic(claim_world.dataset, claim_world.truth_cache, base_replies),
            "new": love_rate_by_topic(claim_world.dataset, claim_world.truth_cache, new_replies),
        },
        "cpu_seconds": round(time.process_time() - started, 2),
    }
