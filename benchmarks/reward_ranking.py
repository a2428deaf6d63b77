"""Whether the reward models of runs rank the replies to one prompt as the simulated users would.

python benchmarks/reward_ranking.py RUN [RUN ...]      # run folders of python -m rluf.train with simulated users

A policy can only learn what a reward model tells apart within a prompt. AUROC on the log says little about that, since
it also counts differences between prompts. Of the base policy's replies to each test prompt (arms base and base_repeat
of answers.jsonl, which no training saw) prints, with 95% intervals over prompts:

- `correlation`: mean over prompts of the correlation of the score's log-odds with the true probability of a heart.
- `lift`: relative gain in that probability if the reply with the highest score is chosen, against a random one.

for each objective, for the mean of love and helpfulness (each divided by its standard deviation within a prompt), and
for the true probability itself (`oracle`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rluf.config.settings import Settings
from rluf.reward.metrics import round_for_json
from rluf.simulate.ground_truth import ReaderInput, load_reader
from rluf.simulate.users import expected_love_probability
from rluf.tracking.run_files import read_answers
from rluf.types import BASE_ARM, REPEAT_ARM, PolicyAnswer
from rluf.utils.paths import resolve_cache_folder
from rluf.utils.stats import Floats, logit

RESAMPLES = 2000


def read_scores(answers: Sequence[PolicyAnswer], index_groups: Sequence[list[int]]) -> dict[str, Floats]:
    """Log-odds [N] by objective, and the mean of love and helpfulness."""
    scores = {
        name: np.array([logit(min(max(answer.scores[name], 1e-9), 1 - 1e-9)) for answer in answers])
        for name in answers[0].scores
    }
    if {"love", "helpfulness"} <= set(scores):
        scores["love and helpfulness"] = sum(
            scores[name] / np.mean([scores[name][group].std() for group in index_groups])
            for name in ("love", "helpfulness")
        ) / np.array(2.0)
    return scores


def measure_ranking(scores: Floats, truths: Floats, index_groups: Sequence[list[int]]) -> dict[str, Any]:
    """Figures of one score over the replies to each prompt, with intervals over prompts."""
    correlations = np.array(
        [
            np.corrcoef(scores[group], truths[group])[0, 1]
            for group in index_groups
            if scores[group].std() > 1e-9 and truths[group].std() > 1e-12
        ]
    )
    chosen = np.array([truths[group[int(np.argmax(scores[group]))]] for group in index_groups])
    average = np.array([truths[group].mean() for group in index_groups])
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, len(index_groups), (RESAMPLES, len(index_groups)))
    lifts = chosen[prompts].mean(1) / average[prompts].mean(1) - 1
    means = correlations[rng.integers(0, len(correlations), (RESAMPLES, len(correlations)))].mean(1)
    return {
        "correlation": _build_interval(float(correlations.mean()), means),
        "lift": _build_interval(float(chosen.mean() / average.mean() - 1), lifts),
    }


def _build_interval(mean: float, draws: Floats) -> dict[str, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def measure_run(folder: Path) -> dict[str, Any]:
    """Figures of one run by objective."""
    answers = [answer for answer in read_answers(folder) if answer.arm in (BASE_ARM, REPEAT_ARM)]
    inputs = [ReaderInput(answer.messages, answer.text, answer.finish_reason == "stop") for answer in answers]
    ground_truths = load_reader(resolve_cache_folder(Settings())).score_responses(inputs)
    truths = expected_love_probability(ground_truths, [answer.topic for answer in answers])
    indices_by_prompt: defaultdict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        indices_by_prompt[answer.prompt_id].append(index)
    groups = [indices for indices in indices_by_prompt.values() if len(indices) > 1]
    scores = read_scores(answers, groups) | {"oracle": truths}
    rows = {name: measure_ranking(values, truths, groups) for name, values in scores.items()}
    return {"run": str(folder), "prompts": len(groups), "replies": len(answers), "scores": rows}


def main() -> None:
    """Print a table per run and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    results = []
    for folder in args.runs:
        results.append(measure_run(folder))
        sys.stdout.write(f"{folder}: {results[-1]['replies']} replies to {results[-1]['prompts']} prompts\n")
        for name, row in results[-1]["scores"].items():
            cells = (f"{row[key]['mean']:+.3f} [{row[key]['low']:+.3f}, {row[key]['high']:+.3f}]" for key in row)
            sys.stdout.write(f"  {name:22} correlation {' lift '.join(cells)}\n")
    sys.stdout.write(json.dumps(round_for_json({"benchmark": "reward_ranking", "runs": results})) + "\n")


if __name__ == "__main__":
    main()
