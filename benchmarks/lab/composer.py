"""The small policy of the claims and its training: imitation, then rluf's reward aggregation, advantages and losses.

A network of about 100,000 weights makes five consecutive choices, each conditioned on the previous ones. A reply thus
has a probability, a KL to the reference, and gradients like a language model's with five tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lab.dataset import ReplyDataset
from lab.replies import BODY_SLOT, SLOT_OPTIONS, compose_texts
from numpy.typing import NDArray
from torch import Tensor, nn

from rluf.algorithms.advantages import AdvantageInputs, SampleKL
from rluf.algorithms.losses import compute_policy_loss
from rluf.algorithms.packing import PackedBatch
from rluf.algorithms.registry import build_learner_inputs, requires_reference_kl
from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.objectives.aggregator import GroupScores, RewardAggregator
from rluf.objectives.judges import judge_responses
from rluf.types import ScoringItem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SignalFunction = Callable[[Ints, Sequence[str]], Mapping[str, Floats]]
"""(prompt indices [N], texts [N]) -> signal [N] by objective."""
MAX_RESPONSE_KL = 6.0
"""Largest KL of a reply in nats (CGPO)."""
WIDE = 64


class ComposerPolicy(nn.Module):
    """pi(choices | prompt): one small network per choice, on the sum of the states of prompt and earlier choices."""

    def __init__(self, dataset: ReplyDataset) -> None:
        """Initialize with random weights."""
        super().__init__()
        self.register_buffer("prompt_vectors", torch.from_numpy(dataset.prompt_vectors), persistent=False)
        self.register_buffer("reply_vectors", torch.from_numpy(dataset.reply_vectors), persistent=False)
        input_size = dataset.prompt_vectors.shape[1]
        self.prompt_layer, self.reply_layer, self.reply_key_layer = (
            nn.Linear(input_size, WIDE),
            nn.Linear(input_size, WIDE),
            nn.Linear(input_size, WIDE),
        )
        self.choice_embeddings = nn.ModuleList(nn.Embedding(option_count, WIDE) for option_count in SLOT_OPTIONS)
        self.hidden_layers = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Linear(WIDE, WIDE), nn.GELU()) for _ in SLOT_OPTIONS
        )
        self.output_layers = nn.ModuleList(
            nn.Linear(WIDE, WIDE if slot == BODY_SLOT else option_count)
            for slot, option_count in enumerate(SLOT_OPTIONS)
        )

    def _encode_prompt(self, prompt_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reply_vectors = self.reply_vectors[prompt_index]
        return (
            self.prompt_layer(self.prompt_vectors[prompt_index]) * 3.0,
            self.reply_key_layer(reply_vectors) * 3.0,
            self.reply_layer(reply_vectors) * 3.0,
        )

    def _slot_logits(self, slot: int, state: Tensor, reply_keys: Tensor) -> Tensor:
        slot_output: Tensor = self.output_layers[slot](self.hidden_layers[slot](state))
        return torch.einsum("nd,nkd->nk", slot_output, reply_keys) / WIDE**0.5 if slot == BODY_SLOT else slot_output

    def _choice_state(self, slot: int, choices: Tensor, reply_states: Tensor) -> Tensor:
        if slot == BODY_SLOT:
            return reply_states[torch.arange(len(choices)), choices]
        embedding: Tensor = self.choice_embeddings[slot](choices)
        return embedding

    def logprobs(self, prompt_index: Tensor, choices: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability [N, 5] of each choice."""
        state, reply_keys, reply_states = self._encode_prompt(prompt_index)
        slot_logprobs = []
        for slot in range(len(SLOT_OPTIONS)):
            log_probabilities = torch.log_softmax(self._slot_logits(slot, state, reply_keys) / temperature, -1)
            slot_logprobs.append(log_probabilities.gather(1, choices[:, slot, None])[:, 0])
            state = state + self._choice_state(slot, choices[:, slot], reply_states)
        return torch.stack(slot_logprobs, 1)

    @torch.no_grad()
    def sample(
        self, prompt_index: Tensor, generator: torch.Generator, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Choices [N, 5] and their log-probabilities [N, 5]."""
        state, reply_keys, reply_states = self._encode_prompt(prompt_index)
        choices, logprobs = [], []
        for slot in range(len(SLOT_OPTIONS)):
            log_probabilities = torch.log_softmax(self._slot_logits(slot, state, reply_keys) / temperature, -1)
            choice = torch.multinomial(log_probabilities.exp(), 1, generator=generator)[:, 0]
            choices.append(choice)
            logprobs.append(log_probabilities.gather(1, choice[:, None])[:, 0])
            state = state + self._choice_state(slot, choice, reply_states)
        return torch.stack(choices, 1), torch.stack(logprobs, 1)


def imitate_demonstrations(
    dataset: ReplyDataset,
    prompt_index: Ints,
    choices: Ints,
    *,
    seed: int,
    epochs: int = 6,
    initial_policy: ComposerPolicy | None = None,
) -> ComposerPolicy:
    """Train a policy on demonstrations `choices` [N, 5] to prompts [N] by maximum likelihood."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = ComposerPolicy(dataset) if initial_policy is None else copy.deepcopy(initial_policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01)
        prompt_tensor, choice_tensor = torch.as_tensor(prompt_index), torch.as_tensor(choices)
        for _ in range(epochs):
            for batch_index in torch.randperm(len(prompt_tensor)).split(256):
                optimizer.zero_grad()
                (-policy.logprobs(prompt_tensor[batch_index], choice_tensor[batch_index]).sum(1).mean()).backward()
                optimizer.step()
    policy.eval()
    return policy


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """Training of a policy: rluf's settings of algorithm, objectives and aggregation, and the learning rate."""

    algorithm: AlgorithmSettings
    objectives: ObjectivesSettings
    aggregation: AggregationSettings
    learning_rate: float = 2e-3


@dataclass(slots=True)
class ComposerRun:
    """The policy after the last step and at the checkpoint steps, and the means of each step."""

    policy: ComposerPolicy
    checkpoints: dict[int, ComposerPolicy] = field(default_factory=dict)
    step_means: list[dict[str, float]] = field(default_factory=list)


def train_composer(
    dataset: ReplyDataset,
    base_policy: ComposerPolicy,
    train_prompts: Ints,
    signals: SignalFunction,
    recipe: TrainRecipe,
    *,
    seed: int,
    checkpoint_steps: Sequence[int] = (),
) -> ComposerRun:
    """Train a copy of `base_policy` by policy gradients on `train_prompts`; `base_policy` is the reference."""
    algorithm, aggregation = recipe.algorithm, recipe.aggregation
    policy, aggregator = copy.deepcopy(base_policy).train(), RewardAggregator(recipe.objectives, aggregation)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng([seed, 7])
    group_size, run = algorithm.samples_per_prompt, ComposerRun(policy)
    for step in range(1, algorithm.steps + 1):
        step_prompts = rng.choice(train_prompts, algorithm.prompts_per_step, replace=False)
        prompt_index = np.repeat(step_prompts, group_size)
        prompt_tensor = torch.as_tensor(prompt_index)
        choices, rollout_logprobs = policy.sample(prompt_tensor, generator)
        reply_texts = compose_texts(dataset, prompt_index, choices.numpy())
        scores = signals(prompt_index, reply_texts)
        with torch.no_grad():
            reference_logprobs = base_policy.logprobs(prompt_tensor, choices)
        sample_kl = (rollout_logprobs - reference_logprobs).sum(1).reshape(-1, group_size).tolist()
        group_scores = []
        for group, prompt in enumerate(step_prompts.tolist()):
            group_slice = slice(group * group_size, (group + 1) * group_size)
            conversations = [ScoringItem(dataset.entries[prompt].messages, text) for text in reply_texts[group_slice]]
            verdicts = judge_responses(aggregation.gate_judges, conversations) if aggregation.gate_judges else ()
            group_scores.append(
                GroupScores(
                    str(prompt),
                    dataset.entries[prompt].topic,
                    {name: values[group_slice].tolist() for name, values in scores.items()},
                    verdicts,
                )
            )
        step_rewards = aggregator.aggregate(group_scores)
        advantage_inputs = AdvantageInputs(
            rewards=step_rewards.rewards,
            response_lengths=[[len(SLOT_OPTIONS)] * group_size for _ in group_scores],
            sample_kl=[[SampleKL(value) for value in row] for row in sample_kl]
            if requires_reference_kl(algorithm)
            else (),
            passed_judges=[item.gate_verdicts for item in group_scores] if aggregation.gate_judges else (),
            objective_rewards=step_rewards.normalized_signals,
            objective_weights=step_rewards.objective_weights,
            kl_coef=algorithm.kl_coef if algorithm.kl_penalty == "reward" else 0.0,
            max_response_kl=MAX_RESPONSE_KL,
        )
        learner_inputs = build_learner_inputs(
            algorithm,
            advantage_inputs,
            max_response_tokens=len(SLOT_OPTIONS),
            kl_coef=algorithm.kl_coef,
            use_gdpo=aggregation.method == "gdpo",
        )
        optimizer.zero_grad()
        loss = compute_policy_loss(
            policy.logprobs(prompt_tensor, choices).reshape(-1),
            reference_logprobs.reshape(-1),
            _batch(choices, rollout_logprobs, learner_inputs.advantages, learner_inputs.loss_weights),
            algorithm,
            loss_name=learner_inputs.policy_loss,
            kl_coef=learner_inputs.loss_kl_coef,
            kl_to_go_coef=learner_inputs.kl_to_go_coef,
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        run.step_means.append(
            {name: float(values.mean()) for name, values in scores.items()}
            | {"kl": float(np.mean(sample_kl)), "reward": float(np.mean(step_rewards.rewards))}
        )
        if step in checkpoint_steps:
            run.checkpoints[step] = copy.deepcopy(policy).eval()
    policy.eval()
    return run


def _batch(
    choices: Tensor, rollout_logprobs: Tensor, advantages: list[list[float]], loss_weights: list[list[float]]
) -> PackedBatch:
    """The step as a packed batch for rluf's losses: five response tokens per reply, no prompt tokens."""
    reply_count, slot_count = choices.shape
    flat_choices, index = choices.reshape(-1), torch.arange(reply_count * slot_count)

    def spread_over_slots(rows: list[list[float]]) -> Tensor:
        return torch.tensor([value for row in rows for value in row]).repeat_interleave(slot_count)

    return PackedBatch(
        input_ids=flat_choices[None],
        position_ids=(index % slot_count)[None],
        sequence_token_index=index.reshape(reply_count, slot_count),
        token_output_index=index,
        flat_token_index=index,
        flat_output_index=index,
        sequence_starts=torch.arange(0, len(index) + 1, slot_count, dtype=torch.int32),
        prompt_token_index=index.reshape(reply_count, slot_count),
        response_token_index=index.reshape(reply_count, slot_count),
        split_output_index=index,
        logit_index=index,
        target_ids=flat_choices,
        sequence_index=torch.arange(reply_count).repeat_interleave(slot_count),
        advantages=spread_over_slots(advantages),
        loss_weights=spread_over_slots(loss_weights),
        rollout_logprobs=rollout_logprobs.reshape(-1),
    )
