"""Helpfulness heads with likelihoods of the response as further features, scored on prompts that they never saw.

python benchmarks/helpfulness_ideas.py [--config configs/reward/helpfulness-human.yaml] [--splits 2] [key=value]

The features of benchmarks/human.py with the config's members, and six of a frozen SmolLM2-135M-Instruct that reads the
response after its prompt and after "Say something." (rluf.simulate.reader_model; the first 80 tokens): both
log-probabilities per token, their difference (the pointwise mutual information of response and prompt) per token and
divided by the square root of the tokens, the log-probability that the turn ends there, and the log of the words,
between 5 and 200. `states` is the head without them. `weight` is the scale of the further features relative to a hidden
state's, since the regularization is the same for all. Prints one JSON line per head: accuracy by source, as in
human.py, and the agreement with 60 pairs of a short right and a long wrong answer (benchmarks/short_right_pairs.jsonl),
for which each head is fitted on all prompts. `counterfactuals` adds the rows of debias (rluf.reward.counterfactuals) to
the training folds; `prompt_fit` is the share of good responses above the copies made from them, by kind.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from human import (
    compute_member_features,
    compute_metrics,
    read_raw_rows,
    score_out_of_fold,
    select_training_rows,
    summarize_prompt_fit,
)

from rluf.config.load import load_settings
from rluf.config.run import READER_MODEL
from rluf.models.hub import resolve_model
from rluf.reward.backbone import enable_fast_cpu_matmul
from rluf.reward.counterfactuals import make_training_copies
from rluf.reward.linear_probe import fit_probe
from rluf.reward.metrics import round_for_json
from rluf.simulate.reader_model import ReaderModel, Reading
from rluf.utils.files import read_jsonl
from rluf.utils.paths import resolve_cache_folder
from rluf.utils.stats import Floats

logger = logging.getLogger("helpfulness_ideas")

SHORT_RIGHT_PAIRS = Path(__file__).with_name("short_right_pairs.jsonl")
READING_PART_ROWS = 200
"""Responses that are read between two lines of progress."""
MIN_WORDS, MAX_WORDS = 5, 200
LENGTH_COLUMN = 5


@dataclass(frozen=True)
class HeadInputs:
    """What a head is fitted on: hidden states or not, columns of the further features, their weight, and which rows."""

    uses_states: bool
    columns: tuple[int, ...] = ()
    weight: int = 1
    uses_counterfactuals: bool = False


LIKELIHOODS = (0, 1, 2, 3, 4)
HEADS: Mapping[str, HeadInputs] = {
    "states": HeadInputs(True),
    "likelihoods": HeadInputs(False, LIKELIHOODS),
    "likelihoods, length": HeadInputs(False, (*LIKELIHOODS, LENGTH_COLUMN)),
    "states, likelihoods, weight 1": HeadInputs(True, LIKELIHOODS),
    "states, likelihoods, weight 4": HeadInputs(True, LIKELIHOODS, 4),
    "states, likelihoods, weight 8": HeadInputs(True, LIKELIHOODS, 8),
    "states, likelihoods, length, weight 4": HeadInputs(True, (*LIKELIHOODS, LENGTH_COLUMN), 4),
    "states, counterfactuals": HeadInputs(True, uses_counterfactuals=True),
    "likelihoods, counterfactuals": HeadInputs(False, LIKELIHOODS, uses_counterfactuals=True),
    "states, likelihoods, weight 4, counterfactuals": HeadInputs(True, LIKELIHOODS, 4, uses_counterfactuals=True),
    "states, likelihoods, weight 8, counterfactuals": HeadInputs(True, LIKELIHOODS, 8, uses_counterfactuals=True),
}


def build_likelihood_features(reading: Reading, response: str) -> list[float]:
    """The further features of one response, in the order of the docstring."""
    tokens = max(1, reading.token_count)
    information = reading.prompt_logprob - reading.neutral_logprob
    words = min(max(len(response.split()), MIN_WORDS), MAX_WORDS)
    return [
        reading.prompt_logprob / tokens,
        reading.neutral_logprob / tokens,
        information / tokens,
        information / math.sqrt(tokens),
        reading.end_logprob,
        math.log(words),
    ]


def read_likelihoods(reader: ReaderModel, records: Sequence[Mapping[str, Any]]) -> Floats:
    """Further features [2N, 6] of N pairs, the chosen responses first."""
    items = [(row["messages"], row[key]) for key in ("chosen", "rejected") for row in records]
    features: list[list[float]] = []
    for start in range(0, len(items), READING_PART_ROWS):
        conversations, texts = zip(*items[start : start + READING_PART_ROWS], strict=True)
        readings = reader.read(conversations, texts)
        features += [build_likelihood_features(reading, text) for reading, text in zip(readings, texts, strict=True)]
        logger.info("read %d of %d responses", len(features), len(items))
    return np.asarray(features)


def join_features(states: Floats, likelihoods: Floats, head: HeadInputs) -> Floats:
    """Inputs [2N, H] of a head. A column that is repeated w^2 times is regularized like one of w times its scale."""
    repeated = np.repeat(likelihoods[:, list(head.columns)], head.weight**2, axis=1)
    return np.concatenate([states, repeated], axis=1) if head.uses_states else repeated


def main() -> None:
    """Read, fit and score every head, and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/reward/helpfulness-human.yaml"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(os.cpu_count() or 1)
    enable_fast_cpu_matmul()
    settings = load_settings(args.config, args.overrides).settings
    records = read_raw_rows(settings, "helpfulness")
    short_pairs = [
        {**row, "id": f"short-{index}", "group": f"short-{index}", "weight": 1.0}
        for index, row in enumerate(read_jsonl(SHORT_RIGHT_PAIRS))
    ]
    copies, counterfactuals = make_training_copies(records, is_pairwise=True, seed=settings.seed)
    reader = ReaderModel(resolve_model(READER_MODEL, resolve_cache_folder(settings)))
    (states, *_), rows = compute_member_features(settings, "helpfulness", [*records, *copies])
    likelihoods = read_likelihoods(reader, [*records, *copies])
    (short_states, *_), _ = compute_member_features(settings, "helpfulness", short_pairs)
    short_likelihoods = read_likelihoods(reader, short_pairs)
    sources = np.asarray([copy.source_index for copy in counterfactuals], dtype=np.int64)
    rows = replace(rows, copy_sources=sources, counterfactual_count=len(copies))
    for name, head in HEADS.items():
        joined, short_joined = (
            join_features(*inputs, head) for inputs in ((states, likelihoods), (short_states, short_likelihoods))
        )
        debias = ("counterfactuals",) if head.uses_counterfactuals else ()
        report: dict[str, Any] = {"head": name, "pair_accuracy": [], "by_source": []}
        for split in range(args.splits):
            raw, logits = score_out_of_fold([joined], rows, counterfactuals, args.folds, settings.seed + split, debias)
            metrics = compute_metrics(records, rows.select_originals(), logits)
            report["pair_accuracy"].append(metrics["pair_accuracy"])
            report["by_source"].append(metrics["by_source"])
            report.setdefault("prompt_fit", summarize_prompt_fit(rows, counterfactuals, raw))
        fit_rows, indices = select_training_rows(rows, counterfactuals, np.ones(len(records), np.bool_), debias)
        weights, _, report["strength"] = fit_probe(
            joined[rows.list_sequence_indices(indices)], fit_rows.labels, fit_rows.weights, fit_rows.clusters,
            is_pairwise=True, seed=settings.seed,
        )  # fmt: skip
        report["short_right"] = float((np.subtract(*np.split(short_joined @ weights, 2)) > 0).mean())
        sys.stdout.write(json.dumps(round_for_json(report)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
