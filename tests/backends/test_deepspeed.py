"""DeepSpeed on one rank: float32 masters, accumulation, warm-up, skipped steps, gathered weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rluf.algorithms.policy_model import load_policy
from rluf.backends import deepspeed as ds
from rluf.backends.colocation import OPTIMIZER_STATES_TAG, WEIGHTS_TAG
from rluf.errors import ResourceError
from rluf.models.hub import resolve_model

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

pytestmark = pytest.mark.usefixtures("process_group")

STAGES = [0, 1, 2, 3]


class SumModel(nn.Module):  # type: ignore[misc]
    """A weight of ones, whose loss is its sum: gradient 1 everywhere."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, scale: Tensor) -> Tensor:
        return (self.weight.float() * scale).sum()


def make_engine(
    model: nn.Module, stage: int, *, learning_rate: float = 1e-4, warmup_steps: int = 0, dtype: str = "bfloat16"
) -> DeepSpeedEngine:
    return ds.init_deepspeed(
        model,
        zero_stage=stage,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        max_grad_norm=1e9,
        dtype=getattr(torch, dtype),
        world_size=1,
        device=torch.device("cpu"),
    )


def run_step(engine: DeepSpeedEngine, *scales: float) -> tuple[bool, Any]:
    for index, scale in enumerate(scales):
        ds.accumulate_gradients(engine, partial(compute_loss, engine, scale), is_last=index == len(scales) - 1)
    return ds.apply_optimizer_step(engine)


def compute_loss(engine: DeepSpeedEngine, scale: float) -> tuple[Tensor, None]:
    return engine(torch.tensor(scale)), None


def copy_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in ds.gather_parameters(engine, 1 << 16) for name, tensor in bucket}


@pytest.mark.parametrize("stage", STAGES)
def test_updates_too_small_for_bfloat16_add_up_in_the_master(stage: int) -> None:
    """Adam moves each weight by 1e-4 a step; bfloat16 below 1 comes in steps of 0.0039, so only a master can add up."""
    engine = make_engine(SumModel(), stage)
    run_step(engine, 1.0)
    assert bool((copy_weights(engine)["weight"] == 1.0).all())
    for _ in range(99):
        run_step(engine, 1.0)
    assert copy_weights(engine)["weight"].dtype == torch.bfloat16
    assert copy_weights(engine)["weight"].float().mean().item() == pytest.approx(0.99, abs=0.002)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_any_number_of_micro_batches_add_up(stage: int, dtype: str) -> None:
    engine = make_engine(SumModel(4), stage, dtype=dtype)
    assert run_step(engine, 1.0) == (True, pytest.approx(2.0))
    assert run_step(engine, 0.5, 1.0, 1.5) == (True, pytest.approx(6.0))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_are_float32(stage: int) -> None:
    """256 + 1 is 256 in bfloat16."""
    engine = make_engine(SumModel(1), stage)
    assert run_step(engine, 256.0, *[1.0] * 8)[1] == pytest.approx(264.0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_with_a_non_finite_gradient_is_skipped(stage: int, dtype: str) -> None:
    engine = make_engine(SumModel(4), stage, learning_rate=0.1, dtype=dtype)
    run_step(engine, 1.0)
    before = copy_weights(engine)["weight"]
    assert run_step(engine, 1.0, float("nan"))[0] is False
    assert torch.equal(copy_weights(engine)["weight"], before)
    assert run_step(engine, 1.0) == (True, pytest.approx(2.0))
    assert not torch.equal(copy_weights(engine)["weight"], before)


@pytest.mark.parametrize("stage", STAGES)
def test_learning_rate_zero_leaves_weights_bit_identical(stage: int) -> None:
    torch.manual_seed(0)
    model = SumModel()
    model.weight.data = torch.randn(64).bfloat16().float()
    before = model.weight.data.clone()
    engine = make_engine(model, stage, learning_rate=0.0)
    for _ in range(3):
        assert run_step(engine, 1.0)[0]
    assert torch.equal(copy_weights(engine)["weight"].float(), before)


def test_learning_rate_warms_up_then_is_constant_or_decays() -> None:
    constant = make_engine(SumModel(), 2, learning_rate=1.0, warmup_steps=2)
    rates = []
    for _ in range(4):
        rates.append(ds.get_learning_rate(constant))
        run_step(constant, 1.0)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0])
    decaying = ds.init_deepspeed(
        SumModel(),
        zero_stage=0,
        learning_rate=1.0,
        warmup_steps=2,
        max_grad_norm=1.0,
        dtype=torch.float32,
        world_size=1,
        device=torch.device("cpu"),
        total_steps=6,
    )
    rates = []
    for _ in range(7):
        rates.append(ds.get_learning_rate(decaying))
        run_step(decaying, 1.0)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_gradient_norm_is_clipped() -> None:
    engine = ds.init_deepspeed(
        SumModel(4),
        zero_stage=0,
        learning_rate=0.0,
        warmup_steps=0,
        max_grad_norm=0.5,
        dtype=torch.float32,
        world_size=1,
        device=torch.device("cpu"),
    )
    assert run_step(engine, 3.0) == (True, pytest.approx(6.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("stage", [2, 3])
def test_gathered_weights_have_checkpoint_names_and_include_the_tied_head(
    stage: int, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with ds.sharded_loading(stage, torch.bfloat16, 1, torch.device("cpu")):
        model = load_policy(folder, dtype=torch.bfloat16)
    engine = make_engine(model, stage)
    gathered = copy_weights(engine)
    reference_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = reference_model.state_dict()
    assert gathered.keys() == expected.keys()
    assert torch.equal(gathered["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items())
    assert ds.count_parameters(engine) == sum(p.numel() for p in reference_model.parameters())
    ds.save_hf_model(engine, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert saved["lm_head.weight"].dtype == torch.bfloat16


def test_buckets_respect_their_size(folder: Path) -> None:
    engine = make_engine(load_policy(folder, dtype=torch.bfloat16), 2)
    for bucket in ds.gather_parameters(engine, 100_000):
        assert len(bucket) == 1 or sum(t.numel() * t.element_size() for _, t in bucket) <= 100_000


def test_another_world_size_is_refused() -> None:
    with pytest.raises(ResourceError, match="expected a process group of 2 ranks, got 1"):
        ds.init_deepspeed(
            SumModel(),
            zero_stage=0,
            learning_rate=0.0,
            warmup_steps=0,
            max_grad_norm=1.0,
            dtype=torch.float32,
            world_size=2,
            device=torch.device("cpu"),
        )
    assert dist.is_initialized()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloaded_and_reloaded_states_train_bit_exactly(dtype: str) -> None:
    """As on a shared GPU: states offloaded before a sync, weights after it, all reloaded before the next step."""
    final_weights = []
    for use_offload in (False, True):
        engine = make_engine(SumModel(), 2, learning_rate=1e-2, dtype=dtype)
        for step in range(2):
            scale = torch.linspace(-1.0, 2.0, 64) * (step + 1)
            ds.accumulate_gradients(engine, lambda scale=scale, engine=engine: (engine(scale), None), is_last=True)  # type: ignore[misc]
            assert ds.apply_optimizer_step(engine)[0]
            if use_offload:
                ds.offload_to_host(engine, (OPTIMIZER_STATES_TAG,))
                synced_weight = next(ds.gather_parameters(engine, 1 << 20))[0][1].clone()
                ds.offload_to_host(engine, (WEIGHTS_TAG,))
                ds.reload_to_device(engine)
                assert torch.equal(next(ds.gather_parameters(engine, 1 << 20))[0][1], synced_weight)
        final_weights.append(next(ds.gather_parameters(engine, 1 << 20))[0][1].clone())
    assert torch.equal(*final_weights)


@pytest.mark.parametrize(
    ("stage", "device", "dtype", "reduces_in", "overlaps"),
    [
        (0, "cuda", "bfloat16", "fp32", True),
        (2, "cuda", "bfloat16", "fp32", True),
        (3, "cuda", "bfloat16", "bf16", True),
        (3, "cuda", "float32", "fp32", True),
        (2, "cpu", "bfloat16", "fp32", False),
        (3, "cpu", "bfloat16", "fp32", False),
    ],
)
def test_reduction_of_gradients(stage: int, device: str, dtype: str, reduces_in: str, overlaps: bool) -> None:
    """Overlapped with the backward pass on GPUs; half the bytes where every micro-batch is reduced."""
    config = ds._build_deepspeed_config(stage, 1.0, getattr(torch, dtype), 8, device=torch.device(device))
    assert (config["communication_data_type"], config["zero_optimization"]["overlap_comm"]) == (reduces_in, overlaps)


def test_a_process_on_the_cpu_cannot_train_on_a_gpu() -> None:
    """DeepSpeed's accelerator is one per process, chosen when it is first imported."""
    with pytest.raises(ResourceError, match=r"DeepSpeed runs on cpu .* cannot train on cuda:0; set DS_ACCELERATOR"):
        ds.init_deepspeed(
            SumModel(), zero_stage=0, learning_rate=0.0, warmup_steps=0, dtype=torch.float32, world_size=1,
            device=torch.device("cuda", 0),
        )  # fmt: skip
