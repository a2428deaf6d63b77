"""Training of one reward model, in plain torch: rows, step plan, epochs, choice of the best epoch.

The engine (DeepSpeed in production) is handed in, so this runs wherever torch runs. Ranks work in lockstep: equal
numbers of steps, and equal numbers of forward passes when they look at dev together.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from rluf.errors import DataError, StallError
from rluf.objectives.calibration import Floats, fit_platt, fit_scale, prior_shift, sigmoid
from rluf.objectives.losses import weighted_bce
from rluf.objectives.metrics import log_loss
from rluf.objectives.prefix import FrozenPrefix
from rluf.objectives.probe import HeadInput
from rluf.objectives.text import Encoded, TextEncoder, shared_batches, token_batches

logger = logging.getLogger(__name__)

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
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

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self, rows: Sequence[int]) -> list[int]:
        """Indices of the sequences of these rows: chosen, then rejected for pairs."""
        return [*rows, *(row + len(self) for row in rows)] if self.pairs else list(rows)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def loss_weights(self) -> Floats:
        """Weights with a mean of 1 in each class: the class balance stays that of the sample.

        The sampling factor is put back by the prior correction instead of a few heavily weighted rows.
        """
        means = {label: self.weights[self.labels == label].mean() for label in np.unique(self.labels)}
        return self.weights / np.asarray([means[label] for label in self.labels])


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
    conversations = [list(row["messages"]) for _ in keys for row in records]
    labels = np.ones(len(records)) if pairs else np.asarray([float(row["label"]) for row in records])
    return Rows(
        pairs=pairs,
        sequences=encoder.encode(list(zip(conversations, responses, strict=True))),
        labels=labels,
        weights=np.asarray([float(row["weight"]) for row in records]),
        clusters=[str(row[cluster]) for row in records],
        lengths=np.asarray([float(len(response)) for response in responses]),
    )


@dataclass(frozen=True)
class Plan:
    """How one rank trains. `batch_rows` are this rank's rows of a step."""

    epochs: int
    batch_rows: int
    batch_tokens: int
    steps: int
    """Steps an epoch, the same on every rank."""
    seed: int
    rank: int = 0
    world: int = 1
    loss: Loss = weighted_bce
    """Of logits (pairs: chosen, then rejected), labels and weights."""
    patience: int = 0
    """Epochs without a better dev log-loss after which training stops; 0 runs them all."""
    deadline: float = float("inf")
    """time.monotonic() after which training stops with StallError."""


@dataclass
class Fit:
    """What training found: the best epoch's dev logits, and the pace."""

    best_epoch: int = -1
    """-1 is the probe."""
    best_loss: float = float("inf")
    dev_logits: Floats = field(default_factory=lambda: np.empty(0))
    """One logit a dev sequence, at the best epoch."""
    shift: float = 0.0
    tokens: int = 0
    """Tokens this rank read in training steps, without padding."""
    seconds: float = 0.0
    """Spent in training steps and on frozen layers."""
    history: list[dict[str, float]] = field(default_factory=list)


def step_plan(lengths: Sequence[int], plan: Plan, epoch: int) -> list[list[int]]:
    """Row indices of each step of an epoch: shuffled, of like length within a step, `plan.steps` steps in all.

    The rows of POOL_STEPS steps are sorted together and cut; a rank short of rows reads some again.
    """
    rng = random.Random(plan.seed * 1_000_003 + epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    wanted = max(min(len(order), plan.steps * plan.batch_rows), (plan.steps - 1) * plan.batch_rows + 1)
    order = [order[i % len(order)] for i in range(wanted)]
    size, steps = plan.batch_rows * POOL_STEPS, []
    for start in range(0, len(order), size):
        pool = sorted(order[start : start + size], key=lambda row: lengths[row])
        steps += [pool[i : i + plan.batch_rows] for i in range(0, len(pool), plan.batch_rows)]
    rng.shuffle(steps)
    return steps


class Trainer:
    """One reward model's training on one rank."""

    def __init__(
        self, model: PreTrainedModel, encoder: TextEncoder, plan: Plan, prefix: FrozenPrefix | None = None
    ) -> None:
        """`prefix` replays the frozen layers where that pays."""
        self.model, self.encoder, self.plan, self.prefix = model, encoder, plan, prefix
        self.device = next(model.parameters()).device
        self._kept: dict[int, list[torch.Tensor]] = {}

    def fit(
        self,
        engine: Engine,
        train: Rows,
        dev: Rows,
        found: Fit,
        *,
        snapshot: Callable[[], None],
        report: Callable[[dict[str, float]], None],
    ) -> Fit:
        """Train with `engine`, which wraps the model; `found` is what came before (a probe, or an empty Fit).

        `snapshot` is called whenever dev log-loss is the best so far, `report` after every epoch, both on every rank.
        Raises StallError past the deadline.
        """
        found.shift = 0.0 if train.pairs else self.shift(train)
        clock = time.monotonic()
        hidden = self._hidden(train), self._hidden(dev)
        found.seconds += time.monotonic() - clock
        for epoch in range(self.plan.epochs):
            loss = self._epoch(engine, train, hidden[0], epoch, found)
            logits = self._dev_logits(engine, dev, hidden[1])
            dev_loss = dev_log_loss(logits, dev, found.shift)
            if dev_loss < found.best_loss:
                found.best_epoch, found.best_loss, found.dev_logits = epoch, dev_loss, logits
                snapshot()
            figures = {"epoch": epoch + 1.0, "train_loss": loss, "dev_log_loss": dev_loss}
            found.history.append(figures)
            report(figures)
            if self.plan.patience and epoch - found.best_epoch >= self.plan.patience:
                break
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
                    now = time.monotonic()
                    if now > self.plan.deadline:
                        raise StallError("reward training met its deadline in the probe; raise reward.deadline_s")
                    if now - told > LOG_SECONDS:
                        told = now
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

    def _epoch(self, engine: Engine, rows: Rows, hidden: list[torch.Tensor] | None, epoch: int, found: Fit) -> float:
        """One pass over this rank's rows; returns the mean loss of its steps."""
        engine.train()
        started = told = time.monotonic()
        lengths = [max(len(rows.sequences[part]) for part in rows.parts([row])) for row in range(len(rows))]
        steps, weights, losses = step_plan(lengths, self.plan, epoch), rows.loss_weights, []
        with self._replaying(hidden):
            for number, step in enumerate(steps):
                logits = self._forward(engine, rows, rows.parts(step), hidden)
                factor = torch.tensor(weights[step], dtype=torch.float32, device=self.device)
                labels = torch.tensor(rows.labels[step], dtype=torch.float32, device=self.device)
                loss = self.plan.loss(logits, labels, factor)
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
                found.tokens += sum(len(rows.sequences[part]) for part in rows.parts(step))
                now = time.monotonic()
                if now > self.plan.deadline:
                    raise StallError(f"reward training met its deadline in epoch {epoch + 1}; raise reward.deadline_s")
                if now - told > LOG_SECONDS:
                    told = now
                    done = number + 1, len(steps), float(losses[-1])
                    logger.info("epoch %d: step %d of %d, loss %.4f", epoch + 1, *done)
        found.seconds += time.monotonic() - started
        return float(torch.stack(losses).mean())

    def _forward(
        self, model: Callable[..., Any], rows: Rows, parts: Sequence[int], hidden: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """Logits [B] of these sequences, with gradient."""
        inputs = self.encoder.collate([rows.sequences[part] for part in parts])
        if self.prefix is not None and hidden is not None:
            self.prefix.load([hidden[part] for part in parts])
        output = model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        logits: torch.Tensor = output.logits[:, 0].float()
        return logits

    @torch.no_grad()
    def _dev_logits(self, engine: Engine, rows: Rows, hidden: list[torch.Tensor] | None) -> Floats:
        """Logits of all sequences, the batches dealt out to the ranks, each running equally many."""
        engine.eval()
        batches = token_batches([len(sequence) for sequence in rows.sequences], self.plan.batch_tokens)
        turns = -(-len(batches) // self.plan.world)
        found: dict[int, float] = {}
        with self._replaying(hidden):
            for turn in range(turns):
                batch = batches[min(turn * self.plan.world + self.plan.rank, len(batches) - 1)]
                found.update(zip(batch, self._forward(engine, rows, batch, hidden).tolist(), strict=True))
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


def gathered(value: Any, world: int) -> list[Any]:
    """The value of every one of `world` ranks."""
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, value)
    return everyone
