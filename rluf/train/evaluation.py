"""Responses of every arm of an evaluation: the base policy, further draws of it, and the aligned policy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.settings import Settings
from rluf.evaluate.control import describe_base_draw
from rluf.models.hub import load_tokenizer
from rluf.tracking.console import PhaseProgress
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import TrainController
from rluf.train.prompts import load_prompts
from rluf.train.response_cache import ResponseCache
from rluf.types import ALIGNED_ARM, BASE_ARM, Group, PolicyAnswer, Prompt, TrainResult

if TYPE_CHECKING:
    from rluf.train.work_buffer import ScoredGroup

logger = logging.getLogger(__name__)

EVALUATION_SEED_OFFSET = 1_000_003
"""Both policies are evaluated with the same seeds, which training does not use; each further draw of the base adds it
once more."""
BASE_TEMPERATURE_FACTORS = (1.0, 0.7, 0.4)
"""Further draws of the base, as multiples of rollout.temperature: the A/A draw, and those that the control mixes.

Two cooler ones suffice: a mixture of two neighbors has any entropy between theirs.
"""
REDRAW_SAMPLES = 1
"""Responses per prompt of each further draw: three more cost as much time as the base arm of the default settings."""


async def generate_base_arms(
    settings: Settings, controller: TrainController, prompts: Sequence[Prompt], cache: ResponseCache
) -> list[PolicyAnswer]:
    """Responses of the base policy: its arm, the A/A draw, and draws at lower temperatures for the control arm."""
    sample_count = settings.evaluate.samples_per_prompt
    answers = await generate_answers(
        settings, controller, prompts, BASE_ARM, sample_count, EVALUATION_SEED_OFFSET, cache=cache
    )
    for index, factor in enumerate(BASE_TEMPERATURE_FACTORS):
        seed_offset, temperature = (index + 2) * EVALUATION_SEED_OFFSET, factor * settings.rollout.temperature
        arm = describe_base_draw(factor)
        answers += await generate_answers(
            settings, controller, prompts, arm, REDRAW_SAMPLES, seed_offset, temperature, cache
        )
    return answers


async def generate_aligned_arm(
    settings: Settings, controller: TrainController, prompts: Sequence[Prompt]
) -> list[PolicyAnswer]:
    """Responses of the engines' present policy, with the seeds of the base arm."""
    return await generate_answers(
        settings, controller, prompts, ALIGNED_ARM, settings.evaluate.samples_per_prompt, EVALUATION_SEED_OFFSET
    )


async def generate_answers(
    settings: Settings,
    controller: TrainController,
    prompts: Sequence[Prompt],
    arm: str,
    sample_count: int,
    seed_offset: int,
    temperature: float | None = None,
    cache: ResponseCache | None = None,
) -> list[PolicyAnswer]:
    """Responses of the engines' policy to each prompt, in order of prompts, scored by every objective."""
    start_time = time.monotonic()
    with PhaseProgress(f"responses of {arm}", len(prompts), unit="prompt") as progress:
        scored = await controller.generate_and_score(
            prompts, sample_count, settings.seed + seed_offset, progress.advance, temperature, cache
        )
    end_time = time.monotonic()
    logger.info(
        "responses of %s: seconds=%.1f scoring_after_last_rollout=%.1f",
        arm,
        end_time - start_time,
        end_time - controller.last_generated_at,
    )
    sampled_at = settings.rollout.temperature if temperature is None else temperature
    return [answer for group, scored_group in scored for answer in _list_answers(arm, group, scored_group, sampled_at)]


def _list_answers(arm: str, group: Group, scored_group: ScoredGroup, temperature: float) -> list[PolicyAnswer]:
    prompt = group.prompt
    return [
        PolicyAnswer(
            arm=arm,
            prompt_id=prompt.id,
            topic=prompt.topic,
            messages=prompt.messages,
            text=sample.text,
            finish_reason=sample.finish_reason,
            tokens=len(sample.response_ids),
            scores={name: scores[index].value for name, scores in scored_group.scores.items()},
            logprob=sum(sample.rollout_logprobs) / max(1, len(sample.rollout_logprobs)),
            temperature=temperature,
        )
        for index, sample in enumerate(group.samples)
    ]


async def evaluate_policies(
    settings: Settings,
    base_path: Path,
    candidate_path: Path,
    data_folder: Path,
    reward_folders: Mapping[str, Path | None],
) -> TrainResult:
    """Responses of the policies at `base_path` and `candidate_path` to the test prompts, without training."""
    tokenizer = load_tokenizer(base_path, trust_remote_code=settings.model.trust_remote_code)
    max_prompt_tokens = settings.rollout.max_prompt_tokens
    test_prompts = load_prompts(
        data_folder, "test", tokenizer, max_tokens=max_prompt_tokens, limit=settings.evaluate.prompts
    )
    result = TrainResult()
    for phase, model_path in (("evaluate_base", base_path), ("evaluate_aligned", candidate_path)):
        phase_start = time.monotonic()
        async with ActorSupervisor(settings, model_path, reward_folders, with_learners=False) as supervisor:
            controller = TrainController(settings, supervisor, test_prompts)
            if model_path is base_path:
                cache = ResponseCache.open(settings, base_path)
                arms = generate_base_arms(settings, controller, test_prompts, cache)
            else:
                arms = generate_aligned_arm(settings, controller, test_prompts)
            result.answers += await supervisor.run_monitored(arms)
            await controller.close()
        result.phase_seconds[phase] = time.monotonic() - phase_start
    return result
