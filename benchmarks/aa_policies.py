"""False alarms and the operating curve of the comparison of two policies, through the report's own code.

python benchmarks/aa_policies.py ANSWERS [--comparisons 200] [--fall 0.1]

ANSWERS is a run folder or its answers.jsonl (plain or .gz). The base arm is the pool: each comparison samples prompts
of it with replacement, for each arm three of the pool's responses to each prompt, and new simulated users; then it
builds the summary of a run from them, with the settings' defaults. Reported: how often a policy against another draw of
itself differs (95% intervals: 5%), by this interval and by one that is clustered by user alone, what the gates say, and
what they say of helpfulness that truly fell by --fall. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rluf.config.settings import Settings
from rluf.evaluate.compare import score_truths, simulate_arm
from rluf.evaluate.gates import NON_INFERIORITY_MARGIN, decide_check
from rluf.evaluate.summary import EvaluatedArm, RunFacts, build_summary, compare_reactions
from rluf.types import ALIGNED_ARM, ANSWERS_FILE, BASE_ARM, PolicyAnswer

KEYS = {"love": "love_rate", "helpfulness": "helpfulness", "safety": "safety"}
"""Objective -> key of the users' verdict in a summary."""

logger = logging.getLogger("benchmarks.aa_policies")


def read_pool(path: Path) -> list[PolicyAnswer]:
    """The base arm's responses. Files of other origin may lack scores and log-probabilities."""
    file = path / ANSWERS_FILE if path.is_dir() else path
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
        rows = [json.loads(line) for line in stream]
    names = {field.name for field in fields(PolicyAnswer)}
    return [
        PolicyAnswer(**{"scores": {}} | {key: value for key, value in row.items() if key in names})
        for row in rows
        if row["arm"] == BASE_ARM
    ]


class PolicyPool:
    """Responses of one policy by prompt, with their ground truth."""

    def __init__(self, answers: list[PolicyAnswer]) -> None:
        """The ground truth is computed once, as it does not depend on users."""
        self.answers, self.truths = answers, score_truths(Settings(), answers)
        self.rows_by_prompt: dict[str, list[int]] = {}
        for row, answer in enumerate(answers):
            self.rows_by_prompt.setdefault(answer.prompt_id, []).append(row)

    def sample_arms(self, settings: Settings, seed: int) -> dict[str, EvaluatedArm]:
        """Two arms of the same policy: the same sampled prompts, other responses, other users."""
        rng = np.random.default_rng([seed, 67_867_967])
        prompt_ids = list(self.rows_by_prompt)
        prompts = [prompt_ids[index] for index in rng.integers(0, len(prompt_ids), len(prompt_ids))]
        arms = {}
        for arm_index, arm in enumerate((BASE_ARM, ALIGNED_ARM)):
            rows = np.concatenate(
                [rng.choice(self.rows_by_prompt[prompt], settings.evaluate.samples_per_prompt) for prompt in prompts]
            )
            # A prompt that is sampled twice counts as two prompts.
            numbers = np.repeat(np.arange(len(prompts)), settings.evaluate.samples_per_prompt)
            answers = [
                replace(self.answers[row], arm=arm, prompt_id=f"{n:05d}") for n, row in zip(numbers, rows, strict=True)
            ]
            arms[arm] = simulate_arm(settings, answers, [self.truths[row] for row in rows], seed=2 * seed + arm_index)
        return arms


def lower_helpfulness(arm: EvaluatedArm, fall: float) -> EvaluatedArm:
    """The arm with each user's verdict on helpfulness lowered by this share."""
    if arm.reactions is None:
        raise ValueError("the arm has no users")
    return replace(arm, reactions=replace(arm.reactions, helpful=np.asarray(arm.reactions.helpful) * (1 - fall)))  # type: ignore[type-var]


def run_comparisons(pool: PolicyPool, settings: Settings, count: int, fall: float) -> dict[str, Any]:
    """Shares over `count` comparisons."""
    differs: Counter[str] = Counter()
    differs_by_user: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    fall_statuses: Counter[str] = Counter()
    widths: dict[str, list[float]] = {name: [] for name in KEYS}
    alarm_count = 0
    for seed in range(count):
        arms = pool.sample_arms(settings, seed)
        summary = build_summary(RunFacts("aa", seed), arms)
        for name, key in KEYS.items():
            if (lift := summary[key]["lift"]) is not None:
                differs[name] += not lift["low"] <= 0 <= lift["high"]
                widths[name].append((lift["high"] - lift["low"]) / 2)
        for name, comparison in compare_reactions(arms[BASE_ARM], arms[ALIGNED_ARM]).items():
            if comparison.lift is not None and (parts := comparison.log_ratio_variance) is not None:
                differs_by_user[name] += abs(math.log1p(comparison.lift.mean)) > 1.96 * math.sqrt(parts.user)
        verdicts[summary["gates"]["measured_verdict"]] += 1
        alarm_count += bool(summary["gates"]["alarms"])
        worse = compare_reactions(arms[BASE_ARM], lower_helpfulness(arms[ALIGNED_ARM], fall))
        fall_statuses[decide_check(worse["helpfulness"], -NON_INFERIORITY_MARGIN)] += 1
    return {
        "comparisons": count, "prompts": len(pool.rows_by_prompt), "responses": len(pool.answers),
        "users_per_arm": settings.evaluate.simulated_users,
        "differs": {name: differs[name] / count for name in KEYS},
        "differs_by_user_alone": {name: differs_by_user[name] / count for name in KEYS},
        "half_width": {name: round(float(np.mean(values)), 4) for name, values in widths.items() if values},
        "verdicts": {verdict: verdicts[verdict] / count for verdict in ("pass", "undecided", "fail")},
        "runs_with_alarm": alarm_count / count,
        "fall": fall,
        "fall_statuses": {status: fall_statuses[status] / count for status in ("pass", "undecided", "fail")},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons; the last line is JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, metavar="ANSWERS")
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--fall", type=float, default=0.1)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    pool = PolicyPool(read_pool(options.answers))
    result = run_comparisons(pool, Settings(), options.comparisons, options.fall)
    for name, share in result["differs"].items():
        logger.info("%s of one policy differs in %.1f%% of A/A comparisons", name, 100 * share)
    sys.stdout.write(
        json.dumps({"benchmark": "aa_policies", **result, "seconds": round(time.monotonic() - start)}) + "\n"
    )


if __name__ == "__main__":
    main()
