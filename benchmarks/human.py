"""Rank real reactions with heads on frozen backbones, evaluated on users or prompts that they never saw.

python benchmarks/human.py --config configs/reward/love-human.yaml [--folds 5] [--splits 1] [--unreacted N]
    [--head dislike] [--leave-source-out] [key=value]

Uses backbone, members and linear probe of the config's first objective or of another --head. It fits the head on all
folds but one and scores that one: five times, split by user (love) or by prompt. The backbone stays frozen, so epochs
of the config have no effect; measure theirs on a held-out file (see docs/reward.md). Prints AUROC or pair accuracy of
the out-of-fold scores with an interval clustered by user or prompt, what length alone reaches, and ECE after a
calibration fitted on other folds. With counterfactuals in the config's debias, the training folds of pairs have such
rows too, made from rows of these folds only. `prompt_fit` is the share of good rows that score higher than a row made
from them and another row of their fold, by kind (rluf.reward.counterfactuals); --skip-prompt-fit saves reading these
rows, and leaves them out of the fit too. --splits N repeats with N random fold assignments; `by_split` shows how far
the figure depends on them, and all other figures are from the first assignment. --leave-source-out scores each data set
by a head that was fitted on the others: folds by prompt share the models that wrote the responses, these do not.

If the log has responses without a reaction (reader convai2_sparse), they count as not loved, which is how P[Love] is
defined; `among_reacted` is the AUROC on the other rows. --unreacted N samples N of them and weights them accordingly.
`turn_only` and `with_turn` are the AUROC of the turn of the conversation without and with the score, `context_only` and
`with_context` those of turn, activity of the user and bot; with `context` in debias the head is fitted with these.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rluf.config.load import load_settings
from rluf.config.reward import HeadReading
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import resolve_model
from rluf.prepare.readers.datasets import DATASET_READERS, ReaderOptions, SkippedRow
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.groups import group_messages
from rluf.prepare.readers.sources import resolve_sources
from rluf.reward.backbone import build_text_encoder, enable_fast_cpu_matmul, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.card import compute_label_metrics, compute_pair_metrics, fit_calibration
from rluf.reward.counterfactuals import Counterfactual, make_training_copies, should_measure_prompt_fit
from rluf.reward.debias import count_context, encode_context, fit_nuisance_offsets
from rluf.reward.encoded_split import EncodedSplit, encode_split
from rluf.reward.linear_probe import assign_folds, fit_probe
from rluf.reward.metrics import compute_accuracy_interval, compute_auroc_interval, round_for_json
from rluf.reward.shared_backbone import get_data_objective, get_head_label, select_labeled_rows
from rluf.reward.text import TextEncoder
from rluf.reward.trainer import RewardModelTrainer, TrainPlan
from rluf.utils.paths import resolve_cache_folder
from rluf.utils.stats import Floats, fit_logistic

logger = logging.getLogger("human")

SAVED_PART_ROWS = 500
"""Rows whose features are saved at once."""
CONTEXT_INVERSE_STRENGTH = 10.0
"""Inverse regularization strength of the effects of turn and context: a few coefficients need hardly any."""
DATA_KIND_BY_OBJECTIVE = {"love": "feedback", "helpfulness": "preferences", "safety": "safety"}


def read_raw_rows(settings: Settings, objective: str) -> list[dict[str, Any]]:
    """Read the rows of the raw data of an objective or reaction head, each with a weight of 1."""
    kind = DATA_KIND_BY_OBJECTIVE[get_data_objective(objective)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in group_messages(resolve_sources(getattr(settings.data, kind), kind), Path(folder)):
            reader = DATASET_READERS.get(source.entry.reader or "")
            if reader is None or reader.read_item is None:
                raise DataError(f"{source.local_path} needs a reader; this benchmark reads public data sets only")
            for line in itertools.chain.from_iterable(read_line_batches(source.location)):
                parsed_rows = reader.read_item(json.loads(line.raw), ReaderOptions(0.0))
                rows += [{**row, "weight": 1.0} for row in parsed_rows if not isinstance(row, SkippedRow)]
    if kind == "feedback":
        rows = [{**row, "label": int(row["reaction"] == "love")} for row in rows]
        rows = [dict(row, label=get_head_label(objective, row)) for row in select_labeled_rows(objective, rows, "log")]
    return [row for row in rows if row["messages"][-1]["role"] == "user"]


def sample_unreacted_rows(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """All rows with a reaction, and `count` of the others, each with the weight of the rows that it stands for."""
    unreacted = [index for index, row in enumerate(rows) if row.get("reaction") is None]
    if count >= len(unreacted):
        return rows
    sampled = set(random.Random(seed).sample(unreacted, count))
    weight = len(unreacted) / count
    return [
        {**row, "weight": weight} if index in sampled else row
        for index, row in enumerate(rows)
        if index in sampled or row.get("reaction") is not None
    ]


def measure_with_context(rows: EncodedSplit, logits: Floats, folds: NDArray[np.int64]) -> dict[str, Any]:
    """AUROC of P[Love] with the propensity to react in the row's context, and of the context alone.

    The context (turn; or turn, user activity and bot) is the same for all responses that could be served there, so it
    never decides between two of them. Its effect and the weight of the text's logit are fitted on the other folds.
    """
    context = rows.context_columns
    context = (context - context.mean(0)) / (context.std(0) + 1e-6)
    designs = {"turn": context[:, :2], "context": context}
    metrics: dict[str, Any] = {}
    for name, design in itertools.chain.from_iterable(
        ((f"{key}_only", columns), (f"with_{key}", np.column_stack([logits, columns])))
        for key, columns in designs.items()
    ):
        predicted = np.zeros(len(logits))
        for fold in np.unique(folds):
            train = folds != fold
            solution = fit_logistic(design[train], rows.labels[train], rows.weights[train], CONTEXT_INVERSE_STRENGTH)
            predicted[~train] = design[~train] @ solution[:-1] + solution[-1]
        metrics[name] = compute_auroc_interval(predicted, rows.labels, rows.weights, rows.clusters)
    return metrics


def compute_member_features(
    settings: Settings, objective: str, records: Sequence[Mapping[str, Any]]
) -> tuple[list[Floats], EncodedSplit]:
    """Features of each member's head, [members][N, H] (shared head: [1][N, sum of H]), and the encoded rows."""
    model_settings = settings.reward.get_head_settings(objective)
    is_pairwise = model_settings.loss == "bradley_terry"
    features, first_encoded = [], None
    for member in model_settings.member_specs:
        readings = model_settings.model_copy(update={"linear_probe": True, "epochs": 0}).list_shared_readings(member)
        folder = resolve_model(member.backbone, resolve_cache_folder(settings))
        model = load_classifier(
            folder, require_all_weights=False, layer_count=max(reading.layers for reading in readings)
        )
        is_single_model = len(model_settings.member_specs) < 2
        encoder = build_text_encoder(
            model,
            folder,
            model_settings.token_limit,
            read_at_next_turn=model_settings.read_at_next_turn,
            is_single_model=is_single_model,
            response_only=member.response_only,
            mark_truncated=True,
            locate_responses=model_settings.reads_response_tokens,
        )
        encoded_rows = encode_split(records, encoder, is_pairwise=is_pairwise, source_name=objective)
        first_encoded = first_encoded or encoded_rows
        features_by_reading = load_or_compute_features(
            settings, f"{member.backbone} {readings}", model, encoder, encoded_rows, readings
        )
        features.append(features_by_reading[readings.index(member.reading)])
    if model_settings.ensemble.shared_head:
        features = [np.concatenate(features, axis=1)]
    if first_encoded is None:
        raise DataError(f"reward.{objective} has no member")
    return features, first_encoded


def load_or_compute_features(
    settings: Settings,
    name: str,
    model: PreTrainedModel,
    encoder: TextEncoder,
    rows: EncodedSplit,
    readings: tuple[HeadReading, ...],
) -> Floats:
    """Features of the rows [readings, N, H], cached by row, so that a second call is fast."""
    keys = [
        hashlib.sha256(repr((row.token_ids, row.response_start)).encode()).hexdigest()[:24] for row in rows.sequences
    ]
    path = resolve_cache_folder(settings) / "features" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    index_by_key: dict[str, int] = {}
    stored_features = np.empty((0, 0, 0))
    if path.is_file():
        stored = np.load(path)
        index_by_key, stored_features = {str(key): index for index, key in enumerate(stored["keys"])}, stored["values"]
    row_by_missing_key = {key: row_index for row_index, key in enumerate(keys) if key not in index_by_key}
    missing_keys = list(row_by_missing_key)
    model.to(getattr(torch, settings.reward_dtype))
    plan = TrainPlan(epochs=0, batch_rows=1, batch_tokens=4096, seed=settings.seed)
    trainer = RewardModelTrainer(model, encoder, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In parts, so that a run that was ended resumes; in the order of the log, so that conversations share their passes.
    for start in range(0, len(missing_keys), SAVED_PART_ROWS):
        part_keys = missing_keys[start : start + SAVED_PART_ROWS]
        logger.info("%s: reading rows %d to %d of %d", name, start, start + len(part_keys), len(missing_keys))
        part_rows = replace(rows, sequences=[rows.sequences[row_by_missing_key[key]] for key in part_keys])
        new_features = trainer.compute_features(part_rows, readings).astype(np.float32)
        stored_features = np.concatenate([stored_features, new_features], axis=1) if index_by_key else new_features
        index_by_key |= {key: len(index_by_key) + index for index, key in enumerate(part_keys)}
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, keys=np.asarray(list(index_by_key)), values=stored_features)
        path.with_suffix(".part").rename(path)
    features: Floats = stored_features[:, [index_by_key[key] for key in keys]].astype(np.float64)
    return features


def measure_within_prompts(records: list[dict[str, Any]], rows: EncodedSplit, logits: Floats) -> dict[str, Any]:
    """Ranking of responses to the same messages: best of n, and accuracy of a label 1 against a 0.

    Best of n is the share of label 1 of the response that scores highest, averaged over prompts with two or more
    responses. `random` (mean over responses) and `oracle` (the best response) are its reference values.
    """
    rows_by_prompt: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(records):
        rows_by_prompt.setdefault(json.dumps(row["messages"]), {}).setdefault(row["response"], []).append(index)
    best_rates, mean_rates, oracle_rates, margins, clusters, prompt_clusters = [], [], [], [], [], []
    for rows_by_response in (responses for responses in rows_by_prompt.values() if len(responses) > 1):
        rates = np.asarray([rows.labels[indices].mean() for indices in rows_by_response.values()])
        scores = np.asarray([logits[indices[0]] for indices in rows_by_response.values()])
        best_rates.append(float(rates[scores.argmax()]))
        mean_rates.append(float(rates.mean()))
        oracle_rates.append(float(rates.max()))
        prompt_clusters.append(rows.clusters[next(iter(rows_by_response.values()))[0]])
        for winner, loser in itertools.product(range(len(rates)), repeat=2):
            if rates[winner] == 1 and rates[loser] == 0:
                margins.append(scores[winner] - scores[loser])
                clusters.append(prompt_clusters[-1])
    if not best_rates:
        return {}
    resampled = np.random.default_rng(0).integers(0, len(best_rates), (1000, len(best_rates)))
    low, high = np.quantile(np.asarray(best_rates)[resampled].mean(1), [0.025, 0.975])
    metrics: dict[str, Any] = {
        "prompts": len(best_rates),
        "best_of_n": {"mean": float(np.mean(best_rates)), "low": float(low), "high": float(high)},
        "random": float(np.mean(mean_rates)),
        "oracle": float(np.mean(oracle_rates)),
    }
    if margins:
        metrics["accuracy"] = compute_accuracy_interval(np.asarray(margins), np.ones(len(margins)), clusters)
        metrics["pairs"] = len(margins)
    return {"same_prompt": metrics}


def select_training_rows(
    rows: EncodedSplit, counterfactuals: Sequence[Counterfactual], is_train: NDArray[np.bool_], debias: Sequence[str]
) -> tuple[EncodedSplit, list[int]]:
    """The rows of the log in the training folds and the copies made from them alone, and the indices of both.

    `is_train` [N] covers the rows of the log. Copies take part if `debias` says so; length and user effects in it are
    fitted and added as offsets.
    """
    log_indices = np.flatnonzero(is_train).tolist()
    position_by_row = {row: position for position, row in enumerate(log_indices)}
    copies = [
        (rows.original_count + index, position_by_row[copy.source_index])
        for index, copy in enumerate(counterfactuals)
        if rows.is_pairwise
        and "counterfactuals" in debias
        and is_train[copy.source_index]
        and is_train[copy.partner_index]
    ]
    indices = [*log_indices, *(index for index, _ in copies)]
    sources = np.asarray([source for _, source in copies], dtype=np.int64)
    selected = replace(rows.select_rows(indices), copy_sources=sources, counterfactual_count=len(copies))
    if {"length", "users"} & set(debias):
        selected = replace(selected, logit_offsets=fit_nuisance_offsets(selected, debias))
    return selected, indices


def score_out_of_fold(
    member_features: list[Floats],
    all_rows: EncodedSplit,
    counterfactuals: Sequence[Counterfactual],
    fold_count: int,
    seed: int,
    debias: Sequence[str],
    fold_names: Sequence[str] = (),
) -> tuple[Floats, Floats]:
    """Raw logits [all sequences] and calibrated ones [sequences of the log]; no head or calibration saw the cluster.

    A copy has the logit of its source's fold, or NaN if its partner is in another fold. `fold_names` [rows of the log]
    replaces the random folds of clusters.
    """
    rows = all_rows.select_originals()
    fold_by_row = assign_folds(rows.clusters, fold_count, seed=seed)
    if fold_names:
        names, fold_by_row = np.unique(np.asarray(fold_names), return_inverse=True)
        fold_count = len(names)
    fold_by_sequence = np.tile(fold_by_row, 2) if rows.is_pairwise else fold_by_row
    copy_folds = [
        fold_by_row[copy.source_index] if fold_by_row[copy.source_index] == fold_by_row[copy.partner_index] else -1
        for copy in counterfactuals
    ]
    fold_by_any_row = np.concatenate([fold_by_row, np.asarray(copy_folds, dtype=np.int64)])
    fold_by_any_sequence = np.tile(fold_by_any_row, 2) if rows.is_pairwise else fold_by_any_row
    log_sequences = all_rows.list_sequence_indices(range(len(rows)))
    all_raw = np.where(fold_by_any_sequence < 0, np.nan, 0.0)
    for fold in range(fold_count):
        is_test = fold_by_any_sequence == fold
        train_rows, indices = select_training_rows(all_rows, counterfactuals, fold_by_row != fold, debias)
        train_sequences = all_rows.list_sequence_indices(indices)
        # Offsets are fitted on the training folds only, so they know nothing of the scored fold.
        offsets = train_rows.logit_offsets if train_rows.logit_offsets.size else None
        for features in member_features:
            head, bias, strength = fit_probe(
                features[train_sequences], train_rows.labels, train_rows.weights, train_rows.clusters,
                is_pairwise=rows.is_pairwise, seed=seed, logit_offsets=offsets,
                covariates=train_rows.context_columns if "context" in debias else None,
            )  # fmt: skip
            logger.info("fold %d: C=%g", fold, strength)
            logits = features[is_test] @ head + bias
            all_raw[is_test] += logits / logits.std()  # unit variance, so that members and folds are comparable
    raw = all_raw[log_sequences]
    calibrated = np.zeros_like(raw)
    for fold in range(fold_count):
        train_rows = rows.select_rows(np.flatnonzero(fold_by_row != fold).tolist())
        if "context" not in debias:
            train_rows = replace(train_rows, context_columns=np.empty((0, 0)))
        calibration = fit_calibration(train_rows, raw[fold_by_sequence != fold], Calibration())
        calibrated[fold_by_sequence == fold] = calibration.calibrate_logits(raw[fold_by_sequence == fold])
    return all_raw, calibrated


def summarize_prompt_fit(
    all_rows: EncodedSplit, counterfactuals: Sequence[Counterfactual], raw: Floats
) -> dict[str, Any]:
    """Share of good rows that score higher than the copies made from them, by kind, with interval and n."""
    # In a pair, the copy is the rejected response: the second half of the sequences.
    shift = len(all_rows) if all_rows.is_pairwise else 0
    differences_by_kind: dict[str, list[tuple[float, str]]] = {}
    for index, copy in enumerate(counterfactuals):
        difference = raw[copy.source_index] - raw[all_rows.original_count + index + shift]
        if not np.isnan(difference):
            differences_by_kind.setdefault(copy.kind, []).append((difference, all_rows.clusters[copy.source_index]))
    return {
        kind: {"n": len(entries)}
        | compute_accuracy_interval(np.asarray([d for d, _ in entries]), np.ones(len(entries)), [c for _, c in entries])
        for kind, entries in differences_by_kind.items()
    }


def list_sources(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The data set of each row: what its id begins with."""
    return [str(record["id"]).split("-")[0] for record in records]


def measure_by_source(
    sources: Sequence[str], differences: Floats, length_differences: Floats, clusters: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Pair accuracy on each data set by itself [N pairs], next to what length alone reaches on it.

    `length_only` is the share of pairs won by the longer response, or by the shorter one where that is more.
    `without_length` is the accuracy of what remains of the score differences after a regression on the difference of
    the lengths within the data set.
    """
    by_source: dict[str, dict[str, Any]] = {}
    for source in sorted(set(sources)):
        rows = np.flatnonzero(np.asarray(sources) == source)
        scores, lengths = differences[rows], length_differences[rows]
        slope = float(scores @ lengths) / max(float(lengths @ lengths), 1e-12)
        names, ones = [clusters[row] for row in rows.tolist()], np.ones(len(rows))
        longer_wins = compute_accuracy_interval(lengths, ones, names)["mean"]
        by_source[source] = {
            "pairs": len(rows),
            "prompts": len(set(names)),
            "accuracy": compute_accuracy_interval(scores, ones, names),
            "length_only": max(longer_wins, 1 - longer_wins),
            "without_length": compute_accuracy_interval(scores - slope * lengths, ones, names),
        }
    return by_source


def compute_metrics(records: list[dict[str, Any]], rows: EncodedSplit, logits: Floats) -> dict[str, Any]:
    """Metrics of these calibrated logits [sequences], as in a reward card, and those of parts of the data.

    `among_reacted` is the AUROC of love against other reactions, without the responses that got none.
    """
    if rows.is_pairwise:
        pair_count = len(rows)
        length_difference = rows.response_lengths[:pair_count] - rows.response_lengths[pair_count:]
        differences = logits[:pair_count] - logits[pair_count:]
        metrics = compute_pair_metrics(differences, rows.weights, length_difference, rows.clusters)
        return metrics | {
            "by_source": measure_by_source(list_sources(records), differences, length_difference, rows.clusters)
        }
    metrics = compute_label_metrics(logits, rows.labels, rows.weights, rows.response_lengths, rows.clusters)
    reacted = [index for index, record in enumerate(records) if record.get("reaction") is not None]
    if 0 < len(reacted) < len(records):
        names = [rows.clusters[index] for index in reacted]
        metrics["among_reacted"] = {"n": len(reacted)} | compute_auroc_interval(
            logits[reacted], rows.labels[reacted], rows.weights[reacted], names
        )
    return metrics | measure_within_prompts(records, rows, logits)


def main() -> None:
    """Fit, score out of fold, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--head")
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--unreacted", type=int, default=1_000_000)
    parser.add_argument("--skip-prompt-fit", action="store_true")
    parser.add_argument("--leave-source-out", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(os.cpu_count() or 1)
    enable_fast_cpu_matmul()
    started = time.monotonic()
    settings = load_settings(args.config, args.overrides).settings
    # Exactly one head: the folds and the figures are those of a single one.
    objective = args.head or (settings.reward.objectives or settings.reward.shared_backbone_heads)[0]
    model_settings = settings.reward.get_head_settings(objective)
    records = sample_unreacted_rows(read_raw_rows(settings, objective), args.unreacted, settings.seed)
    logger.info("%d rows", len(records))
    debias = model_settings.debias
    is_pairwise = model_settings.loss == "bradley_terry"
    copies: list[Mapping[str, Any]] = []
    counterfactuals: list[Counterfactual] = []
    needs_copies = should_measure_prompt_fit(objective, is_pairwise=is_pairwise, debias=debias)
    if needs_copies and not args.skip_prompt_fit:
        copies, counterfactuals = make_training_copies(records, is_pairwise=is_pairwise, seed=settings.seed)
    member_features, all_rows = compute_member_features(settings, objective, [*records, *copies])
    sources = np.asarray([copy.source_index for copy in counterfactuals], dtype=np.int64)
    all_rows = replace(all_rows, copy_sources=sources, counterfactual_count=len(copies))
    if not is_pairwise:
        activity, versions = count_context(records, all_rows.clusters, all_rows.weights)
        columns = encode_context(records, all_rows.clusters, activity, versions)
        all_rows = replace(all_rows, context_columns=columns)
    rows = all_rows.select_originals()
    logger.info("fitting %d heads on %d folds", len(member_features), args.folds)
    fold_names = list_sources(records) if args.leave_source_out else ()
    logits_by_split = [
        score_out_of_fold(
            member_features, all_rows, counterfactuals, args.folds, settings.seed + split, debias, fold_names
        )
        for split in range(args.splits)
    ]
    metrics_by_split = [compute_metrics(records, rows, logits) for _, logits in logits_by_split]
    del metrics_by_split[0]["reliability"]
    if "among_reacted" in metrics_by_split[0]:
        folds = assign_folds(rows.clusters, args.folds, seed=settings.seed)
        metrics_by_split[0] |= measure_with_context(rows, logits_by_split[0][1], folds)
    report = {
        "benchmark": "human",
        "objective": objective,
        "folds": len(set(fold_names)) or args.folds,
        "n": len(rows),
        "clusters": len(set(rows.clusters)),
        "tokens": rows.token_count,
        "raw_logit_sd": float(np.nanstd(logits_by_split[0][0])),
        "prompt_fit": summarize_prompt_fit(all_rows, counterfactuals, logits_by_split[0][0]),
        **metrics_by_split[0],
        "by_split": [metrics["pair_accuracy" if rows.is_pairwise else "auroc"]["mean"] for metrics in metrics_by_split],
        "best_of_n_by_split": [
            metrics["same_prompt"]["best_of_n"]["mean"] for metrics in metrics_by_split if "same_prompt" in metrics
        ],
        "settings": model_settings.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
    }
    sys.stdout.write(json.dumps(round_for_json(report)) + "\n")


if __name__ == "__main__":
    main()
