"""A served policy on a real engine: it responds, loads other weights in place, rejects weights that do not fit."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.serve.policy_deployment import PolicyDeployment
from rluf.types import Message
from rluf.utils.paths import resolve_cache_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HELLO = [Message(role="user", content="Hello?")]
SETTINGS = {
    "model": {"path": "tiny", "dtype": "float32"}, "cluster": {"threads_per_actor": 1},
    "rollout": {"max_prompt_tokens": 256, "max_response_tokens": 12, "concurrency": 4, "kv_cache_gib": 0.1},
}  # fmt: skip


async def test_other_weights_are_loaded_into_the_running_engine(tmp_path: Path) -> None:
    first_folder = resolve_model("tiny", resolve_cache_folder(Settings()))
    other_folder, wrong_folder = (Path(shutil.copytree(first_folder, tmp_path / name)) for name in ("other", "wrong"))
    first_weights = load_file(first_folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    other_weights = {
        name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in first_weights.items()
    }
    save_file(other_weights, other_folder / "model.safetensors", {"format": "pt"})
    save_file(
        {"model.norm.weight": first_weights["model.norm.weight"][:-1].contiguous()}, wrong_folder / "model.safetensors"
    )
    policy = PolicyDeployment(Settings.model_validate(SETTINGS).model_dump_json())
    await policy.reconfigure({"path": str(first_folder), "version": "one"})
    engine = policy._engine
    assert engine is not None
    try:
        before = await policy.complete_chat(HELLO, 1)
        assert before.policy_version == await policy.describe() == "one"
        assert (await policy.complete_chat(HELLO, 1)).text == before.text
        await policy.reconfigure({"path": str(wrong_folder), "version": "wrong"})
        await policy.reconfigure({"path": str(other_folder), "version": "two"})
        async with asyncio.timeout(120):
            while await policy.describe() != "two":
                await asyncio.sleep(0.05)
        after = await policy.complete_chat(HELLO, 1)
        assert after.policy_version == "two"
        assert after.text != before.text
        assert policy._engine is engine
        await policy.check_health()
    finally:
        engine.shutdown()
