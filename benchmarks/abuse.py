"""Abuse rules on logs with a planted truth: recall and precision of each rule, and how much lost AUROC they win back.

Honest users love responses for their words, each with a propensity of their own; hostile ones love what is worst. A
fifth of the hostile users each: bots on a clock, brigades in bursts, farms (eight accounts that share devices and
copied prompts), authors who love their own persona, and contrarians, who behave like anybody else. The log goes
through rluf.prepare; a fixed P[Love] model (logistic regression on words) is trained on honest rows only, on all rows,
and on all rows with their trust, and judged on honest users apart. Prints one JSON line last.

python benchmarks/abuse.py [--seeds 3] [--users 3000]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from rluf.config.settings import Settings
from rluf.prepare.abuse import RULES
from rluf.prepare.pipeline import build, run_task

KINDS = ("bot", "brigade", "farm", "author", "contrarian")
START = datetime(2025, 3, 1, tzinfo=UTC)
RATE, DAYS, FARM = 0.06, 28, 8
WORDS = np.array([f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "sa", "vi") for c in "aeiours"])
Row = dict[str, Any]


class World:
    """Words with hidden merit, and who writes what into the log."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.merit = self.rng.normal(0, 0.35, len(WORDS))
        self.rows: list[Row] = []

    def responses(self, count: int) -> tuple[list[str], np.ndarray]:
        """Texts [count] and their merits."""
        drawn = self.rng.integers(0, len(WORDS), (count, 20))
        return [" ".join(WORDS[row]) for row in drawn], self.merit[drawn].sum(1)

    def prompt(self) -> str:
        """A prompt that nobody else writes."""
        return " ".join(self.rng.choice(WORDS, 12)) + f" {len(self.rows)}"

    def log(self, user: str, seconds: np.ndarray, loved: np.ndarray, texts: Sequence[str], **more: Any) -> None:
        """Append rows of one user; `prompts` in `more` are texts, other keys go into each row."""
        prompts = more.pop("prompts", None)
        for n, (at, text, love) in enumerate(zip(np.sort(seconds), texts, loved, strict=True)):
            number = len(self.rows)
            self.rows.append(
                {
                    "id": f"r{number}", "conversation_id": f"c{number}", "turn": 0, "user_id": user,
                    "time": (START + timedelta(seconds=float(at))).isoformat(), "model_version": "base",
                    "messages": [{"role": "user", "content": prompts[n] if prompts else self.prompt()}],
                    "response": text, "reaction": "love" if love else None, **more,
                }
            )  # fmt: skip

    def honest(self, user: str) -> None:
        """Sessions on some days, pauses of any length, love by merit."""
        count = max(1, round(self.rng.gamma(1.2, 10)))
        starts = self.rng.integers(0, DAYS * 86400, max(1, count // 4))
        seconds = self.rng.choice(starts, count) + np.cumsum(self.rng.lognormal(4.5, 1.0, count))
        texts, merit = self.responses(count)
        chance = expit(merit + np.log(RATE / (1 - RATE)) - 0.8 + self.rng.normal(0, 0.7))
        device = f"d-{user}" if self.rng.random() < 0.8 else None
        self.log(user, seconds, self.rng.random(count) < chance, texts, device=device)

    def worst(self, count: int, rate: float) -> tuple[list[str], np.ndarray]:
        """Texts and hearts of someone who loves what is worst, `rate` of them."""
        texts, merit = self.responses(count)
        loved = np.zeros(count, dtype=bool)
        loved[np.argsort(merit)[: round(rate * count)]] = True
        return texts, loved

    def hostile(self, kind: str, user: str, number: int) -> None:
        """One account of a kind."""
        start = float(self.rng.integers(0, (DAYS - 2) * 86400))
        if kind == "bot":
            seconds = start + np.arange(60) * 300 + self.rng.normal(0, 3, 60)
            texts, loved = self.worst(60, 0.6)
            self.log(user, seconds, loved, texts)
        elif kind == "brigade":
            texts, loved = self.worst(30, 0.7)
            self.log(user, start + self.rng.uniform(0, 120, 30), loved, texts)
        elif kind == "farm":
            gang = number // FARM
            shared = np.random.default_rng(gang)
            base = [" ".join(shared.choice(WORDS, 30)) for _ in range(15)]
            prompts = [f"{text} {self.rng.choice(WORDS)}" for text in base]
            texts, loved = self.worst(15, 0.7)
            seconds = start + np.cumsum(self.rng.lognormal(5, 1.0, 15))
            self.log(user, seconds, loved, texts, prompts=prompts, device=f"farm-{gang}")
        elif kind == "author":
            texts, loved = self.worst(20, 0.9)
            self.log(user, start + np.cumsum(self.rng.lognormal(5, 1.0, 20)), loved, texts, author=user)
        else:
            count = max(1, round(self.rng.gamma(1.2, 10)))
            texts, loved = self.worst(count, RATE)
            self.log(user, start + np.cumsum(self.rng.lognormal(6, 1.2, count)), loved, texts)


def planted(users: int, share: float, seed: int) -> tuple[list[Row], dict[str, str]]:
    """A log and the kind of each user."""
    world, kinds = World(seed), {}
    hostile = round(users * share)
    for n in range(users - hostile):
        kinds[f"u{n}"] = "honest"
        world.honest(f"u{n}")
    for n in range(hostile):
        name, kind = f"x{n}", KINDS[n % len(KINDS)]
        kinds[name] = kind
        world.hostile(kind, name, n // len(KINDS))
    return world.rows, kinds


def inline(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run the passes in this process: the logs are small."""
    return [row for task in tasks for row in run_task(task)]


def prepared(log: Path, out: Path, rules: Sequence[str]) -> pa.Table:
    """The log through prepare with some rules; all rows of all sides."""
    data = {"feedback": [str(log)], "preferences": [], "safety": [], "prompts": []}
    prepare = {"max_rows": 10**7, "positive_share": 0.001, "abuse": list(rules), "redact": []}
    build(Settings.model_validate({"data": data, "prepare": prepare}), out, inline)
    columns = ["user_id", "response", "label", "trust"]
    return pa.concat_tables(
        [pq.read_table(out / "love" / f"{s}.parquet", columns=columns) for s in ("train", "dev", "test")]
    )


def flagged(table: pa.Table) -> dict[str, float]:
    """Mean trust of each user."""
    grouped = table.group_by("user_id").aggregate([("trust", "mean")])
    return dict(zip(grouped["user_id"].to_pylist(), grouped["trust_mean"].to_pylist(), strict=True))


def judged(trust: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Recall in all and by kind, precision, and honest users hit; a user counts as caught below a mean trust of 0.5."""
    caught = {user for user, value in trust.items() if value < 0.5}
    hostile = {user for user, kind in kinds.items() if kind != "honest"}
    by_kind = {}
    for kind in KINDS:
        members = [user for user, own in kinds.items() if own == kind]
        by_kind[kind] = round(sum(user in caught for user in members) / max(len(members), 1), 3)
    return {
        "recall": round(len(caught & hostile) / len(hostile), 3), "by_kind": by_kind,
        "precision": round(len(caught & hostile) / len(caught), 3) if caught else None,
        "honest_caught": len(caught - hostile),
    }  # fmt: skip


def auroc(table: pa.Table, kinds: Mapping[str, str], seed: int) -> dict[str, float]:
    """AUROC on honest users apart, of the fixed model trained on honest rows, on all, and on all with trust."""
    users = np.array(table["user_id"].to_pylist())
    honest = np.array([kinds[user] == "honest" for user in users])
    label, trust = table["label"].to_numpy(), table["trust"].to_numpy()
    rng = np.random.default_rng(seed)
    apart = {user for user in sorted(kinds) if kinds[user] == "honest" and rng.random() < 0.3}
    test = np.array([user in apart for user in users])
    words = CountVectorizer().fit_transform(table["response"].to_pylist())
    found = {}
    for name, rows, weight in (("clean", ~test & honest, None), ("dirty", ~test, None), ("filtered", ~test, trust)):
        model = LogisticRegression(C=0.1, max_iter=300)
        model.fit(words[rows], label[rows], sample_weight=None if weight is None else weight[rows])
        found[name] = float(roc_auc_score(label[test], model.decision_function(words[test])))
    found["won_back"] = (found["filtered"] - found["dirty"]) / (found["clean"] - found["dirty"])
    return found


def main() -> None:
    """All shares and seeds; the rules one by one on the first seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=3000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    result: dict[str, Any] = {}
    for share in (0.01, 0.05, 0.1):
        models, rules, count = [], {}, 0
        for seed in range(options.seeds):
            rows, kinds = planted(options.users, share, seed)
            count = len(rows)
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "log.jsonl"
                log.write_text("".join(json.dumps(row) + "\n" for row in rows))
                table = prepared(log, Path(folder) / "all", list(RULES))
                models.append(auroc(table, kinds, seed))
                if seed == 0:
                    rules["all"] = judged(flagged(table), kinds)
                    for name in RULES:
                        rules[name] = judged(flagged(prepared(log, Path(folder) / name, [name])), kinds)
        means = {name: round(float(np.mean([model[name] for model in models])), 4) for name in models[0]}
        lowest = round(min(model["won_back"] for model in models), 3)
        result[f"{share:g}"] = {"rows": count, "auroc": means, "won_back_lowest": lowest, "rules": rules}
        sys.stdout.write(f"{share:.0%} hostile: {means}\n")
        for name, found in rules.items():
            sys.stdout.write(f"  {name:10} {json.dumps(found)}\n")
    line = {"benchmark": "abuse", "users": options.users, "seeds": options.seeds, "shares": result}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
