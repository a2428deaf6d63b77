"""Training of one reward model, or of one member of an ensemble, on one Ray Train worker with a DeepSpeed engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rluf.config.reward import MemberPlan, RewardModelSettings
from rluf.config.settings import Settings
from rluf.engine.deepspeed import gather_parameters, init_deepspeed
from rluf.errors import DataError
from rluf.models import resolve_model
from rluf.objectives import losses
from rluf.objectives.augment import with_sign_offs
from rluf.objectives.backbone import encoder_for, freeze, load_classifier
from rluf.objectives.calibration import Floats
from rluf.objectives.lora import add_lora, merged
from rluf.objectives.prefix import FrozenPrefix
from rluf.objectives.probe import HEADS, fit_probe, fold_bias, linear_head, set_head
from rluf.objectives.text import TextEncoder
from rluf.objectives.training import Engine, Fit, Loss, Plan, Rows, Trainer, dev_log_loss, encode_rows, gathered
from rluf.paths import cache_dir

logger = logging.getLogger(__name__)

EVAL_TOKENS = 4096
"""Padded tokens of a forward pass without gradient."""


@dataclass(frozen=True, slots=True)
class Splits:
    """This rank's shard of the training split, the whole dev split, and the folder both come from."""

    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]]
    folder: Path


@dataclass(frozen=True, slots=True)
class Member:
    """A trained model: where it came from, its weights, and what was found on the way."""

    backbone: Path
    layers: int
    encoder: TextEncoder
    rows: Rows
    dev: Rows
    found: Fit
    weights: dict[str, torch.Tensor]
    """Weights that differ from the backbone's, by name; complete on rank 0 only."""

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face folder: float32, with the backbone's own dropout in its config."""
        model = load_classifier(self.backbone, trained=False, layers=self.layers)
        model.config.pad_token_id = self.encoder.pad_id
        model.load_state_dict({**model.state_dict(), **merged(self.weights)})
        model.save_pretrained(str(folder))
        self.encoder.tokenizer.save_pretrained(str(folder))


def balance(members: Sequence[Member]) -> None:
    """Scale the members' heads so that their logits vary equally on dev: the mean is then no matter of who is loudest.

    A head fitted with much regularisation and a backbone trained for some epochs differ manifold in spread.
    """
    spreads = [float(member.found.dev_logits.std()) for member in members]
    if len(members) < 2 or min(spreads) <= 0:
        return
    for member, spread in zip(members, spreads, strict=True):
        factor = float(np.mean(spreads)) / spread
        member.found.dev_logits = member.found.dev_logits * factor
        for name in [name for name in member.weights if name.rpartition(".")[0] in HEADS]:
            member.weights[name] = member.weights[name] * factor


def train_member(
    settings: Settings,
    objective: str,
    splits: Splits,
    number: int,
    deadline: float,
    *,
    rank: int = 0,
    world: int = 1,
    shared: dict[str, Floats] | None = None,
) -> Member:
    """Train member `number` (0 for a single model) on rank `rank` of `world`, in step with the others.

    `shared`, empty before the first member, lets members that differ in depth alone read the rows in one pass.

    The process group must exist where there is an epoch to train. Raises DataError, ModelError, StallError.
    """
    chosen = settings.reward.named[objective]
    plan_of = chosen.members[number]
    if not plan_of.own:
        chosen = chosen.model_copy(update={"probe": True, "epochs": 0, "frozen_share": 1, "lora_rank": 0})
    device = f"cuda:{torch.cuda.current_device()}" if settings.cluster.gpus_per_reward > 0 else "cpu"
    depths = chosen.depths(plan_of)
    backbone = resolve_model(plan_of.backbone, cache_dir(settings))
    torch.manual_seed((settings.seed + number) * 1009 + rank)
    model = load_classifier(
        backbone,
        trained=False,
        device=device,
        dropout=chosen.dropout,
        seed=settings.seed + number,
        layers=max(depths),
    )
    encoder = encoder_for(model, backbone, chosen.max_tokens, next_turn=chosen.next_turn, own=plan_of.own)
    rows, dev = _rows(splits, encoder, chosen, settings.seed)
    per_rank = max(1, chosen.batch_rows // world)
    plan = Plan(
        epochs=chosen.epochs,
        batch_rows=per_rank,
        batch_tokens=EVAL_TOKENS,
        steps=-(-_most_rows(len(rows), world) // per_rank),
        seed=settings.seed + number,
        rank=rank,
        world=world,
        loss=loss_of(chosen),
        patience=chosen.patience,
        deadline=deadline,
    )
    frozen = freeze(model, chosen.frozen_share)
    name = objective if len(chosen.members) < 2 else f"{objective} {number + 1} of {len(chosen.members)}"
    trained, every = model.num_parameters(only_trainable=True) / 1e6, model.num_parameters() / 1e6
    logger.info("%s: %d rows, %d tokens, %.1fM of %.1fM weights train", name, len(rows), rows.tokens, trained, every)
    dtype = getattr(torch, settings.reward_dtype)
    model.to(dtype)
    prefix = None
    tokens = rows.tokens + dev.tokens
    if chosen.epochs and settings.reward.zero_stage < 3 and FrozenPrefix.worthwhile(model, frozen, tokens):
        prefix = FrozenPrefix(model, frozen)
    trainer = Trainer(model, encoder, plan, prefix)
    weights: dict[str, torch.Tensor] = {}
    found = Fit()
    if chosen.probe:
        read = _read(trainer, rows, dev, plan_of, depths, {} if shared is None else shared)
        found = _probe(trainer, rows, dev, read, settings.seed, weights)
        logger.info("%s: probe, dev log-loss %.4f", name, found.best_loss)
    if chosen.lora_rank:
        add_lora(model, chosen.lora_rank, frozen, chosen.dropout)
    if chosen.epochs:
        engine = _engine(settings, chosen, model, dtype, plan)
        trainer.fit(
            engine,
            rows,
            dev,
            found,
            snapshot=lambda: _snapshot(engine, weights, keep=rank == 0),
            report=lambda f: logger.info(
                "%s: epoch %d of %d, train loss %.4f, dev log-loss %.4f",
                name,
                f["epoch"],
                plan.epochs,
                f["train_loss"],
                f["dev_log_loss"],
            ),
        )
    return Member(backbone, plan_of.layers, encoder, rows, dev, found, weights)


def _rows(splits: Splits, encoder: TextEncoder, chosen: RewardModelSettings, seed: int) -> tuple[Rows, Rows]:
    """This rank's training rows, sign-offs added, and dev. Raises DataError when the rows have one label only."""
    pairs = chosen.loss == "bradley_terry"
    records = with_sign_offs(splits.train, chosen.sign_offs, pairs=pairs, seed=seed)
    rows = encode_rows(records, encoder, pairs=pairs, where=f"{splits.folder}/train.parquet")
    dev = encode_rows(splits.dev, encoder, pairs=pairs, where=f"{splits.folder}/dev.parquet")
    if not pairs and len(set(rows.labels.tolist())) < 2:
        raise DataError(
            f"{splits.folder}/train.parquet holds one label only; a model needs rows of both, use a larger log"
        )
    return rows, dev


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
    trainer: Trainer, rows: Rows, dev: Rows, member: MemberPlan, depths: Sequence[int], shared: dict[str, Floats]
) -> tuple[Floats, Floats]:
    """What this member's head reads of the rows and of dev, [N, H] each; the siblings' share stays in `shared`."""
    if len(depths) == 1:
        return trainer.features(rows)[0], trainer.features(dev)[0]
    if member.backbone not in shared:
        shared[member.backbone] = np.concatenate([trainer.features(part, depths) for part in (rows, dev)], axis=1)
    every = shared[member.backbone][depths.index(member.layers)]
    return every[: len(rows.sequences)], every[len(rows.sequences) :]


def _probe(
    trainer: Trainer,
    rows: Rows,
    dev: Rows,
    read: tuple[Floats, Floats],
    seed: int,
    weights: dict[str, torch.Tensor],
) -> Fit:
    """Fit the head on all ranks' rows and put it into the model and into `weights`; the same on every rank.

    `read` is what the head reads of the rows and of dev.
    """
    clock = time.monotonic()
    shards = gathered((read[0], rows.labels, rows.loss_weights, rows.clusters), trainer.plan.world)
    halves = [np.split(shard[0], 2) if rows.pairs else [shard[0]] for shard in shards]
    features = np.concatenate([half[side] for side in range(1 + rows.pairs) for half in halves])
    head, bias, strength = fit_probe(
        features,
        np.concatenate([shard[1] for shard in shards]),
        np.concatenate([shard[2] for shard in shards]),
        [cluster for shard in shards for cluster in shard[3]],
        pairs=rows.pairs,
        seed=seed,
    )
    logger.info("probe: regularisation C=%g", strength)
    has_bias = linear_head(trainer.model).bias is not None
    if not has_bias:
        head, bias = fold_bias(features, head, bias)
    weights.update(set_head(trainer.model, head, bias))
    shift = 0.0 if rows.pairs else trainer.shift(rows)
    logits = read[1] @ head + (bias if has_bias else 0.0)
    loss = dev_log_loss(logits, dev, shift)
    return Fit(-1, loss, logits, shift, rows.tokens, time.monotonic() - clock)


def _engine(settings: Settings, chosen: RewardModelSettings, model: Any, dtype: torch.dtype, plan: Plan) -> Engine:
    steps = plan.steps * plan.epochs
    engine: Engine = init_deepspeed(
        model,
        zero_stage=settings.reward.zero_stage,
        learning_rate=chosen.learning_rate,
        warmup_steps=max(1, steps // 10),
        weight_decay=chosen.weight_decay,
        grad_clip=1.0,
        dtype=dtype,
        world=plan.world,
        total_steps=steps,
    )
    return engine


def _most_rows(rows: int, world: int) -> int:
    """Rows of the rank that has most."""
    if world == 1:
        return rows
    count = torch.tensor(rows)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count)


def _snapshot(engine: Any, best: dict[str, torch.Tensor], *, keep: bool) -> None:
    """Copy the whole weights to host memory; all ranks call, as ZeRO 3 gathers them."""
    for bucket in gather_parameters(engine, 64 << 20):
        if keep:
            best.update({name: tensor.to("cpu", copy=True) for name, tensor in bucket})
