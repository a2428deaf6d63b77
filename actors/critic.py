"""PPO's critic on a learner rank: it turns rewards into advantages by token, and learns from what they came to.

It shares the rank's process group and batches with the policy, so that no token tensor travels for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rluf.algorithms.advantages.gae import gae, moments, token_rewards, whitened
from rluf.algorithms.batch import Batch
from rluf.algorithms.critic import Critic, value_loss
from rluf.algorithms.policy_io import load_policy
from rluf.backends import deepspeed as ds
from rluf.config.settings import Settings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class CriticRank:
    """The critic's share of one learner rank. All ranks make it and call it alike."""

    def __init__(self, settings: Settings, source: Path, device: torch.device, world: int) -> None:
        """Build the critic from the policy at `source`; the process group must exist."""
        learner, dtype = settings.learner, getattr(torch, settings.policy_dtype)
        with ds.sharded_loading(learner.zero_stage, dtype, world):
            body = load_policy(
                source,
                dtype=dtype,
                trust_remote_code=settings.model.trust_remote_code,
                gradient_checkpointing=learner.gradient_checkpointing,
            )
            model = Critic(body)
        rate = 10 * learner.learning_rate if learner.critic_rate is None else learner.critic_rate
        self._lambda, self._world = settings.algorithm.gae_lambda, world
        self._batches: list[tuple[Batch, Tensor]] = []
        self.engine: DeepSpeedEngine = ds.init_deepspeed(
            model.to(device) if learner.zero_stage < 3 else model,
            zero_stage=learner.zero_stage,
            learning_rate=rate,
            warmup_steps=learner.warmup_steps,
            weight_decay=learner.weight_decay,
            grad_clip=learner.grad_clip,
            dtype=dtype,
            world=world,
            offload=learner.offload_optimizer,
        )

    def judge(self, batches: Sequence[tuple[Batch, Tensor]], reward_kl: float) -> list[Batch]:
        """The batches, each token with its own whitened advantage; `batches` come with the reference's logprobs.

        Before it, a batch's advantages are rewards. Demonstrations keep theirs.
        """
        self._batches, found = [], []
        total = torch.zeros(3, dtype=torch.float64, device=batches[0][1].device)
        for batch, reference in batches:
            sampled = ~batch.rollout_logprobs.isnan()
            drift = (batch.rollout_logprobs - reference).nan_to_num(0.0)
            with torch.no_grad():
                values = self._values(batch)
            rewards = token_rewards(batch.advantages, drift, batch.sequences, reward_kl)
            gains = gae(rewards, values, batch.sequences, self._lambda)
            returns = torch.where(sampled, gains + values, torch.full_like(values, torch.nan))
            self._batches.append((batch, returns))
            total += moments(gains, sampled & (batch.loss_weights > 0))
            found.append((batch, sampled, gains))
        dist.all_reduce(total)
        return [replace(b, advantages=torch.where(s, whitened(g, total), b.advantages)) for b, s, g in found]

    def learn(self) -> dict[str, float]:
        """One optimiser step on the batches judged last; its loss and gradient norm, the same on every rank."""
        loss = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for number, (batch, returns) in enumerate(self._batches):

            def forward(batch: Batch = batch, returns: Tensor = returns) -> tuple[Tensor, Tensor]:
                value = value_loss(self._values(batch), returns, batch.loss_weights)
                return value * self._world, value.detach().double()

            loss += ds.accumulate(self.engine, forward, last=number == len(self._batches) - 1)
        dist.all_reduce(loss)
        _, norm = ds.apply_step(self.engine)
        self._batches = []
        return {"value_loss": float(loss), "critic_grad_norm": norm}

    def _values(self, batch: Batch) -> Tensor:
        found: Tensor = self.engine(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            rows=batch.rows,
            places=batch.places,
            keep=batch.keep,
        )
        return found
