"""Training of one reward model, or of one member of an ensemble, on one Ray Train worker with a DeepSpeed engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rluf.backends.deepspeed import gather_parameters, init_deepspeed
from rluf.config.reward import MemberPlan, RewardModelSettings
from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward import losses
from rluf.reward.augment import SIGN_OFF_SHARE, with_sign_offs
from rluf.reward.backbone import encoder_for, freeze, load_classifier
from rluf.reward.calibration import Floats
from rluf.reward.checkpoint import Keeper
from rluf.reward.debias import fit_labels, fit_pairs, propensity_weights
from rluf.reward.frozen_prefix import FrozenPrefix
from rluf.reward.linear_probe import HEADS, fit_probe, fold_bias, linear_head, set_head
from rluf.reward.lora import add_lora, merged
from rluf.reward.shared_backbone import labelled, save_heads
from rluf.reward.text import TextEncoder
from rluf.reward.trainer import (
    Engine,
    Fit,
    Loss,
    Plan,
    Position,
    Rows,
    Task,
    Trainer,
    dev_log_loss,
    encode_rows,
    gathered,
    steps_of,
)
from rluf.utils.paths import cache_dir

logger = logging.getLogger(__name__)

EVAL_TOKENS = 4096
"""Padded tokens of a forward pass without gradient."""


@dataclass(frozen=True, slots=True)
class Splits:
    """A head's rows: this rank's shard of the training split, the whole dev split, and the folder both come from."""

    head: str
    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]]
    folder: Path


class Read(NamedTuple):
    """What a head reads of its task's rows and of dev, [N, H] each, and what that took."""

    train: Floats
    dev: Floats
    seconds: float
    tokens: int
    """Tokens of the rows that were read for it; 0 where a sibling had read them."""


@dataclass(frozen=True, slots=True)
class Member:
    """A trained model: where it came from, its weights, and what was found on the way, a head each."""

    backbone: Path
    layers: int
    encoder: TextEncoder
    tasks: Sequence[Task]
    found: Sequence[Fit]
    weights: dict[str, torch.Tensor]
    """Weights that differ from the backbone's, by name; complete on rank 0 only."""
    reads: Sequence[Read] = ()
    """What each head reads, where a probe was fitted."""

    def save(self, folders: Sequence[Path]) -> str:
        """Write each head as a Hugging Face folder: float32, with the backbone's own dropout in its config.

        Returns the hash of the backbone that several heads share; of a model alone nothing.
        """
        model = load_classifier(self.backbone, trained=False, layers=self.layers, heads=len(folders))
        model.config.pad_token_id = self.encoder.pad_id
        model.load_state_dict({**model.state_dict(), **merged(self.weights)})
        if len(folders) > 1:
            return save_heads(model, self.encoder.tokenizer, folders)
        model.save_pretrained(str(folders[0]))
        self.encoder.tokenizer.save_pretrained(str(folders[0]))
        return ""


def train_members(
    settings: Settings,
    splits: Sequence[Splits],
    deadline: float,
    *,
    rank: int = 0,
    world: int = 1,
    keeper: Keeper | None = None,
    save_s: float = float("inf"),
) -> list[Member]:
    """Train the model of these heads, or the members of its ensemble in turn and their fused head; see train_member."""
    lead = settings.reward.of_head(splits[0].head)
    backbones = {member.backbone for member in lead.members}
    if len(lead.members) > 1 and lead.next_turn and not any(_foresees(settings, backbone) for backbone in backbones):
        raise ModelError(
            f"next_turn is set, but all members' backbones ({', '.join(sorted(backbones))}) are encoders, which do "
            "not foresee a next message; set next_turn=false or add a decoder to layers"
        )
    shared: dict[tuple[str, str], Floats] = {}
    members = [
        train_member(
            settings, splits, number, deadline, rank=rank, world=world, keeper=keeper, save_s=save_s, shared=shared
        )
        for number in range(len(lead.members))
    ]
    if lead.fuse:
        _fuse(members, seed=settings.seed, world=world)
    return members


def _foresees(settings: Settings, backbone: str) -> bool:
    """Whether the backbone is a decoder, which can foresee what comes after its text."""
    return load_tokenizer(resolve_model(backbone, cache_dir(settings))).cls_token_id is None


def train_member(
    settings: Settings,
    splits: Sequence[Splits],
    number: int,
    deadline: float,
    *,
    rank: int = 0,
    world: int = 1,
    keeper: Keeper | None = None,
    save_s: float = float("inf"),
    shared: dict[tuple[str, str], Floats] | None = None,
) -> Member:
    """Train member `number` (0 for a single model) on rank `rank` of `world`, in step with the others.

    One entry of `splits` is a model alone, several are heads of one backbone; the first one's settings say how. With a
    `keeper` training stands are kept every `save_s` seconds, and training goes on from the last one. `shared`, empty
    before the first member, lets members that differ in depth alone read the rows in one pass. The process group must
    exist where there is an epoch to train. Raises DataError, ModelError, StallError.
    """
    lead = settings.reward.of_head(splits[0].head)
    member = lead.members[number]
    if not member.own:
        lead = lead.model_copy(update={"probe": True, "epochs": 0, "frozen_share": 1, "lora_rank": 0})
    depths = (member.layers,) if shared is None else lead.depths(member)
    device = f"cuda:{torch.cuda.current_device()}" if settings.cluster.gpus_per_reward > 0 else "cpu"
    backbone = resolve_model(member.backbone, cache_dir(settings))
    torch.manual_seed((settings.seed + number) * 1009 + rank)
    model = load_classifier(
        backbone, trained=False, device=device, dropout=lead.dropout, seed=settings.seed + number, layers=max(depths),
        heads=len(splits),
    )  # fmt: skip
    encoder = encoder_for(
        model, backbone, lead.max_tokens, next_turn=lead.next_turn, alone=len(lead.members) < 2,
        response_alone=member.response,
    )  # fmt: skip
    tasks = [_task(settings, part, encoder, place, world) for place, part in enumerate(splits)]
    plan = _plan(settings, lead, number, rank=rank, world=world, deadline=deadline, save_s=save_s)
    frozen = freeze(model, lead.frozen_share)
    name = "+".join(task.name for task in tasks)
    name += "" if len(lead.members) < 2 else f" {number + 1} of {len(lead.members)}"
    trained, every = model.num_parameters(only_trainable=True) / 1e6, model.num_parameters() / 1e6
    rows, tokens = sum(len(t.train) for t in tasks), sum(t.train.tokens for t in tasks)
    logger.info("%s: %d rows, %d tokens, %.1fM of %.1fM weights train", name, rows, tokens, trained, every)
    weights: dict[str, torch.Tensor] = {}
    position = Position([Fit() for _ in tasks])
    reads: list[Read] = []
    if lead.probe:
        # Read in float32 whatever the training dtype: RewardModel scores in float32, and a head fitted on bfloat16
        # features is calibrated on logits that differ by up to 0.05 from those it later gives.
        reader = Trainer(model, encoder, plan)
        reads = [_read(reader, task, member, depths, {} if shared is None else shared) for task in tasks]
        for place, (task, read) in enumerate(zip(tasks, reads, strict=True)):
            part = _unfitted if lead.fuse else partial(_probe, seed=settings.seed)
            position.fits[place] = part(reader, task, read, weights)
    dtype = getattr(torch, settings.reward_dtype)
    model.to(dtype)
    prefix = None
    tokens += sum(task.dev.tokens for task in tasks)
    if lead.epochs and settings.reward.zero_stage < 3 and FrozenPrefix.worthwhile(model, frozen, tokens):
        prefix = FrozenPrefix(model, frozen)
    trainer = Trainer(model, encoder, plan, prefix)
    if lead.probe and not lead.fuse:
        logger.info("%s: probe, dev log-loss %s", name, ", ".join(f"{f.best_loss:.4f}" for f in position.fits))
    if lead.lora_rank:
        add_lora(model, lead.lora_rank, frozen, lead.dropout)
    if lead.epochs:
        steps = lead.epochs * sum(steps_of(len(task.train), plan) for task in tasks)
        engine = _engine(settings, lead, model, dtype, steps, world)
        if keeper is not None:
            position = keeper.restore(name, engine, position, weights)
        _fit(trainer, engine, tasks, position, weights, keeper, name)
    return Member(backbone, member.layers, encoder, tasks, position.fits, weights, reads)


def _plan(
    settings: Settings,
    lead: RewardModelSettings,
    number: int,
    *,
    rank: int,
    world: int,
    deadline: float,
    save_s: float,
) -> Plan:
    """The training plan of member `number` on this rank."""
    return Plan(
        epochs=lead.epochs,
        batch_rows=max(1, lead.batch_rows // world),
        batch_tokens=EVAL_TOKENS,
        seed=settings.seed + number,
        rank=rank,
        world=world,
        patience=lead.patience,
        deadline=deadline,
        save_s=save_s,
    )


def _fit(
    trainer: Trainer,
    engine: Any,
    tasks: Sequence[Task],
    position: Position,
    weights: dict[str, torch.Tensor],
    keeper: Keeper | None,
    name: str,
) -> None:
    """Run the epochs, with the best weights copied to `weights` on rank 0, and lines on how it goes."""

    def report(task: str, figures: Mapping[str, float]) -> None:
        where = task if len(tasks) > 1 else name, figures["epoch"], trainer.plan.epochs
        logger.info(
            "%s: epoch %d of %d, train loss %.4f, dev log-loss %.4f",
            *where, figures["train_loss"], figures["dev_log_loss"],
        )  # fmt: skip

    def save(stand: Position) -> None:
        if keeper is not None:
            keeper.keep(name, engine, stand, weights)

    keep = trainer.plan.rank == 0
    trainer.fit(
        engine, tasks, position, snapshot=lambda: _snapshot(engine, weights, keep=keep), report=report, save=save
    )


def _task(settings: Settings, part: Splits, encoder: TextEncoder, place: int, world: int) -> Task:
    """The head's rows, encoded and weighed as its own settings say."""
    chosen = settings.reward.of_head(part.head)
    pairs = chosen.loss == "bradley_terry"
    records = labelled(part.head, part.train, f"{part.folder}/train.parquet")
    share = SIGN_OFF_SHARE if "sign_offs" in chosen.debias else 0.0
    records, originals = with_sign_offs(records, share, pairs=pairs, seed=settings.seed)
    rows = encode_rows(records, encoder, pairs=pairs, where=f"{part.folder}/train.parquet")
    rows = replace(rows, originals=originals)
    dev_records = labelled(part.head, part.dev, f"{part.folder}/dev.parquet")
    dev = encode_rows(dev_records, encoder, pairs=pairs, where=f"{part.folder}/dev.parquet")
    if not pairs and len(set(rows.labels.tolist())) < 2:
        raise DataError(
            f"{part.folder}/train.parquet holds one label only; a model needs rows of both, use a larger log"
        )
    if "propensity" in chosen.debias and part.head in ("love", "thumbs"):
        theta = np.asarray([float(row["propensity"]) for row in records if "propensity" in row])
        if len(theta) < len(rows):
            raise DataError(f"{part.folder}/train.parquet has no column propensity; run rluf.prepare again")
        factors = propensity_weights(theta, rows.labels, reacted=part.head == "thumbs")
        rows = replace(rows, factors=factors)
    if {"length", "users"} & set(chosen.debias):
        rows = replace(rows, offsets=offsets_of(rows, chosen.debias, world))
    return Task(part.head, rows, dev, loss_of(chosen), place)


def offsets_of(rows: Rows, debias: Sequence[str], world: int = 1) -> Floats:
    """What length and user explain of each sequence, fitted on all ranks' rows. A row and its copies weigh as one.

    A user's readiness is told to a row by the user's rows of other texts.
    """
    once = rows.loss_weights / np.bincount(rows.items)[rows.items]
    shards = gathered((rows.labels, once, rows.lengths, rows.clusters), world)
    weights = np.concatenate([shard[1] for shard in shards])
    if rows.pairs:
        halves = [np.split(shard[2], 2) for shard in shards]
        found = fit_pairs(np.concatenate([half[side] for side in range(2) for half in halves]), weights)
        offsets = found.of_length(rows.lengths)
    else:
        found = fit_labels(
            np.concatenate([shard[0] for shard in shards]),
            weights,
            np.concatenate([shard[2] for shard in shards]),
            [cluster for shard in shards for cluster in shard[3]],
            length="length" in debias,
            user="users" in debias,
        )
        offsets = found.offsets(rows.labels, once, rows.lengths, rows.clusters, rows.texts)
    logger.info("debias: log-odds %.2f a standard deviation of log length", found.slope)
    return offsets


def loss_of(chosen: RewardModelSettings) -> Loss:
    """The loss that the settings name, of logits, labels and weights."""
    margin = chosen.margin

    def pairs(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        won, lost = logits.chunk(2)
        return losses.bradley_terry(won, lost, weights, wins=labels, margin=margin)

    known: dict[str, Loss] = {
        "bce": losses.weighted_bce,
        "focal": losses.focal,
        "nnpu": partial(losses.non_negative_pu, positive_rate=chosen.positive_rate),
        "hinge": partial(losses.hinge, margin=margin or 1.0),
        "bradley_terry": pairs,
    }
    return known[chosen.loss]


def _read(
    trainer: Trainer, task: Task, member: MemberPlan, depths: Sequence[int], shared: dict[tuple[str, str], Floats]
) -> Read:
    """What this member's head reads. The siblings' share stays in `shared`, by backbone and task."""
    clock, tokens = time.monotonic(), task.train.tokens
    if len(depths) == 1:
        return Read(trainer.features(task.train)[0], trainer.features(task.dev)[0], time.monotonic() - clock, tokens)
    key = (f"{member.backbone}:response" if member.response else member.backbone, task.name)
    count = len(task.train.sequences)
    if key in shared:
        tokens = 0
    else:
        shared[key] = np.concatenate([trainer.features(part, depths) for part in (task.train, task.dev)], axis=1)
    every = shared[key][depths.index(member.layers)]
    return Read(every[:count], every[count:], time.monotonic() - clock, tokens)


def _unfitted(trainer: Trainer, task: Task, read: Read, weights: dict[str, torch.Tensor]) -> Fit:
    """A head of noughts in `weights`, for _fuse to fill, and the task's figures without a loss."""
    weights.update(set_head(trainer.model, np.zeros(read.train.shape[1]), 0.0, task.head))
    shift = 0.0 if task.train.pairs else trainer.shift(task.train)
    return Fit(shift=shift, tokens=read.tokens, seconds=read.seconds)


def _probe(trainer: Trainer, task: Task, read: Read, weights: dict[str, torch.Tensor], *, seed: int) -> Fit:
    """Fit the task's head on all ranks' rows, put it into the model and `weights`; the same on every rank."""
    clock, rows = time.monotonic() - read.seconds, task.train
    features, head, bias = _fit_head(read.train, rows, trainer.plan.world, seed)
    has_bias = linear_head(trainer.model).bias is not None
    if not has_bias:
        head, bias = fold_bias(features, head, bias)
    weights.update(set_head(trainer.model, head, bias, task.head))
    shift = 0.0 if rows.pairs else trainer.shift(rows)
    logits = read.dev @ head + (bias if has_bias else 0.0)
    loss = dev_log_loss(logits, task.dev, shift)
    return Fit(-1, loss, logits, shift, tokens=read.tokens, seconds=time.monotonic() - clock)


def _fit_head(read: Floats, rows: Rows, world: int, seed: int) -> tuple[Floats, Floats, float]:
    """Features [N, H] of all ranks' rows from this rank's, and the head's weights [H] and bias fitted on them.

    Copies with a sign-off are no rows of their own there: their logit is held to that of the row they copy.
    """
    count = len(rows) - len(rows.originals)
    own, copies = rows.parts(range(count)), rows.parts(range(count, len(rows)))
    moved = read[copies] - read[rows.parts(rows.originals.tolist())]
    offsets = rows.offsets if rows.offsets.size else np.zeros(len(read))
    mine = rows.labels[:count], rows.loss_weights[:count], rows.clusters[:count]
    shards = gathered((*mine, read[own], offsets[own], moved.T @ moved, len(moved)), world)
    labels, weights = (np.concatenate([shard[part] for shard in shards]) for part in (0, 1))
    features, offsets = (
        np.concatenate([half[side] for side in range(1 + rows.pairs) for half in halves])
        for halves in ([np.split(shard[part], 1 + rows.pairs) for shard in shards] for part in (3, 4))
    )
    clusters = [cluster for shard in shards for cluster in shard[2]]
    drift = sum(shard[5] for shard in shards) / max(1, sum(shard[6] for shard in shards))
    head, bias, strength = fit_probe(
        features, labels, weights, clusters, pairs=rows.pairs, seed=seed, offsets=offsets, drift=drift
    )
    logger.info("probe: regularisation C=%g", strength)
    return features, head, bias


def _fuse(members: Sequence[Member], *, seed: int, world: int) -> None:
    """Give the members one head, fitted on what all of them read side by side; on every rank alike.

    The mean of the members' logits is the fused head's: each has its part of the weights times their number. A bias
    that no member can hold is left to the calibration.
    """
    count = len(members)
    for place, task in enumerate(members[0].tasks):
        clock = time.monotonic()
        reads, fits = [member.reads[place] for member in members], [member.found[place] for member in members]
        read = np.concatenate([one.train for one in reads], axis=1)
        features, head, bias = _fit_head(read, task.train, world, seed)
        ends = np.cumsum([one.train.shape[1] for one in reads])[:-1]
        parts = zip(members, reads, fits, np.split(head, ends), np.split(features, ends, axis=1), strict=True)
        for member, one, fit, part, mine in parts:
            names = [name for name in member.weights if name.rpartition(".")[0] in HEADS]
            weights, left, held = part * count, bias, any(name.endswith(".bias") for name in names)
            if not held:
                weights, left = fold_bias(mine, weights, bias)[0], 0.0
            for name in names:
                whole = member.weights[name].clone()
                whole[place] = torch.as_tensor(left if name.endswith(".bias") else weights, dtype=whole.dtype)
                member.weights[name] = whole
            fit.dev_logits = one.dev @ weights + left
        loss = dev_log_loss(np.mean([fit.dev_logits for fit in fits], axis=0), task.dev, fits[0].shift)
        for fit in fits:
            fit.best_loss = loss
        fits[0].seconds += time.monotonic() - clock
        logger.info("%s: fused probe, dev log-loss %.4f", task.name, loss)


def _engine(
    settings: Settings, chosen: RewardModelSettings, model: Any, dtype: torch.dtype, steps: int, world: int
) -> Engine:
    engine: Engine = init_deepspeed(
        model,
        zero_stage=settings.reward.zero_stage,
        learning_rate=chosen.learning_rate,
        warmup_steps=max(1, steps // 10),
        weight_decay=chosen.weight_decay,
        grad_clip=1.0,
        dtype=dtype,
        world=world,
        total_steps=steps,
    )
    return engine


def _snapshot(engine: Any, best: dict[str, torch.Tensor], *, keep: bool) -> None:
    """Copy the whole weights to host memory; all ranks call, as ZeRO 3 gathers them."""
    for bucket in gather_parameters(engine, 64 << 20):
        if keep:
            best.update({name: tensor.to("cpu", copy=True) for name, tensor in bucket})
