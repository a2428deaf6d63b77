"""PPO's critic on a learner rank: token-level advantages by GAE, and regression of the values on the returns.

It shares the rank's process group and batches with the policy, so that no token tensor is transferred for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rluf.algorithms.critic import (
    CriticModel,
    build_token_rewards,
    compute_explained_variance,
    compute_gae,
    compute_value_loss,
    is_diverging,
    sum_moments,
    whiten_advantages,
)
from rluf.algorithms.packing import PackedBatch
from rluf.algorithms.policy_model import load_policy, remove_noise
from rluf.backends import deepspeed as ds
from rluf.config.settings import Settings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

CRITIC_LEARNING_RATE_FACTOR = 10
"""Default learning rate of the critic, as a multiple of the policy's: the value head starts at zero, and advantages are
noise until it has learned."""


class CriticWorker:
    """The critic on one learner rank. Construction and every call must happen on all ranks."""

    def __init__(self, settings: Settings, model_path: Path, device: torch.device, world_size: int) -> None:
        """Build the critic from the policy at `model_path`; the process group must exist."""
        learner, dtype = settings.learner, getattr(torch, settings.policy_dtype)
        with ds.sharded_loading(learner.zero_stage, dtype, world_size, device):
            policy = load_policy(
                model_path,
                dtype=dtype,
                trust_remote_code=settings.model.trust_remote_code,
                gradient_checkpointing=learner.gradient_checkpointing,
            )
            model = CriticModel(policy)
        learning_rate = learner.critic_learning_rate
        if learning_rate is None:
            learning_rate = CRITIC_LEARNING_RATE_FACTOR * learner.learning_rate
        self._world_size, self._learning_rate = world_size, learning_rate
        self._explained_variance, self._has_warned = 0.0, False
        self._return_batches: list[tuple[PackedBatch, Tensor]] = []
        self.engine: DeepSpeedEngine = ds.init_deepspeed(
            model.to(device) if learner.zero_stage < 3 else model,
            zero_stage=learner.zero_stage,
            learning_rate=learning_rate,
            warmup_steps=learner.warmup_steps,
            dtype=dtype,
            world_size=world_size,
            device=device,
            offload_optimizer=learner.offload_optimizer,
        )
        remove_noise(self.engine.module)

    def compute_advantages(
        self, batches: Sequence[tuple[PackedBatch, Tensor | None]], reward_kl_coef: float
    ) -> list[PackedBatch]:
        """The batches with a whitened advantage per token in place of the rewards; demonstrations keep theirs.

        `batches` come with their reference log-probabilities, if there is a reference. `reward_kl_coef` is the
        coefficient of the KL penalty subtracted from the rewards of each token. Raises RlufError where the critic's
        values are not finite.
        """
        self._return_batches, advantage_batches = [], []
        # Of advantages, Monte Carlo returns and their errors, over the whole step and all ranks.
        moments = torch.zeros(3, 3, dtype=torch.float64, device=batches[0][0].advantages.device)
        for batch, ref_logprobs in batches:
            # Demonstrations were not sampled by an engine: their rollout log-probabilities are NaN.
            is_sampled = ~batch.rollout_logprobs.isnan()
            token_kl = torch.zeros_like(batch.rollout_logprobs)
            if ref_logprobs is not None:
                token_kl = (batch.rollout_logprobs - ref_logprobs).nan_to_num(0.0)
            with torch.no_grad():
                values = self._predict_values(batch)
            rewards = build_token_rewards(batch.advantages, token_kl, batch.sequence_index, reward_kl_coef)
            advantages = compute_gae(rewards, values, batch.sequence_index)
            # NaN marks tokens of demonstrations, which have no return; compute_value_loss leaves them out.
            returns = torch.where(is_sampled, advantages + values, torch.full_like(values, torch.nan))
            self._return_batches.append((batch, returns))
            sampled_returns = compute_gae(rewards, torch.zeros_like(values), batch.sequence_index, gae_lambda=1.0)
            is_counted = is_sampled & (batch.loss_weights > 0)
            quantities = (advantages, sampled_returns, sampled_returns - values)
            moments += torch.stack([sum_moments(quantity, is_counted) for quantity in quantities])
            advantage_batches.append((batch, is_sampled, advantages))
        dist.all_reduce(moments)
        self._explained_variance = compute_explained_variance(moments[1], moments[2])
        if is_diverging(moments[1], moments[2]) and not self._has_warned:
            self._has_warned = True  # the metrics show the rest
            logger.warning(
                "critic: diverging, its errors are far larger than the returns (explained_variance=%.1f); lower "
                "learner.critic_learning_rate (now %g)",
                self._explained_variance,
                self._learning_rate,
            )
        return [
            replace(
                batch,
                advantages=torch.where(is_sampled, whiten_advantages(advantages, moments[0]), batch.advantages),
            )
            for batch, is_sampled, advantages in advantage_batches
        ]

    def train_step(self, numbers: Sequence[int]) -> dict[str, float]:
        """One optimizer step on the batches `numbers` of the last `compute_advantages`.

        Returns value loss, gradient norm, whether the update was skipped for a non-finite gradient, and the explained
        variance before the step's first update, the same on every rank.
        """
        total_loss = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for batch_number, (batch, returns) in enumerate(self._return_batches[number] for number in numbers):
            # Default arguments bind this iteration's batch: the closure must not see that of a later one.
            def forward(batch: PackedBatch = batch, returns: Tensor = returns) -> tuple[Tensor, Tensor]:
                value_loss = compute_value_loss(self._predict_values(batch), returns, batch.loss_weights)
                # DeepSpeed averages gradients over ranks, but the loss weights are those of a sum over all ranks.
                return value_loss * self._world_size, value_loss.detach().double()

            is_last = batch_number == len(numbers) - 1
            total_loss += ds.accumulate_gradients(self.engine, forward, is_last=is_last)
        dist.all_reduce(total_loss)
        is_applied, grad_norm = ds.apply_optimizer_step(self.engine)
        return {
            "value_loss": float(total_loss),
            "critic_grad_norm": grad_norm,
            "critic_skipped": float(not is_applied),
            "explained_variance": self._explained_variance,
        }

    def _predict_values(self, batch: PackedBatch) -> Tensor:
        values: Tensor = self.engine(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logit_index=batch.logit_index,
            **batch.attention_inputs,
        )
        return values
