"""Whole steps with real engines and learners: LoRA adapters synced while samples are generated, and a zero learning
rate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.families import COMMON, FAMILIES
from rluf.algorithms.batch_layout import choose_batch_layout
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import TrainController
from rluf.types import Group, Message, Prompt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

BASE_OVERRIDES = (
    "model.path=tiny",
    "model.dtype=float32",
    "timeouts.actor_start_s=400",
    "rollout.max_prompt_tokens=64",
    "rollout.kv_cache_gib=0.25",
    "algorithm.steps=5",
    "algorithm.prompts_per_step=3",
    "algorithm.demonstrations=0",
    "algorithm.topic_weights={}",
    "learner.warmup_steps=0",
    "objectives.love={source: judge, path: 'tests.train.test_training_modes:judge_even_bytes'}",
    "objectives.helpfulness={source: judge, path: repetition}",
    "objectives.safety={source: judge, path: refusal}",
)
OBJECTIVES = ("love", "helpfulness", "safety")


def judge_even_bytes(messages: Any, response: str) -> bool:
    """A judge that passes about every second response, so that groups have spread."""
    del messages
    return sum(response.encode()) % 2 == 0


def run_steps(
    settings: Settings,
    cache_folder: Path,
    step_count: int,
    policy_path: Path | None = None,
    objectives: Sequence[str] = OBJECTIVES,
    model_path: Path | None = None,
) -> tuple[list[dict[str, float]], list[Group]]:
    """Metrics of the steps and the groups they trained on; the policy is saved to `policy_path`.

    `objectives` are those with reward actors.
    """
    model_path = model_path or resolve_model("tiny", cache_folder)
    tokenizer = load_tokenizer(model_path)
    conversations = [(Message(role="user", content=f"{word}?"),) for word in ("sea", "cat", "rain", "moon")]
    prompts = [
        Prompt(str(index), messages, render_prompt(tokenizer, messages)[:64], "", "train")
        for index, messages in enumerate(conversations)
    ]

    async def work() -> tuple[list[dict[str, float]], list[Group]]:
        reward_folders: dict[str, Path | None] = dict.fromkeys(objectives)
        async with ActorSupervisor(settings, model_path, reward_folders, with_learners=True) as supervisor:
            controller, rows, groups = TrainController(settings, supervisor, prompts), [], []
            try:
                for step in range(1, step_count + 1):
                    rows.append(await controller.run_step(step))
                    groups += await asyncio.to_thread(ray.get, controller.last_batch_refs)
            finally:
                await controller.close()
            if policy_path is not None:
                await controller.save_policy(str(policy_path))
            return rows, groups

    return asyncio.run(work())


def test_adapters_reach_running_samples_and_each_token_has_its_version(tmp_path: Path) -> None:
    """The check after each sync proves that the engine computes with the learner's adapter."""
    settings = load_settings(
        None,
        [
            *BASE_OVERRIDES,
            "weight_sync.transport=lora",
            "learner.lora_rank=4",
            "learner.learning_rate=2e-2",
            "algorithm.max_staleness=1",
            "rollout.max_response_tokens=120",
            f"run.cache={tmp_path}",
        ],
    ).settings
    rows, groups = run_steps(settings, tmp_path, 4)
    assert all(row["sync_logprob_gap"] < 5e-3 and row["skipped"] == 0.0 for row in rows)
    assert rows[-1]["kl"] > 1e-4, "the learner did not move, so the check proves nothing"
    assert not list((tmp_path / "weight_sync").glob("*"))
    spans_by_sample = [sample.version_spans for group in groups for sample in group.samples]
    assert all(spans[0][0] == 0 for spans in spans_by_sample)
    for spans in spans_by_sample:
        assert all(
            first_token < next_token and version < next_version
            for (first_token, version), (next_token, next_version) in pairwise(spans)
        )
    assert any(len(spans) > 1 for spans in spans_by_sample), "no sample was generated during a weight sync"
    for group in groups:
        assert group.weight_version == min(sample.version_spans[0][1] for sample in group.samples)


def test_learning_rate_zero_changes_nothing_in_five_steps_and_ratios_stay_at_one(tmp_path: Path) -> None:
    overrides = [
        "learner.learning_rate=0",
        "rollout.max_response_tokens=24",
        "objectives.helpfulness.weight=0",
        "objectives.safety.weight=0",
        "aggregation.topic_objectives={}",
    ]
    settings = load_settings(None, [*BASE_OVERRIDES, *overrides]).settings
    rows, _ = run_steps(settings, tmp_path, 5, tmp_path / "policy", ["love"])
    # The supervisor was given no others.
    assert all("love" in row and "safety" not in row for row in rows)
    before = load_file(resolve_model("tiny", tmp_path) / "model.safetensors")
    after = load_file(tmp_path / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor.to(after[name].dtype)) for name, tensor in before.items())
    assert any(row["grad_norm"] > 0.0 for row in rows)
    for row in rows:
        assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-4) and row["ratio_max"] < 1.01
        assert row["kl"] == pytest.approx(0.0, abs=1e-6) and row["sync_logprob_gap"] < 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize(("family", "layout"), [("Gemma 2", "rows"), ("Mistral, window of 128", "packed")])
def test_engine_and_learner_of_other_families_agree_after_each_sync(family: str, layout: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path))
    config_name, values = FAMILIES[family]
    sizes = {**COMMON, **values, "vocab_size": len(tokenizer), "hidden_size": 128, "pad_token_id": 2}
    if "head_dim" in sizes:
        sizes["head_dim"] = 32  # vLLM's CPU attention supports it
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    overrides = ["learner.learning_rate=2e-2", "rollout.max_response_tokens=24", f"model.path={tmp_path / 'model'}"]
    settings = load_settings(None, [*BASE_OVERRIDES, *overrides]).settings
    assert choose_batch_layout(settings, tmp_path / "model").layout == layout
    rows, _ = run_steps(settings, tmp_path, 2, model_path=tmp_path / "model")
    assert all(row["sync_logprob_gap"] < 5e-3 and row["skipped"] == 0.0 for row in rows)
    assert rows[-1]["kl"] > 1e-4, "the learner did not move, so the check proves nothing"
