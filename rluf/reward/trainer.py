"""Reward model training loop in plain torch: step plan, epochs, and selection of the best epoch.

A model has one head per task: a single one, or several on a shared backbone, whose steps are interleaved. The engine
(DeepSpeed in production) is passed in, so the loop runs wherever torch runs. Ranks work in lockstep: equal numbers of
steps, and equal numbers of forward passes when dev is evaluated. Progress can be saved at any step; resuming reads
only the rows of the epoch that no rank has read yet.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from rluf.config.reward import HeadReading
from rluf.errors import DeadlineError, RlufError
from rluf.models.dropout import CpuDropout
from rluf.reward.backbone import FrozenPrefix
from rluf.reward.calibration import compute_prior_shift, fit_pair_scale, fit_platt
from rluf.reward.encoded_split import EncodedSplit, RowKeys
from rluf.reward.losses import LossFunction, compute_step_loss, weighted_bce_loss
from rluf.reward.metrics import binary_entropy, log_loss
from rluf.reward.model import HeadInputCapture, find_capture_points
from rluf.reward.text import (
    TextEncoder,
    iter_shared_batches,
    plan_token_batches,
)
from rluf.utils.stats import Floats, sigmoid

logger = logging.getLogger(__name__)

SAVE_CHECK_STEPS = 8
"""Steps between checks whether a save is due; each check is a collective call."""
LENGTH_POOL_STEPS = 16
"""Steps whose rows are sorted by length together: little padding, and the order is still random."""
LOG_INTERVAL_S = 10.0
EVAL_BATCH_TOKENS = 4096
"""Padded tokens of a forward pass without gradient."""


class TrainEngine(Protocol):
    """Interface that the trainer needs of an engine; DeepSpeed's engine has it."""

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """The model's output, with logits [B, heads]."""

    def backward(self, loss: torch.Tensor) -> Any:
        """Add the gradient of a scalar loss."""

    def step(self) -> Any:
        """Update the weights and clear the gradient."""

    def train(self) -> Any:
        """Enable dropout."""

    def eval(self) -> Any:
        """Disable dropout."""


@dataclass(frozen=True)
class HeadTask:
    """Training task of one head: its rows on this rank, the whole dev split, and the loss."""

    name: str
    train_split: EncodedSplit
    dev_split: EncodedSplit
    loss_function: LossFunction = weighted_bce_loss
    head_index: int = 0
    """Index of this task's logit among the model's logits."""


@dataclass(frozen=True)
class TrainPlan:
    """Training options of one rank. `batch_rows` is this rank's number of rows per step."""

    epochs: int
    batch_rows: int
    batch_tokens: int
    seed: int
    rank: int = 0
    world_size: int = 1
    patience: int = 0
    """Epochs without a better dev log-loss after which training stops; 0 runs all epochs."""
    deadline: float = float("inf")
    """time.monotonic() after which training stops with DeadlineError."""
    save_interval_s: float = float("inf")
    """Seconds between two saves of the progress."""


@dataclass
class FitResult:
    """Result of training one task: the best epoch and its dev logits, and the throughput."""

    best_epoch: int = -1
    """-1 is the probe."""
    best_loss: float = float("inf")
    """Dev log-loss at the best epoch, which is chosen for all heads together."""
    dev_logits: Floats = field(default_factory=lambda: np.empty(0))
    """One logit per dev sequence, at the best epoch."""
    prior_shift: float = 0.0
    examples: int = 0
    """Rows read in training, on all ranks; a row counts once per epoch."""
    token_count: int = 0
    """Tokens that this rank read in training steps, without padding."""
    train_seconds: float = 0.0
    """Time spent in training steps and on frozen layers."""
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class TrainProgress:
    """Resumable state of `RewardModelTrainer.fit`."""

    fit_results: list[FitResult]
    """One per task."""
    epoch: int = 0
    read_keys: list[RowKeys] = field(default_factory=list)
    """For each task, the keys of the rows that any rank has read in this epoch."""


def count_steps(row_count: int, plan: TrainPlan) -> int:
    """Number of steps that every rank runs: enough for the rank with the most rows."""
    return -(-max(gather_objects(row_count, plan.world_size)) // plan.batch_rows)


def plan_epoch_steps(lengths: Sequence[int], plan: TrainPlan, step_count: int, epoch: int) -> list[list[int]]:
    """Row indices of each of `step_count` steps of an epoch: shuffled, of similar length within a step.

    The rows of LENGTH_POOL_STEPS steps are sorted together and cut into steps.
    """
    if not step_count:
        return []
    rng = random.Random(plan.seed * 1_000_003 + epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    # Every rank must run exactly `step_count` steps, or an all-reduce waits forever. So the last step needs at least
    # one row: a rank that is short of rows repeats some.
    min_rows = (step_count - 1) * plan.batch_rows + 1
    used_rows = max(min(len(order), step_count * plan.batch_rows), min_rows)
    order = [order[i % len(order)] for i in range(used_rows)]
    pool_rows, steps = plan.batch_rows * LENGTH_POOL_STEPS, []
    for start in range(0, len(order), pool_rows):
        pool = sorted(order[start : start + pool_rows], key=lambda row: lengths[row])
        steps += [pool[i : i + plan.batch_rows] for i in range(0, len(pool), plan.batch_rows)]
    rng.shuffle(steps)
    return steps


class RewardModelTrainer:
    """Trains one reward model on one rank."""

    def __init__(
        self, model: PreTrainedModel, encoder: TextEncoder, plan: TrainPlan, frozen_prefix: FrozenPrefix | None = None
    ) -> None:
        """`frozen_prefix` replays the cached output of the frozen layers, where that saves time."""
        self.model, self.encoder, self.plan, self.frozen_prefix = model, encoder, plan, frozen_prefix
        self.device = next(model.parameters()).device
        self._frozen_states: dict[int, list[torch.Tensor]] = {}
        self._last_save_time = self._last_log_time = time.monotonic()

    def fit(
        self,
        engine: TrainEngine,
        tasks: Sequence[HeadTask],
        progress: TrainProgress,
        *,
        on_best: Callable[[], None],
        on_epoch: Callable[[str, dict[str, float]], None],
        on_save: Callable[[TrainProgress], None] = lambda _: None,
    ) -> list[FitResult]:
        """Train with `engine`, which wraps the model, from `progress` on; returns one FitResult per task.

        The results in `progress` are the starting point (a probe, or an empty FitResult each). `on_best` is called
        when the dev log-loss is the best so far, `on_epoch` with a task's name after every epoch, and `on_save` when
        plan.save_interval_s have passed since the last save; all three on every rank. Raises DeadlineError, RlufError
        where training diverged.
        """
        results = progress.fit_results
        for task, result in zip(tasks, results, strict=True):
            result.prior_shift = 0.0 if task.train_split.is_pairwise else self.gather_prior_shift(task.train_split)
            start_time = time.monotonic()
            self._get_frozen_states(task.train_split)
            self._get_frozen_states(task.dev_split)
            result.train_seconds += time.monotonic() - start_time
        best_mean_loss = _average_normalized_losses([result.best_loss for result in results], tasks)
        for epoch in range(progress.epoch, self.plan.epochs):
            progress.epoch = epoch
            train_losses = self._run_epoch(engine, tasks, progress, on_save)
            dev_logits = [self._compute_dev_logits(engine, task) for task in tasks]
            dev_losses = [
                compute_dev_log_loss(logits, task.dev_split, result.prior_shift)
                for logits, task, result in zip(dev_logits, tasks, results, strict=True)
            ]
            # One epoch is chosen for all heads: they share the backbone's weights.
            mean_loss = _average_normalized_losses(dev_losses, tasks)
            if mean_loss < best_mean_loss:
                best_mean_loss = mean_loss
                for result, dev_loss, logits in zip(results, dev_losses, dev_logits, strict=True):
                    result.best_epoch, result.best_loss, result.dev_logits = epoch, dev_loss, logits
                on_best()
            for task, result, train_loss, dev_loss in zip(tasks, results, train_losses, dev_losses, strict=True):
                epoch_metrics = {"epoch": epoch + 1.0, "train_loss": train_loss, "dev_log_loss": dev_loss}
                result.history.append(epoch_metrics)
                on_epoch(task.name, epoch_metrics)
            if self.plan.patience and epoch - results[0].best_epoch >= self.plan.patience:
                break
            progress.epoch, progress.read_keys = epoch + 1, []
            if self._is_save_due():
                on_save(progress)
        if not math.isfinite(best_mean_loss):
            names = ", ".join(task.name for task in tasks)
            raise RlufError(
                f"the dev log-loss of reward model {names} was not a number after any of {self.plan.epochs} epochs; "
                "lower reward.<name>.learning_rate"
            )
        return results

    @torch.no_grad()
    def compute_features(self, split: EncodedSplit, readings: Sequence[HeadReading] = (HeadReading(),)) -> Floats:
        """Input of the model's linear head for each of this rank's sequences [readings, N, H], without dropout.

        By default there is one reading, at the depth of the model.
        """
        frozen_states = self._get_frozen_states(split)
        capture = HeadInputCapture(find_capture_points(self.model, readings))
        was_training = self.model.training
        self.model.eval()
        features_by_row: dict[int, Floats] = {}
        last_log_time = time.monotonic()
        try:
            with self._replay_prefix(frozen_states):
                for batch, readers in iter_shared_batches(
                    split.sequences, is_causal=not self.encoder.uses_text_pairs, batch_tokens=self.plan.batch_tokens
                ):
                    self._check_deadline("the probe")
                    if time.monotonic() - last_log_time > LOG_INTERVAL_S:
                        last_log_time = time.monotonic()
                        logger.info("probe features: rows=%d of %d", len(features_by_row), len(split.sequences))
                    # The logits are not needed: the capture's hooks read the hidden states during the pass.
                    self._compute_logits(self.model, split, batch, frozen_states)
                    features = capture.take_features([(index, split.sequences[row]) for index, row in readers])
                    features_by_row.update(zip([row for _, row in readers], features.swapaxes(0, 1), strict=True))
        finally:
            capture.close()
            self.model.train(was_training)
        return np.stack([features_by_row[row] for row in range(len(split.sequences))], axis=1)

    def gather_prior_shift(self, split: EncodedSplit) -> float:
        """Prior shift over the rows of the log on all ranks; copies say nothing about the base rate."""
        count = split.original_count
        shards = gather_objects((split.labels[:count], split.weights[:count]), self.plan.world_size)
        return compute_prior_shift(
            np.concatenate([labels for labels, _ in shards]), np.concatenate([weights for _, weights in shards])
        )

    def _run_epoch(
        self,
        engine: TrainEngine,
        tasks: Sequence[HeadTask],
        progress: TrainProgress,
        on_save: Callable[[TrainProgress], None],
    ) -> list[float]:
        """Run the rest of an epoch over this rank's rows; returns the mean loss of each task's steps."""
        engine.train()
        resumed_keys = progress.read_keys or [np.empty(0, dtype=np.uint64) for _ in tasks]
        steps = self._plan_steps(tasks, resumed_keys, progress.epoch)
        losses_by_task: list[list[torch.Tensor]] = [[] for _ in tasks]
        rows_read: list[set[int]] = [set() for _ in tasks]
        loss_weights = [task.train_split.loss_weights for task in tasks]
        for step_number, (task_index, row_indices) in enumerate(steps):
            if step_number % SAVE_CHECK_STEPS == 0 and step_number and self._is_save_due():
                progress.read_keys = self._gather_read_keys(tasks, resumed_keys, rows_read)
                on_save(progress)
            task, result, start_time = tasks[task_index], progress.fit_results[task_index], time.monotonic()
            losses_by_task[task_index].append(self._train_step(engine, task, loss_weights[task_index], row_indices))
            rows_read[task_index].update(row_indices)
            split = task.train_split
            result.token_count += sum(len(split.sequences[index]) for index in split.list_sequence_indices(row_indices))
            result.train_seconds += time.monotonic() - start_time
            self._check_deadline(f"epoch {progress.epoch + 1}")
            if time.monotonic() - self._last_log_time > LOG_INTERVAL_S:
                self._last_log_time = time.monotonic()
                logger.info(
                    "%s: epoch %d, step %d of %d, loss=%.4f",
                    task.name,
                    progress.epoch + 1,
                    step_number + 1,
                    len(steps),
                    # Read only here: a loss on a GPU is a tensor still being computed, and reading it waits for it.
                    float(losses_by_task[task_index][-1]),
                )
        read_keys = self._gather_read_keys(tasks, resumed_keys, rows_read)
        for result, task_keys in zip(progress.fit_results, read_keys, strict=True):
            result.examples += len(task_keys)
        return [float(torch.stack(losses).mean()) if losses else float("nan") for losses in losses_by_task]

    def _train_step(
        self, engine: TrainEngine, task: HeadTask, loss_weights: Floats, row_indices: Sequence[int]
    ) -> torch.Tensor:
        """One optimizer step on these rows of the task; returns its loss."""
        split, contrasts = task.train_split, task.train_split.find_contrasts(row_indices)
        sequence_indices = [*split.list_sequence_indices(row_indices), *(source for _, source in contrasts)]
        frozen_states = self._get_frozen_states(split)
        with self._replay_prefix(frozen_states), CpuDropout():
            logits = self._compute_logits(engine, split, sequence_indices, frozen_states)[:, task.head_index]
            if split.logit_offsets.size:
                logits = logits + self._to_tensor(split.logit_offsets[sequence_indices])
            labels, weights = self._to_tensor(split.labels[row_indices]), self._to_tensor(loss_weights[row_indices])
            loss = compute_step_loss(
                task.loss_function, logits, labels, weights, [position for position, _ in contrasts]
            )
            engine.backward(loss)
        engine.step()
        return loss.detach()

    def _to_tensor(self, values: Floats) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _plan_steps(
        self, tasks: Sequence[HeadTask], read_keys: Sequence[RowKeys], epoch: int
    ) -> list[tuple[int, list[int]]]:
        """(task index, row indices) of each step: the unread rows of the epoch, the tasks interleaved at random."""
        steps: list[tuple[int, list[int]]] = []
        for task_index, task in enumerate(tasks):
            split = task.train_split
            unread_rows = np.flatnonzero(~np.isin(split.row_keys, read_keys[task_index])).tolist()
            step_count = count_steps(len(unread_rows), self.plan)
            # A rank that has read all its rows repeats them while other ranks still have unread ones.
            unread_rows = unread_rows or list(range(len(split)))
            lengths = [max(len(split.sequences[i]) for i in split.list_sequence_indices([row])) for row in unread_rows]
            task_steps = plan_epoch_steps(lengths, self.plan, step_count, epoch)
            steps += [(task_index, [unread_rows[i] for i in step]) for step in task_steps]
        if len(tasks) > 1:
            # The same seed on every rank: in a step all ranks must train the same head.
            random.Random(self.plan.seed * 1_000_003 + epoch).shuffle(steps)
        return steps

    def _gather_read_keys(
        self, tasks: Sequence[HeadTask], read_keys: Sequence[RowKeys], rows_read: Sequence[set[int]]
    ) -> list[RowKeys]:
        """For each task, the keys of the rows that any rank has read in this epoch, before and after a resume."""
        new_keys = [task.train_split.row_keys[sorted(rows)] for task, rows in zip(tasks, rows_read, strict=True)]
        keys_by_rank = gather_objects(new_keys, self.plan.world_size)
        return [
            np.unique(np.concatenate([earlier_keys, *(rank_keys[task_index] for rank_keys in keys_by_rank)]))
            for task_index, earlier_keys in enumerate(read_keys)
        ]

    def _is_save_due(self) -> bool:
        """Whether the progress must be saved now. Rank 0's clock decides, so that all ranks save at the same step."""
        if self.plan.save_interval_s == float("inf"):
            return False
        is_due = time.monotonic() - self._last_save_time >= self.plan.save_interval_s
        is_due = bool(gather_objects(is_due, self.plan.world_size)[0])
        if is_due:
            self._last_save_time = time.monotonic()
        return is_due

    def _check_deadline(self, phase: str) -> None:
        if time.monotonic() > self.plan.deadline:
            raise DeadlineError(f"reward training exceeded its deadline in {phase}; raise timeouts.reward_training_s")

    def _compute_logits(
        self,
        model: Callable[..., Any],
        split: EncodedSplit,
        sequence_indices: Sequence[int],
        frozen_states: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Logits [B, heads] of these sequences, with gradient."""
        inputs = self.encoder.collate([split.sequences[index] for index in sequence_indices])
        if self.frozen_prefix is not None and frozen_states is not None:
            self.frozen_prefix.load_batch([frozen_states[index] for index in sequence_indices])
        output = model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        logits: torch.Tensor = output.logits.float()
        return logits

    @torch.no_grad()
    def _compute_dev_logits(self, engine: TrainEngine, task: HeadTask) -> Floats:
        """Logits of all dev sequences; the batches are distributed over the ranks."""
        engine.eval()
        split, frozen_states = task.dev_split, self._get_frozen_states(task.dev_split)
        batches = plan_token_batches([len(sequence) for sequence in split.sequences], self.plan.batch_tokens)
        rounds = -(-len(batches) // self.plan.world_size)
        logit_by_sequence: dict[int, float] = {}
        with self._replay_prefix(frozen_states):
            for round_index in range(rounds):
                # Ranks without a batch in the last round repeat the last one: at ZeRO 3 every forward pass gathers
                # weights, so all ranks must run equally many.
                batch = batches[min(round_index * self.plan.world_size + self.plan.rank, len(batches) - 1)]
                logits = self._compute_logits(engine, split, batch, frozen_states)[:, task.head_index]
                logit_by_sequence.update(zip(batch, logits.tolist(), strict=True))
        for rank_logits in gather_objects(logit_by_sequence, self.plan.world_size):
            logit_by_sequence.update(rank_logits)
        return np.asarray([logit_by_sequence[index] for index in range(len(split.sequences))])

    def _get_frozen_states(self, split: EncodedSplit) -> list[torch.Tensor] | None:
        """Cached hidden states of the split after the frozen layers, computed at the first call; None without cache."""
        if self.frozen_prefix is None:
            return None
        if id(split) not in self._frozen_states:
            self._frozen_states[id(split)] = self.frozen_prefix.compute_hidden_states(
                self.encoder, split.sequences, self.plan.batch_tokens
            )
        return self._frozen_states[id(split)]

    @contextmanager
    def _replay_prefix(self, frozen_states: list[torch.Tensor] | None) -> Iterator[None]:
        prefix = None if frozen_states is None else self.frozen_prefix
        with nullcontext() if prefix is None else prefix.replay_batch():
            yield


def compute_dev_log_loss(logits: Floats, split: EncodedSplit, prior_shift: float) -> float:
    """Log-loss in nats at the natural rate, after the calibration that the checkpoint will get from the same rows.

    Epochs are compared by this loss: what calibration corrects (confidence, base rate) must not affect the choice.
    """
    if split.is_pairwise:
        differences = logits[: len(split)] - logits[len(split) :]
        probabilities = sigmoid(fit_pair_scale(differences, split.weights) * differences)
    else:
        scale, offset = fit_platt(logits + prior_shift, split.labels, split.weights)
        probabilities = sigmoid(scale * (logits + prior_shift) + offset)
    return log_loss(probabilities, split.labels, split.weights)


def _average_normalized_losses(losses: Sequence[float], tasks: Sequence[HeadTask]) -> float:
    """Mean over the tasks of dev log-loss / entropy of the base rate, by which epochs are compared."""
    # A head with a rare label has a small log-loss. Dividing by the entropy of the base rate (ln 2 for pairs) makes
    # heads with different base rates comparable.
    entropies = []
    for task in tasks:
        split = task.dev_split
        if split.is_pairwise:
            entropies.append(math.log(2))
        else:
            entropies.append(binary_entropy(float(np.average(split.labels, weights=split.weights))))
    return float(np.mean([loss / (entropy or 1.0) for loss, entropy in zip(losses, entropies, strict=True)]))


def gather_objects(value: Any, world_size: int) -> list[Any]:
    """Values of all `world_size` ranks, in rank order."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value)
    return values
