"""The loop itself: base responses, optimiser steps, aligned responses, the saved policy. Read this to see a run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.algorithms.registry import METHODS
from rluf.checkpoint.format import Checkpoint, RunState
from rluf.config.settings import Settings
from rluf.errors import AlarmError, LostError, TerminatedError
from rluf.models.hub import load_tokenizer
from rluf.objectives.judges import find_judge
from rluf.tracking.console import Progress
from rluf.tracking.gauges import Gauges
from rluf.tracking.metric_registry import with_rates
from rluf.tracking.run_files import JsonlMetrics, write_jsonl
from rluf.tracking.wandb import Tracker
from rluf.train.actor_groups import Supervisor
from rluf.train.checkpoint_manager import Keeper, listening
from rluf.train.controller import Pipeline, ScoredGroup
from rluf.train.fault_tolerance import Budget, LastingPipeline
from rluf.train.hacking_monitor import Watch
from rluf.train.profiling import Profiler
from rluf.train.prompt_store import training_prompts
from rluf.train.prompts import load_demonstrations, load_prompts, load_reactions
from rluf.train.sample_table import due, show
from rluf.types import Group, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

EVALUATION_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Answered:
    """One policy's responses to one prompt, with each objective's calibrated values [samples]."""

    group: Group
    values: Mapping[str, tuple[float, ...]]


@dataclass(slots=True)
class Outcome:
    """What a run leaves for the comparison: both policies' answers to the same prompts, steps' metrics, seconds."""

    base: list[Answered] = field(default_factory=list)
    aligned: list[Answered] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)


async def align(
    settings: Settings,
    folder: Path,
    model: Path,
    data: Path,
    rewards: Mapping[str, Path | None],
    tracker: Tracker,
) -> Outcome:
    """Move the policy at `model` towards the objectives; writes <folder>/policy and <folder>/metrics.jsonl.

    With run.resume it goes on from the newest checkpoint in `folder`, and so it does when learners are lost. An alarm
    that asks for it takes the run back to the last clean checkpoint, once; the love weight is 0 from there on.
    `data` is a prepared data set, `rewards` the reward model folder of each objective (None for a judge).
    """
    for judge in settings.objectives.judges:
        find_judge(judge)  # a name that does not exist is told before any actor starts
    tokenizer, longest = load_tokenizer(model), settings.rollout.max_prompt_tokens
    prompts = training_prompts(data, model, longest)
    unseen = load_prompts(data, "test", tokenizer, max_tokens=longest, limit=settings.evaluate.prompts)
    shown = _demonstrations(settings, data, tokenizer)
    reactions = None
    if METHODS[settings.algorithm.name].logged:
        room = settings.rollout.max_response_tokens
        reactions = load_reactions(data, tokenizer, max_prompt=longest, max_response=room)
    keeper, budget = Keeper(settings, folder, prompts), Budget(settings.cluster.restarts_per_hour)
    begin = keeper.newest() if settings.run.resume else None
    held = False
    with keeper.copied():
        while True:
            outcome, started, watch = Outcome(), time.monotonic(), Watch(settings, tracker, held=held)
            try:
                async with Supervisor(
                    settings, model, rewards, learners=True, checkpoint=None if begin is None else begin[0]
                ) as supervisor:
                    _lap(outcome, "start", started)
                    pipeline = LastingPipeline(settings, supervisor, prompts, shown, reactions, budget=budget)
                    try:
                        await supervisor.run(
                            _attempt(settings, pipeline, keeper, begin, unseen, tracker, outcome, watch)
                        )
                    finally:
                        await pipeline.close()
                    started = time.monotonic()
                _lap(outcome, "stop", started)
                return outcome
            except LostError as error:
                budget.spend(error.who or "the cluster", str(error), time.monotonic())
                begin = keeper.newest()
                where = "the beginning" if begin is None else f"the checkpoint of step {begin[0].step}"
                logger.warning("%s; all actors start again, the run goes on from %s", error, where)
            except AlarmError as error:
                if error.back_to is None:
                    raise
                begin, held = keeper.go_back(error.back_to, str(error)), True
                step = begin[0].step
                logger.warning(
                    "%s; the run goes back to the checkpoint of step %d, the love weight is 0 now", error, step
                )


async def _attempt(
    settings: Settings,
    pipeline: LastingPipeline,
    keeper: Keeper,
    begin: tuple[Checkpoint, RunState] | None,
    unseen: Sequence[Prompt],
    tracker: Tracker,
    outcome: Outcome,
    watch: Watch,
) -> None:
    """The run from its beginning or a checkpoint to the saved policy; fills `outcome`."""
    started = time.monotonic()
    if begin is None:
        outcome.base = await answer(settings, pipeline, unseen, "base policy")
        keeper.keep_answers([(one.group, one.values) for one in outcome.base])
        await watch.begin(pipeline)
    else:
        checkpoint, state = begin
        logger.info("going on after step %d, from %s", checkpoint.step, checkpoint.folder)
        pipeline.restore(state.pipeline, checkpoint.step)
        watch.restore(state.watch, pipeline)
        await pipeline.catch_up()
        outcome.base = [Answered(group, values) for group, values in keeper.answers()]
        outcome.steps = [dict(row) for row in state.rows]
    started = _lap(outcome, "evaluate_base", started)
    await _steps(settings, pipeline, keeper, tracker, outcome, watch)
    started = _lap(outcome, "align", started)
    outcome.aligned = await answer(settings, pipeline, unseen, "aligned policy")
    started = _lap(outcome, "evaluate_aligned", started)
    await pipeline.save(str(keeper.folder / "policy"))
    _lap(outcome, "save", started)


def _demonstrations(settings: Settings, data: Path, tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    """What the learner imitates beside its own samples; says where it comes from."""
    wanted, owners = settings.algorithm.demonstrations, settings.objectives.owners
    if not wanted:
        return []
    prompt, response = settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens
    found = load_demonstrations(data, owners, tokenizer, max_prompt=prompt, max_response=response)
    where = ", ".join(f"{topic} ({objective})" for topic, objective in owners.items()) or "none"
    logger.info("demonstrations: %d a step of the %d judged good on the topics: %s", wanted, len(found), where)
    return found


async def contrast(
    settings: Settings, base: Path, candidate: Path, data: Path, rewards: Mapping[str, Path | None]
) -> Outcome:
    """Answers of the policies at `base` and `candidate` to the test prompts, without learning anything."""
    tokenizer, longest = load_tokenizer(base), settings.rollout.max_prompt_tokens
    unseen = load_prompts(data, "test", tokenizer, max_tokens=longest, limit=settings.evaluate.prompts)
    outcome, started = Outcome(), time.monotonic()
    for phase, model in (("base", base), ("aligned", candidate)):
        async with Supervisor(settings, model, rewards, learners=False) as supervisor:
            pipeline = LastingPipeline(settings, supervisor, unseen)
            found = await supervisor.run(answer(settings, pipeline, unseen, f"{phase} policy"))
            await pipeline.close()
        setattr(outcome, phase, found)
        started = _lap(outcome, f"evaluate_{phase}", started)
    return outcome


async def _steps(
    settings: Settings, pipeline: LastingPipeline, keeper: Keeper, tracker: Tracker, outcome: Outcome, watch: Watch
) -> None:
    """Optimiser steps up to algorithm.steps. On SIGTERM the last whole step is kept and TerminatedError raised."""
    total, every, done = settings.algorithm.steps, settings.learner.save_every, len(outcome.steps)
    write_jsonl(keeper.folder / "metrics.jsonl", outcome.steps)
    with (
        JsonlMetrics(keeper.folder / "metrics.jsonl") as metrics,
        Progress("align", total, every_step=True) as progress,
        listening() as stop,
    ):
        progress.advance(done)
        profiler, gauges = Profiler(pipeline, keeper.folder), Gauges(settings.name, pipeline.objectives)
        for number in range(done + 1, total + 1):
            await profiler.before(number)
            taken = await _unless(stop, pipeline, number)
            if taken is not None:
                row = with_rates(taken)
                await profiler.after(number)
                outcome.steps.append(row)
                metrics.append(row)
                tracker.log(number, row, {name: list(chain(*rows)) for name, rows in pipeline.values.items()})
                if due(number, total):
                    await show(pipeline, number, settings.tracking.samples, tracker)
                gauges.set(row)
                await watch.look(pipeline, number, row["kl"])
                progress.advance(
                    **{name: row[name] for name in (*pipeline.objectives, "reward", "kl", "probe", "step_s")}
                )
            if stop.is_set() and outcome.steps:
                await keeper.save(pipeline, len(outcome.steps), outcome.steps, watch.state())
            if stop.is_set():
                raise TerminatedError(
                    f"stopped after step {len(outcome.steps)} of {total}; add --resume to the same command to go on"
                )
            if every and (number % every == 0 or number == total):
                await keeper.save(pipeline, number, outcome.steps, watch.state())


async def _unless(stop: asyncio.Event, pipeline: LastingPipeline, number: int) -> dict[str, float] | None:
    """One step; None if `stop` is set before its learning begins, which undoes nothing. Learning is seen through."""
    step, asked = asyncio.ensure_future(pipeline.step(number)), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({step, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not step.done() and not pipeline.learning:
            return None
        return await step
    finally:
        for task in (step, asked):
            task.cancel()
        await asyncio.gather(step, asked, return_exceptions=True)


async def answer(settings: Settings, pipeline: Pipeline, prompts: Sequence[Prompt], who: str) -> list[Answered]:
    """Responses of the policy in the engines to each prompt, in order of prompts, scored by every objective."""
    seed, begun = settings.seed + EVALUATION_SEED, time.monotonic()
    with Progress(f"answers of the {who}", len(prompts), unit="prompt") as progress:
        found = await pipeline.respond(prompts, settings.evaluate.samples_per_prompt, seed, progress.advance)
    ended = time.monotonic()
    took, alone = ended - begun, ended - pipeline.generated_at
    logger.info("answers of the %s: %.1f s, the last %.1f of them for scoring alone", who, took, alone)
    return [Answered(group, _values(scored)) for group, scored in found]


def _values(scored: ScoredGroup) -> dict[str, tuple[float, ...]]:
    return {name: tuple(score.value for score in scores) for name, scores in scored.scores.items()}


def _lap(outcome: Outcome, phase: str, since: float) -> float:
    now = time.monotonic()
    outcome.phases[phase] = now - since
    return now
