"""The training loop: base policy's responses, optimizer steps, aligned policy's responses, saved policy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.algorithms.registry import find_algorithm
from rluf.checkpoint.format import RunCheckpoint, RunState
from rluf.config.settings import Settings
from rluf.errors import ActorLostError, RewardHackingError, TerminatedError
from rluf.evaluate.monitors import add_monitors
from rluf.models.hub import load_tokenizer
from rluf.objectives.judges import load_judge
from rluf.tracking.console import PhaseProgress
from rluf.tracking.gauges import RunGauges
from rluf.tracking.metric_registry import add_token_rate
from rluf.tracking.wandb import WandbTracker
from rluf.train.actor_calls import RestartBudget
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.checkpoint_manager import CheckpointManager, sigterm_event
from rluf.train.controller import TrainController
from rluf.train.evaluation import generate_aligned_arm, generate_base_arms
from rluf.train.hacking_monitor import RewardHackingMonitor
from rluf.train.offline import OfflineTrainer, load_offline_data
from rluf.train.profiling import StepProfiler
from rluf.train.prompts import load_demonstrations, load_prompts, load_training_prompts
from rluf.train.response_cache import ResponseCache
from rluf.train.sample_table import log_sample_table, should_log_samples
from rluf.types import Group, Prompt, TrainResult
from rluf.utils.files import JsonlWriter, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DISPLAYED_METRICS = ("reward", "kl", "truncated_share", "sync_logprob_gap", "step_s")
MAX_TRUNCATED_SHARE = 0.2
"""A larger share of truncated responses in the first step is worth a warning."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What one attempt of a run works with; `run_step` is that of the controller or of the offline trainer."""

    settings: Settings
    model_path: Path
    controller: TrainController
    run_step: Callable[[int], Awaitable[dict[str, float]]]
    checkpoints: CheckpointManager
    tracker: WandbTracker
    result: TrainResult
    monitor: RewardHackingMonitor
    profile_steps: int = 0


async def run_training(
    settings: Settings,
    run_folder: Path,
    model_path: Path,
    data_folder: Path,
    reward_folders: Mapping[str, Path | None],
    tracker: WandbTracker,
    profile_steps: int = 0,
) -> TrainResult:
    """Train the policy at `model_path`; writes <run_folder>/policy and <run_folder>/metrics.jsonl.

    With run.resume, and after a loss of learners, the run resumes from the newest checkpoint in `run_folder`. A reward
    hacking alarm may roll it back to the last clean checkpoint, once; from there on the love weight is 0.
    `data_folder` is a prepared data set, `reward_folders` has the reward model of each objective (None for a judge).
    """
    for judge in settings.aggregation.gate_judges:
        load_judge(judge)  # refuse an unknown name before any actor starts
    add_monitors(settings.evaluate.monitors)
    trust_remote_code, max_prompt_tokens = settings.model.trust_remote_code, settings.rollout.max_prompt_tokens
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    prompts = load_training_prompts(data_folder, model_path, max_prompt_tokens, trust_remote_code=trust_remote_code)
    test_prompts = load_prompts(
        data_folder, "test", tokenizer, max_tokens=max_prompt_tokens, limit=settings.evaluate.prompts
    )
    demonstrations = _load_demonstrations(settings, data_folder, tokenizer)
    is_offline = find_algorithm(settings.algorithm.name).offline
    offline_data = load_offline_data(data_folder, tokenizer, settings) if is_offline else None
    checkpoints = CheckpointManager(settings, run_folder, prompts)
    # One budget for all attempts: an actor that kills every attempt must not restart the run forever.
    budget = RestartBudget(settings.cluster.max_restarts_per_hour)
    resume_from = checkpoints.load_newest() if settings.run.resume else None
    love_frozen = False
    with checkpoints.wait_for_upload():
        while True:
            result, phase_start = TrainResult(), time.monotonic()
            monitor = RewardHackingMonitor(settings, tracker, love_frozen=love_frozen)
            checkpoint = None if resume_from is None else resume_from[0]
            try:
                async with ActorSupervisor(
                    settings, model_path, reward_folders, with_learners=True, checkpoint=checkpoint
                ) as supervisor:
                    _record_phase(result, "start", phase_start)
                    controller = TrainController(settings, supervisor, prompts, demonstrations, restart_budget=budget)
                    trainer = controller if offline_data is None else OfflineTrainer(controller, offline_data)
                    run = TrainingRun(
                        settings, model_path, controller, trainer.run_step, checkpoints, tracker, result, monitor,
                        profile_steps,
                    )  # fmt: skip
                    try:
                        await supervisor.run_monitored(_run_from_checkpoint(run, resume_from, test_prompts))
                    finally:
                        await controller.close()
                    phase_start = time.monotonic()
                _record_phase(result, "stop", phase_start)
                return result
            except ActorLostError as error:
                budget.record_failure(error.actor_name or "the cluster", str(error), time.monotonic())
                resume_from = checkpoints.load_newest()
                start = "the beginning" if resume_from is None else f"the checkpoint of step {resume_from[0].step}"
                logger.warning("run: %s; restarting all actors, resuming from %s", error, start)
            except RewardHackingError as error:
                if error.rollback_step is None:
                    raise
                resume_from, love_frozen = checkpoints.roll_back_to(error.rollback_step, str(error)), True
                logger.warning(
                    "run: %s; rolled back to the checkpoint of step %d, objectives.love.weight set to 0 from here on",
                    error,
                    resume_from[0].step,
                )


async def _run_from_checkpoint(
    run: TrainingRun, resume_from: tuple[RunCheckpoint, RunState] | None, test_prompts: Sequence[Prompt]
) -> None:
    """Run from the start or from a checkpoint to the saved policy; fills `run.result`."""
    settings, controller, checkpoints, result = run.settings, run.controller, run.checkpoints, run.result
    phase_start = time.monotonic()
    if resume_from is None:
        cache = ResponseCache.open(settings, run.model_path)
        result.answers = await generate_base_arms(settings, controller, test_prompts, cache)
        # Saved at once: a resumed run has no engine with the base policy any more.
        checkpoints.save_base_answers(result.answers)
        if not find_algorithm(settings.algorithm.name).offline:
            run.monitor.set_baseline(await controller.sample_reference(cache))
    else:
        checkpoint, state = resume_from
        logger.info("run: resuming after step %d from %s", checkpoint.step, checkpoint.folder)
        controller.restore(state.controller_state, checkpoint.step)
        run.monitor.restore(state.monitor_state, controller)
        # For a run that resumes after its last step: no step is left that would sync before the evaluation.
        await controller.sync_adapter_after_resume()
        result.answers = checkpoints.load_base_answers()
        result.step_metrics = [dict(row) for row in state.step_metrics]
    result.reference_statistics = controller.reward_aggregator.describe_reference()
    phase_start = _record_phase(result, "evaluate_base", phase_start)
    await _run_steps(run)
    phase_start = _record_phase(result, "train", phase_start)
    await controller.apply_policy_average()
    result.answers += await generate_aligned_arm(settings, controller, test_prompts)
    phase_start = _record_phase(result, "evaluate_aligned", phase_start)
    await controller.save_policy(str(checkpoints.run_folder / "policy"))
    _record_phase(result, "save", phase_start)


def _load_demonstrations(settings: Settings, data_folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    """Responses to imitate in addition to training on the policy's own samples; logs their number and source."""
    step_count, topic_objectives = settings.algorithm.demonstrations, settings.aggregation.topic_objectives
    if not step_count or find_algorithm(settings.algorithm.name).offline:
        return []
    demonstrations = load_demonstrations(
        data_folder,
        topic_objectives,
        tokenizer,
        max_prompt_tokens=settings.rollout.max_prompt_tokens,
        max_response_tokens=settings.rollout.max_response_tokens,
    )
    topics = ", ".join(f"{topic} ({objective})" for topic, objective in topic_objectives.items()) or "none"
    logger.info(
        "demonstrations: %d per step out of %d with a positive label, topics: %s",
        step_count,
        len(demonstrations),
        topics,
    )
    return demonstrations


async def _run_steps(run: TrainingRun) -> None:
    """Optimizer steps up to algorithm.steps. On SIGTERM, save the last whole step and raise TerminatedError."""
    settings, controller, checkpoints, result = run.settings, run.controller, run.checkpoints, run.result
    last_step, checkpoint_every = settings.algorithm.steps, settings.learner.checkpoint_every_steps
    steps_done, metrics_file = len(result.step_metrics), checkpoints.run_folder / "metrics.jsonl"
    # Rewritten from the checkpoint: steps after it, which are repeated now, must not occur twice.
    write_jsonl(metrics_file, result.step_metrics)
    with (
        JsonlWriter(metrics_file) as metrics_writer,
        PhaseProgress("train", last_step, log_every_step=True, done_count=steps_done) as progress,
        sigterm_event() as stop_event,
    ):
        profiler = StepProfiler(controller, checkpoints.run_folder, run.profile_steps)
        gauges = RunGauges(settings.name, controller.objectives)
        for step in range(steps_done + 1, last_step + 1):
            if result.step_metrics and _is_over_kl_budget(settings, result.step_metrics[-1]):
                break
            await profiler.start_if_due(step)
            step_metrics = await _step_or_stop(stop_event, run, step)
            if step_metrics is not None:
                row = add_token_rate(step_metrics)
                await profiler.stop_if_due(step)
                result.step_metrics.append(row)
                metrics_writer.append_row(row)
                sample_values = {name: list(chain(*rows)) for name, rows in controller.sample_values.items()}
                run.tracker.log_step(step, row, sample_values)
                if should_log_samples(step, last_step):
                    await log_sample_table(controller, step, run.tracker)
                gauges.set_step(row)
                await run.monitor.check_step(controller, step)
                if step == 1:
                    _warn_if_truncated(settings, row.get("truncated_share", 0.0))
                displayed_metrics = (
                    *controller.objectives,
                    "reward",
                    "kl",
                    "truncated_share",
                    "sync_logprob_gap",
                    "step_s",
                )
                progress.advance(**{name: row[name] for name in displayed_metrics if name in row})
            if stop_event.is_set():
                steps_done = len(result.step_metrics)
                if steps_done:
                    await checkpoints.save_checkpoint(
                        controller, steps_done, result.step_metrics, run.monitor.get_state()
                    )
                raise TerminatedError(
                    f"stopped after step {steps_done} of {last_step}; add --resume to the same command to continue"
                )
            if checkpoint_every and (step % checkpoint_every == 0 or step == last_step):
                await checkpoints.save_checkpoint(controller, step, result.step_metrics, run.monitor.get_state())


async def _step_or_stop(stop_event: asyncio.Event, run: TrainingRun, step: int) -> dict[str, float] | None:
    """One step; None if `stop_event` is set before its update begins.

    Before its update a step changes nothing that a checkpoint stores, so it is canceled. A started update is completed,
    because a partial one cannot be saved.
    """
    step_task = asyncio.ensure_future(run.run_step(step))
    stop_task = asyncio.ensure_future(stop_event.wait())
    try:
        await asyncio.wait({step_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
        if not step_task.done() and not run.controller.update_in_progress:
            return None
        return await step_task
    finally:
        for task in (step_task, stop_task):
            task.cancel()
        await asyncio.gather(step_task, stop_task, return_exceptions=True)


def _record_phase(result: TrainResult, phase: str, start_time: float) -> float:
    end_time = time.monotonic()
    result.phase_seconds[phase] = end_time - start_time
    return end_time


def _is_over_kl_budget(settings: Settings, step_metrics: Mapping[str, float]) -> bool:
    """Whether the KL of the last step ends training (algorithm.kl_budget)."""
    kl, budget = step_metrics.get("kl", 0.0), settings.algorithm.kl_budget
    if budget is None or kl <= budget:
        return False
    step = step_metrics["step"]
    logger.warning("train: step %d: kl=%.3f exceeds algorithm.kl_budget=%g, so training ends", step, kl, budget)
    return True


def _warn_if_truncated(settings: Settings, truncated_share: float) -> None:
    """Warn if the token limit cuts many responses of the base policy, whose rewards then say little."""
    if truncated_share > MAX_TRUNCATED_SHARE:
        # Where cut replies lose, a policy learns to end early rather than to answer.
        mask_text = "" if settings.algorithm.truncated == "mask" else "set algorithm.truncated=mask, "
        logger.warning(
            "rollout: %.0f%% of the responses of step 1 were cut at rollout.max_response_tokens=%d; raise the limit, %s"
            "or ask for shorter answers in the system prompt of the data",
            100.0 * truncated_share,
            settings.rollout.max_response_tokens,
            mask_text,
        )
