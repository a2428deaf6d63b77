"""Helpfulness heads with likelihoods of the response as further features, scored on prompts that they never saw.

python benchmarks/helpfulness_ideas.py [--config configs/reward/helpfulness-human.yaml] [--splits 2] [key=value]

The features of benchmarks/human.py with the config's members, and six of a frozen SmolLM2-135M-Instruct that reads the
response after its prompt and after "Say something." (rluf.simulate.reader_model; the first 80 tokens): both
log-probabilities per token, their difference (the pointwise mutual information of response and prompt) per token and
divided by the square root of the tokens, the log-probability that the turn ends there, and the log of the words,
between 5 and 200. `states` is the head without them. `weight` is the scale of the further features relative to a hidden
state's, since the regularization is the same for all. Prints one JSON line per head: accuracy by source, as in
human.py, and the agreement with 60 pairs of a short right and a long wrong answer (benchmarks/short_right_pairs.jsonl),
for which each head is fitted on all prompts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from human import (
    compute_member_features,
    compute_metrics,
    read_raw_rows,
    score_out_of_fold,
)

from rluf.config.load import load_settings
from rluf.config.run import READER_MODEL
from rluf.models.hub import resolve_model
from rluf.reward.backbone import enable_fast_cpu_matmul
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
HEADS: Mapping[str, tuple[bool, tuple[int, ...], int]] = {
    "states": (True, (), 1),
    "likelihoods": (False, (0, 1, 2, 3, 4), 1),
    "likelihoods, length": (False, (0, 1, 2, 3, 4, LENGTH_COLUMN), 1),
    "states, likelihoods, weight 1": (True, (0, 1, 2, 3, 4), 1),
    "states, likelihoods, weight 4": (True, (0, 1, 2, 3, 4), 4),
    "states, likelihoods, weight 8": (True, (0, 1, 2, 3, 4), 8),
    "states, likelihoods, length, weight 4": (True, (0, 1, 2, 3, 4, LENGTH_COLUMN), 4),
}
"""Name -> whether the hidden states take part, which of the further features, and their weight."""


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


def join_features(states: Floats, likelihoods: Floats, head: tuple[bool, tuple[int, ...], int]) -> Floats:
    """Inputs [2N, H] of a head. A column that is repeated w^2 times is regularized like one of w times its scale."""
    uses_states, columns, weight = head
    repeated = np.repeat(likelihoods[:, list(columns)], weight**2, axis=1)
    return np.concatenate([states, repeated], axis=1) if uses_states else repeated


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
    all_records = [*records, *short_pairs]
    member_features, all_rows = compute_member_features(settings, "helpfulness", all_records)
    reader = ReaderModel(resolve_model(READER_MODEL, resolve_cache_folder(settings)))
    all_likelihoods = read_likelihoods(reader, all_records)
    log_rows = list(range(len(records)))
    rows, log_sequences = all_rows.select_rows(log_rows), all_rows.list_sequence_indices(log_rows)
    short_sequences = all_rows.list_sequence_indices(list(range(len(records), len(all_records))))
    for name, head in HEADS.items():
        joined = join_features(member_features[0], all_likelihoods, head)
        metrics = []
        for split in range(args.splits):
            _, logits = score_out_of_fold([joined[log_sequences]], rows, (), args.folds, settings.seed + split, ())
            metrics.append(compute_metrics(records, rows, logits))
        weights, _, strength = fit_probe(
            joined[log_sequences], rows.labels, rows.weights, rows.clusters, is_pairwise=True, seed=settings.seed
        )
        margins = np.subtract(*np.split(joined[short_sequences] @ weights, 2))
        report = {
            "head": name,
            "pair_accuracy": [m["pair_accuracy"] for m in metrics],
            "by_source": [m["by_source"] for m in metrics],
            "short_right": float((margins > 0).mean()),
            "strength": strength,
        }
        sys.stdout.write(json.dumps(round_for_json(report)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
