"""Compare a policy with its base on unseen prompts: objectives, simulated users, monitors, gates, report.

python -m rluf.evaluate offline --config configs/quickstart.yaml evaluate.candidate=runs/quickstart/latest/policy

`offline` is the default and may be omitted. Other sub-commands, each with its own --help:
python -m rluf.evaluate blind RUN   pages of shuffled pairs for human readers, and scores of their ratings
python -m rluf.evaluate gate RUN   verdict of a run as text and exit code
python -m rluf.evaluate score --model FOLDER --data FILE.jsonl[.gz]   score held-out rows with a reward model
python -m rluf.evaluate rescore RUN --model FOLDER   judge a run by a reward model that its training never used
python -m rluf.evaluate correlate --data FILE.jsonl   correlation of offline scores and online lifts
python -m rluf.evaluate abtest --data FILE.jsonl   analysis or planning of an A/B test
python -m rluf.evaluate offpolicy --data LOG --scores FILE   love rate of a new policy from the log of another
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import CommandOptions, parse_command_line, run_command
from rluf.errors import ModelError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.evaluate")

SUBCOMMANDS = {
    "blind": "rluf.evaluate.blind",
    "gate": "rluf.evaluate.gates",
    "score": "rluf.evaluate.score",
    "rescore": "rluf.evaluate.rescore",
    "correlate": "rluf.evaluate.correlation",
    "abtest": "rluf.evaluate.abtest",
    "offpolicy": "rluf.evaluate.off_policy",
}
"""Sub-command -> module with main(arguments) -> exit code, imported on use to keep --help fast."""


def run_evaluation(settings: Settings) -> Path:
    """Compare two policies and report; returns the run folder <run.root>/<name>-evaluate/<time>. Raises RlufError."""
    from cluster.connect import ray_connection
    from rluf.artifacts import (
        list_reward_model_folders,
        prepare_data_artifact,
        train_reward_artifacts,
    )
    from rluf.evaluate.compare import compare_policies, write_cards, write_results
    from rluf.evaluate.inputs import check_comparison_inputs
    from rluf.models.hub import resolve_model, resolve_policy
    from rluf.tracking.console import setup_logging
    from rluf.tracking.timeline import PhaseTimer
    from rluf.tracking.wandb import WandbTracker
    from rluf.train.evaluation import evaluate_policies
    from rluf.utils.event_loop import run_coroutine
    from rluf.utils.files import write_json
    from rluf.utils.paths import create_run_folder, resolve_cache_folder

    setup_logging()
    timer, cache_folder = PhaseTimer(), resolve_cache_folder(settings)
    check_comparison_inputs(settings, may_download=True)
    base_path = timer.time_call("model", resolve_policy, settings)
    candidate_path = resolve_model(find_candidate(settings), cache_folder)

    with ExitStack() as stack:
        timer.time_call("ray", stack.enter_context, ray_connection())
        run_folder = create_run_folder(settings, name_suffix="-evaluate")
        setup_logging(run_folder / "run.log")
        logger.info("evaluate: run_folder=%s candidate=%s base=%s", run_folder, candidate_path, base_path)
        write_json(run_folder / "config.json", settings.model_dump(mode="json"))

        data_artifact = timer.time_call("prepare", prepare_data_artifact, settings)
        reward_artifacts = timer.time_call("reward", train_reward_artifacts, settings, data_artifact)
        write_cards(run_folder, data_artifact, reward_artifacts)

        tracker = stack.enter_context(WandbTracker(settings, run_folder, job_type="evaluate"))
        reward_folders = list_reward_model_folders(reward_artifacts)
        result = run_coroutine(
            evaluate_policies(settings, base_path, candidate_path, data_artifact.folder, reward_folders)
        )
        timer.add_seconds(result.phase_seconds)

        summary = timer.time_call("compare", compare_policies, settings, result, data_artifact, reward_artifacts)
        write_results(settings, run_folder, summary, result, timer, tracker)
    return run_folder


def find_candidate(settings: Settings) -> str:
    """evaluate.candidate, else the policy of the newest run. Raises ModelError if there is neither."""
    from rluf.utils.paths import resolve_runs_root

    latest_policy = resolve_runs_root(settings) / settings.name / "latest" / "policy"
    if settings.evaluate.candidate is None and not latest_policy.is_dir():
        raise ModelError(f"no policy in {latest_policy}; train one, or set evaluate.candidate to a model")
    return settings.evaluate.candidate or str(latest_policy)


def _check_settings(settings: Settings) -> None:
    from rluf.evaluate.inputs import check_comparison_inputs
    from rluf.models.hub import find_model_folder

    check_comparison_inputs(settings)
    find_model_folder(find_candidate(settings))


COMMAND_OPTIONS = CommandOptions(lambda _: None, check=_check_settings, subcommands=("offline", *SUBCOMMANDS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, and an error is one message on stderr."""
    argument_list = sys.argv[1:] if arguments is None else list(arguments)
    if argument_list and argument_list[0] in SUBCOMMANDS:
        exit_code: int = import_module(SUBCOMMANDS[argument_list[0]]).main(argument_list[1:])
        return exit_code
    if argument_list[:1] == ["offline"]:
        argument_list = argument_list[1:]
    loaded = parse_command_line("evaluate", __doc__ or "", argument_list, COMMAND_OPTIONS)
    return run_command(lambda: run_evaluation(loaded.settings))


if __name__ == "__main__":
    raise SystemExit(main())
