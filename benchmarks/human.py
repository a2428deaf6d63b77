"""How well do reward models rank what real people said, on users or prompts that they never saw?

python benchmarks/human.py --config configs/reward/love-human.yaml [--folds 5] [--data FOLDER]

Takes backbone, layers and probe of the config's one objective, fits the head on all folds but one and scores that one:
five times, split by user (love) or by prompt. The layers stay as they are, so epochs of the config play no part; what
they add shows on a held-out file (see docs/reward.md). Prints AUROC or pair accuracy of the out-of-fold scores with an
interval clustered by user or prompt, what length alone reaches, and ECE after a calibration fitted on other folds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.feedback.files import read_batches
from rluf.feedback.readers import READERS, Drop, Options
from rluf.feedback.sources import resolve
from rluf.models import resolve_model
from rluf.objectives.backbone import encoder_for, load_classifier, quick_cpu_matmul
from rluf.objectives.calibration import Calibration, Floats
from rluf.objectives.card import calibrate
from rluf.objectives.figures import label_figures, pair_figures, plain
from rluf.objectives.probe import fit_probe
from rluf.objectives.splits import folds
from rluf.objectives.training import Plan, Rows, Trainer, encode_rows
from rluf.paths import cache_dir

KINDS = {"love": "feedback", "helpfulness": "preferences", "safety": "safety"}


def read(settings: Settings, objective: str) -> list[dict[str, Any]]:
    """Rows of the objective's raw data, each with a weight of 1."""
    kind = KINDS[objective]
    rows: list[dict[str, Any]] = []
    for source in resolve(getattr(settings.data, kind), kind):
        if source.reader is None:
            raise DataError(f"{source.path} needs a reader; this benchmark reads foreign logs only")
        for line in itertools.chain.from_iterable(read_batches(source.location)):
            found = READERS[source.reader].read(json.loads(line.raw), Options(0.0))
            rows += [{**row, "weight": 1.0} for row in found if not isinstance(row, Drop)]
    if kind == "feedback":
        rows = [{**row, "label": int(row["reaction"] == "love")} for row in rows]
    return [row for row in rows if row["messages"][-1]["role"] == "user"]


def features(settings: Settings, objective: str, records: list[dict[str, Any]]) -> tuple[list[Floats], Rows]:
    """What each member's head reads, [members][N, H], and the encoded rows."""
    chosen = settings.reward.named[objective]
    backbone = resolve_model(chosen.backbone, cache_dir(settings))
    found, rows = [], None
    for layers in chosen.layers or (0,):
        model = load_classifier(backbone, trained=False, layers=layers)
        encoder = encoder_for(model, backbone, chosen.max_tokens, next_turn=chosen.next_turn)
        rows = encode_rows(records, encoder, pairs=chosen.loss == "bradley_terry", where=objective)
        model.to(getattr(torch, settings.reward_dtype))
        plan = Plan(epochs=0, batch_rows=1, batch_tokens=4096, seed=settings.seed)
        found.append(Trainer(model, encoder, plan).features(rows))
    if rows is None:
        raise DataError(f"reward.{objective}.layers is empty; name at least one")
    return found, rows


def out_of_fold(members: list[Floats], rows: Rows, count: int, seed: int) -> tuple[Floats, Floats]:
    """Raw and calibrated logits [sequences] of heads that never saw the row's cluster, nor did the calibration."""
    place = folds(rows.clusters, count, seed=seed)
    both = np.tile(place, 2) if rows.pairs else place
    raw = np.zeros(len(rows.sequences))
    for fold in range(count):
        train, test = np.flatnonzero(place != fold), both == fold
        clusters = [rows.clusters[i] for i in train]
        for member in members:
            head, bias, _ = fit_probe(
                member[both != fold], rows.labels[train], rows.weights[train], clusters, pairs=rows.pairs, seed=seed
            )
            raw[test] += (member[test] @ head + bias) / len(members)
    calibrated = np.zeros_like(raw)
    for fold in range(count):
        train = np.flatnonzero(place != fold)
        part = Rows(
            rows.pairs, [], rows.labels[train], rows.weights[train], [rows.clusters[i] for i in train], np.empty(0)
        )
        calibration = calibrate(part, raw[both != fold], Calibration(), "platt")
        calibrated[both == fold] = calibration.logits(raw[both == fold])
    return raw, calibrated


def main() -> None:
    """Fit, score out of fold, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    quick_cpu_matmul()
    started = time.monotonic()
    settings = load_settings(options.config, options.overrides).settings
    (objective,) = settings.reward.only
    records = read(settings, objective)
    members, rows = features(settings, objective, records)
    raw, logits = out_of_fold(members, rows, options.folds, settings.seed)
    count = len(rows)
    if rows.pairs:
        longer = rows.lengths[:count] - rows.lengths[count:]
        figures = pair_figures(logits[:count] - logits[count:], rows.weights, longer, rows.clusters)
    else:
        figures = label_figures(logits, rows.labels, rows.weights, rows.lengths, rows.clusters)
    del figures["reliability"]
    line = {
        "benchmark": "human",
        "objective": objective,
        "folds": options.folds,
        "n": count,
        "clusters": len(set(rows.clusters)),
        "tokens": rows.tokens,
        "raw_logit_sd": float(raw.std()),
        **figures,
        "settings": settings.reward.named[objective].model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
    }
    sys.stdout.write(json.dumps(plain(line)) + "\n")


if __name__ == "__main__":
    main()
