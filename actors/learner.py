"""The learner actor: one DeepSpeed rank that trains on packed micro-batches, sends its weights and saves the policy."""

from __future__ import annotations

import itertools
import logging
import os
import resource
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from ray import ObjectRef
from torch import Tensor

from actors.critic import CriticWorker
from rluf.algorithms.advantages import SampleKL
from rluf.algorithms.batch_layout import choose_batch_layout
from rluf.algorithms.losses import (
    METRIC_SUM_NAMES,
    LossResult,
    compute_loss_metrics,
    compute_policy_loss,
    compute_reference_kl,
    sum_kl_by_response,
)
from rluf.algorithms.packing import (
    BadPromptSearch,
    MicroBatch,
    PackedBatch,
    TrainBatch,
    list_packed_samples,
    pack_micro_batch,
    pack_probe_batch,
)
from rluf.algorithms.policy_model import compute_response_logprobs, copy_companion_files, load_policy, remove_noise
from rluf.algorithms.registry import LearnerInputs, find_algorithm, requires_reference
from rluf.backends import deepspeed as ds
from rluf.backends.colocation import OPTIMIZER_STATES_TAG, WEIGHTS_TAG
from rluf.backends.gpu_metrics import count_flops_per_token, measure_gpu
from rluf.backends.optimizer_state import load_optimizer_state, save_optimizer_state
from rluf.backends.weight_transfer import ensure_weight_sender
from rluf.backends.weight_transfer.base import WeightSender
from rluf.checkpoint.format import POLICY_FOLDER, RunCheckpoint, get_optimizer_state_path
from rluf.config.settings import Settings
from rluf.errors import RlufError
from rluf.models.hub import skip_scikit_learn
from rluf.models.lora import disable_lora_adapters
from rluf.models.weight_average import WeightAverage, copy_weights
from rluf.tracking.timeline import TorchProfiler
from rluf.types import Group
from rluf.utils.files import atomic_folder
from rluf.utils.host_memory import release_freed_memory

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3
"""Consecutive updates skipped for non-finite gradients before the run stops: one may be an outlier, three mean that all
further steps would be skipped too."""
MAX_NAMED_PROMPTS = 3
PROBE_TEMPERATURE = 1.0
"""Temperature at which engines report log-probabilities of given tokens."""


class LearnerActor:
    """A learner rank.

    Call `find_rendezvous_address` on rank 0, then `setup` on all ranks; after that every call must reach all ranks,
    since most of them contain collective operations.
    """

    def __init__(
        self, rank: int, world_size: int, settings_json: str, model_path: str, checkpoint: str | None = None
    ) -> None:
        """Store the arguments; loading is left to `setup`.

        `model_path` is a local Hugging Face folder: the reference policy, and the initial policy. With `checkpoint`,
        the folder of a complete checkpoint, policy and optimizer state come from there.
        """
        self.rank, self.world_size = rank, world_size
        self.settings = Settings.model_validate_json(settings_json)
        is_offline = find_algorithm(self.settings.algorithm.name).offline  # logged responses are not sampled
        self._temperature = 1.0 if is_offline else self.settings.rollout.temperature
        self.base_model_path = Path(model_path)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.device = torch.device("cuda", 0) if self.settings.cluster.gpus_per_learner > 0 else torch.device("cpu")
        self._engine: DeepSpeedEngine | None = None
        self._reference_model: torch.nn.Module | None = None
        self._has_reference = False
        self._weight_average: WeightAverage | None = None
        self._critic: CriticWorker | None = None
        self._weight_sender: WeightSender | None = None
        self._port_reservation = socket.socket()
        self._reference_seconds = self._flops_per_token = 0.0
        self._profiler = TorchProfiler()
        self._weight_buckets: Iterator[list[tuple[str, Tensor]]] = iter(())
        self._ref_logprobs: dict[int, Tensor] = {}
        self._sample_kl: list[tuple[list[tuple[int, int]], Tensor]] = []
        self._step_count = self._skipped_count = self._skipped_in_a_row = 0

    def find_rendezvous_address(self) -> tuple[str, int]:
        """Host of this rank and a port reserved there for the store of a group, until this rank listens on it."""
        host = ray.util.get_node_ip_address()
        self._port_reservation.close()
        self._port_reservation = ds.claim_port(host)
        return host, int(self._port_reservation.getsockname()[1])

    def setup(self, host: str, port: int) -> dict[str, float]:
        """Join the process group at `host`:`port`, load the policy and its frozen reference. All ranks call it.

        Returns the number of parameters and the seconds it took. Raises ResourceError naming the rank, or ModelError.
        """
        start_time = time.monotonic()
        skip_scikit_learn()
        learner, model = self.settings.learner, self.settings.model
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        ds.join_process_group(
            rank=self.rank,
            world_size=self.world_size,
            host=host,
            port=port,
            device=self.device,
            # Collective operations of a step and those of slow model loading share this timeout.
            timeout_s=max(self.settings.timeouts.call_s, self.settings.timeouts.actor_start_s),
        )
        dtype = getattr(torch, self.settings.policy_dtype)
        algorithm = self.settings.algorithm
        self._has_reference = requires_reference(algorithm)
        is_packed = choose_batch_layout(self.settings, self.base_model_path).layout == "packed"
        with ds.sharded_loading(learner.zero_stage, dtype, self.world_size, self.device):
            # With LoRA the policy without its adapters is the reference.
            has_reference_copy = self._has_reference and not learner.lora_rank
            policy, *references = (
                load_policy(
                    self._initial_policy_path if is_policy else self.base_model_path,
                    dtype=dtype,
                    trust_remote_code=model.trust_remote_code,
                    gradient_checkpointing=is_policy and learner.gradient_checkpointing,
                    lora_rank=learner.lora_rank if is_policy else 0,
                    is_packed=is_packed,
                )
                for is_policy in ((True, False) if has_reference_copy else (True,))
            )
        decay = learner.learning_rate_decay
        self._engine = ds.init_deepspeed(
            # ZeRO-3 has partitioned the parameters while loading and places the shards itself.
            policy.to(self.device) if learner.zero_stage < 3 else policy,
            zero_stage=learner.zero_stage,
            learning_rate=learner.learning_rate,
            warmup_steps=learner.warmup_steps,
            dtype=dtype,
            world_size=self.world_size,
            device=self.device,
            offload_optimizer=learner.offload_optimizer,
            total_steps=None if decay == "none" else algorithm.steps * algorithm.update_count,
            has_cosine_decay=decay == "cosine",
            adam_betas=learner.adam_betas,
        )
        remove_noise(self._engine.module)
        for reference in references:
            self._reference_model = ds.init_reference_model(
                reference, zero_stage=learner.zero_stage, dtype=dtype, device=self.device, world_size=self.world_size
            )
        if find_algorithm(self.settings.algorithm.name).uses_critic:
            self._critic = CriticWorker(self.settings, self.base_model_path, self.device, self.world_size)
        if learner.ema_decay:
            self._weight_average = WeightAverage(self.engine.module, learner.ema_decay)
        if self.checkpoint is not None:
            self._restore_optimizer_state(self.checkpoint)
        parameters = float(ds.count_parameters(self.engine))
        self._flops_per_token = count_flops_per_token(
            parameters, has_reference=self._has_reference, is_lora=learner.lora_rank > 0
        )
        seconds = time.monotonic() - start_time
        logger.info(
            "learner %d: ready: world_size=%d device=%s seconds=%.1f", self.rank, self.world_size, self.device, seconds
        )
        return {"parameters": parameters, "seconds": seconds}

    @property
    def engine(self) -> DeepSpeedEngine:
        """The DeepSpeed engine. Raises RlufError before `setup`."""
        if self._engine is None:
            raise RlufError(f"learner {self.rank} was used before setup; call setup on all ranks first")
        return self._engine

    @torch.no_grad()
    def measure_reference_kl(
        self,
        groups: Sequence[ObjectRef[Group] | Group],
        micro_batches: list[MicroBatch],
        *,
        use_learner_policy: bool = False,
    ) -> list[tuple[int, int, SampleKL]]:
        """KL of each sample of this rank's micro-batches to the reference policy, as (group, sample, KL).

        Call it before `train_step` with the same micro-batches, which then reuses the reference log-probabilities. By
        default the KL is that of the rollout log-probabilities; with `use_learner_policy` it is that of the learner's
        policy, and the micro-batches may be others.
        """
        groups_by_index, entries = _fetch_groups(groups, micro_batches), []
        # Only log-probabilities are computed: advantages and weights of the batches are placeholders.
        zeros = [
            [0.0] * len(groups_by_index[index].samples) if index in groups_by_index else []
            for index in range(len(groups))
        ]
        for batch_number, micro_batch in enumerate(micro_batches):
            batch = pack_micro_batch(micro_batch, groups_by_index, zeros, zeros).to(self.device)
            ref_logprobs, policy_logprobs = self._compute_ref_logprobs(batch), None
            if ref_logprobs is None:
                raise RlufError(f"learner {self.rank} has no reference policy to measure the KL to")
            if use_learner_policy:
                policy_logprobs = compute_response_logprobs(self.engine, batch, self._temperature)
            else:
                self._ref_logprobs[batch_number] = ref_logprobs
            # With fewer samples than ranks some micro-batches are empty. They are computed too: under ZeRO-3 each
            # forward pass is a collective operation, so its number must be equal on all ranks.
            sample_indices = list_packed_samples(micro_batch, groups_by_index)
            if sample_indices:
                sample_kl = compute_reference_kl(ref_logprobs, batch, policy_logprobs)
                entries += [(*indices, kl) for indices, kl in zip(sample_indices, sample_kl, strict=True)]
        return entries

    def train_step(
        self,
        groups: Sequence[ObjectRef[Group] | Group],
        learner_inputs: LearnerInputs,
        micro_batches: list[MicroBatch],
        step: int,
        *,
        mini_batch_sizes: Sequence[int] = (),
    ) -> dict[str, float]:
        """The updates of a step over this rank's micro-batches; their metrics, the same on every rank.

        `groups` and `learner_inputs` are those of the step, `micro_batches` this rank's share of `plan_micro_batches`,
        mini-batch after mini-batch, with `mini_batch_sizes` micro-batches each (equal on all ranks; by default a single
        mini-batch). One optimizer step per mini-batch, algorithm.epochs times. An update with a non-finite gradient is
        skipped and counted; MAX_SKIPPED_IN_A_ROW in a row raise RlufError.
        """
        start_time, backward_s = time.monotonic(), 0.0
        groups_by_index = _fetch_groups(groups, micro_batches)
        # float64: the sums run over all tokens of a step.
        metric_sums = torch.zeros(len(METRIC_SUM_NAMES), dtype=torch.float64, device=self.device)
        max_ratio = torch.zeros((), dtype=torch.float64, device=self.device)
        self._reference_seconds, self._sample_kl = 0.0, []
        epochs, sizes = self.settings.algorithm.epochs, list(mini_batch_sizes) or [len(micro_batches)]
        batches: Iterable[TrainBatch] = self._iter_packed_batches(groups_by_index, learner_inputs, micro_batches)
        if epochs * len(sizes) > 1:
            batches = self._add_start_logprobs(list(batches))
        # Read before the update: the schedule then already points to the next one's rate.
        learning_rate = ds.get_learning_rate(self.engine)
        update_metrics: list[dict[str, float]] = []
        for _ in range(epochs):
            remaining = iter(batches)
            for size in sizes:
                batch_losses: list[Tensor] = []
                update_start, reference_s = time.monotonic(), self._reference_seconds
                mini_batch = list(itertools.islice(remaining, size)) if len(sizes) > 1 else remaining
                numbers = []
                for number_in_update, train_batch in enumerate(mini_batch):
                    result = self._accumulate_gradient(
                        train_batch, learner_inputs, groups_by_index, is_last=number_in_update == size - 1
                    )
                    numbers.append(train_batch.number)
                    metric_sums += result.metric_sums
                    batch_losses.append(result.metric_sums[0])
                    max_ratio = torch.maximum(max_ratio, result.max_ratio)
                    # The allocator keeps freed activations for reuse within a micro-batch; over several they add up.
                    release_freed_memory()
                backward_s += time.monotonic() - update_start - (self._reference_seconds - reference_s)
                bad_prompts = BadPromptSearch(batch_losses, [micro_batches[n] for n in numbers], groups_by_index)
                update_metrics.append(self._apply_update(step, bad_prompts, numbers, learner_inputs))
        dist.all_reduce(metric_sums)
        dist.all_reduce(max_ratio, dist.ReduceOp.MAX)
        self._update_weight_copies(step)
        end_time = time.monotonic()
        tokens_per_s = float(metric_sums[METRIC_SUM_NAMES.index("batch_tokens")]) / (end_time - start_time)
        return {
            **compute_loss_metrics(
                metric_sums, float(max_ratio), update_count=len(update_metrics), has_reference=self._has_reference
            ),
            **{name: fmean(row[name] for row in update_metrics) for name in update_metrics[0]},
            "learning_rate": learning_rate,
            "skipped": float(self._skipped_count),
            "micro_batches": float(len(micro_batches)),
            "reference_s": self._reference_seconds,
            "backward_s": backward_s,
            "optimizer_s": end_time - start_time - self._reference_seconds - backward_s,
            "learner_tokens_per_s": tokens_per_s,
        } | (
            measure_gpu(self.device, self._flops_per_token, tokens_per_s, self.world_size)
            if self.device.type == "cuda"
            else {}
        )

    def _apply_update(
        self, step: int, bad_prompts: BadPromptSearch, numbers: Sequence[int], learner_inputs: LearnerInputs
    ) -> dict[str, float]:
        """One optimizer step of policy and critic on the gradients of micro-batches `numbers`; returns its metrics."""
        is_applied, grad_norm = ds.apply_optimizer_step(self.engine)
        if is_applied:
            self._count_skipped_update(is_applied, step, 0.0, [])
        else:
            loss = torch.stack(bad_prompts.batch_losses).sum()
            dist.all_reduce(loss)
            self._count_skipped_update(is_applied, step, float(loss), bad_prompts.list_prompts())
        critic_metrics = {}
        if self._critic is not None and learner_inputs.uses_critic:
            critic_metrics = self._critic.train_step(numbers)
        return {**critic_metrics, "grad_norm": grad_norm}

    def _update_weight_copies(self, step: int) -> None:
        """Update the average of the policy, and refresh the reference policy where that is due."""
        if self._weight_average is not None:
            self._weight_average.update(self.engine.module)
        refresh_steps = self.settings.algorithm.reference_refresh_steps
        if refresh_steps and step % refresh_steps == 0 and self._reference_model is not None:
            copy_weights(self.engine.module, self._reference_model)

    def apply_policy_average(self) -> None:
        """Replace the policy by its average, after the last step."""
        if self._weight_average is not None:
            self._weight_average.copy_to(self.engine.module)

    def get_sample_kl(self) -> list[tuple[int, int, float]]:
        """KL to the reference (nats, k1) of each sample of the last step before its update, as (group, sample, KL)."""
        # Reversed, so that of several passes over a sample the first counts.
        first_kl = {
            indices: kl
            for sample_indices, batch_kl in reversed(self._sample_kl)
            for indices, kl in zip(sample_indices, batch_kl.tolist(), strict=True)
        }
        return [(*indices, kl) for indices, kl in first_kl.items()]

    def _iter_packed_batches(
        self, groups_by_index: dict[int, Group], learner_inputs: LearnerInputs, micro_batches: list[MicroBatch]
    ) -> Iterator[TrainBatch]:
        """Each micro-batch with its reference log-probabilities; a critic replaces the rewards by advantages."""

        def pack_with_reference() -> Iterator[TrainBatch]:
            for number, micro_batch in enumerate(micro_batches):
                batch = pack_micro_batch(
                    micro_batch, groups_by_index, learner_inputs.advantages, learner_inputs.loss_weights
                ).to(self.device)
                start_time = time.monotonic()
                ref_logprobs = self._ref_logprobs.pop(number, None)
                if ref_logprobs is None:
                    ref_logprobs = self._compute_ref_logprobs(batch)
                self._reference_seconds += time.monotonic() - start_time
                yield TrainBatch(number, micro_batch, batch, ref_logprobs)

        if self._critic is None or not learner_inputs.uses_critic:
            yield from pack_with_reference()
            return
        # Advantages are whitened over the whole step, so all micro-batches must be in memory before the first update.
        batches = list(pack_with_reference())
        packed_batches = self._critic.compute_advantages(
            [(train_batch.packed, train_batch.ref_logprobs) for train_batch in batches], learner_inputs.reward_kl_coef
        )
        yield from (replace(batch, packed=packed) for batch, packed in zip(batches, packed_batches, strict=True))

    @torch.no_grad()
    def _add_start_logprobs(self, batches: list[TrainBatch]) -> list[TrainBatch]:
        """The batches with the log-probabilities of the policy before the first update on them."""
        return [
            replace(batch, start_logprobs=compute_response_logprobs(self.engine, batch.packed, self._temperature))
            for batch in batches
        ]

    def _accumulate_gradient(
        self,
        train_batch: TrainBatch,
        learner_inputs: LearnerInputs,
        groups_by_index: dict[int, Group],
        *,
        is_last: bool,
    ) -> LossResult:
        """Add one micro-batch's gradient."""
        batch, ref_logprobs = train_batch.packed, train_batch.ref_logprobs
        sample_indices = list_packed_samples(train_batch.samples, groups_by_index)

        def forward() -> tuple[Tensor, LossResult]:
            logprobs = compute_response_logprobs(self.engine, batch, self._temperature)
            result = compute_policy_loss(
                logprobs,
                ref_logprobs,
                batch,
                self.settings.algorithm,
                loss_name=learner_inputs.policy_loss,
                kl_coef=learner_inputs.loss_kl_coef,
                kl_to_go_coef=learner_inputs.kl_to_go_coef,
                start_logprobs=train_batch.start_logprobs,
            )
            if sample_indices and ref_logprobs is not None:
                self._sample_kl.append((sample_indices, sum_kl_by_response(ref_logprobs, batch, logprobs)))
            # DeepSpeed averages gradients over ranks, but the loss weights are those of a sum over all ranks.
            return result.loss * self.world_size, result

        return ds.accumulate_gradients(self.engine, forward, is_last=is_last)

    @torch.no_grad()
    def _compute_ref_logprobs(self, batch: PackedBatch) -> Tensor | None:
        """Log-probabilities of the reference policy [K]; None if the algorithm needs none."""
        if self._reference_model is not None:
            return compute_response_logprobs(self._reference_model, batch, self._temperature)
        if not self._has_reference:
            return None
        with disable_lora_adapters(self.engine.module):
            return compute_response_logprobs(self.engine, batch, self._temperature)

    def _count_skipped_update(self, is_applied: bool, step: int, loss: float, bad_prompt_ids: list[str]) -> None:
        """Count a skipped update and name its bad prompts; raise RlufError after MAX_SKIPPED_IN_A_ROW in a row."""
        self._step_count += 1
        self._skipped_in_a_row = 0 if is_applied else self._skipped_in_a_row + 1
        if is_applied:
            return
        self._skipped_count += 1
        source = f"of prompt {', '.join(bad_prompt_ids[:MAX_NAMED_PROMPTS])} " if bad_prompt_ids else ""
        logger.warning(
            "learner %d: step %d: non-finite gradient %s(loss %g), update skipped, weights unchanged",
            self.rank,
            step,
            source,
            loss,
        )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RlufError(
                f"step {step}: the gradient {source}was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (loss "
                f"{loss:g}); run.log names the prompts of each; check their data, or lower learner.learning_rate (now "
                f"{self.settings.learner.learning_rate:g}), with --resume and run.resume_with=[learner.learning_rate]"
            )

    @torch.no_grad()
    def probe_logprobs(self, prompt_ids: list[int], responses: list[list[int]]) -> list[list[float]]:
        """The policy's log-probabilities (nats, temperature 1) of non-empty responses to a prompt, one row each.

        All ranks call it.
        """
        batch = pack_probe_batch(prompt_ids, responses).to(self.device)
        logprobs = compute_response_logprobs(self.engine, batch, PROBE_TEMPERATURE)
        return [row.tolist() for row in logprobs.split([len(response) for response in responses])]

    def begin_weight_sync(self, version: int, engine_indices: dict[str, int]) -> dict[str, Any]:
        """Start sending `version` to engines (name to index); rank 0 returns the argument of begin_weight_update."""
        weight_sync = self.settings.weight_sync
        if weight_sync.transport == "lora":
            self._weight_buckets = ds.gather_lora_matrices(self.engine)
        else:
            self._weight_buckets = ds.gather_checkpoint_tensors(self.engine, weight_sync.bucket_bytes)
        # Colocated ranks each share memory with the engine on their GPU; else rank 0 sends for all.
        if self.rank > 0 and not self.settings.is_colocated:
            return {}
        sender, find_address = self._weight_sender, self.find_rendezvous_address
        self._weight_sender = ensure_weight_sender(sender, self.settings, engine_indices, find_address)
        return self._weight_sender.begin(version)

    def send_next_weight_bucket(self) -> dict[str, Any] | None:
        """Gather and send the next bucket; rank 0 returns the argument of load_weight_bucket. None after the last."""
        # Every rank advances the iterator, sender or not: gathering sharded parameters is a collective operation.
        bucket = next(self._weight_buckets, None)
        if bucket is None:
            return None
        return {} if self._weight_sender is None else self._weight_sender.send_bucket(bucket)

    def end_weight_sync(self) -> None:
        """Release the transfer buffers; all engines have loaded the new weights."""
        self._weight_buckets = iter(())
        if self._weight_sender is not None:
            self._weight_sender.end()

    def offload(self, components: tuple[str, ...]) -> None:
        """Move `components` (rluf.backends.colocation) of this rank's models to host memory, to let an engine in."""
        for engine in self._list_engines():
            ds.offload_to_host(engine, components)
        if OPTIMIZER_STATES_TAG in components and self._weight_average is not None:
            self._weight_average.move_to("cpu")
        if WEIGHTS_TAG in components and self._reference_model is not None:
            self._reference_model.to("cpu")
        torch.cuda.empty_cache()  # does nothing without a GPU

    def reload(self) -> None:
        """Move everything that `offload` has moved back to the GPU."""
        for engine in self._list_engines():
            ds.reload_to_device(engine)
        if self._weight_average is not None:
            self._weight_average.move_to(self.device)
        if self._reference_model is not None:
            self._reference_model.to(self.device)

    def _list_engines(self) -> list[DeepSpeedEngine]:
        return [self.engine, *([] if self._critic is None else [self._critic.engine])]

    def save_policy(self, policy_path: str) -> None:
        """Write the policy as a Hugging Face folder with tokenizer, atomically and fsynced. All ranks call it."""
        target = Path(policy_path)
        if self.rank > 0:
            ds.save_hf_model(self.engine, target)
        else:
            with atomic_folder(target) as temporary_folder:
                ds.save_hf_model(self.engine, temporary_folder)
                copy_companion_files(self.base_model_path, temporary_folder)
            logger.info("learner %d: policy saved to %s", self.rank, target)
        dist.barrier()

    def start_profiler(self) -> None:
        """Start torch's profiler on this rank."""
        self._profiler.start()

    def stop_profiler(self, trace_path: str) -> None:
        """Stop torch's profiler and write its trace to `trace_path`, for chrome://tracing or ui.perfetto.dev."""
        self._profiler.stop(Path(trace_path))

    def save_optimizer_state(self, folder: str) -> dict[str, Any]:
        """Write this rank's optimizer state and random state into a checkpoint; returns its schedule and counters."""
        state_file = get_optimizer_state_path(Path(folder), self.rank, self.world_size)
        copies: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if self._weight_average is not None:
            copies |= {f"average.{name}": tensor for name, tensor in self._weight_average.tensors.items()}
        if self.settings.algorithm.reference_refresh_steps and self._reference_model is not None:
            copies |= {f"reference.{name}": tensor for name, tensor in self._reference_model.named_parameters()}
        schedule = save_optimizer_state(self.engine, state_file, copies)
        rank_state = {"learning_rate": schedule, "steps": self._step_count, "skipped": self._skipped_count}
        if self._critic is not None:
            critic_file = get_optimizer_state_path(Path(folder), self.rank, self.world_size, "critic")
            rank_state["critic"] = save_optimizer_state(self._critic.engine, critic_file, {})
        return rank_state

    @property
    def _initial_policy_path(self) -> Path:
        """Folder of the initial policy weights."""
        # With LoRA the base weights are frozen, and the adapters come from the optimizer state's master weights.
        if self.checkpoint is None or self.settings.learner.lora_rank:
            return self.base_model_path
        return self.checkpoint / POLICY_FOLDER

    def _restore_optimizer_state(self, folder: Path) -> None:
        """Load optimizer and random state of a checkpoint."""
        rank_states = RunCheckpoint(folder, 0).read_state().lr_schedules
        # Fewer ranks may have written it: counters and schedules of all ranks are equal.
        rank_state, writers = rank_states[min(self.rank, len(rank_states) - 1)], len(rank_states)
        state_files = [get_optimizer_state_path(folder, rank, writers) for rank in range(writers)]
        extra_tensors = load_optimizer_state(self.engine, state_files, dict(rank_state["learning_rate"]))
        if self.rank < writers:
            torch.set_rng_state(extra_tensors["random"])
        average, reference = (
            {key.removeprefix(prefix): value for key, value in extra_tensors.items() if key.startswith(prefix)}
            for prefix in ("average.", "reference.")
        )
        if self._weight_average is not None:
            self._weight_average.restore(average)
        if reference and self._reference_model is not None:
            self._reference_model.load_state_dict(reference, strict=False)
        if self._critic is not None:
            state_files = [get_optimizer_state_path(folder, rank, writers, "critic") for rank in range(writers)]
            load_optimizer_state(self._critic.engine, state_files, dict(rank_state["critic"]))
        self._step_count, self._skipped_count = int(rank_state["steps"]), int(rank_state["skipped"])

    def get_health(self) -> dict[str, float]:
        """Rank, process id, steps done, and peak memory in bytes."""
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
        return {
            "rank": float(self.rank),
            "pid": float(os.getpid()),
            "steps": float(self._step_count),
            "skipped": float(self._skipped_count),
            "peak_bytes": float(peak_bytes),
        }

    def shutdown(self) -> None:
        """Free shared memory and leave the process group."""
        if self._weight_sender is not None:
            self._weight_sender.close()
            self._weight_sender = None
        self._port_reservation.close()
        ds.leave_process_group()


def _fetch_groups(groups: Sequence[ObjectRef[Group] | Group], micro_batches: list[MicroBatch]) -> dict[int, Group]:
    """The groups of the micro-batches by index, from the object store where they are references."""
    # Only groups of this rank's micro-batches: on several nodes the others need not travel here.
    indices = sorted({group_index for micro_batch in micro_batches for group_index, _ in micro_batch})
    groups_by_index = {index: group for index in indices if isinstance(group := groups[index], Group)}
    remote_indices = [index for index in indices if index not in groups_by_index]
    if remote_indices:
        fetched = ray.get([groups[index] for index in remote_indices])
        groups_by_index |= dict(zip(remote_indices, fetched, strict=True))
    return groups_by_index
