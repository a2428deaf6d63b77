"""Export trained reward models as checkpoint folders with calibration and card; learning curve."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.config.settings import Settings
from rluf.errors import ModelError, RlufError
from rluf.reward.backbone import HEAD_MODULE_NAMES
from rluf.reward.calibration import CARD_FILE, Calibration, fit_member_weights
from rluf.reward.card import (
    build_reward_card,
    compare_models,
    compute_slices,
    fit_calibration,
    measure_robustness,
    summarize_training,
)
from rluf.reward.card_page import CARD_PAGE_FILE, render_card_page
from rluf.reward.counterfactuals import measure_prompt_fit, should_measure_prompt_fit
from rluf.reward.encoded_split import EncodedSplit, encode_split
from rluf.reward.model import RewardModel, get_member_folder
from rluf.reward.shared_backbone import get_head_label, select_labeled_rows
from rluf.reward.text import list_length_warnings, summarize_truncation
from rluf.reward.trainer import EVAL_BATCH_TOKENS, HeadTask
from rluf.utils.files import atomic_write, replace_folder
from rluf.utils.stats import Floats

if TYPE_CHECKING:
    from rluf.reward.fit import TrainedModel

logger = logging.getLogger(__name__)


def read_split_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a split. Used for dev and test, which every rank needs whole: a Ray Data run would cost more."""
    import pyarrow.parquet

    records: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path)).to_pylist()
    return records


def subsample_rows(records: Sequence[Mapping[str, Any]], share: float, head: str) -> list[Mapping[str, Any]]:
    """About `share` of the rows of each of the head's labels, evenly spread; equal at every call.

    Rows without a label of their own (pairs, and rows that the head does not use) count as one more label.
    """
    count_by_label: dict[Any, int] = {}
    sampled_rows = []
    for row in records:
        label = get_head_label(head, row)
        count_by_label[label] = count = count_by_label.get(label, 0) + 1
        # The first row of a label always stays: a model cannot be trained without it.
        if int(count * share) > int((count - 1) * share) or count == 1:
            sampled_rows.append(row)
    return sampled_rows


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One head to export: its prepared data, output folder, staging folder, and an earlier model to compare with."""

    head: str
    data_folder: Path
    output_folder: Path
    staging_folder: Path
    earlier_model: Path | None


def equalize_member_spreads(members: Sequence[TrainedModel]) -> None:
    """Scale the members' heads to logits of equal standard deviation on dev, so that their probabilities compare.

    The spread of a strongly regularized probe and that of a backbone trained for some epochs differ many times over.
    """
    for head_index in range(len(members[0].tasks)):
        results = [member.fit_results[head_index] for member in members]
        spreads = [float(result.dev_logits.std()) for result in results]
        parameter_names = [
            [name for name in member.weights if name.rpartition(".")[0] in HEAD_MODULE_NAMES] for member in members
        ]
        if len(members) < 2 or min(spreads) <= 0 or not all(parameter_names):
            continue
        for member, result, spread, names in zip(members, results, spreads, parameter_names, strict=True):
            factor = float(np.mean(spreads)) / spread
            result.dev_logits = result.dev_logits * factor
            for name in names:
                scaled_parameter = member.weights[name].clone()
                scaled_parameter[head_index] *= factor
                member.weights[name] = scaled_parameter


def export_models(
    settings: Settings,
    outputs: Mapping[str, tuple[Path, Path]],
    members: Sequence[TrainedModel],
    start_time: float,
    *,
    full_card: bool,
    earlier_models: Mapping[str, Path] | None = None,
) -> None:
    """Calibrate the trained members together and write a checkpoint folder per head; called on rank 0 only.

    `outputs` maps a head to (its prepared data, the folder to write). Each model is loaded back through RewardModel,
    evaluated on the test split, and renamed into place when all are complete. `start_time` is time.monotonic() when
    training started. Raises ModelError when the disk cannot be written.
    """
    jobs = [
        ExportJob(
            head=head,
            data_folder=data_folder,
            output_folder=output_folder,
            staging_folder=output_folder.with_name(f".{output_folder.name}-{uuid.uuid4().hex[:8]}"),
            earlier_model=(earlier_models or {}).get(head),
        )
        for head, (data_folder, output_folder) in outputs.items()
    ]
    has_shared_head = settings.reward.get_head_settings(members[0].tasks[0].name).ensemble.shared_head
    # The members' logits under a shared head are terms of one sum: scaling them apart would change the sum.
    if not has_shared_head:
        equalize_member_spreads(members)
    try:
        backbone_hashes = [
            member.save([get_member_folder(job.staging_folder, member_index) for job in jobs])
            for member_index, member in enumerate(members)
        ]
        backbone_hash = "-".join(filter(None, backbone_hashes))
        for head_index, job in enumerate(jobs):
            calibration = _build_base_calibration(members, head_index, backbone_hash, shared_head=has_shared_head)
            calibration.save(job.staging_folder)  # RewardModel.load reads it below
            if any(member.fit_results[head_index].best_epoch >= 0 for member in members):
                _rescore_dev_split(settings, job, members, head_index)
            _fit_head_calibration(members, head_index, calibration).save(job.staging_folder)
            _write_card(settings, job, members, head_index, start_time, full_card=full_card)
        for job in jobs:
            replace_folder(job.staging_folder, job.output_folder)
            logger.info("%s: exported to %s after %.1f s", job.head, job.output_folder, time.monotonic() - start_time)
    except OSError as error:
        folders = ", ".join(str(job.output_folder) for job in jobs)
        raise ModelError(f"the reward model could not be written to {folders}: {error}; free some disk") from error
    finally:
        for job in jobs:
            shutil.rmtree(job.staging_folder, ignore_errors=True)


def _rescore_dev_split(settings: Settings, job: ExportJob, members: Sequence[TrainedModel], head_index: int) -> None:
    """Replace the dev logits of a head by those of the written model, computed by RewardModel.

    Epochs run in the training dtype, partly on rounded hidden states of frozen layers. Calibration must be fitted on
    the float32 logits that the model gives from then on.
    """
    model = RewardModel.load(job.staging_folder, batch_tokens=EVAL_BATCH_TOKENS)
    path = job.data_folder / "dev.parquet"
    dev_split = encode_split(
        select_labeled_rows(job.head, read_split_rows(path), str(path)),
        model.encoder,
        is_pairwise=settings.reward.get_head_settings(job.head).loss == "bradley_terry",
        source_name=str(path),
    )
    for member, dev_logits in zip(members, model.compute_member_logits(dev_split.sequences), strict=True):
        member.fit_results[head_index].dev_logits = dev_logits


def _build_base_calibration(
    members: Sequence[TrainedModel], head_index: int, backbone_hash: str, *, shared_head: bool
) -> Calibration:
    """Calibration that describes the input format and members of a head, with nothing fitted yet."""
    poolings = tuple(member.pooling for member in members)
    return Calibration(
        members[0].tasks[head_index].name,
        prior_shift=members[0].fit_results[head_index].prior_shift,
        max_tokens=max(member.encoder.max_tokens for member in members),
        member_count=len(members),
        shared_head=shared_head,
        read_at_next_turn=any(member.encoder.read_at_next_turn for member in members),
        mark_truncated=any(member.encoder.mark_truncated for member in members),
        response_only_members=tuple(i for i, member in enumerate(members) if member.encoder.response_only),
        member_poolings=poolings if any(pooling != "last" for pooling in poolings) else (),
        backbone_hash=backbone_hash,
    )


def _fit_head_calibration(
    members: Sequence[TrainedModel], head_index: int, base_calibration: Calibration
) -> Calibration:
    """`base_calibration` with member weights and the map to probabilities, both fitted on dev."""
    task = members[0].tasks[head_index]
    member_logits = np.stack([member.fit_results[head_index].dev_logits for member in members])
    if len(members) > 1 and not base_calibration.shared_head:
        member_weights = _fit_task_member_weights(task, member_logits)
        base_calibration = replace(base_calibration, member_weights=member_weights)
    return fit_calibration(task.dev_split, base_calibration.pool_members(member_logits), base_calibration)


def _fit_task_member_weights(task: HeadTask, member_logits: Floats) -> tuple[float, ...]:
    """Weights of the ensemble members, fitted on their dev logits [members, sequences]."""
    row_count, dev_split = len(task.dev_split), task.dev_split
    if dev_split.is_pairwise:
        member_logits = member_logits[:, :row_count] - member_logits[:, row_count:]
    member_weights = fit_member_weights(
        member_logits, dev_split.labels, dev_split.loss_weights, is_pairwise=dev_split.is_pairwise
    )
    logger.info("%s: ensemble weights: %s", task.name, ", ".join(f"{weight:.2f}" for weight in member_weights))
    return member_weights


def _write_card(
    settings: Settings,
    job: ExportJob,
    members: Sequence[TrainedModel],
    head_index: int,
    start_time: float,
    *,
    full_card: bool,
) -> None:
    """Evaluate the written model on the test split and write its card, with `full_card` also the HTML page."""
    model = RewardModel.load(job.staging_folder, batch_tokens=EVAL_BATCH_TOKENS)
    head_settings = settings.reward.get_shared_backbone_settings(job.head, members[0].tasks[0].name)
    is_pairwise = head_settings.loss == "bradley_terry"
    path = job.data_folder / "test.parquet"
    records = select_labeled_rows(job.head, read_split_rows(path), str(path))
    test_split = encode_split(records, model.encoder, is_pairwise=is_pairwise, source_name=str(path))
    scoring_start = time.monotonic()
    raw_logits = model.compute_raw_logits(test_split.sequences)
    scoring_seconds = max(time.monotonic() - scoring_start, 1e-9)
    logits = model.calibration.calibrate_logits(raw_logits)
    card = build_reward_card(model.calibration, test_split, raw_logits, seed=settings.seed)
    task = members[0].tasks[head_index]
    fit_results = [member.fit_results[head_index] for member in members]
    card |= {
        "truncation": {
            name: summarize_truncation(split.sequences) | {"equal_pairs": int(split.is_equal_pair.sum())}
            for name, split in (("train", task.train_split.select_originals()), ("test", test_split))
        },
        "scoring_tokens_per_second": round(test_split.token_count / scoring_seconds, 1),
        "training": summarize_training(fit_results, task.train_split, task.dev_split),
        "settings": head_settings.model_dump(mode="json"),
        "seed": settings.seed,
        "heads": [head_task.name for head_task in members[0].tasks],
        "seconds": round(time.monotonic() - start_time, 3),
    }
    card["warnings"] = list_length_warnings(card["truncation"], head_settings.token_limit)
    for warning in card["warnings"]:
        logger.warning("%s: %s", job.head, warning)
    if should_measure_prompt_fit(job.head, is_pairwise=is_pairwise, debias=head_settings.debias):
        card["prompt_fit"] = measure_prompt_fit(model, records, is_pairwise=is_pairwise, seed=settings.seed)
    if job.earlier_model is not None:
        card |= _compare_with_earlier(job, job.earlier_model, records, test_split, logits, settings.seed)
    if full_card:
        row_count = len(test_split)
        row_logits = logits[:row_count] - logits[row_count:] if is_pairwise else logits
        card["slices"] = compute_slices(records, row_logits, None if is_pairwise else test_split.labels)
        card["robustness"] = measure_robustness(model, records, is_pairwise=is_pairwise, seed=settings.seed)
        (job.staging_folder / CARD_PAGE_FILE).write_text(render_card_page(card), encoding="utf-8")
    # Last: ray_trainer takes the card's presence as the sign that a model is complete.
    (job.staging_folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _compare_with_earlier(
    job: ExportJob,
    earlier_folder: Path,
    records: Sequence[Mapping[str, Any]],
    test_split: EncodedSplit,
    logits: Floats,
    seed: int,
) -> dict[str, Any]:
    """Comparison with an earlier model on the same test rows; empty if that model can no longer be loaded."""
    try:
        earlier_model = RewardModel.load(earlier_folder, batch_tokens=EVAL_BATCH_TOKENS)
        # Encoded again: the earlier model may have another tokenizer or text format.
        earlier_split = encode_split(
            records, earlier_model.encoder, is_pairwise=test_split.is_pairwise, source_name=str(job.data_folder)
        )
    except RlufError as error:
        logger.warning("%s: not compared with %s: %s", job.head, earlier_folder, error)
        return {}
    raw_logits = earlier_model.compute_raw_logits(earlier_split.sequences)
    earlier_logits = earlier_model.calibration.calibrate_logits(raw_logits)
    comparison = compare_models(test_split, logits, earlier_logits, seed=seed)
    return {"previous": {"folder": str(earlier_folder), **comparison}}


def measure_curve_point(
    settings: Settings, members: Sequence[TrainedModel], data_folders: Mapping[str, Path], *, rank: int
) -> dict[str, Any]:
    """Learning curve point of each head: training rows and metrics on the test rows; empty on ranks other than 0."""
    if rank:
        return {}
    with tempfile.TemporaryDirectory(prefix="rluf-curve-") as temporary_folder:
        outputs = {head: (data_folder, Path(temporary_folder) / head) for head, data_folder in data_folders.items()}
        export_models(settings, outputs, members, time.monotonic(), full_card=False)
        cards = {
            head: json.loads((output_folder / CARD_FILE).read_text(encoding="utf-8"))
            for head, (_, output_folder) in outputs.items()
        }
    return {head: make_curve_point(card) for head, card in cards.items()}


def add_learning_curve(output_folders: Mapping[str, Path], curve_points: Sequence[Mapping[str, Any]]) -> None:
    """Add the learning curve to the cards of written models, by head, and to their pages where they exist.

    The model's own metrics are the curve's last point. Raises ModelError when the disk cannot be written.
    """
    for head, output_folder in output_folders.items():
        try:
            card = json.loads((output_folder / CARD_FILE).read_text(encoding="utf-8"))
            card["learning_curve"] = [*(point[head] for point in curve_points), make_curve_point(card)]
            if (output_folder / CARD_PAGE_FILE).is_file():
                with atomic_write(output_folder / CARD_PAGE_FILE) as temporary_path:
                    temporary_path.write_text(render_card_page(card), encoding="utf-8")
            with atomic_write(output_folder / CARD_FILE) as temporary_path:
                temporary_path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ModelError(
                f"the learning curve could not be written to {output_folder}: {error}; the model itself is complete"
            ) from error


def make_curve_point(card: Mapping[str, Any]) -> dict[str, Any]:
    """Learning curve point of a card: training rows, ranking metric and log-loss."""
    metric_name = "pair_accuracy" if "pair_accuracy" in card else "auroc"
    return {"train_rows": card["training"]["train_rows"], metric_name: card[metric_name], "log_loss": card["log_loss"]}
