"""A real engine per family: its log-probabilities are the learner's before and after all weights changed."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.families import COMMON, FAMILIES
from rluf.algorithms.policy_model import load_policy
from rluf.backends.deepspeed import gather_checkpoint_tensors
from rluf.backends.vllm.engine import RolloutEngine, set_vllm_environment
from rluf.backends.weight_transfer.shm import ShmSender
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.utils.paths import resolve_cache_folder

pytestmark = pytest.mark.nightly

SETTINGS = Settings.model_validate(
    {
        "cluster": {"threads_per_actor": 1},
        "model": {"dtype": "float32"},
        "rollout": {
            "temperature": 1.0,
            "concurrency": 4,
            "kv_cache_gib": 0.1,
            "max_prompt_tokens": 128,
            "max_response_tokens": 96,
        },
    }
)
TOLERANCE = 0.01
"""Nats per token, in float32."""
# vLLM's CPU attention has no heads of 16.
SIZES = {"vocab_size": 259, "hidden_size": 128, "intermediate_size": 256}
HEAD_SIZES = {name: {"head_dim": 32} for name in ("Gemma 2", "Gemma 3", "Mamba 2")} | {"GPT-J": {"rotary_dim": 16}}
PROMPT_IDS = tuple(range(10, 110))
"""Longer than most chunks of a recurrent layer."""
ENGINE_FAMILIES = (
    "Llama", "GPT-2", "GPT-J", "Falcon",  # tied heads of other names
    "Mistral, window of 128", "Gemma 2", "Gemma 3", "StableLM",  # one sample per row, sliding windows
    "Falcon-H1", "Mamba 2",  # recurrent layers
)  # fmt: skip


def write_family(family: str, folder: Path) -> None:
    """A random model of the family with the tokenizer of `tiny`."""
    config_name, values = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**COMMON, **values, **SIZES, **HEAD_SIZES.get(family, {})})
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in resolve_model("tiny", resolve_cache_folder(SETTINGS)).iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, folder)


def compute_learner_logprobs(model: Any, response_ids: tuple[int, ...]) -> list[float]:
    """The plain model's log-probabilities [R] of a response, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT_IDS, *response_ids]])).logits[0, len(PROMPT_IDS) - 1 : -1].float()
    return [float(p) for p in logits.log_softmax(-1).gather(1, torch.tensor(response_ids)[:, None])[:, 0]]


async def measure_gaps(folder: Path) -> list[float]:
    """Mean |difference| of engine and learner: of sampled tokens, then of the same response with new weights."""
    model: Any = load_policy(folder, dtype=torch.float32, is_packed=False)
    engine, sender = RolloutEngine("rollout 0", 0, SETTINGS, folder), ShmSender()
    await engine.start()
    try:
        (generation,) = await engine.generate(PROMPT_IDS, [1])
        expected = compute_learner_logprobs(model, generation.response_ids)
        gaps = [fmean(abs(a - b) for a, b in zip(expected, generation.logprobs, strict=True))]
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        changed = compute_learner_logprobs(model, generation.response_ids)
        assert fmean(abs(a - b) for a, b in zip(expected, changed, strict=True)) > 10 * TOLERANCE
        await engine.begin_weight_update(sender.begin(1))
        for bucket in gather_checkpoint_tensors(SimpleNamespace(module=model), 1 << 20):  # type: ignore[arg-type]
            await engine.load_weight_bucket(sender.send_bucket(bucket))
        await engine.finish_weight_update(1)
        sender.end()
        measured = await engine.compute_logprobs(PROMPT_IDS, generation.response_ids)
        return [*gaps, fmean(abs(a - b) for a, b in zip(changed, measured, strict=True))]
    finally:
        engine.shutdown()
        sender.close()


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_engine_and_learner_agree_before_and_after_a_weight_sync(family: str, tmp_path: Path) -> None:
    write_family(family, tmp_path)
    set_vllm_environment(SETTINGS)
    assert max(asyncio.run(measure_gaps(tmp_path))) < TOLERANCE
