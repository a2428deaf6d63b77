"""How well do reward models rank what real people said, on users or prompts that they never saw?

python benchmarks/human.py --config configs/reward/love-human.yaml [--folds 5] [--splits 1] [key=value ...]

Takes backbone, layers and probe of the config's one objective, fits the head on all folds but one and scores that one:
five times, split by user (love) or by prompt. The layers stay as they are, so epochs of the config play no part; what
they add shows on a held-out file (see docs/reward.md). Prints AUROC or pair accuracy of the out-of-fold scores with an
interval clustered by user or prompt, what length alone reaches, and ECE after a calibration fitted on other folds. With
--splits the folds are drawn so many times, and `by_split` tells how far the figure depends on them; all else is of the
first draw.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import resolve_model
from rluf.prepare.readers.datasets import READERS, Drop, Options
from rluf.prepare.readers.files import read_batches
from rluf.prepare.readers.sources import resolve
from rluf.reward.backbone import encoder_for, load_classifier, quick_cpu_matmul
from rluf.reward.calibration import Calibration, Floats
from rluf.reward.card import calibrate
from rluf.reward.card_figures import label_figures, pair_figures, plain
from rluf.reward.fit import offsets_of
from rluf.reward.linear_probe import fit_probe
from rluf.reward.metrics import accuracy_interval
from rluf.reward.splits import folds
from rluf.reward.text import TextEncoder
from rluf.reward.trainer import Plan, Rows, Trainer, encode_rows
from rluf.utils.paths import cache_dir

logger = logging.getLogger("human")

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
    """What each member's head reads, [members][N, H] (fused: all of it, [1][N, sum of H]), and the encoded rows."""
    chosen = settings.reward.named[objective]
    pairs = chosen.loss == "bradley_terry"
    found, rows = [], None
    for member in chosen.members:
        depths = chosen.model_copy(update={"probe": True, "epochs": 0}).depths(member)
        folder = resolve_model(member.backbone, cache_dir(settings))
        model = load_classifier(folder, trained=False, layers=max(depths))
        alone = len(chosen.members) < 2
        encoder = encoder_for(
            model, folder, chosen.max_tokens, next_turn=chosen.next_turn, alone=alone, response_alone=member.response
        )
        mine = encode_rows(records, encoder, pairs=pairs, where=objective)
        rows = rows or mine
        every = kept_features(settings, f"{member.backbone} {depths}", model, encoder, mine, depths)
        found.append(every[depths.index(member.layers)])
    if chosen.fuse:
        found = [np.concatenate(found, axis=1)]
    if rows is None:
        raise DataError(f"reward.{objective} has no member")
    return found, rows


def kept_features(
    settings: Settings, name: str, model: PreTrainedModel, encoder: TextEncoder, rows: Rows, depths: tuple[int, ...]
) -> Floats:
    """What heads on the model read of the rows [depths, N, H]. Kept in the cache by row, so a second call is quick."""
    keys = [hashlib.sha256(repr((row.ids, row.second)).encode()).hexdigest()[:24] for row in rows.sequences]
    path = cache_dir(settings) / "features" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    known: dict[str, int] = {}
    values = np.empty((0, 0, 0))
    if path.is_file():
        stored = np.load(path)
        known, values = {str(key): place for place, key in enumerate(stored["keys"])}, stored["values"]
    new = {key: row for row, key in enumerate(keys) if key not in known}
    if new:
        part = replace(rows, sequences=[rows.sequences[row] for row in new.values()])
        logger.info("%s: reading %d rows, %d tokens or fewer", name, len(new), part.tokens)
        model.to(getattr(torch, settings.reward_dtype))
        plan = Plan(epochs=0, batch_rows=1, batch_tokens=4096, seed=settings.seed)
        fresh = Trainer(model, encoder, plan).features(part, depths if len(depths) > 1 else ()).astype(np.float32)
        values = np.concatenate([values, fresh], axis=1) if known else fresh
        known |= {key: len(known) + place for place, key in enumerate(new)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, keys=np.asarray(list(known)), values=values)
        path.with_suffix(".part").rename(path)
    found: Floats = values[:, [known[key] for key in keys]].astype(np.float64)
    return found


def same_prompt(records: list[dict[str, Any]], rows: Rows, logits: Floats) -> dict[str, Any]:
    """How well responses to the same messages are told apart: best of n, and accuracy of a label 1 against a 0.

    Best of n is the share of label 1 of the response that scores highest, averaged over prompts with two responses or
    more, beside that of a random one (mean over responses) and of the best.
    """
    prompts: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(records):
        prompts.setdefault(json.dumps(row["messages"]), {}).setdefault(row["response"], []).append(index)
    best, chance, oracle, margins, clusters, of_prompt = [], [], [], [], [], []
    for replies in (found for found in prompts.values() if len(found) > 1):
        rates = np.asarray([rows.labels[indices].mean() for indices in replies.values()])
        scores = np.asarray([logits[indices[0]] for indices in replies.values()])
        best.append(float(rates[scores.argmax()]))
        chance.append(float(rates.mean()))
        oracle.append(float(rates.max()))
        of_prompt.append(rows.clusters[next(iter(replies.values()))[0]])
        for won, lost in itertools.product(range(len(rates)), repeat=2):
            if rates[won] == 1 and rates[lost] == 0:
                margins.append(scores[won] - scores[lost])
                clusters.append(of_prompt[-1])
    if not best:
        return {}
    draws = np.random.default_rng(0).integers(0, len(best), (1000, len(best)))
    low, high = np.quantile(np.asarray(best)[draws].mean(1), [0.025, 0.975])
    found: dict[str, Any] = {
        "prompts": len(best),
        "best_of_n": {"mean": float(np.mean(best)), "low": float(low), "high": float(high)},
        "random": float(np.mean(chance)),
        "oracle": float(np.mean(oracle)),
    }
    if margins:
        found["accuracy"] = accuracy_interval(np.asarray(margins), np.ones(len(margins)), clusters)
        found["pairs"] = len(margins)
    return {"same_prompt": found}


def part_of(rows: Rows, kept: NDArray[np.int64], debias: Sequence[str]) -> Rows:
    """These rows alone, with what length and user explain of them as offsets where `debias` says so."""
    both = rows.parts(kept.tolist())
    part = Rows(
        rows.pairs,
        [rows.sequences[i] for i in both],
        rows.labels[kept],
        rows.weights[kept],
        [rows.clusters[i] for i in kept],
        rows.lengths[both],
    )
    return replace(part, offsets=offsets_of(part, debias)) if debias else part


def out_of_fold(
    members: list[Floats], rows: Rows, count: int, seed: int, debias: Sequence[str]
) -> tuple[Floats, Floats]:
    """Raw and calibrated logits [sequences] of heads that never saw the row's cluster, nor did the calibration."""
    place = folds(rows.clusters, count, seed=seed)
    both = np.tile(place, 2) if rows.pairs else place
    raw = np.zeros(len(rows.sequences))
    for fold in range(count):
        train, test = part_of(rows, np.flatnonzero(place != fold), debias), both == fold
        offsets = train.offsets if debias else None
        for member in members:
            head, bias, strength = fit_probe(
                member[both != fold], train.labels, train.weights, train.clusters, pairs=rows.pairs, seed=seed,
                offsets=offsets,
            )  # fmt: skip
            logger.info("fold %d: C=%g", fold, strength)
            logits = member[test] @ head + bias
            raw[test] += logits / logits.std()  # equally loud, also from fold to fold
    calibrated = np.zeros_like(raw)
    for fold in range(count):
        part = part_of(rows, np.flatnonzero(place != fold), ())
        calibration = calibrate(part, raw[both != fold], Calibration(), "platt")
        calibrated[both == fold] = calibration.logits(raw[both == fold])
    return raw, calibrated


def figures_of(records: list[dict[str, Any]], rows: Rows, logits: Floats) -> dict[str, Any]:
    """What a reward card would tell of these calibrated logits [sequences]."""
    if rows.pairs:
        count = len(rows)
        longer = rows.lengths[:count] - rows.lengths[count:]
        return pair_figures(logits[:count] - logits[count:], rows.weights, longer, rows.clusters)
    figures = label_figures(logits, rows.labels, rows.weights, rows.lengths, rows.clusters)
    return figures | same_prompt(records, rows, logits)


def main() -> None:
    """Fit, score out of fold, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(os.cpu_count() or 1)
    quick_cpu_matmul()
    started = time.monotonic()
    settings = load_settings(options.config, options.overrides).settings
    (objective,) = settings.reward.only
    records = read(settings, objective)
    logger.info("%d rows", len(records))
    members, rows = features(settings, objective, records)
    logger.info("fitting %d heads on %d folds", len(members), options.folds)
    debias = [way for way in settings.reward.named[objective].debias if way in ("length", "users")]
    found = [
        out_of_fold(members, rows, options.folds, settings.seed + split, debias) for split in range(options.splits)
    ]
    told = [figures_of(records, rows, logits) for _, logits in found]
    del told[0]["reliability"]
    line = {
        "benchmark": "human",
        "objective": objective,
        "folds": options.folds,
        "n": len(rows),
        "clusters": len(set(rows.clusters)),
        "tokens": rows.tokens,
        "raw_logit_sd": float(found[0][0].std()),
        **told[0],
        "by_split": [one["pair_accuracy" if rows.pairs else "auroc"]["mean"] for one in told],
        "best_of_n_by_split": [one["same_prompt"]["best_of_n"]["mean"] for one in told if "same_prompt" in one],
        "settings": settings.reward.named[objective].model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
    }
    sys.stdout.write(json.dumps(plain(line)) + "\n")


if __name__ == "__main__":
    main()
