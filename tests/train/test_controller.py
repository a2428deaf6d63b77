"""Steps with real engines and learners on a tiny model: every kind of algorithm runs, and a seed fixes the numbers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from rluf.algorithms.registry import find_algorithm
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.objectives.judges import list_failed_judges
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import TrainController
from rluf.train.offline import OfflineTrainer, ReactionGroups
from rluf.train.response_cache import ResponseCache
from rluf.train.sample_table import collect_samples
from rluf.types import Group, Message, Prompt, Sample

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

OBJECTIVES = ("love", "helpfulness", "safety")
BASE_OVERRIDES = (
    "model.path=tiny",
    "model.dtype=float32",
    "rollout.max_prompt_tokens=64",
    "rollout.max_response_tokens=12",
    "rollout.concurrency=32",
    "rollout.kv_cache_gib=0.25",
    "algorithm.steps=3",
    "algorithm.prompts_per_step=4",
    "learner.warmup_steps=0",
    "learner.learning_rate=1e-3",
    "objectives.love={source: judge, path: length}",
    "objectives.helpfulness={source: judge, path: repetition}",
    "objectives.safety={source: judge, path: refusal}",
    "aggregation.gate_judges=[unprompted_farewell, length]",
)
VARIANTS = {
    "kl in the reward": ["algorithm.name=reinforce_pp", "algorithm.kl_penalty=reward", "algorithm.kl_target=0.1"],
    "cgpo": ["algorithm.name=crpg", "aggregation.method=calibrated"],
    "pairs": ["algorithm.name=codpo", "aggregation.method=calibrated"],
    "dynamic sampling": ["algorithm.name=dapo", "algorithm.clip=[0.2, 0.28]"],
    "floors": ["aggregation.method=constrained", "aggregation.floors={love: 0.5, safety: 0}"],
    "by objective": ["aggregation.method=gdpo", "algorithm.loss=gspo"],
    "offline": ["algorithm.name=kto"],
    "critic": ["algorithm.name=ppo", "algorithm.kl_penalty=reward"],
    "asynchronous": ["algorithm.max_staleness=1", "algorithm.loss=cispo"],
}


def make_settings(*overrides: str) -> Settings:
    return load_settings(None, [*BASE_OVERRIDES, *overrides]).settings


def make_prompts(model_path: Path) -> list[Prompt]:
    tokenizer = load_tokenizer(model_path)
    words = ("sea", "cat", "rain", "moon", "bread", "snow")
    conversations = [(Message(role="user", content=f"{word}?"),) for word in words]
    return [
        Prompt(str(index), messages, render_prompt(tokenizer, messages)[:64], "", "train")
        for index, messages in enumerate(conversations)
    ]


def make_demonstration(prompt: Prompt) -> Group:
    return Group(prompt, (Sample(prompt.id, prompt.token_ids, (70, 71, 2), (), (), "stop", "FG"),), 0)


async def run_steps(
    settings: Settings, supervisor: ActorSupervisor, prompts: Sequence[Prompt], step_count: int
) -> list[dict[str, float]]:
    logged = [make_demonstration(prompt) for prompt in prompts]
    controller = TrainController(settings, supervisor, prompts, logged[:1])
    trainer = OfflineTrainer(controller, ReactionGroups(logged[:3], logged[3:]))
    is_offline = find_algorithm(settings.algorithm.name).offline
    run_step = trainer.run_step if is_offline else controller.run_step
    try:
        rows = [await run_step(step) for step in range(1, step_count + 1)]
        if is_offline:
            return rows
        samples = await collect_samples(controller, step_count, 2)
        kl_by_group = controller.sample_values["kl"]
        assert [sample["kl"] for sample in samples] == [group_kl[0] for group_kl in kl_by_group[::2]]
        assert all(set(sample["scores"]) == set(OBJECTIVES) for sample in samples)
        for sample in samples:
            assert sample["failed"] == list_failed_judges(prompts[0].messages, sample["response"])
        # The step's metric is the mean over its samples.
        sample_kl = [kl for row in kl_by_group for kl in row]
        assert fmean(sample_kl) == pytest.approx(rows[-1]["kl_sequence"], rel=1e-3, abs=1e-5)
        return rows
    finally:
        await controller.close()


async def check_cached_responses(
    settings: Settings, supervisor: ActorSupervisor, prompts: Sequence[Prompt], model_path: Path
) -> None:
    """Responses that an earlier run sampled are scored without an engine, and equal."""
    controller = TrainController(settings, supervisor, prompts)
    cache = ResponseCache.open(settings, model_path)
    first = await controller.generate_and_score(prompts, 2, 5, lambda: None, cache=cache)
    done: list[int] = []
    controller.sample_and_score = None  # type: ignore[method-assign,assignment]
    second = await controller.generate_and_score(prompts, 2, 5, lambda: done.append(1), cache=cache)
    await controller.close()
    assert [group for group, _ in second] == [group for group, _ in first] and len(done) == len(prompts)
    assert [(row.info, row.scores) for _, row in second] == [(row.info, row.scores) for _, row in first]


def without_timings(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def test_a_seed_fixes_every_number_and_every_kind_of_algorithm_runs(tmp_path: Path) -> None:
    """The second run also syncs weights through files in place of shared memory: the same weights must arrive."""
    model_path = resolve_model("tiny", tmp_path)
    prompts = make_prompts(model_path)
    reward_folders: dict[str, Path | None] = dict.fromkeys(OBJECTIVES)

    async def run(
        variants: dict[str, list[str]], *actor_overrides: str
    ) -> tuple[list[dict[str, float]], dict[str, list[dict[str, float]]]]:
        async with ActorSupervisor(
            make_settings(*actor_overrides), model_path, reward_folders, with_learners=True
        ) as supervisor:
            if variants:
                await check_cached_responses(make_settings(f"run.cache={tmp_path}"), supervisor, prompts, model_path)
            base_rows = await run_steps(make_settings(), supervisor, prompts, 3)
            variant_rows = {
                name: await run_steps(make_settings(*overrides), supervisor, prompts, 2)
                for name, overrides in variants.items()
            }
            return base_rows, variant_rows

    first, variants = asyncio.run(run(VARIANTS, "algorithm.name=ppo"))  # so that its learner has a critic
    second, _ = asyncio.run(run({}, "weight_sync.transport=disk", f"run.cache={tmp_path}"))
    assert without_timings(second) == without_timings(first)
    assert all(row["ratio_max"] < 1.1 and row["demonstration_nll"] > 0 for row in first)
    for name, rows in variants.items():
        assert all(math.isfinite(value) for row in rows for value in row.values()), name
        assert all(row["skipped"] == 0.0 and row["grad_norm"] > 0.0 for row in rows), name
    assert variants["kl in the reward"][1]["kl_coef"] != variants["kl in the reward"][0]["kl_coef"]
    assert variants["critic"][1]["value_loss"] > 0.0 and variants["critic"][1]["critic_grad_norm"] > 0.0
    assert variants["offline"][1]["demonstration_nll"] < variants["offline"][0]["demonstration_nll"] + 1.0
    assert 0.0 <= variants["cgpo"][0]["gate_pass_rate"] <= 1.0
    assert variants["floors"][0]["multiplier_love"] > 0.0
    assert variants["asynchronous"][1]["staleness"] <= 1.0
