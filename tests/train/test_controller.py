"""The pumps with real engines and learners on a tiny model: every kind of method runs, and a seed fixes the numbers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.objectives.judges import failed
from rluf.train.actor_groups import Supervisor
from rluf.train.controller import Pipeline
from rluf.train.prompts import Reactions
from rluf.train.sample_table import drawn
from rluf.types import Group, Message, Prompt, Sample

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

BASE = (
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
    "objectives.love={source: judge, judge: length}",
    "objectives.helpfulness={source: judge, judge: repetition}",
    "objectives.safety={source: judge, judge: refusal}",
    "objectives.judges=[unprompted_farewell, length]",
)
VARIANTS = {
    "kl in the reward": ["algorithm.name=reinforce_pp", "algorithm.kl_in=reward", "algorithm.kl_target=0.1"],
    "cgpo": ["algorithm.name=crpg", "objectives.combine=calibrated"],
    "pairs": ["algorithm.name=codpo", "objectives.combine=calibrated"],
    "refill": ["algorithm.name=dapo", "algorithm.clip_high=0.28"],
    "floors": ["objectives.combine=constrained", "objectives.floors=[love:0.5, safety:0]"],
    "by objective": ["objectives.combine=gdpo", "algorithm.loss=gspo"],
    "logged": ["algorithm.name=kto"],
    "critic": ["algorithm.name=ppo", "algorithm.kl_in=reward"],
    "asynchronous": ["algorithm.staleness=1", "algorithm.too_old=drop", "algorithm.loss=cispo"],
}


def settings_of(*overrides: str) -> Settings:
    return load_settings(None, [*BASE, *overrides]).settings


def texts(model: Path) -> list[Prompt]:
    tokenizer = load_tokenizer(model)
    messages = [(Message(role="user", content=f"{word}?"),) for word in ("sea", "cat", "rain", "moon", "bread", "snow")]
    return [Prompt(str(n), m, render_prompt(tokenizer, m)[:64], "", "train") for n, m in enumerate(messages)]


def demonstration(prompt: Prompt) -> Group:
    return Group(prompt, (Sample(prompt.id, prompt.token_ids, (70, 71, 2), (), (), "stop", "FG"),), 0)


async def steps(settings: Settings, crew: Any, prompts: Sequence[Prompt], count: int) -> list[dict[str, float]]:
    shown = [demonstration(prompt) for prompt in prompts]
    pipeline = Pipeline(settings, crew, prompts, shown[:1], Reactions(shown[:3], shown[3:]))
    try:
        rows = [await pipeline.step(number) for number in range(1, count + 1)]
        shown_rows = await drawn(pipeline, count, 2)
        assert [row["kl"] for row in shown_rows] == [table[0] for table in pipeline.values.get("kl", [[None]] * 4)[::2]]
        assert all(set(row["scores"]) == {"love", "helpfulness", "safety"} for row in shown_rows)
        assert all(row["failed"] == failed(prompts[0].messages, row["response"]) for row in shown_rows)
        if "kl" in pipeline.values:  # each sample's own, of which the step's metric is the mean
            each = [kl for row in pipeline.values["kl"] for kl in row]
            assert fmean(each) == pytest.approx(rows[-1]["kl_sequence"], rel=1e-3, abs=1e-5)
        return rows
    finally:
        await pipeline.close()


def untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.endswith("_s")}


def test_a_seed_fixes_every_number_and_every_kind_of_method_runs(tmp_path: Path) -> None:
    """The second run also publishes through files in place of shared memory: the same weights must arrive."""
    model = resolve_model("tiny", tmp_path)
    prompts = texts(model)
    rewards: dict[str, Path | None] = dict.fromkeys(("love", "helpfulness", "safety"))

    async def run(
        variants: dict[str, list[str]], *own: str
    ) -> tuple[list[dict[str, float]], dict[str, list[dict[str, float]]]]:
        async with Supervisor(settings_of(*own), model, rewards, learners=True) as supervisor:
            first = await steps(settings_of(), supervisor.crew, prompts, 3)
            others = {
                name: await steps(settings_of(*extra), supervisor.crew, prompts, 2) for name, extra in variants.items()
            }
            return first, others

    first, others = asyncio.run(run(VARIANTS, "algorithm.name=ppo"))  # so that its learner has a critic
    again, _ = asyncio.run(run({}, "publish.engine=disk", f"run.cache={tmp_path}"))
    assert [untimed(row) for row in again] == [untimed(row) for row in first]
    assert all(row["ratio_max"] < 1.1 and row["demonstration_nll"] > 0 for row in first)
    for name, rows in others.items():
        assert all(math.isfinite(value) for row in rows for value in row.values()), name
        assert all(row["skipped"] == 0.0 and row["grad_norm"] > 0.0 for row in rows), name
    assert others["kl in the reward"][1]["kl_coef"] != others["kl in the reward"][0]["kl_coef"]
    assert others["critic"][1]["value_loss"] > 0.0 and others["critic"][1]["critic_grad_norm"] > 0.0
    assert others["logged"][1]["demonstration_nll"] < others["logged"][0]["demonstration_nll"] + 1.0
    assert 0.0 <= others["cgpo"][0]["passed"] <= 1.0
    assert others["floors"][0]["multiplier_love"] > 0.0
    assert others["asynchronous"][1]["staleness"] <= 1.0


@pytest.mark.nightly
def test_weights_that_came_over_tcp_are_those_of_shared_memory(tmp_path: Path) -> None:
    model = resolve_model("tiny", tmp_path)
    prompts = texts(model)

    async def run(engine: str) -> list[dict[str, float]]:
        told = settings_of(f"publish.engine={engine}", "publish.bucket_mib=1")
        rewards: dict[str, Path | None] = dict.fromkeys(("love", "helpfulness", "safety"))
        async with Supervisor(told, model, rewards, learners=True) as supervisor:
            return await steps(told, supervisor.crew, prompts, 3)

    over_tcp, in_memory = (asyncio.run(run(engine)) for engine in ("tcp", "shm"))
    assert [untimed(row) for row in over_tcp] == [untimed(row) for row in in_memory]
    assert all(0 <= row["probe"] < 0.05 for row in over_tcp)
