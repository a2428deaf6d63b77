"""Ideas for rules against three attacks that no abuse rule detects: recall and honest users flagged, by idea.

turn: a user's rows after some moment are loved more often than those before it (hypergeometric, adjusted for the
moments that a user has). dislike: a user loves what the others love least, however rarely (Mann-Whitney). disagree: a
user agrees less with the others than the median user who loves 5 responses does. What the others love is a model of
words that is trained on the users of the other fold. Probabilities are adjusted for the number of users and flag
below the threshold of the rules. The logs are those of benchmarks/abuse.py, with one attack by 5% of the users.
Prints one JSON line last.

python benchmarks/abuse_ideas.py [--seeds 2] [--users 1500]
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import Any

import numpy as np
from abuse import ATTACK_SHARE, HONEST_KINDS, build_planted_log
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import false_discovery_control, hypergeom

from rluf.prepare.abuse import TAIL_PROBABILITY_THRESHOLD, AbuseLog, predict_love
from rluf.utils.stats import Bools, Floats

ATTACKS = ("sleeper", "random_bot", "contrarian")
MIN_TURN_ROWS, MIN_TURN_LOVED, MIN_LOVED = 10, 4, 3


def build_abuse_log(attack: str, users: int, seed: int) -> tuple[AbuseLog, NDArray[np.str_]]:
    """A planted log as the rules see it, and the kind of each user code [U]."""
    rows, kind_by_user = build_planted_log(users, ATTACK_SHARE, seed, (attack,))
    code_by_user = {user: code for code, user in enumerate(kind_by_user)}
    user_code = np.array([code_by_user[row["user_id"]] for row in rows])
    loved = np.array([row["reaction"] == "love" for row in rows])
    time_us = np.array([round(datetime.fromisoformat(row["time"]).timestamp() * 1e6) for row in rows])
    texts, row_codes = [str(row["response"]) for row in rows], np.arange(len(rows))
    log = AbuseLog(
        user_code, row_codes, row_codes, np.full(len(rows), -1), time_us, loved, np.zeros(len(rows), np.bool_),
        lambda indices: [texts[index] for index in indices],
    )  # fmt: skip
    return log, np.array(list(kind_by_user.values()))


def compute_turn_probability(log: AbuseLog) -> Floats:
    """Probability [U] of the most surprising moment after which a user loves more often; 1 for users with few rows."""
    probability = np.ones(int(log.user_code.max()) + 1)
    order = np.lexsort((log.time_us, log.user_code))
    for loved in np.split(log.loved[order], np.cumsum(np.bincount(log.user_code))[:-1]):
        user = int(log.user_code[order[0]])
        order = order[len(loved) :]
        if len(loved) < MIN_TURN_ROWS or loved.sum() < MIN_TURN_LOVED:
            continue
        later_rows = np.arange(3, len(loved) - 2)
        later_loved = loved[::-1].cumsum()[later_rows - 1]
        tail = hypergeom.sf(later_loved - 1, len(loved), loved.sum(), later_rows)
        probability[user] = min(1.0, float(tail.min()) * len(later_rows))
    return probability


def compute_agreement(log: AbuseLog) -> tuple[Floats, Floats]:
    """How often a user's [U] loved rows have a higher score than the other rows (NaN for few), and its deviation."""
    user_count = int(log.user_code.max()) + 1
    fold_of_user, scores = np.arange(user_count) % 2, np.zeros(len(log.user_code))
    for fold in (0, 1):
        is_scored = fold_of_user[log.user_code] == fold
        predicted = predict_love(log, ~is_scored, np.flatnonzero(is_scored))
        if predicted is None:
            raise SystemExit("too few loved rows; give more --users")
        scores[is_scored] = predicted
    agreement, deviation = np.full(user_count, np.nan), np.ones(user_count)
    for user in range(user_count):
        is_row = log.user_code == user
        loved, others = scores[is_row & log.loved], scores[is_row & ~log.loved]
        if min(len(loved), len(others)) >= MIN_LOVED:
            agreement[user] = (loved[:, None] > others).mean()
            deviation[user] = np.sqrt((len(loved) + len(others) + 1) / (12 * len(loved) * len(others)))
    return agreement, deviation


def flag_disagreeing_users(agreement: Floats, deviation: Floats, expected: float) -> Bools:
    """Users [U] whose agreement is below the expected one by more than chance explains."""
    is_known, flagged = ~np.isnan(agreement), np.zeros(len(agreement), dtype=np.bool_)
    probability = ndtr((agreement[is_known] - expected) / deviation[is_known])
    flagged[is_known] = false_discovery_control(probability) < TAIL_PROBABILITY_THRESHOLD
    return flagged


def measure_ideas(attack: str, users: int, seed: int) -> dict[str, dict[str, Any]]:
    """Recall, and honest users flagged, by idea."""
    log, kinds = build_abuse_log(attack, users, seed)
    agreement, deviation = compute_agreement(log)
    loved_rows = np.bincount(log.user_code, weights=log.loved)
    expected = float(np.nanmedian(agreement[loved_rows >= 5]))
    flagged_by_idea = {
        "turn": false_discovery_control(compute_turn_probability(log)) < TAIL_PROBABILITY_THRESHOLD,
        "dislike": flag_disagreeing_users(agreement, deviation, 0.5),
        "disagree": flag_disagreeing_users(agreement, deviation, expected),
    }
    is_honest = np.isin(kinds, HONEST_KINDS)
    return {
        idea: {"recall": round(float(flagged[~is_honest].mean()), 3), "honest_flagged": int(flagged[is_honest].sum())}
        for idea, flagged in flagged_by_idea.items()
    }


def main() -> None:
    """Measure each attack on each seed and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--users", type=int, default=1500)
    args = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "abuse_ideas", "users": args.users}
    for attack in ATTACKS:
        report[attack] = [measure_ideas(attack, args.users, seed) for seed in range(args.seeds)]
        sys.stdout.write(f"{attack:10} {json.dumps(report[attack])}\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
