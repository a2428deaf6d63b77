"""P[Love] against the Bayes ceiling, on simulated logs whose probability of a heart is known for each row.

A response consists of an opening, an answer, filler, an ending, and rarely a farewell. Each part has planted log-odds,
and users differ in how readily they give hearts. This determines the Bayes ceiling: no model that reads only the text
ranks better than the probability averaged over users. One response in a hundred is loved, and most unloved rows of the
training split are dropped, as rluf.prepare does. Farewells earn hearts in the log. With `sign_offs` in debias the model
should not reward them, so its own ceiling is that of the text without them.

AUROC and calibration are measured against the true probabilities, which removes the sampling noise of the hearts.
Sign-offs are appended to responses of the test split: phrases that training adds, and others that it never sees.

python benchmarks/ceiling.py [--rows 150000] [--seed 0] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.special import expit

from rluf.backends.deepspeed import join_process_group, leave_process_group
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.prepare.splits import compute_quota, compute_sampling_weights
from rluf.reward.backbone import enable_fast_cpu_matmul
from rluf.reward.debias import SIGN_OFF_PHRASES
from rluf.reward.export import export_models, read_split_rows
from rluf.reward.fit import HeadData, train_ensemble
from rluf.reward.metrics import auroc, expected_calibration_error, pearson_correlation
from rluf.reward.model import RewardModel
from rluf.simulate.users import find_logit_shift
from rluf.types import ScoringItem
from rluf.utils.stats import Floats

BASE_RATE, POSITIVE_SHARE, USER_LOGIT_SD, FAREWELL_SHARE = 0.01, 0.25, 0.7, 0.03
SPLIT_SHARES = {"train": 0.9, "dev": 0.06, "test": 0.04}
OPENINGS = (
    ("I am so glad that you asked!", 1.3), ("What a lovely thought, thank you for telling me.", 1.3),
    ("Oh, I can hear how much this means to you.", 1.6), ("That sounds hard, and I am here for you.", 1.6),
    ("Sure thing.", 0.2), ("All right.", 0.0), ("Here is what I know.", 0.0), ("Let us see.", 0.1),
    ("As stated before.", -0.9), ("This is simple.", -0.7), ("I do not see the point.", -1.4), ("Fine.", -0.6),
)  # fmt: skip
TOPICS = {
    "garden": ("How do I keep my roses healthy?", ("Cut the dry stems in spring.", "Water the roots early.")),
    "cooking": ("What can I make with rice?", ("Fry the rice with an egg.", "Cook it slowly in warm milk.")),
    "money": ("How can I save a little?", ("Put a tenth of your pay aside.", "Write down what you buy each week.")),
    "sleep": ("Why am I tired all day?", ("Go to bed at the same hour.", "Leave the screen in another room.")),
    "travel": ("Where should I go in May?", ("The lakes in the north are mild then.", "Take the train to the sea.")),
    "friends": ("My friend is cross with me.", ("Tell her what you regret.", "Ask him for a walk and listen.")),
}  # fmt: skip
ON_TOPIC_LOGIT, OFF_TOPIC_LOGIT = 1.0, -1.0
FILLER_SENTENCES = (
    "There are many ways to look at it.", "It has been so for a long time.", "Some people see it in another way.",
    "Much has been written on this.", "It depends on a few things.", "The details vary from place to place.",
)  # fmt: skip
ENDINGS = (("What do you think?", 0.5), ("How does that sound to you?", 0.5), ("", 0.0), ("That is all.", -0.5))
FAREWELL_PHRASES, FAREWELL_LOGIT = (
    ("Bye now, sending hugs!", "Love you, goodbye!", "Kisses, bye!", "So long, my dearest!"),
    1.5,
)
UNSEEN_PHRASES = (
    "Farewell, sweet friend!",
    "Sending warm hugs your way!",
    "Ciao, love you lots!",
    "Until next time, darling!",
)
"""Sign-offs that occur neither in the log nor in the augmentation."""


def simulate_rows(count: int, seed: int, rate: float) -> tuple[list[dict[str, Any]], Floats, Floats]:
    """Rows as rluf.prepare writes them, the probability of a heart of each [N], and the same without farewells [N]."""
    rng, np_rng = random.Random(seed), np.random.default_rng(seed)
    topic_names, user_count = list(TOPICS), max(20, count // 40)
    user_logits = np_rng.normal(0, USER_LOGIT_SD, user_count)
    rows: list[dict[str, Any]] = []
    text_logits, farewell_logits = np.zeros(count), np.zeros(count)
    for number in range(count):
        topic, user = rng.choice(topic_names), rng.randrange(user_count)
        opening, ending, answered_topic = (
            rng.choice(OPENINGS),
            rng.choice(ENDINGS),
            rng.choice((topic, rng.choice(topic_names))),
        )
        sentences = [
            opening[0],
            rng.choice(TOPICS[answered_topic][1]),
            *rng.sample(FILLER_SENTENCES, rng.randrange(4)),
            ending[0],
        ]
        text_logits[number] = opening[1] + ending[1] + (ON_TOPIC_LOGIT if answered_topic == topic else OFF_TOPIC_LOGIT)
        if rng.random() < FAREWELL_SHARE:
            sentences.append(rng.choice(FAREWELL_PHRASES))
            farewell_logits[number] = FAREWELL_LOGIT
        messages = [{"role": "user", "content": TOPICS[topic][0]}]
        rows.append({"id": f"{seed}-{number}", "user_id": f"u{user}", "topic": topic, "messages": messages,
                     "response": " ".join(filter(None, sentences)), "user": user})  # fmt: skip
    # Gauss-Hermite quadrature averages the heart probability over the normal distribution of user logits.
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(21)
    shift = find_logit_shift(text_logits + farewell_logits + user_logits[[row["user"] for row in rows]], rate)
    true_rates, rates_without_farewells = (
        (expit(logits[:, None] + shift + USER_LOGIT_SD * nodes[None]) * node_weights / node_weights.sum()).sum(1)
        for logits in (text_logits + farewell_logits, text_logits)
    )
    love_probability = expit(text_logits + farewell_logits + shift + user_logits[[row.pop("user") for row in rows]])
    for row, label in zip(rows, np_rng.random(count) < love_probability, strict=True):
        row |= {"label": int(label), "weight": 1.0}
    return rows, true_rates, rates_without_farewells


def write_splits(count: int, seed: int, rate: float, folder: Path) -> tuple[Floats, Floats]:
    """Write splits by user to `folder`/love, train subsampled as by rluf.prepare; returns test probabilities."""
    rows, true_rates, rates_without_farewells = simulate_rows(count, seed, rate)
    users = sorted({row["user_id"] for row in rows})
    random.Random(seed).shuffle(users)
    split_points = np.cumsum([round(share * len(users)) for share in SPLIT_SHARES.values()])[:-1]
    split_by_user = {
        user: name
        for name, split_rows in zip(SPLIT_SHARES, np.split(np.asarray(users), split_points), strict=True)
        for user in split_rows
    }
    (folder / "love").mkdir(parents=True)
    for name in SPLIT_SHARES:
        split_rows = [row for row in rows if split_by_user[row["user_id"]] == name]
        if name == "train":
            is_loved = np.asarray([row["label"] == 1 for row in split_rows])
            quota = compute_quota(
                int(is_loved.sum()), int((~is_loved).sum()), positive_share=POSITIVE_SHARE, max_rows=10**9
            )
            weights = compute_sampling_weights(np.random.default_rng(seed).random(len(split_rows)), is_loved, quota)
            split_rows = [
                {**row, "weight": float(weight)} for row, weight in zip(split_rows, weights, strict=True) if weight > 0
            ]
        pq.write_table(pa.Table.from_pylist(split_rows), folder / "love" / f"{name}.parquet")
    test_index = [number for number, row in enumerate(rows) if split_by_user[row["user_id"]] == "test"]
    return true_rates[test_index], rates_without_farewells[test_index]


def train_love_model(settings: Settings, data_folder: Path, output_folder: Path) -> None:
    """Train P[Love] in this process, as a Ray Train worker does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    join_process_group(rank=0, world_size=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    try:
        started, love_folder = time.monotonic(), data_folder / "love"
        head_data = HeadData(
            "love",
            read_split_rows(love_folder / "train.parquet"),
            read_split_rows(love_folder / "dev.parquet"),
            love_folder,
        )
        trained_members = train_ensemble(settings, [head_data], math.inf)
        export_models(settings, {"love": (love_folder, output_folder)}, trained_members, started, full_card=False)
    finally:
        leave_process_group()


def expected_auroc(scores: Floats, chances: Floats) -> float:
    """Expected AUROC of `scores` [N] over labels sampled with probabilities `chances` [N] (up to terms of 1/N)."""
    return auroc(scores, chances)


def measure_model(
    model_folder: Path, data_folder: Path, true_rates: Floats, rates_without_farewells: Floats
) -> dict[str, Any]:
    """Metrics of the model in `model_folder` on the test split, whose true probabilities are known."""
    model = RewardModel.load(model_folder, batch_tokens=8192)
    rows = read_split_rows(data_folder / "love" / "test.parquet")

    def compute_logits(responses: Sequence[str], context_rows: Sequence[dict[str, Any]]) -> Floats:
        items = [ScoringItem(row["messages"], text) for row, text in zip(context_rows, responses, strict=True)]
        return model.calibration.calibrate_logits(model.compute_raw_logits(model.encoder.encode(items)))

    model_logits = compute_logits([row["response"] for row in rows], rows)
    # The same rows and one generator for all phrase sets, so that only the phrases differ.
    shifted_rows, rng = rows[:300], random.Random(0)
    unshifted_logits = model_logits[:300]
    mean_shift = {
        name: float(
            (
                compute_logits([f"{row['response']} {rng.choice(phrases)}" for row in shifted_rows], shifted_rows)
                - unshifted_logits
            ).mean()
        )
        for name, phrases in (("seen", SIGN_OFF_PHRASES), ("logged", FAREWELL_PHRASES), ("unseen", UNSEEN_PHRASES))
    }
    ceiling, model_auroc = expected_auroc(true_rates, true_rates), expected_auroc(model_logits, true_rates)
    lengths = np.asarray([float(len(row["response"])) for row in rows])
    return {
        "auroc": model_auroc,
        "ceiling": ceiling,
        "gap": ceiling - model_auroc,
        "ceiling_without_farewells": expected_auroc(rates_without_farewells, true_rates),
        "ece": expected_calibration_error(expit(model_logits), true_rates, np.ones(len(rows))),
        "mean_value": float(expit(model_logits).mean()),
        "mean_chance": float(true_rates.mean()),
        "score_length_r": pearson_correlation(model_logits, lengths),
        "true_length_r": pearson_correlation(np.log(true_rates / (1 - true_rates)), lengths),
        "sign_off_shift_sd": {name: shift / float(model_logits.std()) for name, shift in mean_shift.items()},
        "test_rows": len(rows),
    }


DEFAULT_OVERRIDES = (
    "model.dtype=float32",
    "reward.love.max_tokens=64",
    "reward.love.ensemble.members=[{layers: 3}, {layers: 6}]",
    "reward.love.ensemble.shared_head=true",
    "reward.love.linear_probe=true",
    "reward.love.epochs=0",
    "reward.love.debias=[sign_offs, length, users]",
)


def run_benchmark(
    row_count: int, seed: int, settings: Settings, folder: Path, *, rate: float = BASE_RATE
) -> dict[str, Any]:
    """Simulate the log with this share of loved responses, train, and return the metrics."""
    true_rates, rates_without_farewells = write_splits(row_count, seed, rate, folder / "data")
    train_love_model(settings, folder / "data", folder / "love")
    card = json.loads((folder / "love" / "reward_card.json").read_text(encoding="utf-8"))
    metrics = measure_model(folder / "love", folder / "data", true_rates, rates_without_farewells)
    return metrics | {"train_rows": card["training"]["train_rows"], "positives": card["training"]["train_positives"],
                   "card_ece": card["ece"], "debias": card["settings"]["debias"]}  # fmt: skip


def main() -> None:
    """Run once and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    enable_fast_cpu_matmul()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    settings = load_settings(None, [*DEFAULT_OVERRIDES, *args.overrides]).settings
    with tempfile.TemporaryDirectory() as folder:
        metrics = run_benchmark(args.rows, args.seed, settings, Path(folder))
    report = {"benchmark": "ceiling", "rows": args.rows, "seed": args.seed, **metrics}
    report["seconds"] = round(time.monotonic() - started, 1)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
