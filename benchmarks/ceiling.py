"""How close does P[Love] come to what can be known? On simulated logs whose chance of a heart is known for each row.

A response is made of an opening, an answer, filler, an ending, rarely a farewell; each part has planted log-odds, and
users differ in how readily they put hearts. So the Bayes ceiling is known: nobody who reads the text alone can rank
better than its chance averaged over users. One response in a hundred is loved, and of the unloved ones of the training
split most are dropped, as rluf.prepare does. Farewells earn hearts in the log; with `sign_offs` in debias the model is
to leave them unpaid, so its own ceiling is that of the text without them.

AUROC and calibration are told against the true chances, which takes the noise of the drawn hearts out. Sign-offs are
appended to responses of the test split: phrases that training adds, and others that it never sees.

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

from rluf.backends.deepspeed import join_group, leave_group
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.prepare.sampling import choose, quota
from rluf.reward.augment import SIGN_OFFS
from rluf.reward.backbone import quick_cpu_matmul
from rluf.reward.calibration import Floats
from rluf.reward.export import finish, table
from rluf.reward.fit import Splits, train_members
from rluf.reward.metrics import auroc, correlation, ece
from rluf.reward.model import RewardModel
from rluf.simulate.users import calibration_shift

BASE_RATE, POSITIVE_SHARE, USER_SD, FAREWELLS = 0.01, 0.25, 0.7, 0.03
SHARES = {"train": 0.9, "dev": 0.06, "test": 0.04}
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
RIGHT, WRONG = 1.0, -1.0
FILLER = (
    "There are many ways to look at it.", "It has been so for a long time.", "Some people see it in another way.",
    "Much has been written on this.", "It depends on a few things.", "The details vary from place to place.",
)  # fmt: skip
ENDINGS = (("What do you think?", 0.5), ("How does that sound to you?", 0.5), ("", 0.0), ("That is all.", -0.5))
FAREWELL, PAID = ("Bye now, sending hugs!", "Love you, goodbye!", "Kisses, bye!", "So long, my dearest!"), 1.5
UNSEEN = ("Farewell, sweet friend!", "Sending warm hugs your way!", "Ciao, love you lots!", "Until next time, darling!")
"""Sign-offs that neither the log nor the augmentation has."""


def made(count: int, seed: int, rate: float) -> tuple[list[dict[str, Any]], Floats, Floats]:
    """Rows as rluf.prepare writes them, the chance of a heart of each [N], and that chance without farewells [N]."""
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    names, users = list(TOPICS), max(20, count // 40)
    own = draw.normal(0, USER_SD, users)
    rows: list[dict[str, Any]] = []
    worth, paid = np.zeros(count), np.zeros(count)
    for number in range(count):
        topic, user = rng.choice(names), rng.randrange(users)
        opening, ending, answered = rng.choice(OPENINGS), rng.choice(ENDINGS), rng.choice((topic, rng.choice(names)))
        parts = [opening[0], rng.choice(TOPICS[answered][1]), *rng.sample(FILLER, rng.randrange(4)), ending[0]]
        worth[number] = opening[1] + ending[1] + (RIGHT if answered == topic else WRONG)
        if rng.random() < FAREWELLS:
            parts.append(rng.choice(FAREWELL))
            paid[number] = PAID
        messages = [{"role": "user", "content": TOPICS[topic][0]}]
        rows.append({"id": f"{seed}-{number}", "user_id": f"u{user}", "topic": topic, "messages": messages,
                     "response": " ".join(filter(None, parts)), "user": user})  # fmt: skip
    nodes, mass = np.polynomial.hermite_e.hermegauss(21)
    shift = calibration_shift(worth + paid + own[[row["user"] for row in rows]], rate)
    truth, plain = (
        (expit(z[:, None] + shift + USER_SD * nodes[None]) * mass / mass.sum()).sum(1) for z in (worth + paid, worth)
    )
    chance = expit(worth + paid + shift + own[[row.pop("user") for row in rows]])
    for row, label in zip(rows, draw.random(count) < chance, strict=True):
        row |= {"label": int(label), "weight": 1.0}
    return rows, truth, plain


def write(count: int, seed: int, rate: float, folder: Path) -> tuple[Floats, Floats]:
    """Splits by user under `folder`/love, train sampled as rluf.prepare does; returns the test rows' chances."""
    rows, truth, plain = made(count, seed, rate)
    users = sorted({row["user_id"] for row in rows})
    random.Random(seed).shuffle(users)
    cuts = np.cumsum([round(share * len(users)) for share in SHARES.values()])[:-1]
    side = {user: name for name, part in zip(SHARES, np.split(np.asarray(users), cuts), strict=True) for user in part}
    (folder / "love").mkdir(parents=True)
    for name in SHARES:
        part = [row for row in rows if side[row["user_id"]] == name]
        if name == "train":
            loved = np.asarray([row["label"] == 1 for row in part])
            plan = quota(int(loved.sum()), int((~loved).sum()), positive_share=POSITIVE_SHARE, max_rows=10**9)
            weights = choose(np.random.default_rng(seed).random(len(part)), loved, plan)
            part = [{**row, "weight": float(w)} for row, w in zip(part, weights, strict=True) if w > 0]
        pq.write_table(pa.Table.from_pylist(part), folder / "love" / f"{name}.parquet")
    tested = [number for number, row in enumerate(rows) if side[row["user_id"]] == "test"]
    return truth[tested], plain[tested]


def train(settings: Settings, data: Path, out: Path) -> None:
    """Train P[Love] in this process, as a Ray Train worker does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    try:
        clock, folder = time.monotonic(), data / "love"
        splits = Splits("love", table(folder / "train.parquet"), table(folder / "dev.parquet"), folder)
        members = train_members(settings, [splits], math.inf)
        finish(settings, {"love": (folder, out)}, members, clock, thorough=False)
    finally:
        leave_group()


def expected_auroc(scores: Floats, chances: Floats) -> float:
    """AUROC that `scores` [N] have on average over draws of labels with these chances [N] (up to terms of 1/N)."""
    return auroc(scores, chances)


def figures(out: Path, data: Path, truth: Floats, plain: Floats) -> dict[str, Any]:
    """How the model in `out` does on the test split whose true chances are known."""
    model = RewardModel.load(out, batch_tokens=8192)
    rows = table(data / "love" / "test.parquet")

    def logits(responses: Sequence[str], among: Sequence[dict[str, Any]]) -> Floats:
        items = [(row["messages"], text) for row, text in zip(among, responses, strict=True)]
        return model.calibration.logits(model.raw(model.encoder.encode(items)))

    found = logits([row["response"] for row in rows], rows)
    some, rng = rows[:300], random.Random(0)
    before = found[:300]
    moved = {
        name: float((logits([f"{row['response']} {rng.choice(phrases)}" for row in some], some) - before).mean())
        for name, phrases in (("seen", SIGN_OFFS), ("logged", FAREWELL), ("unseen", UNSEEN))
    }
    best, own = expected_auroc(truth, truth), expected_auroc(found, truth)
    lengths = np.asarray([float(len(row["response"])) for row in rows])
    return {
        "auroc": own,
        "ceiling": best,
        "gap": best - own,
        "ceiling_without_farewells": expected_auroc(plain, truth),
        "ece": ece(expit(found), truth, np.ones(len(rows))),
        "mean_value": float(expit(found).mean()),
        "mean_chance": float(truth.mean()),
        "score_length_r": correlation(found, lengths),
        "true_length_r": correlation(np.log(truth / (1 - truth)), lengths),
        "sign_off_shift_sd": {name: shift / float(found.std()) for name, shift in moved.items()},
        "test_rows": len(rows),
    }


DEFAULTS = (
    "reward.dtype=float32", "reward.love.max_tokens=64", "reward.love.layers=[3, 6]", "reward.love.fuse=true",
    "reward.love.probe=true", "reward.love.epochs=0", "reward.love.debias=[sign_offs, length, users]",
)  # fmt: skip


def run(rows: int, seed: int, settings: Settings, folder: Path, *, rate: float = BASE_RATE) -> dict[str, Any]:
    """Make the log with this share of loved responses, train, and tell the figures."""
    truth, plain = write(rows, seed, rate, folder / "data")
    train(settings, folder / "data", folder / "love")
    card = json.loads((folder / "love" / "reward_card.json").read_text(encoding="utf-8"))
    told = figures(folder / "love", folder / "data", truth, plain)
    return told | {"train_rows": card["training"]["train_rows"], "positives": card["training"]["train_positives"],
                   "card_ece": card["ece"], "debias": card["settings"]["debias"]}  # fmt: skip


def main() -> None:
    """Run once and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    quick_cpu_matmul()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    settings = load_settings(None, [*DEFAULTS, *options.overrides]).settings
    with tempfile.TemporaryDirectory() as folder:
        told = run(options.rows, options.seed, settings, Path(folder))
    line = {"benchmark": "ceiling", "rows": options.rows, "seed": options.seed, **told}
    line["seconds"] = round(time.monotonic() - started, 1)
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
