"""Judge a finished run by reward models that its training never used.

    python -m rluf.evaluate rescore RUN --model FOLDER [--model FOLDER ...]

A policy is trained to please its own reward models, so their scores rise even where nothing improves. A model with
another backbone, trained on other rows, shares fewer of their errors. The command scores every response in
RUN/answers.jsonl with each model and prints one line per comparison. `RUN/rescored.json` and the last line on stdout
have the result as JSON: mean scores by arm, and the differences and lifts of the run's comparisons with 95% intervals
clustered by prompt.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import CommandParser, run_command
from rluf.errors import DataError, ModelError
from rluf.evaluate.summary import COMPARISONS
from rluf.evaluate.two_way import ArmValues, compare_arms
from rluf.tracking.run_files import read_answers
from rluf.types import ANSWERS_FILE, PolicyAnswer, ScoringItem
from rluf.utils.files import write_json
from rluf.utils.paths import suggest_run_folder

if TYPE_CHECKING:
    from rluf.reward.model import RewardModel

logger = logging.getLogger("rluf.evaluate.rescore")

RESULT_FILE = "rescored.json"
SAME_SCORE_GAP = 1e-4
"""Largest difference of two scores of one response by the same model, which rounds differently in other batches."""


def rescore_run(run_folder: Path, model_folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Score the responses of a run with each model, write RESULT_FILE, and return one result per model.

    Raises DataError without responses and ModelError for a folder that is not a reward model or is one of the run's
    own: its scores show how well training pleased it, not whether responses are better.
    """
    from rluf.reward.backbone import enable_fast_cpu_matmul
    from rluf.reward.model import RewardModel
    from rluf.tracking.console import setup_logging

    setup_logging()
    answers = read_answers(run_folder)
    if not answers:
        raise DataError(
            f"{run_folder} has no {ANSWERS_FILE}; name a run folder of rluf.train or rluf.evaluate"
            f"{suggest_run_folder(run_folder)}"
        )
    for folder in model_folders:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; give a reward model folder written by rluf.reward")
    enable_fast_cpu_matmul()
    results = []
    for folder in model_folders:
        model = RewardModel.load(folder, batch_tokens=4096)
        results.append({"model": str(folder), **compare_rescored_arms(answers, score_answers(model, answers, folder))})
    write_json(run_folder / RESULT_FILE, {"command": "rescore", "run": str(run_folder), "models": results})
    return results


def score_answers(model: RewardModel, answers: Sequence[PolicyAnswer], folder: Path) -> list[float]:
    """Calibrated probabilities of the responses, in order. ModelError when the run itself has the same scores."""
    objective = model.calibration.objective
    items = [ScoringItem(list(answer.messages), answer.text, answer.finish_reason == "length") for answer in answers]
    scores = [score.value for score in model.score(items, objective)]
    own_gaps = [
        abs(score - answer.scores[objective])
        for score, answer in zip(scores, answers, strict=True)
        if objective in answer.scores
    ]
    if own_gaps and max(own_gaps) < SAME_SCORE_GAP:
        raise ModelError(
            f"{folder} gives every response the {objective} score that the run recorded: it is the run's own reward "
            "model; give a model of another backbone, trained on other rows"
        )
    logger.info("%s: scored objective=%s responses=%d", folder, objective, len(scores))
    return scores


def compare_rescored_arms(answers: Sequence[PolicyAnswer], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score of each arm, and the comparisons of a run's summary whose arms exist."""
    arms: dict[str, tuple[list[float], list[str]]] = {}
    for answer, score in zip(answers, scores, strict=True):
        arm_scores, arm_prompts = arms.setdefault(answer.arm, ([], []))
        arm_scores.append(score)
        arm_prompts.append(answer.prompt_id)
    comparisons = {}
    for key, title, reference_name, arm_name in COMPARISONS:
        if reference_name in arms and arm_name in arms:
            comparison = compare_arms(*(ArmValues(*arms[name]) for name in (reference_name, arm_name)))
            lift = comparison.lift.as_dict() if comparison.lift else None
            comparisons[key] = {"title": title, "difference": comparison.difference.as_dict(), "lift": lift}
    means = {name: sum(arm_scores) / len(arm_scores) for name, (arm_scores, _) in arms.items()}
    return {"responses": len(answers), "means": means, "comparisons": comparisons}


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """One line per model and comparison."""
    lines = []
    for result in results:
        for comparison in result["comparisons"].values():
            difference = comparison["difference"]
            lines.append(
                f"{result['model']}: {comparison['title']}: difference {difference['mean']:+.4f} "
                f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; returns the exit code, and an error is one message on stderr."""
    parser = CommandParser("rluf.evaluate rescore", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder with answers.jsonl")
    parser.add_argument(
        "--model", type=Path, action="append", required=True, metavar="FOLDER", help="reward model folder; repeatable"
    )
    options = parser.parse_args(arguments)

    def run_selected() -> None:
        results = rescore_run(options.folder, options.model)
        sys.stdout.write(f"{format_results(results)}\n{json.dumps({'command': 'rescore', 'models': results})}\n")

    return run_command(run_selected)
