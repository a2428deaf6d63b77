"""One DeepSpeed rank: learns from packed micro-batches, publishes its weights bucket by bucket, saves the policy."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from ray import ObjectRef
from torch import Tensor

from rluf.config.settings import Settings
from rluf.engine import deepspeed as ds
from rluf.engine.transfer import Sender, make_sender
from rluf.errors import RlufError
from rluf.policy.batch import Batch
from rluf.policy.checkpoint import copy_companions, load_policy, whole_folder
from rluf.policy.logprobs import chosen_logprobs
from rluf.policy.losses import SUMS, LossResult, metrics, policy_loss
from rluf.policy.packing import MicroBatch, pack
from rluf.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Updates skipped in a row, for gradients that are not finite, before the run stops."""


class LearnerActor:
    """A learner rank. `address` of rank 0 first, then `setup` on all ranks; then every call goes to all ranks alike."""

    def __init__(self, rank: int, world: int, settings_json: str, model_path: str) -> None:
        """Nothing heavy happens before `setup`. `model_path` is a local Hugging Face folder."""
        self.rank, self.world = rank, world
        self.settings = Settings.model_validate_json(settings_json)
        self.source = Path(model_path)
        self.device = torch.device("cuda", 0) if self.settings.cluster.gpus_per_learner > 0 else torch.device("cpu")
        self._engine: DeepSpeedEngine | None = None
        self._reference: torch.nn.Module | None = None
        self._sender: Sender | None = None
        self._buckets: Iterator[list[tuple[str, Tensor]]] = iter(())
        self._steps = self._skipped = self._skipped_in_a_row = 0

    def address(self) -> tuple[str, int]:
        """Host of this rank and a port that is free there now, for the process group."""
        host = ray.util.get_node_ip_address()
        return host, _free_port(host)

    def setup(self, host: str, port: int) -> dict[str, float]:
        """Join the ranks around `host`:`port`, load the policy and its frozen reference. All ranks call it.

        Returns parameters and seconds. Raises ResourceError naming the rank, or ModelError.
        """
        begun = time.monotonic()
        learner, model = self.settings.learner, self.settings.model
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        ds.join_group(
            rank=self.rank,
            world=self.world,
            host=host,
            port=port,
            device=self.device,
            timeout_s=max(learner.deadline_s, self.settings.cluster.start_deadline_s),
        )
        dtype = getattr(torch, model.dtype)
        with ds.sharded_loading(learner.zero_stage, dtype, self.world):
            policy, reference = (
                load_policy(
                    self.source,
                    dtype=dtype,
                    trust_remote_code=model.trust_remote_code,
                    gradient_checkpointing=trained and learner.gradient_checkpointing,
                )
                for trained in (True, False)
            )
        self._engine = ds.init_deepspeed(
            policy.to(self.device) if learner.zero_stage < 3 else policy,
            zero_stage=learner.zero_stage,
            learning_rate=learner.learning_rate,
            warmup_steps=learner.warmup_steps,
            weight_decay=learner.weight_decay,
            grad_clip=learner.grad_clip,
            dtype=dtype,
            world=self.world,
            offload=learner.offload_optimizer,
        )
        self._reference = ds.init_reference(
            reference, zero_stage=learner.zero_stage, dtype=dtype, device=self.device, world=self.world
        )
        seconds = time.monotonic() - begun
        logger.info("learner rank %d of %d ready on %s after %.1f s", self.rank, self.world, self.device, seconds)
        return {"parameters": float(ds.parameter_count(self.engine)), "seconds": seconds}

    @property
    def engine(self) -> DeepSpeedEngine:
        """The DeepSpeed engine, once `setup` has made it."""
        if self._engine is None:
            raise RlufError(f"learner rank {self.rank} was used before setup; call setup on all ranks first")
        return self._engine

    def step(
        self, groups: list[ObjectRef[Group]], advantages: list[list[float]], plan: list[MicroBatch], step: int
    ) -> dict[str, float]:
        """One optimiser step over this rank's micro-batches; metrics of the whole step, the same on every rank.

        `groups` and `advantages` are those of the step, `plan` this rank's part of `plan_micro_batches`. An update with
        a gradient that is not finite is skipped and counted; MOST_SKIPPED in a row raise RlufError.
        """
        begun = time.monotonic()
        wanted = sorted({group for micro_batch in plan for group, _ in micro_batch})
        held = dict(zip(wanted, ray.get([groups[group] for group in wanted]), strict=True))
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        peak = torch.zeros((), dtype=torch.float64, device=self.device)
        reference_s = 0.0
        for number, micro_batch in enumerate(plan):
            batch = pack(micro_batch, held, advantages).to(self.device)
            since = time.monotonic()
            reference = self._reference_logprobs(batch)
            reference_s += time.monotonic() - since
            result = self._accumulate(batch, reference, last=number == len(plan) - 1)
            sums += result.sums
            peak = torch.maximum(peak, result.peak)
        dist.all_reduce(sums)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        rate, since = ds.learning_rate(self.engine), time.monotonic()
        applied, norm = ds.apply_step(self.engine)
        now = time.monotonic()
        self._count(applied, step, float(sums[0]))
        return {
            **metrics(sums, float(peak)),
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(self._skipped),
            "micro_batches": float(len(plan)),
            "reference_s": reference_s,
            "backward_s": since - begun - reference_s,
            "optimizer_s": now - since,
            "learner_tokens_per_s": float(sums[SUMS.index("tokens")]) / (now - begun),
        }

    def _accumulate(self, batch: Batch, reference: Tensor, *, last: bool) -> LossResult:
        """Add one micro-batch's gradient. DeepSpeed averages over ranks, the loss sums over them: hence the factor."""

        def forward() -> tuple[Tensor, LossResult]:
            logprobs = self._logprobs(self.engine, batch, self.settings.rollout.temperature)
            result = policy_loss(logprobs, reference, batch, self.settings.algorithm)
            return result.loss * self.world, result

        return ds.accumulate(self.engine, forward, last=last)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self._reference is None:
            raise RlufError(f"learner rank {self.rank} was used before setup; call setup on all ranks first")
        return self._logprobs(self._reference, batch, self.settings.rollout.temperature)

    @staticmethod
    def _logprobs(model: Any, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities [K] of the response tokens; logits are computed for these only."""
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.keep,
            use_cache=False,
            rows=batch.rows,
            places=batch.places,
        )
        return chosen_logprobs(output.logits[0], batch.targets, temperature)

    def _count(self, applied: bool, step: int, loss: float) -> None:
        self._steps += 1
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if applied:
            return
        self._skipped += 1
        logger.warning("step %d: gradient not finite (loss %g), update skipped, weights kept", step, loss)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise RlufError(
                f"step {step}: the gradient was not finite in {MOST_SKIPPED} steps in a row (loss {loss:g}); lower "
                f"learner.learning_rate ({self.settings.learner.learning_rate:g}), or look at the rewards and the model"
            )

    @torch.no_grad()
    def logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        """The current policy's logprobs [R] (nats, temperature 1) of a response, for the probe. All ranks call it."""
        batch = _single(prompt_ids, response_ids).to(self.device)
        found: list[float] = self._logprobs(self.engine, batch, 1.0).tolist()
        return found

    def begin_publish(self, init: dict[str, Any]) -> dict[str, Any]:
        """Start sending weights as version `init["version"]`; rank 0 returns what the engines' begin_update takes."""
        self._buckets = ds.gather_parameters(self.engine, self.settings.publish.bucket_mib << 20)
        if self.rank > 0:
            return {}
        if self._sender is None:
            host, port = self.address()
            self._sender = make_sender(self.settings, host, port)
        return self._sender.offer(int(init["version"]))

    def next_bucket(self) -> dict[str, Any] | None:
        """Gather and hand over the next bucket; rank 0 returns what the engines' update takes. None after the last."""
        bucket = next(self._buckets, None)
        if bucket is None:
            return None
        return {} if self._sender is None else self._sender.send(bucket)

    def end_publish(self) -> None:
        """All engines hold the new weights."""
        self._buckets = iter(())
        if self._sender is not None:
            self._sender.finish()

    def save(self, path: str) -> None:
        """Write the policy as a Hugging Face folder with tokenizer: whole, synced, or not at all. All ranks call it."""
        target = Path(path)
        if self.rank > 0:
            ds.save_hf(self.engine, target)
        else:
            with whole_folder(target) as part:
                ds.save_hf(self.engine, part)
                copy_companions(self.source, part)
            logger.info("policy saved to %s", target)
        dist.barrier()

    def health(self) -> dict[str, float]:
        """Rank, process id, steps done, and peak memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "rank": float(self.rank),
            "pid": float(os.getpid()),
            "steps": float(self._steps),
            "skipped": float(self._skipped),
            "peak_bytes": float(peak),
        }

    def shutdown(self) -> None:
        """Free shared memory and leave the process group."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        ds.leave_group()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _single(prompt_ids: list[int], response_ids: list[int]) -> Batch:
    """A batch of one response."""
    logprobs = (0.0,) * len(response_ids)
    sample = Sample("probe", tuple(prompt_ids), tuple(response_ids), logprobs, (), "stop", "")
    prompt = Prompt("probe", (), tuple(prompt_ids), "", "")
    return pack([(0, 0)], {0: Group(prompt, (sample,), 0)}, [[0.0]])
