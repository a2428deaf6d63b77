"""Whole steps with real engines and learners: adapters published while samples are under way, and a run that must not
move."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_groups import Supervisor
from rluf.train.controller import Pipeline
from rluf.types import Group, Message, Prompt

pytestmark = pytest.mark.slow

BASE = (
    "model.path=tiny",
    "model.dtype=float32",
    "cluster.start_deadline_s=400",
    "rollout.max_prompt_tokens=64",
    "rollout.kv_cache_gib=0.25",
    "algorithm.steps=5",
    "algorithm.prompts_per_step=3",
    "algorithm.demonstrations=0",
    "algorithm.mix=[]",
    "learner.warmup_steps=0",
    "objectives.love={source: judge, judge: 'tests.train.test_training_modes:even'}",
    "objectives.helpfulness={source: judge, judge: repetition}",
    "objectives.safety={source: judge, judge: refusal}",
)
OBJECTIVES = ("love", "helpfulness", "safety")


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """A Ray whose actors find the judge below."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield
    ray.shutdown()


def even(messages: Any, response: str) -> bool:
    """A judge that tells about every second response apart."""
    del messages
    return sum(response.encode()) % 2 == 0


def run(
    settings: Settings, cache: Path, count: int, policy: Path | None = None, scored: Sequence[str] = OBJECTIVES
) -> tuple[list[dict[str, float]], list[Group]]:
    """Metrics of `count` steps and the groups they learnt from; the policy is saved to `policy`.

    `scored` are the objectives that have reward actors.
    """
    model = resolve_model("tiny", cache)
    tokenizer = load_tokenizer(model)
    messages = [(Message(role="user", content=f"{word}?"),) for word in ("sea", "cat", "rain", "moon")]
    prompts = [Prompt(str(n), m, render_prompt(tokenizer, m)[:64], "", "train") for n, m in enumerate(messages)]

    async def work() -> tuple[list[dict[str, float]], list[Group]]:
        rewards: dict[str, Path | None] = dict.fromkeys(scored)
        async with Supervisor(settings, model, rewards, learners=True) as supervisor:
            pipeline, rows, groups = Pipeline(settings, supervisor.crew, prompts), [], []
            try:
                for number in range(1, count + 1):
                    rows.append(await pipeline.step(number))
                    groups += await asyncio.to_thread(ray.get, pipeline.learnt)
            finally:
                await pipeline.close()
            if policy is not None:
                await pipeline.save(str(policy))
            return rows, groups

    return asyncio.run(work())


def test_adapters_reach_samples_under_way_and_each_token_has_its_version(tmp_path: Path) -> None:
    """The probe after each publish is what proves that the engine computes with the learner's adapter."""
    settings = load_settings(
        None,
        [
            *BASE,
            "publish.engine=adapter",
            "learner.lora_rank=4",
            "learner.learning_rate=2e-2",
            "algorithm.staleness=1",
            "rollout.max_response_tokens=120",
            f"run.cache={tmp_path}",
        ],
    ).settings
    rows, groups = run(settings, tmp_path, 4)
    assert all(row["probe"] < 5e-3 and row["skipped"] == 0.0 for row in rows)
    assert rows[-1]["kl"] > 1e-3, "the learner did not move, so the probe proves nothing"
    assert not list((tmp_path / "publish").glob("*"))
    spans = [sample.version_spans for group in groups for sample in group.samples]
    assert all(found[0][0] == 0 for found in spans)
    assert all(one[0] < two[0] and one[1] < two[1] for found in spans for one, two in pairwise(found))
    assert any(len(found) > 1 for found in spans), "no sample straddled a publish"
    assert all(group.version == min(s.version_spans[0][1] for s in group.samples) for group in groups)


def test_learning_rate_zero_moves_nothing_in_five_steps_and_ratios_stay_at_one(tmp_path: Path) -> None:
    alone = ["objectives.helpfulness.weight=0", "objectives.safety.weight=0", "objectives.alone=[]"]
    told = ["learner.learning_rate=0", "rollout.max_response_tokens=24", *alone]
    rows, _ = run(load_settings(None, [*BASE, *told]).settings, tmp_path, 5, tmp_path / "policy", ["love"])
    assert all("love" in row and "safety" not in row for row in rows)  # nobody scores what weighs nothing
    before = load_file(resolve_model("tiny", tmp_path) / "model.safetensors")
    after = load_file(tmp_path / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor.to(after[name].dtype)) for name, tensor in before.items())
    assert any(row["grad_norm"] > 0.0 for row in rows)
    for row in rows:
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-4) and row["ratio_max"] < 1.01
        assert row["kl"] == pytest.approx(0.0, abs=1e-6) and row["probe"] < 1e-3
