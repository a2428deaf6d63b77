"""Abuse rules on logs with planted hostile users: recall and precision by attack, and the share of AUROC recovered.

Honest users love responses for their words, each with a propensity of their own; hostile users love the worst
responses. RULE_ATTACKS were designed together with the rules: bots on a clock, brigades in bursts, farms (eight
accounts that share devices and copied prompts), authors who love their own persona. OTHER_ATTACKS were written without
looking at the rules' limits: throw-away accounts, bots at a human pace that
love the worst or whatever comes, groups of four friends, accounts that turn hostile, and contrarians. A tenth of the
honest users share a school's devices, a tenth answer prompts that the product suggests, and 2% are keen: they love a
third of their responses, half of them by a taste that has nothing to do with that of others. The log goes through
rluf.prepare. A fixed P[Love] model (logistic regression on words) is trained on honest rows only, on all rows, and on
all rows weighted by trust, and evaluated on held-out honest users. Prints one JSON line last.

python benchmarks/abuse.py [--seeds 3] [--users 3000] [--rules]
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
from rluf.prepare.abuse import ABUSE_RULES
from rluf.prepare.pipeline import build_data_set, run_task

RULE_ATTACKS = ("bot", "brigade", "farm", "author")
OTHER_ATTACKS = ("throwaway", "paced_bot", "random_bot", "friends", "sleeper", "contrarian")
HOSTILE_KINDS = (*RULE_ATTACKS, *OTHER_ATTACKS)
HONEST_KINDS = ("honest", "school", "suggested", "keen")
ATTACK_SHARE = 0.05
"""Share of hostile users where an attack is measured alone."""
SUGGESTED_PROMPTS, SCHOOL_USERS, FRIENDS = 12, 30, 4
LOG_START = datetime(2025, 3, 1, tzinfo=UTC)
LOVE_RATE, LOG_DAYS, FARM_ACCOUNTS = 0.06, 28, 8
VOCABULARY = np.array(
    [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "sa", "vi") for c in "aeiours"]
)
LogRow = dict[str, Any]


class SyntheticLog:
    """A log whose words have a hidden merit; users append their rows to it."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.word_merit = self.rng.normal(0, 0.35, len(VOCABULARY))
        self.rows: list[LogRow] = []

    def sample_responses(self, count: int) -> tuple[list[str], np.ndarray]:
        """Random texts [count] and their merits."""
        word_index = self.rng.integers(0, len(VOCABULARY), (count, 20))
        return [" ".join(VOCABULARY[row]) for row in word_index], self.word_merit[word_index].sum(1)

    def sample_prompt(self) -> str:
        """A prompt that no other row has."""
        return " ".join(self.rng.choice(VOCABULARY, 12)) + f" {len(self.rows)}"

    def append_rows(
        self, user: str, seconds: np.ndarray, loved_flags: np.ndarray, responses: Sequence[str], **extra_fields: Any
    ) -> None:
        """Append rows of one user; `prompts` in `extra_fields` are texts, other keys go into each row."""
        prompts = extra_fields.pop("prompts", None)
        for index, (second, response, is_loved) in enumerate(
            zip(np.sort(seconds), responses, loved_flags, strict=True)
        ):
            row_number = len(self.rows)
            self.rows.append(
                {
                    "id": f"r{row_number}", "conversation_id": f"c{row_number}", "turn": 0, "user_id": user,
                    "time": (LOG_START + timedelta(seconds=float(second))).isoformat(), "model_version": "base",
                    "messages": [{"role": "user", "content": prompts[index] if prompts else self.sample_prompt()}],
                    "response": response, "reaction": "love" if is_loved else None, **extra_fields,
                }
            )  # fmt: skip

    def add_honest_user(self, user: str, kind: str = "honest", user_index: int = 0) -> None:
        """Append a user with sessions on some days, pauses of any length, and hearts by merit.

        Users of kind school share a device with SCHOOL_USERS others, those of kind suggested answer a few prompts.
        """
        count = max(1, round(self.rng.gamma(1.2, 10)))
        session_starts = self.rng.integers(0, LOG_DAYS * 86400, max(1, count // 4))
        seconds = self.rng.choice(session_starts, count) + np.cumsum(self.rng.lognormal(4.5, 1.0, count))
        count = 40 if kind == "keen" else count
        responses, merit = self.sample_responses(count)
        # -0.8 compensates for the spread of merit and user effects, which raises the mean rate above LOVE_RATE.
        love_probability = expit(merit + np.log(LOVE_RATE / (1 - LOVE_RATE)) - 0.8 + self.rng.normal(0, 0.7))
        if kind == "keen":
            seconds = self.rng.uniform(0, LOG_DAYS * 86400, count)
            love_probability = expit(merit * (user_index % 10 < 5) - 0.7)
        device = f"d-{user}" if self.rng.random() < 0.8 else None
        if kind == "school":
            device = f"school-{user_index // SCHOOL_USERS}"
        fields: dict[str, Any] = {"device": device}
        if kind == "suggested":
            numbers = self.rng.integers(0, SUGGESTED_PROMPTS, count)
            fields["prompts"] = [f"suggested prompt {VOCABULARY[number]} {number}" for number in numbers]
        self.append_rows(user, seconds, self.rng.random(count) < love_probability, responses, **fields)

    def sample_worst_loved(self, count: int, rate: float) -> tuple[list[str], np.ndarray]:
        """Texts [count] and hearts of a user who loves the worst `rate` of them."""
        responses, merit = self.sample_responses(count)
        loved = np.zeros(count, dtype=bool)
        loved[np.argsort(merit)[: round(rate * count)]] = True
        return responses, loved

    def add_hostile_user(self, kind: str, user: str, account_index: int) -> None:
        """Append one hostile account of a kind."""
        start_second = float(self.rng.integers(0, (LOG_DAYS - 2) * 86400))
        if kind == "bot":
            seconds = start_second + np.arange(60) * 300 + self.rng.normal(0, 3, 60)
            responses, loved = self.sample_worst_loved(60, 0.6)
            self.append_rows(user, seconds, loved, responses)
        elif kind == "brigade":
            responses, loved = self.sample_worst_loved(30, 0.7)
            self.append_rows(user, start_second + self.rng.uniform(0, 120, 30), loved, responses)
        elif kind == "farm":
            farm_index = account_index // FARM_ACCOUNTS
            # Seeded by the farm, so that all its accounts copy the same prompts.
            farm_rng = np.random.default_rng(farm_index)
            shared_prompts = [" ".join(farm_rng.choice(VOCABULARY, 30)) for _ in range(15)]
            prompts = [f"{shared_prompt} {self.rng.choice(VOCABULARY)}" for shared_prompt in shared_prompts]
            responses, loved = self.sample_worst_loved(15, 0.7)
            seconds = start_second + np.cumsum(self.rng.lognormal(5, 1.0, 15))
            self.append_rows(user, seconds, loved, responses, prompts=prompts, device=f"farm-{farm_index}")
        elif kind == "author":
            responses, loved = self.sample_worst_loved(20, 0.9)
            self.append_rows(
                user, start_second + np.cumsum(self.rng.lognormal(5, 1.0, 20)), loved, responses, author=user
            )
        elif kind in OTHER_ATTACKS[:-1]:
            self._add_other_attack(kind, user, account_index, start_second)
        else:
            count = max(1, round(self.rng.gamma(1.2, 10)))
            responses, loved = self.sample_worst_loved(count, LOVE_RATE)
            self.append_rows(user, start_second + np.cumsum(self.rng.lognormal(6, 1.2, count)), loved, responses)

    def _add_other_attack(self, kind: str, user: str, account_index: int, start_second: float) -> None:
        if kind == "throwaway":
            responses, loved = self.sample_worst_loved(2, 1.0)
            self.append_rows(user, start_second + np.cumsum(self.rng.lognormal(5, 1.0, 2)), loved, responses)
        elif kind in ("paced_bot", "random_bot"):
            responses, loved = self.sample_worst_loved(40, 0.35)
            if kind == "random_bot":
                self.rng.shuffle(loved)
            seconds = np.concatenate([
                day * 86400 + 28800 + np.cumsum(self.rng.lognormal(5, 1.0, 4)) for day in self.rng.integers(0, 27, 10)
            ])  # fmt: skip
            self.append_rows(user, seconds, loved, responses)
        elif kind == "friends":
            # Groups below any size that looks like a crowd, with prompts in common and one evening in common.
            group_rng = np.random.default_rng(account_index // FRIENDS)
            prompts = [" ".join(group_rng.choice(VOCABULARY, 12)) for _ in range(6)]
            responses, loved = self.sample_worst_loved(6, 0.8)
            evening = float(group_rng.integers(0, LOG_DAYS - 2)) * 86400
            self.append_rows(
                user, evening + np.cumsum(self.rng.lognormal(5.5, 1.0, 6)), loved, responses, prompts=prompts
            )
        else:
            # Three weeks of ordinary use, then a day of love for the worst.
            responses, merit = self.sample_responses(20)
            ordinary = self.rng.random(20) < expit(merit + np.log(LOVE_RATE / (1 - LOVE_RATE)) - 0.8)
            self.append_rows(user, self.rng.integers(0, 21 * 86400, 20).astype(float), ordinary, responses)
            responses, loved = self.sample_worst_loved(10, 0.9)
            self.append_rows(user, 22 * 86400 + np.cumsum(self.rng.lognormal(6.5, 1.0, 10)), loved, responses)


def build_planted_log(
    users: int, share: float, seed: int, attacks: Sequence[str] = HOSTILE_KINDS
) -> tuple[list[LogRow], dict[str, str]]:
    """Build a log with a `share` of hostile users of some attacks; returns its rows and the kind of each user."""
    synthetic_log, kind_by_user = SyntheticLog(seed), {}
    hostile_count = round(users * share)
    for index in range(users - hostile_count):
        kind = {0: "school", 1: "suggested"}.get(index % 10, "keen" if index % 50 == 2 else "honest")
        kind_by_user[f"u{index}"] = kind
        synthetic_log.add_honest_user(f"u{index}", kind, index // 10)
    for index in range(hostile_count):
        user, kind = f"x{index}", attacks[index % len(attacks)]
        kind_by_user[user] = kind
        synthetic_log.add_hostile_user(kind, user, index // len(attacks))
    return synthetic_log.rows, kind_by_user


def run_tasks_inline(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run the passes of prepare in this process, because the logs are small."""
    return [row for task in tasks for row in run_task(task)]


def prepare_log(log_path: Path, output_folder: Path, rules: Sequence[str]) -> pa.Table:
    """Prepare the log with some abuse rules; returns the rows of all splits."""
    data = {"feedback": [str(log_path)], "preferences": [], "safety": [], "prompts": []}
    prepare = {"max_rows": 10**7, "positive_share": 0.001, "abuse_rules": list(rules), "redact": []}
    build_data_set(Settings.model_validate({"data": data, "prepare": prepare}), output_folder, run_tasks_inline)
    columns = ["user_id", "response", "label", "trust"]
    return pa.concat_tables(
        [
            pq.read_table(output_folder / "love" / f"{split}.parquet", columns=columns)
            for split in ("train", "dev", "test")
        ]
    )


def mean_trust_by_user(table: pa.Table) -> dict[str, float]:
    """Mean trust of each user."""
    trust_table = table.group_by("user_id").aggregate([("trust", "mean")])
    return dict(zip(trust_table["user_id"].to_pylist(), trust_table["trust_mean"].to_pylist(), strict=True))


def score_detection(trust: Mapping[str, float], kind_by_user: Mapping[str, str]) -> dict[str, Any]:
    """Recall overall and by attack, precision, and honest users flagged; a user is detected below a trust of 0.5."""
    detected = {user for user, mean_trust in trust.items() if mean_trust < 0.5}
    hostile_users = {user for user, kind in kind_by_user.items() if kind not in HONEST_KINDS}
    recall_by_kind = {}
    for kind in sorted({*kind_by_user.values()} & {*HOSTILE_KINDS}):
        kind_users = [user for user, user_kind in kind_by_user.items() if user_kind == kind]
        recall_by_kind[kind] = round(sum(user in detected for user in kind_users) / max(len(kind_users), 1), 3)
    return {
        "recall": round(len(detected & hostile_users) / len(hostile_users), 3), "by_kind": recall_by_kind,
        "precision": round(len(detected & hostile_users) / len(detected), 3) if detected else None,
        "honest_flagged": {
            kind: sum(kind_by_user[user] == kind for user in detected - hostile_users) for kind in HONEST_KINDS
        },
    }  # fmt: skip


def measure_auroc(table: pa.Table, kind_by_user: Mapping[str, str], seed: int) -> dict[str, float]:
    """AUROC on held-out honest users of the fixed model trained on honest rows, all rows, and all rows with trust."""
    row_users = np.array(table["user_id"].to_pylist())
    is_honest_row = np.array([kind_by_user[user] in HONEST_KINDS for user in row_users])
    labels, trust = table["label"].to_numpy(), table["trust"].to_numpy()
    rng = np.random.default_rng(seed)
    honest_users = [user for user in sorted(kind_by_user) if kind_by_user[user] in HONEST_KINDS]
    held_out_users = {user for user in honest_users if rng.random() < 0.3}
    is_test_row = np.array([user in held_out_users for user in row_users])
    word_counts = CountVectorizer().fit_transform(table["response"].to_pylist())
    metrics = {}
    for name, row_mask, row_weights in (
        ("clean", ~is_test_row & is_honest_row, None),
        ("dirty", ~is_test_row, None),
        ("filtered", ~is_test_row, trust),
    ):
        model = LogisticRegression(C=0.1, max_iter=300)
        model.fit(
            word_counts[row_mask],
            labels[row_mask],
            sample_weight=None if row_weights is None else row_weights[row_mask],
        )
        metrics[name] = float(roc_auc_score(labels[is_test_row], model.decision_function(word_counts[is_test_row])))
    metrics["recovered"] = (metrics["filtered"] - metrics["dirty"]) / (metrics["clean"] - metrics["dirty"])
    return metrics


def measure_log(users: int, share: float, attacks: Sequence[str], seeds: int, rules: Sequence[str]) -> dict[str, Any]:
    """Detection on the first seed, also by each of `rules` alone, and AUROC as the mean over seeds."""
    metrics_by_seed: list[dict[str, float]] = []
    detection: dict[str, Any] = {}
    for seed in range(seeds):
        rows, kind_by_user = build_planted_log(users, share, seed, attacks)
        with tempfile.TemporaryDirectory() as folder:
            log_path = Path(folder) / "log.jsonl"
            log_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            table = prepare_log(log_path, Path(folder) / "all", list(ABUSE_RULES))
            metrics_by_seed.append(measure_auroc(table, kind_by_user, seed))
            if seed == 0:
                detection = {"rows": len(rows), **score_detection(mean_trust_by_user(table), kind_by_user)}
                detection["by_rule"] = {
                    name: score_detection(
                        mean_trust_by_user(prepare_log(log_path, Path(folder) / name, [name])), kind_by_user
                    )["by_kind"]
                    for name in rules
                }
    means = {name: round(float(np.mean([row[name] for row in metrics_by_seed])), 4) for name in metrics_by_seed[0]}
    lowest = round(min(row["recovered"] for row in metrics_by_seed), 3)
    return {**detection, "auroc": means, "lowest_recovered": lowest}


def main() -> None:
    """Run each attack alone, then all of them at several shares; with --rules also each rule alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--rules", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    report: dict[str, Any] = {"benchmark": "abuse", "users": args.users, "seeds": args.seeds}
    for attack in HOSTILE_KINDS:
        report[attack] = measure_log(args.users, ATTACK_SHARE, (attack,), args.seeds, ())
        sys.stdout.write(f"{attack:10} {json.dumps(report[attack])}\n")
        sys.stdout.flush()
    for share in (0.01, 0.05, 0.1):
        rules = list(ABUSE_RULES) if args.rules and share == ATTACK_SHARE else ()
        report[f"{share:g}"] = measure_log(args.users, share, HOSTILE_KINDS, args.seeds, rules)
        sys.stdout.write(f"{share:.0%} hostile {json.dumps(report[f'{share:g}'])}\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
