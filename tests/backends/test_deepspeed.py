"""DeepSpeed on one rank: float32 masters, free accumulation, warm-up, skipped steps, whole weights out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rluf.algorithms.policy_io import load_policy
from rluf.backends import deepspeed as ds
from rluf.backends.colocation import STATES, WEIGHTS
from rluf.errors import ModelError, ResourceError
from rluf.models.hub import resolve_model

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

pytestmark = pytest.mark.usefixtures("process_group")

STAGES = [0, 1, 2, 3]


class Vector(nn.Module):  # type: ignore[misc]
    """A weight of ones, whose loss is its sum: gradient 1 everywhere."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, scale: Tensor) -> Tensor:
        return (self.weight.float() * scale).sum()


def engine_of(
    model: nn.Module, stage: int, *, rate: float = 1e-4, warmup: int = 0, dtype: str = "bfloat16"
) -> DeepSpeedEngine:
    return ds.init_deepspeed(
        model,
        zero_stage=stage,
        learning_rate=rate,
        warmup_steps=warmup,
        weight_decay=0.0,
        grad_clip=1e9,
        dtype=getattr(torch, dtype),
        world=1,
    )


def learn(engine: DeepSpeedEngine, *scales: float) -> tuple[bool, Any]:
    for number, scale in enumerate(scales):
        ds.accumulate(engine, partial(loss_of, engine, scale), last=number == len(scales) - 1)
    return ds.apply_step(engine)


def loss_of(engine: DeepSpeedEngine, scale: float) -> tuple[Tensor, None]:
    return engine(torch.tensor(scale)), None


def weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in ds.gather_parameters(engine, 1 << 16) for name, tensor in bucket}


@pytest.mark.parametrize("stage", STAGES)
def test_updates_too_small_for_bfloat16_add_up_in_the_master(stage: int) -> None:
    """Adam moves each weight by 1e-4 a step; bfloat16 below 1 comes in steps of 0.0039, so only a master can add up."""
    engine = engine_of(Vector(), stage)
    learn(engine, 1.0)
    assert bool((weights(engine)["weight"] == 1.0).all())
    for _ in range(99):
        learn(engine, 1.0)
    assert weights(engine)["weight"].dtype == torch.bfloat16
    assert weights(engine)["weight"].float().mean().item() == pytest.approx(0.99, abs=0.002)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_any_number_of_micro_batches_are_summed(stage: int, dtype: str) -> None:
    engine = engine_of(Vector(4), stage, dtype=dtype)
    assert learn(engine, 1.0) == (True, pytest.approx(2.0))
    assert learn(engine, 0.5, 1.0, 1.5) == (True, pytest.approx(6.0))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_are_float32(stage: int) -> None:
    """256 + 1 is 256 in bfloat16."""
    engine = engine_of(Vector(1), stage)
    assert learn(engine, 256.0, *[1.0] * 8)[1] == pytest.approx(264.0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_with_a_gradient_that_is_not_finite_is_skipped(stage: int, dtype: str) -> None:
    engine = engine_of(Vector(4), stage, rate=0.1, dtype=dtype)
    learn(engine, 1.0)
    before = weights(engine)["weight"]
    assert learn(engine, 1.0, float("nan"))[0] is False
    assert torch.equal(weights(engine)["weight"], before)
    assert learn(engine, 1.0) == (True, pytest.approx(2.0))
    assert not torch.equal(weights(engine)["weight"], before)


@pytest.mark.parametrize("stage", STAGES)
def test_learning_rate_zero_leaves_weights_bit_identical(stage: int) -> None:
    torch.manual_seed(0)
    model = Vector()
    model.weight.data = torch.randn(64).bfloat16().float()
    before = model.weight.data.clone()
    engine = engine_of(model, stage, rate=0.0)
    for _ in range(3):
        assert learn(engine, 1.0)[0]
    assert torch.equal(weights(engine)["weight"].float(), before)


def test_learning_rate_warms_up_then_stays_or_falls() -> None:
    constant = engine_of(Vector(), 2, rate=1.0, warmup=2)
    seen = []
    for _ in range(4):
        seen.append(ds.learning_rate(constant))
        learn(constant, 1.0)
    assert seen == pytest.approx([0.5, 1.0, 1.0, 1.0])
    falling = ds.init_deepspeed(
        Vector(),
        zero_stage=0,
        learning_rate=1.0,
        warmup_steps=2,
        weight_decay=0.0,
        grad_clip=1.0,
        dtype=torch.float32,
        world=1,
        total_steps=6,
    )
    seen = []
    for _ in range(7):
        seen.append(ds.learning_rate(falling))
        learn(falling, 1.0)
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_gradient_norm_is_clipped() -> None:
    engine = ds.init_deepspeed(
        Vector(4),
        zero_stage=0,
        learning_rate=0.0,
        warmup_steps=0,
        weight_decay=0.0,
        grad_clip=0.5,
        dtype=torch.float32,
        world=1,
    )
    assert learn(engine, 3.0) == (True, pytest.approx(6.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("stage", [2, 3])
def test_gathered_weights_are_whole_named_as_saved_and_hold_the_tied_head(
    stage: int, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with ds.sharded_loading(stage, torch.bfloat16, 1):
        model = load_policy(folder, dtype=torch.bfloat16)
    engine = engine_of(model, stage)
    found = weights(engine)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = plain.state_dict()
    assert found.keys() == expected.keys()
    assert torch.equal(found["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert ds.parameter_count(engine) == sum(p.numel() for p in plain.parameters())
    ds.save_hf(engine, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert again["lm_head.weight"].dtype == torch.bfloat16


def test_buckets_keep_to_their_size(folder: Path) -> None:
    engine = engine_of(load_policy(folder, dtype=torch.bfloat16), 2)
    for bucket in ds.gather_parameters(engine, 100_000):
        assert len(bucket) == 1 or sum(t.numel() * t.element_size() for _, t in bucket) <= 100_000


def test_another_world_size_is_refused() -> None:
    with pytest.raises(ResourceError, match="2 ranks, but the process group has 1"):
        ds.init_deepspeed(
            Vector(),
            zero_stage=0,
            learning_rate=0.0,
            warmup_steps=0,
            weight_decay=0.0,
            grad_clip=1.0,
            dtype=torch.float32,
            world=2,
        )
    assert dist.is_initialized()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_steps_and_two_resumed_ones_are_four_steps_bit_for_bit(stage: int, dtype: str, tmp_path: Path) -> None:
    def advance(engine: DeepSpeedEngine, numbers: range) -> None:
        for number in numbers:
            scale = torch.linspace(-1.0, 2.0, 64) * (number + 1)
            ds.accumulate(engine, lambda scale=scale: (engine(scale), None), last=True)  # type: ignore[misc]
            assert ds.apply_step(engine)[0]

    straight = engine_of(Vector(), stage, rate=1e-2, warmup=3, dtype=dtype)
    advance(straight, range(4))
    first = engine_of(Vector(), stage, rate=1e-2, warmup=3, dtype=dtype)
    advance(first, range(2))
    schedule = ds.save_optimizer(first, tmp_path / "state.safetensors", {"random": torch.arange(3)})
    ((_, kept),) = next(ds.gather_parameters(first, 1 << 20))
    again = engine_of(Vector(), stage, rate=1e-2, warmup=3, dtype=dtype)
    assert ds.load_optimizer(again, tmp_path / "state.safetensors", schedule)["random"].tolist() == [0, 1, 2]
    assert torch.equal(next(ds.gather_parameters(again, 1 << 20))[0][1], kept)
    assert ds.learning_rate(again) == ds.learning_rate(first)
    advance(again, range(2, 4))
    weights = [next(ds.gather_parameters(engine, 1 << 20))[0][1] for engine in (straight, again)]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], kept)
    ds.save_optimizer(again, tmp_path / "again", {})
    ds.save_optimizer(straight, tmp_path / "straight", {})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "straight").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_that_were_moved_away_and_back_learn_on_bit_for_bit(dtype: str) -> None:
    """As on a shared GPU: states leave before a publish, weights after it, all come back before the next step."""
    found = []
    for moves in (False, True):
        engine = engine_of(Vector(), 2, rate=1e-2, dtype=dtype)
        for number in range(2):
            scale = torch.linspace(-1.0, 2.0, 64) * (number + 1)
            ds.accumulate(engine, lambda scale=scale, engine=engine: (engine(scale), None), last=True)  # type: ignore[misc]
            assert ds.apply_step(engine)[0]
            if moves:
                ds.offload(engine, (STATES,))
                published = next(ds.gather_parameters(engine, 1 << 20))[0][1].clone()
                ds.offload(engine, (WEIGHTS,))
                ds.reload(engine)
                assert torch.equal(next(ds.gather_parameters(engine, 1 << 20))[0][1], published)
        found.append(next(ds.gather_parameters(engine, 1 << 20))[0][1].clone())
    assert torch.equal(*found)


def test_optimiser_state_of_another_model_is_refused(tmp_path: Path) -> None:
    schedule = ds.save_optimizer(engine_of(Vector(), 2), tmp_path / "state", {})
    with pytest.raises(ModelError, match=r"part of shape \(64,\).*learner\.ranks"):
        ds.load_optimizer(engine_of(Vector(32), 2), tmp_path / "state", schedule)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:100])
    with pytest.raises(ModelError, match="resume from another one"):
        ds.load_optimizer(engine_of(Vector(), 2), tmp_path / "state", schedule)
