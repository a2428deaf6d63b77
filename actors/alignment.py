"""The loop itself: base responses, optimiser steps, aligned responses, the saved policy. Read this to see a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.pipeline import Pipeline, ScoredGroup
from actors.supervisor import Supervisor
from rluf.config.settings import Settings
from rluf.models import load_tokenizer
from rluf.prompts import load_prompts
from rluf.tracking.console import Progress
from rluf.tracking.metrics import JsonlMetrics
from rluf.tracking.wandb import Tracker
from rluf.types import Group, Prompt

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

    `data` is a prepared data set, `rewards` the reward model folder of each objective (None for a judge).
    """
    tokenizer, longest = load_tokenizer(model), settings.rollout.max_prompt_tokens
    prompts = load_prompts(data, "train", tokenizer, max_tokens=longest)
    unseen = load_prompts(data, "test", tokenizer, max_tokens=longest, limit=settings.evaluate.prompts)
    outcome, started = Outcome(), time.monotonic()
    async with Supervisor(settings, model, rewards, learners=True) as supervisor:
        started = _lap(outcome, "start", started)
        pipeline = Pipeline(settings, supervisor.crew, prompts)
        outcome.base = await supervisor.run(answer(settings, pipeline, unseen, "base policy"))
        started = _lap(outcome, "evaluate_base", started)
        try:
            await supervisor.run(_steps(settings, pipeline, folder, tracker, outcome))
        finally:
            await pipeline.close()
        started = _lap(outcome, "align", started)
        outcome.aligned = await supervisor.run(answer(settings, pipeline, unseen, "aligned policy"))
        started = _lap(outcome, "evaluate_aligned", started)
        await supervisor.run(pipeline.save(str(folder / "policy")))
        started = _lap(outcome, "save", started)
    _lap(outcome, "stop", started)
    return outcome


async def contrast(
    settings: Settings, base: Path, candidate: Path, data: Path, rewards: Mapping[str, Path | None]
) -> Outcome:
    """Answers of the policies at `base` and `candidate` to the test prompts, without learning anything."""
    tokenizer, longest = load_tokenizer(base), settings.rollout.max_prompt_tokens
    unseen = load_prompts(data, "test", tokenizer, max_tokens=longest, limit=settings.evaluate.prompts)
    outcome, started = Outcome(), time.monotonic()
    for phase, model in (("base", base), ("aligned", candidate)):
        async with Supervisor(settings, model, rewards, learners=False) as supervisor:
            pipeline = Pipeline(settings, supervisor.crew, unseen)
            found = await supervisor.run(answer(settings, pipeline, unseen, f"{phase} policy"))
        setattr(outcome, phase, found)
        started = _lap(outcome, f"evaluate_{phase}", started)
    return outcome


async def _steps(settings: Settings, pipeline: Pipeline, folder: Path, tracker: Tracker, outcome: Outcome) -> None:
    total, every = settings.algorithm.steps, settings.learner.save_every
    with JsonlMetrics(folder / "metrics.jsonl") as metrics, Progress("align", total, every_step=True) as progress:
        for number in range(1, total + 1):
            row = await pipeline.step(number)
            outcome.steps.append(row)
            metrics.append(row)
            tracker.log(number, row)
            progress.advance(
                **{name: row[name] for name in (*pipeline.crew.rewards, "reward", "kl", "probe", "step_s")}
            )
            if every and number % every == 0 and number < total:
                await pipeline.save(str(folder / "checkpoints" / f"step-{number}"))


async def answer(settings: Settings, pipeline: Pipeline, prompts: Sequence[Prompt], who: str) -> list[Answered]:
    """Responses of the policy in the engines to each prompt, in order of prompts, scored by every objective."""
    seed = settings.seed + EVALUATION_SEED
    with Progress(f"answers of the {who}", len(prompts), unit="prompt") as progress:
        found = await pipeline.respond(prompts, settings.evaluate.samples_per_prompt, seed, progress.advance)
    return [Answered(group, _values(scored)) for group, scored in found]


def _values(scored: ScoredGroup) -> dict[str, tuple[float, ...]]:
    return {name: tuple(score.value for score in scores) for name, scores in scored.scores.items()}


def _lap(outcome: Outcome, phase: str, since: float) -> float:
    now = time.monotonic()
    outcome.phases[phase] = now - since
    return now
