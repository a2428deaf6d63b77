"""A served policy on a real engine: it answers, takes other weights in place, and refuses weights that do not fit."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.serve.policy_deployment import Policy
from rluf.types import Message
from rluf.utils.paths import cache_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HELLO = [Message(role="user", content="Hello?")]
SETTINGS = {
    "model": {"path": "tiny", "dtype": "float32"}, "cluster": {"threads": 1},
    "rollout": {"max_prompt_tokens": 256, "max_response_tokens": 12, "concurrency": 4, "kv_cache_gib": 0.1},
}  # fmt: skip


async def test_other_weights_go_into_the_running_engine(tmp_path: Path) -> None:
    first = resolve_model("tiny", cache_dir(Settings()))
    other, wrong = (Path(shutil.copytree(first, tmp_path / name)) for name in ("other", "wrong"))
    stored = load_file(first / "model.safetensors")
    drawn = torch.Generator().manual_seed(3)
    moved = {name: tensor + 0.5 * torch.randn(tensor.shape, generator=drawn) for name, tensor in stored.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": stored["model.norm.weight"][:-1].contiguous()}, wrong / "model.safetensors")
    policy = Policy(Settings.model_validate(SETTINGS).model_dump_json())
    await policy.reconfigure({"path": str(first), "version": "one"})
    engine = policy._engine
    assert engine is not None
    try:
        before = await policy.chat(HELLO, 1)
        assert before.version == await policy.describe() == "one"
        assert (await policy.chat(HELLO, 1)).text == before.text
        await policy.reconfigure({"path": str(wrong), "version": "wrong"})
        await policy.reconfigure({"path": str(other), "version": "two"})
        async with asyncio.timeout(120):
            while await policy.describe() != "two":
                await asyncio.sleep(0.05)
        after = await policy.chat(HELLO, 1)
        assert after.version == "two"
        assert after.text != before.text
        assert policy._engine is engine
        await policy.check_health()
    finally:
        engine.shutdown()
