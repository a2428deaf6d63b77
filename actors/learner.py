"""One DeepSpeed rank: learns from packed micro-batches, publishes its weights bucket by bucket, saves the policy."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from ray import ObjectRef
from torch import Tensor

from actors.critic import CriticRank
from rluf.algorithms.advantages import Drift
from rluf.algorithms.batch import Batch
from rluf.algorithms.debug_dump import POLICY as DUMPED
from rluf.algorithms.debug_dump import Dump, write_dump
from rluf.algorithms.logprobs import response_logprobs
from rluf.algorithms.losses import SUMS, LossResult, drifts_of, kl_by_response, metrics, policy_loss
from rluf.algorithms.packing import MicroBatch, pack, packed_order
from rluf.algorithms.policy_io import copy_companions, load_policy
from rluf.algorithms.registry import METHODS, Lesson
from rluf.backends import allocator as memory
from rluf.backends import deepspeed as ds
from rluf.backends.colocation import WEIGHTS, shares_gpus
from rluf.backends.weight_transfer.base import Sender, make_sender
from rluf.checkpoint.format import POLICY, Checkpoint, rank_file
from rluf.config.settings import Settings
from rluf.errors import RlufError
from rluf.tracking.profiler import TorchProfiler
from rluf.types import Group, Prompt, Sample
from rluf.utils.files import atomic_folder
from rluf.utils.paths import cache_dir

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Updates skipped in a row, for gradients that are not finite, before the run stops."""


class LearnerActor:
    """A learner rank. `address` of rank 0 first, then `setup` on all ranks; then every call goes to all ranks alike."""

    def __init__(
        self, rank: int, world: int, settings_json: str, model_path: str, checkpoint: str | None = None
    ) -> None:
        """Nothing heavy happens before `setup`. `model_path` is a local Hugging Face folder: reference and start.

        With `checkpoint`, the folder of a whole one, the policy and the optimiser go on from there.
        """
        self.rank, self.world = rank, world
        self.settings = Settings.model_validate_json(settings_json)
        self.source = Path(model_path)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.device = torch.device("cuda", 0) if self.settings.cluster.gpus_per_learner > 0 else torch.device("cpu")
        self._engine: DeepSpeedEngine | None = None
        self._reference: torch.nn.Module | None = None
        self._critic: CriticRank | None = None
        self._sender: Sender | None = None
        self._reference_s = 0.0
        self._profiler = TorchProfiler()
        self._buckets: Iterator[list[tuple[str, Tensor]]] = iter(())
        self._opinions: dict[int, Tensor] = {}
        self._far: list[tuple[list[tuple[int, int]], Tensor]] = []
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
        dtype = getattr(torch, self.settings.policy_dtype)
        with ds.sharded_loading(learner.zero_stage, dtype, self.world):
            policy, reference = (
                load_policy(
                    self._start if trained else self.source,
                    dtype=dtype,
                    trust_remote_code=model.trust_remote_code,
                    gradient_checkpointing=trained and learner.gradient_checkpointing,
                    lora_rank=learner.lora_rank if trained else 0,
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
        if METHODS[self.settings.algorithm.name].critic:
            self._critic = CriticRank(self.settings, self.source, self.device, self.world)
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        seconds = time.monotonic() - begun
        logger.info("learner rank %d of %d ready on %s after %.1f s", self.rank, self.world, self.device, seconds)
        return {"parameters": float(ds.parameter_count(self.engine)), "seconds": seconds}

    @property
    def engine(self) -> DeepSpeedEngine:
        """The DeepSpeed engine, once `setup` has made it."""
        if self._engine is None:
            raise RlufError(f"learner rank {self.rank} was used before setup; call setup on all ranks first")
        return self._engine

    @torch.no_grad()
    def drifts(
        self, groups: Sequence[ObjectRef[Group] | Group], plan: list[MicroBatch], *, own: bool = False
    ) -> list[tuple[int, int, Drift]]:
        """How far each sample of this rank's micro-batches lies from the reference, as (group, sample, drift).

        All ranks call it alike, before `step` with the same plan, which then reuses the reference's logprobs. With
        `own` it is the learner's policy that is compared, not the engine's; the plan may then be another.
        """
        held, found = _fetch(groups, plan), []
        blank = [[0.0] * len(held[group].samples) if group in held else [] for group in range(len(groups))]
        for number, micro_batch in enumerate(plan):
            batch = pack(micro_batch, held, blank, blank).to(self.device)
            reference = self._reference_logprobs(batch)
            mine = response_logprobs(self.engine, batch, self.settings.rollout.temperature) if own else None
            if not own:
                self._opinions[number] = reference
            members = packed_order(micro_batch, held)
            if members:
                drifts = drifts_of(reference, batch, mine)
                found += [(*member, drift) for member, drift in zip(members, drifts, strict=True)]
        return found

    def step(
        self, groups: Sequence[ObjectRef[Group] | Group], lesson: Lesson, plan: list[MicroBatch], step: int
    ) -> dict[str, float]:
        """One optimiser step over this rank's micro-batches; metrics of the whole step, the same on every rank.

        `groups` and `lesson` are those of the step, `plan` this rank's part of `plan_micro_batches`. An update with
        a gradient that is not finite is skipped and counted; MOST_SKIPPED in a row raise RlufError.
        """
        begun = time.monotonic()
        held = _fetch(groups, plan)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        peak = torch.zeros((), dtype=torch.float64, device=self.device)
        self._reference_s, self._far = 0.0, []
        for number, (batch, reference) in enumerate(self._batches(held, lesson, plan)):
            members = packed_order(plan[number], held)
            result = self._accumulate(batch, reference, lesson, members, last=number == len(plan) - 1)
            sums += result.sums
            peak = torch.maximum(peak, result.peak)
            memory.release()
        dist.all_reduce(sums)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        rate, since = ds.learning_rate(self.engine), time.monotonic()
        applied, norm = ds.apply_step(self.engine)
        now = time.monotonic()
        self._count(applied, step, float(sums[0]), held, lesson, plan)
        critic = {} if self._critic is None or not lesson.critic else self._critic.learn()
        return {
            **metrics(sums, float(peak)),
            **critic,
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(self._skipped),
            "micro_batches": float(len(plan)),
            "reference_s": self._reference_s,
            "backward_s": since - begun - self._reference_s,
            "optimizer_s": now - since,
            "learner_tokens_per_s": float(sums[SUMS.index("tokens")]) / (now - begun),
        }

    def distances(self) -> list[tuple[int, int, float]]:
        """KL to the reference of each sample of the last step, before its update, as (group, sample, nats; k1)."""
        return [(*member, kl) for members, kls in self._far for member, kl in zip(members, kls.tolist(), strict=True)]

    def _batches(
        self, held: dict[int, Group], lesson: Lesson, plan: list[MicroBatch]
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Each micro-batch with the reference's logprobs [K]; with a critic, advantages are its own."""

        def packed() -> Iterator[tuple[Batch, Tensor]]:
            for number, micro_batch in enumerate(plan):
                batch = pack(micro_batch, held, lesson.advantages, lesson.weights).to(self.device)
                since = time.monotonic()
                reference = self._opinions.pop(number, None)
                if reference is None:
                    reference = self._reference_logprobs(batch)
                self._reference_s += time.monotonic() - since
                yield batch, reference

        if self._critic is None or not lesson.critic:
            yield from packed()
            return
        pairs = list(packed())
        judged = self._critic.judge(pairs, lesson.reward_kl)
        yield from ((batch, reference) for batch, (_, reference) in zip(judged, pairs, strict=True))

    def _accumulate(
        self, batch: Batch, reference: Tensor, lesson: Lesson, members: list[tuple[int, int]], *, last: bool
    ) -> LossResult:
        """Add one micro-batch's gradient. DeepSpeed averages over ranks, the loss sums over them: hence the factor."""

        def forward() -> tuple[Tensor, LossResult]:
            logprobs = response_logprobs(self.engine, batch, self.settings.rollout.temperature)
            result = policy_loss(
                logprobs,
                reference,
                batch,
                self.settings.algorithm,
                loss=lesson.loss,
                kl_coef=lesson.kl_coef,
                slope=lesson.slope,
            )
            if members:
                self._far.append((members, kl_by_response(reference, batch, logprobs)))
            return result.loss * self.world, result

        return ds.accumulate(self.engine, forward, last=last)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self._reference is None:
            raise RlufError(f"learner rank {self.rank} was used before setup; call setup on all ranks first")
        return response_logprobs(self._reference, batch, self.settings.rollout.temperature)

    def _count(
        self, applied: bool, step: int, loss: float, held: dict[int, Group], lesson: Lesson, plan: list[MicroBatch]
    ) -> None:
        """Count an update that was skipped; after MOST_SKIPPED in a row keep the step as files and raise RlufError."""
        self._steps += 1
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if applied:
            return
        self._skipped += 1
        logger.warning("step %d: gradient not finite (loss %g), update skipped, weights kept", step, loss)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            kept = cache_dir(self.settings) / "dumps" / f"{self.settings.name}-step-{step}"
            write_dump(kept, self.rank, Dump(self.settings, self.source, step, held, lesson, plan))
            ds.save_hf(self.engine, kept / DUMPED)
            dist.barrier()
            raise RlufError(
                f"step {step}: the gradient was not finite in {MOST_SKIPPED} steps in a row (loss {loss:g}); "
                f"python -m rluf.train.replay {kept} says which samples it came from; or lower learner.learning_rate "
                f"({self.settings.learner.learning_rate:g})"
            )

    @torch.no_grad()
    def logprobs(self, prompt_ids: list[int], responses: list[list[int]]) -> list[list[float]]:
        """The policy's logprobs (nats, temperature 1) of responses to a prompt, for the probe. All ranks call it.

        Responses must not be empty; one row of logprobs comes back for each.
        """
        batch = _unscored(prompt_ids, responses).to(self.device)
        found = response_logprobs(self.engine, batch, 1.0).split([len(response) for response in responses])
        return [row.tolist() for row in found]

    def begin_publish(self, init: dict[str, Any]) -> dict[str, Any]:
        """Start sending weights as version `init["version"]`; rank 0 returns what the engines' begin_update takes."""
        publish = self.settings.publish
        if publish.engine == "adapter":
            self._buckets = ds.gather_adapters(self.engine)
        else:
            self._buckets = ds.gather_parameters(self.engine, publish.bucket_mib << 20)
        if self.rank > 0 and not shares_gpus(self.settings):
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

    def offload(self, parts: tuple[str, ...]) -> None:
        """Move `parts` of this rank's models to host memory for an engine on the same GPU; see backends.colocation."""
        for engine in self._engines():
            ds.offload(engine, parts)
        if WEIGHTS in parts and self._reference is not None:
            self._reference.to("cpu")
            torch.accelerator.empty_cache()

    def reload(self) -> None:
        """Bring back what `offload` has moved."""
        for engine in self._engines():
            ds.reload(engine)
        if self._reference is not None:
            self._reference.to(self.device)

    def _engines(self) -> list[DeepSpeedEngine]:
        return [self.engine, *([] if self._critic is None else [self._critic.engine])]

    def save(self, path: str) -> None:
        """Write the policy as a Hugging Face folder with tokenizer: whole, synced, or not at all. All ranks call it."""
        target = Path(path)
        if self.rank > 0:
            ds.save_hf(self.engine, target)
        else:
            with atomic_folder(target) as part:
                ds.save_hf(self.engine, part)
                copy_companions(self.source, part)
            logger.info("policy saved to %s", target)
        dist.barrier()

    def begin_profile(self) -> None:
        """Start torch's profiler on this rank."""
        self._profiler.start()

    def end_profile(self, path: str) -> None:
        """Stop it and write its trace to `path`, for chrome://tracing or ui.perfetto.dev."""
        self._profiler.stop(Path(path))

    def save_state(self, folder: str) -> dict[str, Any]:
        """Write this rank's optimiser state and random state into a checkpoint; returns its learning rate schedule."""
        file = rank_file(Path(folder), self.rank, self.world)
        schedule = ds.save_optimizer(self.engine, file, {"random": torch.get_rng_state()})
        kept = {"learning_rate": schedule, "steps": self._steps, "skipped": self._skipped}
        if self._critic is not None:
            critic = rank_file(Path(folder), self.rank, self.world, "critic")
            kept["critic"] = ds.save_optimizer(self._critic.engine, critic, {})
        return kept

    @property
    def _start(self) -> Path:
        """Where the policy's weights come from; adapters go on the base and get theirs from the optimiser state."""
        resumed = self.checkpoint is not None and not self.settings.learner.lora_rank
        return self.checkpoint / POLICY if resumed and self.checkpoint is not None else self.source

    def _restore(self, folder: Path) -> None:
        """Go on from the optimiser state of a checkpoint."""
        kept = Checkpoint(folder, 0).state().schedules[self.rank]
        extra = ds.load_optimizer(self.engine, rank_file(folder, self.rank, self.world), dict(kept["learning_rate"]))
        torch.set_rng_state(extra["random"])
        if self._critic is not None:
            critic = rank_file(folder, self.rank, self.world, "critic")
            ds.load_optimizer(self._critic.engine, critic, dict(kept["critic"]))
        self._steps, self._skipped = int(kept["steps"]), int(kept["skipped"])

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


def _fetch(groups: Sequence[ObjectRef[Group] | Group], plan: list[MicroBatch]) -> dict[int, Group]:
    """The groups of a plan by index, from the object store unless they are here already (a learner without Ray)."""
    wanted = sorted({group for micro_batch in plan for group, _ in micro_batch})
    held = {index: entry for index in wanted if isinstance(entry := groups[index], Group)}
    away = [index for index in wanted if index not in held]
    if away:
        held |= dict(zip(away, ray.get([groups[index] for index in away]), strict=True))
    return held


def _unscored(prompt_ids: list[int], responses: list[list[int]]) -> Batch:
    """A batch of responses to one prompt, without rewards."""
    samples = tuple(
        Sample("probe", tuple(prompt_ids), tuple(ids), (0.0,) * len(ids), (), "stop", "") for ids in responses
    )
    group = Group(Prompt("probe", (), tuple(prompt_ids), "", ""), samples, 0)
    return pack([(0, index) for index in range(len(samples))], {0: group}, [[0.0] * len(samples)])
