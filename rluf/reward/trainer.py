"""Training of one reward model, in plain torch: step plan, epochs, choice of the best epoch.

A model has a head for each task: one, or several on a shared backbone, whose steps come by turns. The engine
(DeepSpeed in production) is handed in, so this runs wherever torch runs. Ranks work in lockstep: equal numbers of
steps, and equal numbers of forward passes when they look at dev together. Where training stands can be kept at any
step; whoever goes on from there reads the rows of the epoch that nobody has read yet.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from transformers import PreTrainedModel

from rluf.errors import DataError, StallError
from rluf.reward.calibration import Floats, fit_platt, fit_scale, prior_shift, sigmoid
from rluf.reward.frozen_prefix import FrozenPrefix
from rluf.reward.linear_probe import HeadInput
from rluf.reward.losses import weighted_bce
from rluf.reward.metrics import entropy, log_loss
from rluf.reward.text import Encoded, TextEncoder, shared_batches, token_batches

logger = logging.getLogger(__name__)

Keys = NDArray[np.uint64]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SAVE_LOOK = 8
"""Steps between two looks at the clock: is it time to keep where training stands?"""
POOL_STEPS = 16
"""Steps whose rows are sorted by length together: little padding, and still a random order."""
LOG_SECONDS = 10.0


class Engine(Protocol):
    """What training asks of an engine; DeepSpeed's has it."""

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """The model's output, with logits [B, 1]."""

    def backward(self, loss: torch.Tensor) -> Any:
        """Add the gradient of a scalar loss."""

    def step(self) -> Any:
        """Update the weights and clear the gradient."""

    def train(self) -> Any:
        """Dropout on."""

    def eval(self) -> Any:
        """Dropout off."""


@dataclass(frozen=True)
class Rows:
    """One split, encoded. For pairs, `sequences` hold all N chosen, then all N rejected responses."""

    pairs: bool
    sequences: list[Encoded]
    labels: Floats
    """[N] 0 or 1; for pairs 1 (chosen won) or 0.5 (a tie)."""
    weights: Floats
    """[N] 1 / share kept, so that weighted figures are at the natural rate."""
    clusters: list[str]
    """[N] user or prompt group: rows of one cluster are not independent."""
    lengths: Floats
    """Characters of the response of each sequence."""
    keys: Keys = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """[N] stand for the rows' ids, the same on every rank and in every run; empty: the rows' numbers."""
    factors: Floats = field(default_factory=lambda: np.empty(0))
    """[N] on the weights in the loss alone (propensities); empty: 1."""
    offsets: Floats = field(default_factory=lambda: np.empty(0))
    """Added to each sequence's logit in training, not in scoring: what length or user explain (rluf.reward.debias).
    Empty: nothing."""
    originals: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The last rows are copies with a sign-off (rluf.reward.augment): which row each of them is a copy of."""

    def __post_init__(self) -> None:
        """Rows without keys of their own go by their number."""
        if not self.keys.size:
            object.__setattr__(self, "keys", np.arange(len(self.labels), dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self, rows: Sequence[int]) -> list[int]:
        """Indices of the sequences of these rows: chosen, then rejected for pairs."""
        return [*rows, *(row + len(self) for row in rows)] if self.pairs else list(rows)

    @property
    def items(self) -> NDArray[np.int64]:
        """[N] the same number for a row and its copies."""
        return np.concatenate([np.arange(len(self) - len(self.originals)), self.originals])

    @property
    def texts(self) -> NDArray[np.int64]:
        """[N] the same number for rows that read alike (many reactions to one response) and for their copies."""
        first: dict[Encoded, int] = {}
        rows = range(len(self) - len(self.originals))
        return np.asarray([first.setdefault(self.sequences[row], row) for row in rows], dtype=np.int64)[self.items]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def loss_weights(self) -> Floats:
        """Weights with a mean of 1 in each class: the class balance stays that of the sample.

        The sampling factor is put back by the prior correction instead of a few heavily weighted rows.
        """
        weights = self.weights * self.factors if self.factors.size else self.weights
        means = {label: weights[self.labels == label].mean() for label in np.unique(self.labels)}
        return weights / np.asarray([means[label] for label in self.labels])


def encode_rows(records: Sequence[Mapping[str, Any]], encoder: TextEncoder, *, pairs: bool, where: str) -> Rows:
    """Rows of a prepared split (see rluf.prepare). Raises DataError when it is empty or lacks a column."""
    if not records:
        raise DataError(f"{where} has no rows; run rluf.prepare on a larger log")
    keys = ("chosen", "rejected") if pairs else ("response",)
    cluster = "user_id" if "user_id" in records[0] else "group"
    missing = [key for key in ("messages", "weight", cluster, *keys) if key not in records[0]]
    if missing or (not pairs and "label" not in records[0]):
        raise DataError(f"{where} lacks the columns {', '.join(missing) or 'label'}; run rluf.prepare again")
    responses = [str(row[key]) for key in keys for row in records]
    texts = (str(row.get("id", "")) + "\n" + "\n".join(str(row[key]) for key in keys) for row in records)
    conversations = [list(row["messages"]) for _ in keys for row in records]
    labels = np.ones(len(records)) if pairs else np.asarray([float(row["label"]) for row in records])
    return Rows(
        pairs=pairs,
        sequences=encoder.encode(list(zip(conversations, responses, strict=True))),
        labels=labels,
        weights=np.asarray([float(row["weight"]) for row in records]),
        clusters=[str(row[cluster]) for row in records],
        lengths=np.asarray([float(len(response)) for response in responses]),
        keys=np.asarray([_key(text) for text in texts], dtype=np.uint64),
    )


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Task:
    """What one head learns: its rows on this rank, the whole dev split, and the loss."""

    name: str
    train: Rows
    dev: Rows
    loss: Loss = weighted_bce
    """Of logits (pairs: chosen, then rejected), labels and weights."""
    head: int = 0
    """Which of the model's logits is this task's."""


@dataclass(frozen=True)
class Plan:
    """How one rank trains. `batch_rows` are this rank's rows of a step."""

    epochs: int
    batch_rows: int
    batch_tokens: int
    seed: int
    rank: int = 0
    world: int = 1
    patience: int = 0
    """Epochs without a better dev log-loss after which training stops; 0 runs them all."""
    deadline: float = float("inf")
    """time.monotonic() after which training stops with StallError."""
    save_s: float = float("inf")
    """Seconds between two looks at which training keeps where it stands."""


@dataclass
class Fit:
    """What training found for one task: the best epoch's dev logits, and the pace."""

    best_epoch: int = -1
    """-1 is the probe."""
    best_loss: float = float("inf")
    """Dev log-loss at the best epoch, which is that of all heads together."""
    dev_logits: Floats = field(default_factory=lambda: np.empty(0))
    """One logit a dev sequence, at the best epoch."""
    shift: float = 0.0
    examples: int = 0
    """Rows read in training, on all ranks; a row counts once an epoch."""
    tokens: int = 0
    """Tokens this rank read in training steps, without padding."""
    seconds: float = 0.0
    """Spent in training steps and on frozen layers."""
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Position:
    """Where training stands: what `Trainer.fit` needs to go on."""

    fits: list[Fit]
    """One a task."""
    epoch: int = 0
    done: list[Keys] = field(default_factory=list)
    """Of each task, the keys of the rows that some rank has read in this epoch."""


def steps_of(rows: int, plan: Plan) -> int:
    """Steps that the ranks need for their rows: those of the rank that has most."""
    return -(-max(gathered(rows, plan.world)) // plan.batch_rows)


def step_plan(lengths: Sequence[int], plan: Plan, steps: int, epoch: int) -> list[list[int]]:
    """Row indices of each step of an epoch: shuffled, of like length within a step, `steps` steps in all.

    The rows of POOL_STEPS steps are sorted together and cut; a rank short of rows reads some again.
    """
    if not steps:
        return []
    rng = random.Random(plan.seed * 1_000_003 + epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    wanted = max(min(len(order), steps * plan.batch_rows), (steps - 1) * plan.batch_rows + 1)
    order = [order[i % len(order)] for i in range(wanted)]
    size, found = plan.batch_rows * POOL_STEPS, []
    for start in range(0, len(order), size):
        pool = sorted(order[start : start + size], key=lambda row: lengths[row])
        found += [pool[i : i + plan.batch_rows] for i in range(0, len(pool), plan.batch_rows)]
    rng.shuffle(found)
    return found


class Trainer:
    """One reward model's training on one rank."""

    def __init__(
        self, model: PreTrainedModel, encoder: TextEncoder, plan: Plan, prefix: FrozenPrefix | None = None
    ) -> None:
        """`prefix` replays the frozen layers where that pays."""
        self.model, self.encoder, self.plan, self.prefix = model, encoder, plan, prefix
        self.device = next(model.parameters()).device
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._saved = self._told = time.monotonic()

    def fit(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        position: Position,
        *,
        snapshot: Callable[[], None],
        report: Callable[[str, dict[str, float]], None],
        save: Callable[[Position], None] = lambda _: None,
    ) -> list[Fit]:
        """Train with `engine`, which wraps the model, from `position` on; returns a Fit a task.

        The position's fits are what came before (a probe, or an empty Fit each). `snapshot` is called whenever dev
        log-loss is the best so far, `report` with a task's name after every epoch, and `save` when plan.save_s have
        passed since the last time; all three on every rank. Raises StallError past the deadline.
        """
        found = position.fits
        for task, fit in zip(tasks, found, strict=True):
            fit.shift = 0.0 if task.train.pairs else self.shift(task.train)
            clock = time.monotonic()
            self._hidden(task.train)
            self._hidden(task.dev)
            fit.seconds += time.monotonic() - clock
        best = _together([fit.best_loss for fit in found], tasks)
        for epoch in range(position.epoch, self.plan.epochs):
            position.epoch = epoch
            train_losses = self._epoch(engine, tasks, position, save)
            logits = [self._dev_logits(engine, task) for task in tasks]
            losses = [dev_log_loss(z, t.dev, f.shift) for z, t, f in zip(logits, tasks, found, strict=True)]
            together = _together(losses, tasks)
            if together < best:
                best = together
                for fit, loss, dev_logits in zip(found, losses, logits, strict=True):
                    fit.best_epoch, fit.best_loss, fit.dev_logits = epoch, loss, dev_logits
                snapshot()
            for task, fit, train_loss, loss in zip(tasks, found, train_losses, losses, strict=True):
                figures = {"epoch": epoch + 1.0, "train_loss": train_loss, "dev_log_loss": loss}
                fit.history.append(figures)
                report(task.name, figures)
            if self.plan.patience and epoch - found[0].best_epoch >= self.plan.patience:
                break
            position.epoch, position.done = epoch + 1, []
            if self._due():
                save(position)
        return found

    @torch.no_grad()
    def features(self, rows: Rows, depths: Sequence[int] = ()) -> Floats:
        """What the model's linear head reads for each of this rank's sequences [depths, N, H], without dropout.

        One depth, that of the model, unless `depths` name numbers of lowest layers.
        """
        hidden, caught = self._hidden(rows), HeadInput(self.model, depths)
        was_training = self.model.training
        self.model.eval()
        found: dict[int, Floats] = {}
        told = time.monotonic()
        try:
            with self._replaying(hidden):
                for batch, takers in shared_batches(
                    rows.sequences, causal=not self.encoder.pair, batch_tokens=self.plan.batch_tokens
                ):
                    self._check_deadline("the probe")
                    if time.monotonic() - told > LOG_SECONDS:
                        told = time.monotonic()
                        logger.info("probe: features of %d of %d rows", len(found), len(rows.sequences))
                    self._forward(self.model, rows, batch, hidden)
                    taken = caught.take([(place, len(rows.sequences[index]) - 1) for place, index in takers])
                    found.update(zip([index for _, index in takers], taken.swapaxes(0, 1), strict=True))
        finally:
            caught.close()
            self.model.train(was_training)
        return np.stack([found[index] for index in range(len(rows.sequences))], axis=1)

    def shift(self, rows: Rows) -> float:
        """Prior shift over the rows of all ranks."""
        shards = gathered((rows.labels, rows.weights), self.plan.world)
        return prior_shift(np.concatenate([s[0] for s in shards]), np.concatenate([s[1] for s in shards]))

    def _epoch(
        self, engine: Engine, tasks: Sequence[Task], position: Position, save: Callable[[Position], None]
    ) -> list[float]:
        """What is left of an epoch's pass over this rank's rows; returns the mean loss of each task's steps."""
        engine.train()
        done = position.done or [np.empty(0, dtype=np.uint64) for _ in tasks]
        order = self._order(tasks, done, position.epoch)
        losses: list[list[torch.Tensor]] = [[] for _ in tasks]
        read: list[set[int]] = [set() for _ in tasks]
        weights = [task.train.loss_weights for task in tasks]
        for number, (place, step) in enumerate(order):
            if number % SAVE_LOOK == 0 and number and self._due():
                position.done = self._read(tasks, done, read)
                save(position)
            task, fit, clock = tasks[place], position.fits[place], time.monotonic()
            losses[place].append(self._step(engine, task, weights[place], step))
            read[place].update(step)
            fit.tokens += sum(len(task.train.sequences[part]) for part in task.train.parts(step))
            fit.seconds += time.monotonic() - clock
            self._check_deadline(f"epoch {position.epoch + 1}")
            if time.monotonic() - self._told > LOG_SECONDS:
                self._told = time.monotonic()
                where = position.epoch + 1, number + 1, len(order), float(losses[place][-1])
                logger.info("epoch %d: step %d of %d, loss %.4f", *where)
        for fit, keys in zip(position.fits, self._read(tasks, done, read), strict=True):
            fit.examples += len(keys)
        return [float(torch.stack(found).mean()) if found else float("nan") for found in losses]

    def _step(self, engine: Engine, task: Task, weights: Floats, step: Sequence[int]) -> torch.Tensor:
        """One optimiser step on rows `step` of the task; returns its loss."""
        rows, parts = task.train, task.train.parts(step)
        hidden = self._hidden(rows)
        with self._replaying(hidden):
            logits = self._forward(engine, rows, parts, hidden)[:, task.head]
            if rows.offsets.size:
                logits = logits + self._tensor(rows.offsets[parts])
            loss = task.loss(logits, self._tensor(rows.labels[step]), self._tensor(weights[step]))
            engine.backward(loss)
        engine.step()
        return loss.detach()

    def _tensor(self, values: Floats) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _order(self, tasks: Sequence[Task], done: Sequence[Keys], epoch: int) -> list[tuple[int, list[int]]]:
        """(task, rows) of each step: the rows of the epoch that nobody has read, the tasks by turns at random."""
        order: list[tuple[int, list[int]]] = []
        for place, task in enumerate(tasks):
            rows = task.train
            left = np.flatnonzero(~np.isin(rows.keys, done[place])).tolist()
            steps = steps_of(len(left), self.plan)
            left = left or list(range(len(rows)))  # other ranks have rows left: keep them company
            lengths = [max(len(rows.sequences[part]) for part in rows.parts([row])) for row in left]
            plan = step_plan(lengths, self.plan, steps, epoch)
            order += [(place, [left[i] for i in step]) for step in plan]
        if len(tasks) > 1:
            random.Random(self.plan.seed * 1_000_003 + epoch).shuffle(order)
        return order

    def _read(self, tasks: Sequence[Task], done: Sequence[Keys], read: Sequence[set[int]]) -> list[Keys]:
        """Of each task, keys of the rows read in this epoch by any rank, before a stop or since."""
        mine = [task.train.keys[sorted(rows)] for task, rows in zip(tasks, read, strict=True)]
        shards = gathered(mine, self.plan.world)
        return [np.unique(np.concatenate([done[i], *(shard[i] for shard in shards)])) for i in range(len(tasks))]

    def _due(self) -> bool:
        """Whether it is time to keep where training stands, by rank 0's clock."""
        late = self.plan.save_s < float("inf") and time.monotonic() - self._saved >= self.plan.save_s
        late = self.plan.save_s < float("inf") and bool(gathered(late, self.plan.world)[0])
        if late:
            self._saved = time.monotonic()
        return late

    def _check_deadline(self, where: str) -> None:
        if time.monotonic() > self.plan.deadline:
            raise StallError(f"reward training met its deadline in {where}; raise reward.deadline_s")

    def _forward(
        self, model: Callable[..., Any], rows: Rows, parts: Sequence[int], hidden: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """Logits [B, heads] of these sequences, with gradient."""
        inputs = self.encoder.collate([rows.sequences[part] for part in parts])
        if self.prefix is not None and hidden is not None:
            self.prefix.load([hidden[part] for part in parts])
        output = model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        logits: torch.Tensor = output.logits.float()
        return logits

    @torch.no_grad()
    def _dev_logits(self, engine: Engine, task: Task) -> Floats:
        """Logits of all dev sequences, the batches dealt out to the ranks, each running equally many."""
        engine.eval()
        rows, hidden = task.dev, self._hidden(task.dev)
        batches = token_batches([len(sequence) for sequence in rows.sequences], self.plan.batch_tokens)
        turns = -(-len(batches) // self.plan.world)
        found: dict[int, float] = {}
        with self._replaying(hidden):
            for turn in range(turns):
                batch = batches[min(turn * self.plan.world + self.plan.rank, len(batches) - 1)]
                logits = self._forward(engine, rows, batch, hidden)[:, task.head]
                found.update(zip(batch, logits.tolist(), strict=True))
        for part in gathered(found, self.plan.world):
            found.update(part)
        return np.asarray([found[index] for index in range(len(rows.sequences))])

    def _hidden(self, rows: Rows) -> list[torch.Tensor] | None:
        if self.prefix is None:
            return None
        if id(rows) not in self._kept:
            self._kept[id(rows)] = self.prefix.compute(self.encoder, rows.sequences, self.plan.batch_tokens)
        return self._kept[id(rows)]

    @contextmanager
    def _replaying(self, hidden: list[torch.Tensor] | None) -> Iterator[None]:
        with nullcontext() if self.prefix is None or hidden is None else self.prefix.replaying():
            yield


def dev_log_loss(logits: Floats, rows: Rows, shift: float) -> float:
    """Log-loss in nats at the natural rate, after the calibration that the checkpoint will get from the same rows.

    Epochs are compared by it: what calibration will undo (confidence, base rate) must not choose between them.
    """
    if rows.pairs:
        differences = logits[: len(rows)] - logits[len(rows) :]
        values = sigmoid(fit_scale(differences, rows.weights) * differences)
    else:
        scale, offset = fit_platt(logits + shift, rows.labels, rows.weights)
        values = sigmoid(scale * (logits + shift) + offset)
    return log_loss(values, rows.labels, rows.weights)


def _together(losses: Sequence[float], tasks: Sequence[Task]) -> float:
    """Mean over the tasks of dev log-loss over the entropy of the base rate: what epochs are compared by."""
    floors = [math.log(2) if t.dev.pairs else entropy(float(np.average(t.dev.labels, weights=t.dev.weights)))
              for t in tasks]  # fmt: skip
    return float(np.mean([loss / (floor or 1.0) for loss, floor in zip(losses, floors, strict=True)]))


def gathered(value: Any, world: int) -> list[Any]:
    """The value of every one of `world` ranks."""
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, value)
    return everyone
