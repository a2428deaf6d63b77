"""LoRA transport: PEFT reads the files, and an engine refuses an adapter that does not fit its model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rluf.algorithms.policy_model import load_policy
from rluf.backends.vllm.engine import RolloutEngine, set_vllm_environment
from rluf.backends.weight_transfer.lora import (
    LoraSender,
    build_zero_adapter,
    check_adapter,
    get_lora_names,
    read_linear_shapes,
    select_max_lora_rank,
    write_adapter,
)
from rluf.config.load import load_settings
from rluf.errors import WeightSyncError
from rluf.models.hub import resolve_model
from rluf.models.lora import find_lora_adapters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def matrices(model: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(model, dtype=torch.float32, trust_remote_code=False, lora_rank=4)
    torch.manual_seed(0)
    return {
        name: torch.randn(tensor.shape) * 0.1
        for weight_name, adapter in find_lora_adapters(policy).items()
        for name, tensor in zip(get_lora_names(weight_name), (adapter.lora_a, adapter.lora_b), strict=True)
    }


def test_peft_with_the_files_equals_merged_weights(
    model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", matrices)
    check_adapter(tmp_path / "adapter", read_linear_shapes(model))
    input_ids = torch.arange(3, 20)[None]
    base_model, merged_model = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for weight_name in read_linear_shapes(model):
            lora_a, lora_b = (matrices[name] for name in get_lora_names(weight_name))
            merged_model.get_parameter(weight_name).add_(2.0 * lora_b @ lora_a)
        expected = merged_model(input_ids).logits
        logits = PeftModel.from_pretrained(base_model, str(tmp_path / "adapter"))(input_ids).logits
    assert (logits - expected).abs().max() < 1e-4


def test_the_initial_adapter_changes_nothing(model: Path) -> None:
    adapter = build_zero_adapter(model, 4, torch.bfloat16)
    assert len(adapter) == 2 and all(not tensor.any() for tensor in adapter.values())


def test_an_adapter_that_does_not_fit_is_refused(
    model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    expected = read_linear_shapes(model)
    name = sorted(matrices)[0]
    faults = {
        "sent no": {key: value for key, value in matrices.items() if key != name},
        "of shapes": matrices | {name: torch.zeros(4, 3)},
        "changes no weight": matrices | {"base_model.model.other.lora_A.weight": torch.zeros(4, 3)},
    }
    for index, (message, tensors) in enumerate(faults.items()):
        write_adapter(tmp_path / str(index), tensors)
        with pytest.raises(WeightSyncError, match=message):
            check_adapter(tmp_path / str(index), expected)
    with pytest.raises(WeightSyncError, match="share"):
        check_adapter(tmp_path / "nowhere", expected)


def test_the_smallest_sufficient_rank_of_vllm_is_selected() -> None:
    assert [select_max_lora_rank(rank) for rank in (1, 2, 8, 12, 600)] == [1, 8, 8, 16, 512]


@pytest.mark.slow
async def test_an_engine_loads_adapters_while_samples_are_running(
    model: Path, matrices: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Real vLLM on the CPU: it computes what PEFT computes, and version spans say which adapter sampled a token."""
    settings = load_settings(
        None,
        [
            "model.path=tiny",
            "model.dtype=float32",
            "rollout.max_prompt_tokens=32",
            "rollout.max_response_tokens=400",
            "rollout.kv_cache_gib=0.1",
            "learner.lora_rank=4",
            "weight_sync.transport=lora",
            "cluster.threads_per_actor=1",
            "timeouts.actor_start_s=500",
        ],
    ).settings
    set_vllm_environment(settings)
    engine, prompt, response = RolloutEngine("rollout 0", 0, settings, model), [1, 60, 70, 2], list(range(10, 40))
    base_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    input_ids = torch.tensor([prompt + response])

    def compute_expected(policy: torch.nn.Module) -> list[float]:
        with torch.no_grad():
            logits = policy(input_ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(logits, response, strict=True)]

    try:
        await engine.start()
        assert await engine.compute_logprobs(prompt, response) == pytest.approx(compute_expected(base_model), abs=1e-3)
        generate_task = asyncio.create_task(engine.generate(prompt, range(8)))
        while not engine.running_samples:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        sender = LoraSender(tmp_path / "weight_sync")
        await engine.begin_weight_update(sender.begin(1))
        await engine.load_weight_bucket(sender.send_bucket(list(matrices.items())))
        await engine.finish_weight_update(1)
        sender.end()
        generations = await generate_task
        write_adapter(tmp_path / "expected", matrices)
        adapted_model = PeftModel.from_pretrained(base_model, str(tmp_path / "expected"))
        assert await engine.compute_logprobs(prompt, response) == pytest.approx(
            compute_expected(adapted_model), abs=1e-3
        )
        assert any([version for _, version in generation.version_spans] == [0, 1] for generation in generations)
        await engine.begin_weight_update(sender.begin(2))
        with pytest.raises(WeightSyncError, match="sent no"):
            await engine.load_weight_bucket(sender.send_bucket(list(matrices.items())[1:]))
    finally:
        engine.shutdown()
