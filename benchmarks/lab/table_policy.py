"""A policy that is a table of logits, with a known best response, trained by the library's losses and aggregation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.critic import build_token_rewards, compute_gae, compute_value_loss, sum_moments, whiten_advantages
from rluf.algorithms.losses import LossResult, compute_policy_loss, compute_reference_kl
from rluf.algorithms.packing import PackedBatch, pack_micro_batch
from rluf.algorithms.registry import (
    LearnerInputs,
    build_learner_inputs,
    scale_mini_batch_weights,
    split_mini_batches,
)
from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.objectives.aggregator import GroupScores, RewardAggregator
from rluf.types import Group, Prompt, Sample

LENGTH, VOCABULARY = 3, 6
LEARNING_RATE = 0.3
SignalFunction = Callable[[int, Sequence[int]], dict[str, float]]


@dataclass
class TablePolicy:
    """Logits [prompts, positions, tokens], with a table of values as critic."""

    seed: int
    learning_rate: float = LEARNING_RATE
    prompt_count: int = 2
    groups_per_prompt: int = 2
    sample_count: int = 8

    def __post_init__(self) -> None:
        """Start from the uniform policy."""
        torch.manual_seed(self.seed)
        self.logits = torch.zeros(self.prompt_count, LENGTH, VOCABULARY, requires_grad=True)
        self.values = torch.zeros(self.prompt_count, LENGTH, requires_grad=True)
        self.reference_logits = torch.zeros_like(self.logits)
        self.optimizer = torch.optim.Adam([self.logits, self.values], lr=self.learning_rate)

    def sample_groups(self) -> dict[int, Group]:
        """A batch of the present policy."""
        logprobs = self.logits.detach().log_softmax(-1)
        groups = {}
        for index in range(self.groups_per_prompt * self.prompt_count):
            prompt = index % self.prompt_count
            tokens = torch.multinomial(logprobs[prompt].exp(), self.sample_count, replacement=True).t()
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
        """Log-probabilities [K] of the response tokens."""
        prompts, positions = self.locate_tokens(batch)
        return self.logits.log_softmax(-1)[prompts, positions, batch.target_ids]

    def compute_reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities [K] under the reference policy, which is uniform until `refresh_reference`."""
        prompts, positions = self.locate_tokens(batch)
        return self.reference_logits.log_softmax(-1)[prompts, positions, batch.target_ids]

    def refresh_reference(self) -> None:
        """Make the present policy the reference, as algorithm.reference_refresh_steps does."""
        self.reference_logits = self.logits.detach().clone()

    def update(
        self, algorithm: AlgorithmSettings, groups: dict[int, Group], learner_inputs: LearnerInputs
    ) -> LossResult:
        """All updates on a batch, as LearnerActor.train_step has them; returns the loss of the last."""
        mini_batches = split_mini_batches(len(groups), algorithm.mini_batches)
        lengths = [[LENGTH] * len(group.samples) for group in groups.values()]
        learner_inputs = scale_mini_batch_weights(learner_inputs, lengths, mini_batches)
        batches = [
            pack_micro_batch(
                [(group, sample) for group in mini_batch for sample in range(self.sample_count)],
                groups,
                learner_inputs.advantages,
                learner_inputs.loss_weights,
            )
            for mini_batch in mini_batches
        ]
        with torch.no_grad():
            start_logprobs = [self.compute_logprobs(batch) for batch in batches]
        return [
            self._step(algorithm, batch, learner_inputs, batch_start_logprobs)
            for _ in range(algorithm.epochs)
            for batch, batch_start_logprobs in zip(batches, start_logprobs, strict=True)
        ][-1]

    def _step(
        self, algorithm: AlgorithmSettings, batch: PackedBatch, learner_inputs: LearnerInputs, start_logprobs: Tensor
    ) -> LossResult:
        value_loss = torch.zeros(())
        if learner_inputs.uses_critic:
            values = self.values[self.locate_tokens(batch)]
            token_kl = batch.rollout_logprobs - self.compute_reference_logprobs(batch)
            rewards = build_token_rewards(
                batch.advantages, token_kl, batch.sequence_index, learner_inputs.reward_kl_coef
            )
            advantages = compute_gae(rewards, values.detach(), batch.sequence_index)
            value_loss = compute_value_loss(values, advantages + values.detach(), batch.loss_weights)
            moments = sum_moments(advantages, torch.ones_like(advantages, dtype=torch.bool))
            batch = dataclasses.replace(batch, advantages=whiten_advantages(advantages, moments))
        result = compute_policy_loss(
            self.compute_logprobs(batch),
            self.compute_reference_logprobs(batch),
            batch,
            algorithm,
            loss_name=learner_inputs.policy_loss,
            kl_coef=learner_inputs.loss_kl_coef,
            kl_to_go_coef=learner_inputs.kl_to_go_coef,
            start_logprobs=start_logprobs if algorithm.update_count > 1 else None,
        )
        self.optimizer.zero_grad()
        (result.loss + value_loss).backward()
        self.optimizer.step()
        return result


def score_groups(groups: Iterable[Group], compute_signals: SignalFunction) -> Iterator[GroupScores]:
    """The aggregator's view of each group."""
    for group in groups:
        rows = [compute_signals(group.samples[0].prompt_ids[0], sample.response_ids) for sample in group.samples]
        yield GroupScores(group.prompt.id, "", {name: [row[name] for row in rows] for name in rows[0]})


def train(
    policy: TablePolicy,
    algorithm: AlgorithmSettings,
    aggregator: RewardAggregator,
    compute_signals: SignalFunction,
    steps: int,
    *,
    is_done: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Mean signals of each step's samples, by objective. The untrained policy gives the reference sample.

    `is_done` is called after each step and may end the training.
    """
    reference_groups = [group for _ in range(24) for group in policy.sample_groups().values()]
    aggregator.fit_reference(list(score_groups(reference_groups, compute_signals)))
    history = []
    for _ in range(steps):
        groups = policy.sample_groups()
        scores = list(score_groups(groups.values(), compute_signals))
        step_rewards = aggregator.aggregate(scores)
        samples = policy.sample_count
        zeros = [[0.0] * samples] * len(groups)
        batch = pack_micro_batch([(i, j) for i in groups for j in range(samples)], groups, zeros, zeros)
        sample_kl = compute_reference_kl(policy.compute_reference_logprobs(batch), batch)
        inputs = AdvantageInputs(
            step_rewards.rewards,
            [[LENGTH] * samples] * len(groups),
            [sample_kl[start : start + samples] for start in range(0, len(sample_kl), samples)],
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
        objectives = scores[0].signals
        history.append({name: fmean(value for row in scores for value in row.signals[name]) for name in objectives})
        if is_done():
            break
    return history


def make_aggregator(
    method: str, love: float, safety: float, floors: Mapping[str, float] | None = None
) -> RewardAggregator:
    """Aggregator of love and safety with these weights."""
    weights = {"love": {"weight": love}, "helpfulness": {"weight": 0.0}, "safety": {"weight": safety}}
    return RewardAggregator(
        ObjectivesSettings.model_validate(weights),
        AggregationSettings.model_validate({"method": method, "floors": floors or {}}),
    )


def score_target_tokens(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Love is the share of positions with their one target token; all other responses score the same."""
    hits = sum(token == (prompt + 2 * position) % VOCABULARY for position, token in enumerate(tokens))
    return {"love": hits / LENGTH, "helpfulness": 0.0, "safety": 0.0}
