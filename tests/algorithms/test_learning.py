"""Every algorithm trains a table policy over short responses, with a known best response, to 95% of the optimum."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from torch import Tensor

from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.critic import build_token_rewards, compute_gae, compute_value_loss, sum_moments, whiten_advantages
from rluf.algorithms.losses import LossResult, compute_policy_loss, compute_reference_kl
from rluf.algorithms.packing import PackedBatch, pack_micro_batch
from rluf.algorithms.registry import ALGORITHMS, LearnerInputs, build_learner_inputs
from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.objectives.aggregator import GroupScores, RewardAggregator
from rluf.types import Group, Prompt, Sample

PROMPTS, LENGTH, VOCABULARY, SAMPLES = 2, 3, 6, 8
MICRO_BATCH = [(group, sample) for group in range(2 * PROMPTS) for sample in range(SAMPLES)]
SEEDS = (1, 2, 3)
STEPS, LEARNING_RATE = 60, 0.3
SignalFunction = Callable[[int, Sequence[int]], dict[str, float]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class TablePolicy:
    """A policy that is a table of logits [prompts, positions, tokens], with a table of values as critic."""

    seed: int
    learning_rate: float = LEARNING_RATE

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.logits = torch.zeros(PROMPTS, LENGTH, VOCABULARY, requires_grad=True)
        self.values = torch.zeros(PROMPTS, LENGTH, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits, self.values], lr=self.learning_rate)

    def sample_groups(self) -> dict[int, Group]:
        logprobs = self.logits.detach().log_softmax(-1)
        groups = {}
        for index in range(2 * PROMPTS):
            prompt = index % PROMPTS
            tokens = torch.multinomial(logprobs[prompt].exp(), SAMPLES, replacement=True).t()
            token_logprobs = logprobs[prompt][torch.arange(LENGTH), tokens]
            samples = tuple(
                Sample(str(index), (prompt,), tuple(response_ids), tuple(rollout_logprobs), ((0, 0),), "stop", "")
                for response_ids, rollout_logprobs in zip(tokens.tolist(), token_logprobs.tolist(), strict=True)
            )
            groups[index] = Group(Prompt(str(index), (), (prompt,), "", "train"), samples, 0)
        return groups

    def locate_tokens(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Prompt and position of each response token."""
        first_tokens = batch.sequence_token_index[batch.sequence_index, 0]
        return batch.input_ids[0][first_tokens], batch.position_ids[0][batch.logit_index]

    def compute_logprobs(self, batch: PackedBatch) -> Tensor:
        prompts, positions = self.locate_tokens(batch)
        return self.logits.log_softmax(-1)[prompts, positions, batch.target_ids]

    def update(
        self, algorithm: AlgorithmSettings, groups: dict[int, Group], learner_inputs: LearnerInputs
    ) -> LossResult:
        batch = pack_micro_batch(MICRO_BATCH, groups, learner_inputs.advantages, learner_inputs.loss_weights)
        value_loss = torch.zeros(())
        if learner_inputs.uses_critic:
            values = self.values[self.locate_tokens(batch)]
            token_kl = batch.rollout_logprobs - compute_reference_logprobs(batch)
            rewards = build_token_rewards(
                batch.advantages, token_kl, batch.sequence_index, learner_inputs.reward_kl_coef
            )
            advantages = compute_gae(rewards, values.detach(), batch.sequence_index)
            value_loss = compute_value_loss(values, advantages + values.detach(), batch.loss_weights)
            moments = sum_moments(advantages, torch.ones_like(advantages, dtype=torch.bool))
            batch = dataclasses.replace(batch, advantages=whiten_advantages(advantages, moments))
        result = compute_policy_loss(
            self.compute_logprobs(batch),
            compute_reference_logprobs(batch),
            batch,
            algorithm,
            loss_name=learner_inputs.policy_loss,
            kl_coef=learner_inputs.loss_kl_coef,
            kl_to_go_coef=learner_inputs.kl_to_go_coef,
        )
        self.optimizer.zero_grad()
        (result.loss + value_loss).backward()
        self.optimizer.step()
        return result


def compute_reference_logprobs(batch: PackedBatch) -> Tensor:
    """The reference policy is uniform."""
    return torch.full_like(batch.rollout_logprobs, -torch.log(torch.tensor(float(VOCABULARY))).item())


def train(
    policy: TablePolicy,
    algorithm: AlgorithmSettings,
    aggregator: RewardAggregator,
    compute_signals: SignalFunction,
    steps: int,
) -> list[dict[str, float]]:
    """Mean signals of each step's samples, by objective."""
    history = []
    for _ in range(steps):
        groups = policy.sample_groups()
        group_signals = [
            [compute_signals(group.samples[0].prompt_ids[0], sample.response_ids) for sample in group.samples]
            for group in groups.values()
        ]
        objectives = list(group_signals[0][0])
        scores = [
            GroupScores(
                group.prompt.id, "", {name: [signals[name] for signals in sample_signals] for name in objectives}
            )
            for group, sample_signals in zip(groups.values(), group_signals, strict=True)
        ]
        step_rewards = aggregator.aggregate(scores)
        zeros = [[0.0] * SAMPLES] * len(groups)
        batch = pack_micro_batch(MICRO_BATCH, groups, zeros, zeros)
        sample_kl = compute_reference_kl(compute_reference_logprobs(batch), batch)
        inputs = AdvantageInputs(
            step_rewards.rewards,
            [[LENGTH] * SAMPLES] * len(groups),
            [sample_kl[start : start + SAMPLES] for start in range(0, len(sample_kl), SAMPLES)],
            objective_rewards=step_rewards.normalized_signals,
            objective_weights=step_rewards.objective_weights,
            kl_coef=algorithm.kl_coef if algorithm.kl_penalty == "reward" else 0.0,
            max_response_kl=100.0,
        )
        learner_inputs = build_learner_inputs(
            algorithm,
            inputs,
            max_response_tokens=LENGTH,
            kl_coef=algorithm.kl_coef,
            use_gdpo=aggregator.aggregation.method == "gdpo",
        )
        policy.update(algorithm, groups, learner_inputs)
        all_signals = [signals for sample_signals in group_signals for signals in sample_signals]
        history.append({name: fmean(signals[name] for signals in all_signals) for name in objectives})
    return history


def make_aggregator(
    method: str, love: float, safety: float, floors: Mapping[str, float] | None = None
) -> RewardAggregator:
    weights = {"love": {"weight": love}, "helpfulness": {"weight": 0.0}, "safety": {"weight": safety}}
    return RewardAggregator(
        ObjectivesSettings.model_validate(weights),
        AggregationSettings.model_validate({"method": method, "floors": floors or {}}),
    )


def score_target_tokens(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Love is the share of positions with their one target token; all other responses score the same."""
    hits = sum(token == (prompt + 2 * position) % VOCABULARY for position, token in enumerate(tokens))
    return {"love": hits / LENGTH, "helpfulness": 0.0, "safety": 0.0}


CASES = [
    *(
        (name, None, "calibrated" if ALGORITHMS[name].needs_reference_kl else "linear", "k3")
        for name in ALGORITHMS
        if not ALGORITHMS[name].offline
    ),
    *((name, loss, "linear", "k3") for name in ("grpo", "dr_grpo") for loss in ("gspo", "cispo", "reinforce")),
    ("grpo", None, "gdpo", "k3"),
    ("rloo", None, "linear", "reward"),
    ("ppo", None, "linear", "reward"),
    ("reinforce_pp", None, "linear", "reward"),
]


@pytest.mark.parametrize(("name", "loss", "method", "kl_penalty"), CASES)
def test_each_algorithm_reaches_95_percent_of_the_optimum(
    name: str, loss: str | None, method: str, kl_penalty: str
) -> None:
    algorithm = AlgorithmSettings.model_validate(
        {"name": name, "loss": loss, "kl_penalty": kl_penalty, "kl_coef": 0.001}
    )
    love_by_seed = {}
    for seed in SEEDS:
        history = train(TablePolicy(seed), algorithm, make_aggregator(method, 1.0, 0.0), score_target_tokens, STEPS)
        love_by_seed[seed] = fmean(step["love"] for step in history[-10:])
    assert all(love >= 0.95 for love in love_by_seed.values()), love_by_seed


def score_unsafe_temptation(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Token 0 is loved most and unsafe; token 1 is loved a little less and safe; the others are neither."""
    del prompt
    return {
        "love": fmean({0: 3.0, 1: 2.0}.get(token, 0.0) for token in tokens),
        "helpfulness": 0.0,
        "safety": fmean({0: -2.0, 1: 0.3}.get(token, 0.0) for token in tokens),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_floors_are_met_where_a_weighted_sum_violates_them(seed: int) -> None:
    """The floor is the reference policy's own mean; both runs have the same weights."""
    algorithm = AlgorithmSettings(kl_coef=0.001)
    final_means = {}
    for method, floors in (("linear", {}), ("constrained", {"safety": 0.0})):
        aggregator = make_aggregator(method, 0.9, 0.1, floors)
        history = train(TablePolicy(seed, learning_rate=0.1), algorithm, aggregator, score_unsafe_temptation, 200)
        assert aggregator.normalizer is not None
        for name in ("love", "safety"):
            normalized = aggregator.normalizer.normalize(name, [step[name] for step in history[-40:]])
            final_means[method, name] = fmean(normalized)
    assert final_means["linear", "safety"] < -1.0, final_means
    assert final_means["constrained", "safety"] >= -0.05, final_means
    assert final_means["constrained", "love"] > 1.0, final_means


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "reinforce"])
def test_learning_rate_zero_leaves_the_policy_unchanged_and_the_ratio_at_one(loss: str) -> None:
    policy = TablePolicy(1, learning_rate=0.0)
    with torch.no_grad():
        policy.logits.copy_(torch.randn_like(policy.logits))
    logits_before, algorithm = policy.logits.detach().clone(), AlgorithmSettings()
    rng = random.Random(0)
    for _ in range(5):
        groups = policy.sample_groups()
        rewards = [[rng.random() for _ in range(SAMPLES)] for _ in groups]
        learner_inputs = build_learner_inputs(
            AlgorithmSettings.model_validate({"loss": loss}),
            AdvantageInputs(rewards, [[LENGTH] * SAMPLES] * len(groups)),
            max_response_tokens=LENGTH,
            kl_coef=0.02,
        )
        result = policy.update(algorithm, groups, learner_inputs)
        assert result.max_ratio.item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(policy.logits, logits_before)
