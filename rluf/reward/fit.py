"""Train one reward model, or the members of an ensemble, on one Ray Train worker with a DeepSpeed engine."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rluf.backends.deepspeed import gather_parameters, init_deepspeed
from rluf.config.reward import EnsembleMemberSpec, HeadReading, Pooling, RewardModelSettings
from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.models.lora import merge_lora_weights
from rluf.reward.backbone import (
    HEAD_MODULE_NAMES,
    FrozenPrefix,
    add_layer_adapters,
    build_text_encoder,
    freeze_lowest_layers,
    get_linear_head,
    load_classifier,
)
from rluf.reward.checkpoint import RewardCheckpointer
from rluf.reward.counterfactuals import Counterfactual, make_training_copies
from rluf.reward.debias import (
    SIGN_OFF_SHARE,
    add_context,
    add_sign_off_copies,
    compute_propensity_weights,
    fit_nuisance_offsets,
)
from rluf.reward.encoded_split import encode_split
from rluf.reward.linear_probe import fit_probe, fold_bias_into_weights, set_head_weights
from rluf.reward.losses import build_loss, check_unlabeled_rows
from rluf.reward.shared_backbone import save_head_folders, select_labeled_rows
from rluf.reward.text import TextEncoder, is_truncated
from rluf.reward.trainer import (
    EVAL_BATCH_TOKENS,
    FitResult,
    HeadTask,
    RewardModelTrainer,
    TrainEngine,
    TrainPlan,
    TrainProgress,
    compute_dev_log_loss,
    count_steps,
    gather_objects,
)
from rluf.utils.paths import resolve_cache_folder
from rluf.utils.stats import Floats

logger = logging.getLogger(__name__)

DROPOUT_RATE = 0.1
"""Dropout in training, as BERT was trained; it replaces the backbone's own rate."""
WEIGHT_DECAY = 0.01
"""Weight decay of AdamW, its usual value."""
EARLY_STOPPING_EPOCHS = 2
"""Epochs without a lower dev log-loss before training stops early; one alone is often noise."""
SNAPSHOT_BUCKET_BYTES = 64 << 20
"""Size of the buckets in which the best weights are copied to the host."""


@dataclass(frozen=True, slots=True)
class HeadData:
    """Rows of one head: this rank's shard of the training split, the whole dev split, and the folder of both."""

    head: str
    train_rows: Sequence[Mapping[str, Any]]
    dev_rows: Sequence[Mapping[str, Any]]
    data_folder: Path


class ProbeFeatures(NamedTuple):
    """Head inputs of a task's training and dev rows, [N, H] each, and the cost of computing them."""

    train_features: Floats
    dev_features: Floats
    seconds: float
    token_count: int
    """Tokens read to compute them; 0 if another member's pass computed them."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A trained model: its backbone, weights and encoder, and the task and fit result of each head."""

    backbone_folder: Path
    layer_count: int
    encoder: TextEncoder
    tasks: Sequence[HeadTask]
    fit_results: Sequence[FitResult]
    weights: dict[str, torch.Tensor]
    """Weights that differ from the backbone's, by name; complete on rank 0 only."""
    probe_features: Sequence[ProbeFeatures] = ()
    """Head inputs by head, if a probe was fitted."""
    pooling: Pooling = "last"
    """Tokens that the head reads."""

    def save(self, folders: Sequence[Path]) -> str:
        """Write each head as a Hugging Face folder: float32, with the backbone's own dropout in its config.

        Returns the hash of the backbone if several heads share it, else an empty string.
        """
        model = load_classifier(
            self.backbone_folder, require_all_weights=False, layer_count=self.layer_count, head_count=len(folders)
        )
        model.config.pad_token_id = self.encoder.pad_id
        model.load_state_dict({**model.state_dict(), **merge_lora_weights(self.weights)})
        if len(folders) > 1:
            return save_head_folders(model, self.encoder.tokenizer, folders)
        model.save_pretrained(str(folders[0]))
        self.encoder.tokenizer.save_pretrained(str(folders[0]))
        return ""


def train_ensemble(
    settings: Settings,
    head_data: Sequence[HeadData],
    deadline: float,
    *,
    rank: int = 0,
    world_size: int = 1,
    checkpointer: RewardCheckpointer | None = None,
    save_interval_s: float = float("inf"),
) -> list[TrainedModel]:
    """Train the members of these heads' ensemble (often one), and their shared head if set; see train_member."""
    lead_settings = settings.reward.get_head_settings(head_data[0].head)
    member_count = len(lead_settings.member_specs)
    backbones = {member.backbone for member in lead_settings.member_specs}
    if member_count > 1 and lead_settings.read_at_next_turn and not any(_is_decoder(settings, b) for b in backbones):
        raise ModelError(
            f"read_at_next_turn is set, but all members' backbones ({', '.join(sorted(backbones))}) are encoders, "
            "which cannot predict a next message; set read_at_next_turn=false or add a decoder to members"
        )
    shared_features: dict[tuple[str, str], Floats] = {}
    members = [
        train_member(
            settings,
            head_data,
            member_index,
            deadline,
            rank=rank,
            world_size=world_size,
            checkpointer=checkpointer,
            save_interval_s=save_interval_s,
            shared_features=shared_features,
        )
        for member_index in range(member_count)
    ]
    if lead_settings.ensemble.shared_head:
        _fit_shared_head(members, seed=settings.seed, world_size=world_size)
    return members


def _should_build_counterfactuals(model_settings: RewardModelSettings) -> bool:
    """Whether counterfactual rows are made: a fitted head (no epochs) on labels has no use for them."""
    can_compare = model_settings.epochs > 0 or model_settings.loss == "bradley_terry"
    return can_compare and "counterfactuals" in model_settings.debias


def _has_truncated_rows(settings: Settings, head_data: Sequence[HeadData], world_size: int) -> bool:
    """Whether any training row of any rank is cut at the token limit, so that the model can learn to read the end."""
    has_truncated = any(
        _should_build_counterfactuals(settings.reward.get_head_settings(data.head))
        or any(is_truncated(row, column) for row in data.train_rows for column in ("response", "chosen", "rejected"))
        for data in head_data
    )
    return any(gather_objects(has_truncated, world_size))


def _is_decoder(settings: Settings, backbone: str) -> bool:
    """Whether the backbone is a decoder: its tokenizer has no CLS token."""
    return load_tokenizer(resolve_model(backbone, resolve_cache_folder(settings))).cls_token_id is None


def train_member(
    settings: Settings,
    head_data: Sequence[HeadData],
    member_index: int,
    deadline: float,
    *,
    rank: int = 0,
    world_size: int = 1,
    checkpointer: RewardCheckpointer | None = None,
    save_interval_s: float = float("inf"),
    shared_features: dict[tuple[str, str], Floats] | None = None,
) -> TrainedModel:
    """Train one ensemble member (0 for a single model) on rank `rank` of `world_size`, in step with the other ranks.

    One entry of `head_data` is a separate model, several are heads of one backbone; the first one's settings apply.
    With a `checkpointer`, progress is saved every `save_interval_s` seconds and training resumes from the last save.
    `shared_features`, empty before the first member, lets members that differ only in depth share one pass over the
    rows. Epochs need an initialized process group. Raises DataError, ModelError, DeadlineError.
    """
    lead_settings = settings.reward.get_head_settings(head_data[0].head)
    member_count = len(lead_settings.member_specs)
    member = lead_settings.member_specs[member_index]
    if not member.uses_section_backbone:
        # The section's epochs, learning rate and frozen share are tuned for its own backbone: only fit a head.
        probe_only = {"linear_probe": True, "epochs": 0, "frozen_share": 1, "lora_rank": 0}
        lead_settings = lead_settings.model_copy(update=probe_only)
    readings = (member.reading,) if shared_features is None else lead_settings.list_shared_readings(member)
    backbone_folder = resolve_model(member.backbone, resolve_cache_folder(settings))
    torch.manual_seed((settings.seed + member_index) * 1009 + rank)  # another dropout mask on every rank
    device = f"cuda:{torch.cuda.current_device()}" if settings.cluster.reward_training_gpus > 0 else "cpu"
    model = load_classifier(
        backbone_folder, require_all_weights=False, device=device, dropout=DROPOUT_RATE,
        seed=settings.seed + member_index, layer_count=max(reading.layers for reading in readings),
        head_count=len(head_data),
    )  # fmt: skip
    encoder = _build_member_encoder(
        lead_settings, member, model, backbone_folder,
        mark_truncated=_has_truncated_rows(settings, head_data, world_size),
    )  # fmt: skip
    tasks = [_build_task(settings, data, encoder, index, world_size) for index, data in enumerate(head_data)]
    plan = _build_plan(settings, lead_settings, member_index, rank, world_size, deadline, save_interval_s)
    frozen_layers = freeze_lowest_layers(model, lead_settings.frozen_share)
    model_name = "+".join(task.name for task in tasks)
    model_name += "" if member_count < 2 else f" {member_index + 1} of {member_count}"
    _log_training_size(model_name, model, tasks)
    weights: dict[str, torch.Tensor] = {}
    progress = TrainProgress([FitResult() for _ in tasks])
    probe_features: list[ProbeFeatures] = []
    if lead_settings.linear_probe:
        # In float32 whatever the training dtype: RewardModel scores in float32, and a head fitted on bfloat16 features
        # is calibrated on logits that differ by up to 0.05 from those it later gives.
        probe_trainer = RewardModelTrainer(model, encoder, plan)
        shared_features = {} if shared_features is None else shared_features
        probe_features = [
            _compute_probe_features(probe_trainer, task, member, readings, shared_features) for task in tasks
        ]
        has_shared_head = lead_settings.ensemble.shared_head
        fit_head = _add_zero_head if has_shared_head else partial(_fit_probe_head, seed=settings.seed)
        progress.fit_results = [
            fit_head(probe_trainer, task, features, weights)
            for task, features in zip(tasks, probe_features, strict=True)
        ]
        _log_probe(model_name, progress, has_shared_head=has_shared_head)
    if lead_settings.epochs:
        model.to(getattr(torch, settings.reward_dtype))
        frozen_prefix = _build_frozen_prefix(settings, model, frozen_layers, tasks)
        trainer = RewardModelTrainer(model, encoder, plan, frozen_prefix)
        if lead_settings.lora_rank:
            add_layer_adapters(model, lead_settings.lora_rank, frozen_layers, DROPOUT_RATE)
        progress = _train_epochs(
            settings, lead_settings, model, trainer, tasks, progress, weights, checkpointer, model_name
        )
    return TrainedModel(
        backbone_folder, member.layers, encoder, tasks, progress.fit_results, weights, probe_features,
        pooling=member.pooling,
    )  # fmt: skip


def _build_member_encoder(
    lead_settings: RewardModelSettings,
    member: EnsembleMemberSpec,
    model: Any,
    backbone_folder: Path,
    *,
    mark_truncated: bool,
) -> TextEncoder:
    """Text encoder of an ensemble member. Raises ModelError for an encoder with another pooling than its own."""
    encoder = build_text_encoder(
        model,
        backbone_folder,
        lead_settings.token_limit,
        read_at_next_turn=lead_settings.read_at_next_turn,
        is_single_model=len(lead_settings.member_specs) < 2,
        response_only=member.response_only,
        mark_truncated=mark_truncated,
        locate_responses=lead_settings.reads_response_tokens,
    )
    if member.pooling != "last" and encoder.uses_text_pairs:
        raise ModelError(
            f"a member on {member.backbone} has pooling: {member.pooling}, but an encoder has a pooler of its own; "
            "remove pooling from this member or name a decoder"
        )
    return encoder


def _build_plan(
    settings: Settings,
    model_settings: RewardModelSettings,
    member_index: int,
    rank: int,
    world_size: int,
    deadline: float,
    save_interval_s: float,
) -> TrainPlan:
    """Training plan of an ensemble member on this rank."""
    return TrainPlan(
        epochs=model_settings.epochs, batch_rows=max(1, model_settings.batch_rows // world_size),
        batch_tokens=EVAL_BATCH_TOKENS, seed=settings.seed + member_index, rank=rank, world_size=world_size,
        patience=EARLY_STOPPING_EPOCHS, deadline=deadline, save_interval_s=save_interval_s,
    )  # fmt: skip


def _log_probe(model_name: str, progress: TrainProgress, *, has_shared_head: bool) -> None:
    if not has_shared_head:
        dev_losses = ", ".join(f"{result.best_loss:.4f}" for result in progress.fit_results)
        logger.info("%s: linear probe dev_log_loss=%s", model_name, dev_losses)


def _build_frozen_prefix(
    settings: Settings, model: Any, frozen_layers: int, tasks: Sequence[HeadTask]
) -> FrozenPrefix | None:
    """Cache of the frozen layers' output, if it fits; None at ZeRO stage 3, which partitions the layers' weights."""
    token_count = sum(task.train_split.token_count + task.dev_split.token_count for task in tasks)
    if settings.reward.zero_stage == 3 or not FrozenPrefix.is_worthwhile(model, frozen_layers, token_count):
        return None
    return FrozenPrefix(model, frozen_layers)


def _log_training_size(model_name: str, model: torch.nn.Module, tasks: Sequence[HeadTask]) -> None:
    parameters = list(model.parameters())
    logger.info(
        "%s: training rows=%d tokens=%d trainable=%.1fM of %.1fM weights",
        model_name,
        sum(len(task.train_split) for task in tasks),
        sum(task.train_split.token_count for task in tasks),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6,
        sum(parameter.numel() for parameter in parameters) / 1e6,
    )


def _train_epochs(
    settings: Settings,
    model_settings: RewardModelSettings,
    model: Any,
    trainer: RewardModelTrainer,
    tasks: Sequence[HeadTask],
    progress: TrainProgress,
    best_weights: dict[str, torch.Tensor],
    checkpointer: RewardCheckpointer | None,
    model_name: str,
) -> TrainProgress:
    """Run the epochs from the last checkpoint on, copying the best weights to `best_weights` on rank 0."""
    plan = trainer.plan
    total_steps = plan.epochs * sum(count_steps(len(task.train_split), plan) for task in tasks)
    engine = _init_engine(settings, model_settings, model, total_steps, plan.world_size)
    if checkpointer is not None:
        progress = checkpointer.restore(model_name, engine, progress, best_weights)

    def log_epoch(task_name: str, metrics: Mapping[str, float]) -> None:
        logger.info(
            "%s: epoch %d of %d train_loss=%.4f dev_log_loss=%.4f", task_name if len(tasks) > 1 else model_name,
            metrics["epoch"], plan.epochs, metrics["train_loss"], metrics["dev_log_loss"],
        )  # fmt: skip

    def save_progress(current_progress: TrainProgress) -> None:
        if checkpointer is not None:
            checkpointer.save(model_name, engine, current_progress, best_weights)

    trainer.fit(
        engine,
        tasks,
        progress,
        on_best=lambda: _copy_best_weights(engine, best_weights, should_store=plan.rank == 0),
        on_epoch=log_epoch,
        on_save=save_progress,
    )
    return progress


def _build_task(
    settings: Settings, head_data: HeadData, encoder: TextEncoder, head_index: int, world_size: int
) -> HeadTask:
    """Encode the head's rows and weight them by its own settings."""
    head_settings = settings.reward.get_head_settings(head_data.head)
    is_pairwise = head_settings.loss == "bradley_terry"
    train_source, dev_source = (f"{head_data.data_folder}/{split}.parquet" for split in ("train", "dev"))
    records = select_labeled_rows(head_data.head, head_data.train_rows, train_source)
    log_rows, sign_off_share = records, SIGN_OFF_SHARE if "sign_offs" in head_settings.debias else 0.0
    records, copy_sources = add_sign_off_copies(log_rows, sign_off_share, is_pairwise=is_pairwise, seed=settings.seed)
    if head_settings.loss == "nnpu":
        check_unlabeled_rows(log_rows, train_source)
    counterfactuals: list[Counterfactual] = []
    if _should_build_counterfactuals(head_settings):
        copies, counterfactuals = make_training_copies(log_rows, is_pairwise=is_pairwise, seed=settings.seed)
        records = [*records, *copies]
        counts = Counter(counterfactual.kind for counterfactual in counterfactuals)
        logger.info("%s: counterfactual rows %s", head_data.head, " ".join(f"{k}={n}" for k, n in counts.items()))
    train_split = encode_split(records, encoder, is_pairwise=is_pairwise, source_name=train_source)
    train_split = replace(
        train_split,
        copy_sources=np.asarray([*copy_sources, *(c.source_index for c in counterfactuals)], dtype=np.int64),
        counterfactual_count=len(counterfactuals),
    )
    dev_records = select_labeled_rows(head_data.head, head_data.dev_rows, dev_source)
    dev_split = encode_split(dev_records, encoder, is_pairwise=is_pairwise, source_name=dev_source)
    if not is_pairwise and len(set(train_split.labels.tolist())) < 2:
        raise DataError(f"{train_source} has rows of one label only; a model needs both labels, use a larger log")
    # Only reactions have a propensity: the other heads' labels do not depend on who happened to react.
    if "propensity" in head_settings.debias and head_data.head in ("love", "thumbs", "dislike"):
        propensity = np.asarray([float(row["propensity"]) for row in records if "propensity" in row])
        if len(propensity) < len(train_split):
            raise DataError(f"{train_source} has no column propensity; run rluf.prepare again")
        loss_factors = compute_propensity_weights(
            propensity, train_split.labels, all_reacted=head_data.head == "thumbs"
        )
        train_split = replace(train_split, loss_factors=loss_factors)
    if "context" in head_settings.debias and not is_pairwise:
        train_split, dev_split = add_context(train_split, records, dev_split, dev_records, world_size)
    if {"length", "users"} & set(head_settings.debias):
        logit_offsets = fit_nuisance_offsets(train_split, head_settings.debias, world_size, head=head_data.head)
        train_split = replace(train_split, logit_offsets=logit_offsets)
    return HeadTask(head_data.head, train_split, dev_split, build_loss(head_settings), head_index)


def _compute_probe_features(
    trainer: RewardModelTrainer,
    task: HeadTask,
    member: EnsembleMemberSpec,
    readings: Sequence[HeadReading],
    shared_features: dict[tuple[str, str], Floats],
) -> ProbeFeatures:
    """Head inputs of this member; those of other readings stay in `shared_features`, by backbone input and task."""
    start_time, token_count = time.monotonic(), task.train_split.token_count
    if len(readings) == 1:
        return ProbeFeatures(
            trainer.compute_features(task.train_split, readings)[0],
            trainer.compute_features(task.dev_split, readings)[0],
            time.monotonic() - start_time,
            token_count,
        )
    key = (f"{member.backbone}:response" if member.response_only else member.backbone, task.name)
    if key in shared_features:
        token_count = 0
    else:
        # The model was loaded with the deepest of the depths, so its pass reads for the other members too.
        splits = (task.train_split, task.dev_split)
        shared_features[key] = np.concatenate([trainer.compute_features(split, readings) for split in splits], axis=1)
    features = shared_features[key][readings.index(member.reading)]
    train_count = len(task.train_split.sequences)
    return ProbeFeatures(features[:train_count], features[train_count:], time.monotonic() - start_time, token_count)


def _add_zero_head(
    trainer: RewardModelTrainer, task: HeadTask, probe_features: ProbeFeatures, best_weights: dict[str, torch.Tensor]
) -> FitResult:
    """Put a head of zeros into `best_weights`, to be filled by _fit_shared_head; returns a result without a loss."""
    hidden_size = probe_features.train_features.shape[1]
    best_weights.update(set_head_weights(trainer.model, np.zeros(hidden_size), 0.0, task.head_index))
    prior_shift = 0.0 if task.train_split.is_pairwise else trainer.gather_prior_shift(task.train_split)
    return FitResult(
        prior_shift=prior_shift, token_count=probe_features.token_count, train_seconds=probe_features.seconds
    )


def _fit_probe_head(
    trainer: RewardModelTrainer,
    task: HeadTask,
    probe_features: ProbeFeatures,
    best_weights: dict[str, torch.Tensor],
    *,
    seed: int,
) -> FitResult:
    """Fit the task's head on the rows of all ranks, put it into the model and `best_weights`; equal on every rank."""
    start_time, train_split = time.monotonic(), task.train_split
    features, head_weights, bias = _fit_head_weights(probe_features.train_features, task, trainer.plan.world_size, seed)
    has_bias = get_linear_head(trainer.model).bias is not None
    if not has_bias:
        head_weights, bias = fold_bias_into_weights(features, head_weights, bias)
    best_weights.update(set_head_weights(trainer.model, head_weights, bias, task.head_index))
    prior_shift = 0.0 if train_split.is_pairwise else trainer.gather_prior_shift(train_split)
    dev_logits = probe_features.dev_features @ head_weights + (bias if has_bias else 0.0)
    return FitResult(
        best_epoch=-1,
        best_loss=compute_dev_log_loss(dev_logits, task.dev_split, prior_shift),
        dev_logits=dev_logits,
        prior_shift=prior_shift,
        token_count=probe_features.token_count,
        train_seconds=time.monotonic() - start_time + probe_features.seconds,
    )


def _fit_head_weights(
    train_features: Floats, task: HeadTask, world_size: int, seed: int
) -> tuple[Floats, Floats, float]:
    """Gather the features [N, H] of all ranks and fit a head; returns features, weights [H] and bias.

    Copies with a sign-off are not rows of the fit: the change of the logit that a sign-off causes is penalized.
    Counterfactual copies are rows of a fit of pairs only: see rluf.reward.losses.compute_step_loss.
    """
    split = task.train_split
    first_counterfactual = len(split) - split.counterfactual_count
    fit_rows = [*range(split.original_count), *(range(first_counterfactual, len(split)) if split.is_pairwise else ())]
    fit_sequences = split.list_sequence_indices(fit_rows)
    sign_off_rows = range(split.original_count, first_counterfactual)
    sign_off_sources = split.copy_sources[: len(sign_off_rows)].tolist()
    changes = (
        train_features[split.list_sequence_indices(sign_off_rows)]
        - train_features[split.list_sequence_indices(sign_off_sources)]
    )
    offsets = split.logit_offsets if split.logit_offsets.size else np.zeros(len(train_features))
    local_shard = (
        split.labels[fit_rows],
        split.loss_weights[fit_rows],
        [split.clusters[row] for row in fit_rows],
        train_features[fit_sequences],
        offsets[fit_sequences],
        # The H x H moment in place of the changes themselves: its size does not grow with the number of copies.
        changes.T @ changes,
        len(changes),
        split.context_columns[fit_rows] if split.context_columns.size else np.zeros((len(fit_rows), 0)),
    )
    shards = gather_objects(local_shard, world_size)
    labels, weights, covariates = (np.concatenate([shard[column] for shard in shards]) for column in (0, 1, 7))
    clusters = [cluster for shard in shards for cluster in shard[2]]
    # For pairs, each rank has chosen before rejected; the fit needs the chosen responses of all ranks first.
    responses_per_row = 1 + split.is_pairwise
    features, offsets = (
        np.concatenate([values[index] for index in range(responses_per_row) for values in values_by_rank])
        for values_by_rank in ([np.split(shard[column], responses_per_row) for shard in shards] for column in (3, 4))
    )
    change_moment = sum(shard[5] for shard in shards) / max(1, sum(shard[6] for shard in shards))
    head_weights, bias, strength = fit_probe(
        features, labels, weights, clusters, is_pairwise=split.is_pairwise, seed=seed, logit_offsets=offsets,
        change_moment=change_moment, covariates=covariates,
    )  # fmt: skip
    logger.info("%s: linear probe C=%g", task.name, strength)
    return features, head_weights, bias


def _fit_shared_head(members: Sequence[TrainedModel], *, seed: int, world_size: int) -> None:
    """Fit one head on the concatenated features of all members and distribute its weights; equal on every rank.

    A bias that no member's head can store is left to the calibration.
    """
    member_count = len(members)
    for head_index, task in enumerate(members[0].tasks):
        start_time = time.monotonic()
        features_by_member = [member.probe_features[head_index] for member in members]
        results = [member.fit_results[head_index] for member in members]
        joint_features = np.concatenate([features.train_features for features in features_by_member], axis=1)
        all_features, head_weights, bias = _fit_head_weights(joint_features, task, world_size, seed)
        boundaries = np.cumsum([features.train_features.shape[1] for features in features_by_member])[:-1]
        weights_by_member = np.split(head_weights, boundaries)
        train_features_by_member = np.split(all_features, boundaries, axis=1)
        for member_index, (member, result) in enumerate(zip(members, results, strict=True)):
            # Scoring averages the members' logits. With its weights times their number and the whole bias in every
            # member, the mean is the logit of the shared head.
            member_weights, member_bias = weights_by_member[member_index] * member_count, bias
            parameter_names = [name for name in member.weights if name.rpartition(".")[0] in HEAD_MODULE_NAMES]
            if not any(name.endswith(".bias") for name in parameter_names):
                member_weights, _ = fold_bias_into_weights(train_features_by_member[member_index], member_weights, bias)
                member_bias = 0.0
            for name in parameter_names:
                parameter = member.weights[name].clone()
                value = member_bias if name.endswith(".bias") else member_weights
                parameter[head_index] = torch.as_tensor(value, dtype=parameter.dtype)
                member.weights[name] = parameter
            result.dev_logits = features_by_member[member_index].dev_features @ member_weights + member_bias
        mean_logits = np.mean([result.dev_logits for result in results], axis=0)
        loss = compute_dev_log_loss(mean_logits, task.dev_split, results[0].prior_shift)
        for result in results:
            result.best_loss = loss
        results[0].train_seconds += time.monotonic() - start_time
        logger.info("%s: shared head fitted dev_log_loss=%.4f", task.name, loss)


def _init_engine(
    settings: Settings, model_settings: RewardModelSettings, model: Any, total_steps: int, world_size: int
) -> TrainEngine:
    engine: TrainEngine = init_deepspeed(
        model, zero_stage=settings.reward.zero_stage, learning_rate=model_settings.learning_rate,
        warmup_steps=max(1, total_steps // 10), weight_decay=WEIGHT_DECAY,
        dtype=getattr(torch, settings.reward_dtype), world_size=world_size, total_steps=total_steps,
        device=next(model.parameters()).device,
    )  # fmt: skip
    return engine


def _copy_best_weights(engine: Any, best_weights: dict[str, torch.Tensor], *, should_store: bool) -> None:
    """Copy the full weights to host memory where `should_store`; all ranks must call, as ZeRO 3 gathers them."""
    for bucket in gather_parameters(engine, SNAPSHOT_BUCKET_BYTES):
        if should_store:
            best_weights.update({name: tensor.to("cpu", copy=True) for name, tensor in bucket})
