"""LoRA adapters as files: PEFT reads what is written, and an engine refuses what does not fit its model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rluf.algorithms.lora import adapters
from rluf.algorithms.policy_io import load_policy
from rluf.backends.vllm.engine import RolloutEngine, set_environment
from rluf.backends.weight_transfer.base import AdapterSender
from rluf.backends.weight_transfer.lora import (
    adapter_names,
    check_adapter,
    linear_shapes,
    no_change,
    room_for,
    write_adapter,
)
from rluf.config.load import load_settings
from rluf.errors import SyncError
from rluf.models.hub import resolve_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def matrices(model: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(model, dtype=torch.float32, trust_remote_code=False, lora_rank=4)
    torch.manual_seed(0)
    return {
        name: torch.randn(tensor.shape) * 0.1
        for weight, change in adapters(policy).items()
        for name, tensor in zip(adapter_names(weight), (change.down, change.up), strict=True)
    }


def test_peft_computes_with_the_files_what_merging_computes(
    model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", matrices)
    check_adapter(tmp_path / "adapter", linear_shapes(model))
    ids = torch.arange(3, 20)[None]
    plain, merged = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for weight in linear_shapes(model):
            down, up = (matrices[name] for name in adapter_names(weight))
            merged.get_parameter(weight).add_(2.0 * up @ down)
        expected = merged(ids).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(ids).logits
    assert (found - expected).abs().max() < 1e-4


def test_an_engine_begins_with_an_adapter_that_changes_nothing(model: Path) -> None:
    first = no_change(model, 4, torch.bfloat16)
    assert len(first) == 2 and all(not tensor.any() for tensor in first.values())


def test_what_does_not_fit_is_refused_by_name(model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path) -> None:
    expected = linear_shapes(model)
    name = sorted(matrices)[0]
    faults = {
        "sent no": {key: value for key, value in matrices.items() if key != name},
        "of shapes": matrices | {name: torch.zeros(4, 3)},
        "changes nothing": matrices | {"base_model.model.other.lora_A.weight": torch.zeros(4, 3)},
    }
    for number, (told, sent) in enumerate(faults.items()):
        write_adapter(tmp_path / str(number), sent)
        with pytest.raises(SyncError, match=told):
            check_adapter(tmp_path / str(number), expected)
    with pytest.raises(SyncError, match="share"):
        check_adapter(tmp_path / "nowhere", expected)


def test_room_is_the_smallest_that_vllm_knows() -> None:
    assert [room_for(rank) for rank in (1, 2, 8, 12, 600)] == [1, 8, 8, 16, 512]


@pytest.mark.slow
async def test_an_engine_takes_adapters_while_samples_are_under_way(
    model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Real vLLM on the CPU: what it then computes is what PEFT computes, and tokens say which adapter sampled them."""
    settings = load_settings(
        None,
        [
            "model.path=tiny",
            "model.dtype=float32",
            "rollout.max_prompt_tokens=32",
            "rollout.max_response_tokens=400",
            "rollout.kv_cache_gib=0.1",
            "learner.lora_rank=4",
            "publish.engine=adapter",
            "cluster.threads=1",
            "cluster.start_deadline_s=500",
        ],
    ).settings
    set_environment(settings)
    engine, prompt, response = RolloutEngine("rollout 0", 0, settings, model), [1, 60, 70, 2], list(range(10, 40))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([prompt + response])

    def truth(policy: torch.nn.Module) -> list[float]:
        with torch.no_grad():
            logits = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(logits, response, strict=True)]

    try:
        await engine.start()
        assert await engine.logprobs(prompt, response) == pytest.approx(truth(plain), abs=1e-3)
        under_way = asyncio.create_task(engine.generate(prompt, range(8)))
        while not engine.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        sender = AdapterSender(tmp_path / "publish")
        await engine.begin_update(sender.offer(1))
        await engine.update(sender.send(list(matrices.items())))
        await engine.finish_update(1)
        sender.finish()
        drafts = await under_way
        adapted = truth(PeftModel.from_pretrained(plain, str(_kept(tmp_path, matrices))))
        assert await engine.logprobs(prompt, response) == pytest.approx(adapted, abs=1e-3)
        assert any([version for _, version in draft.version_spans] == [0, 1] for draft in drafts)
        await engine.begin_update(sender.offer(2))
        with pytest.raises(SyncError, match="sent no"):
            await engine.update(sender.send(list(matrices.items())[1:]))
    finally:
        engine.shutdown()


def _kept(root: Path, matrices: dict[str, torch.Tensor]) -> Path:
    write_adapter(root / "kept", matrices)
    return root / "kept"
