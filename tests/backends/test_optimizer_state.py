"""Optimizer state: a resumed run equals an uninterrupted one, also at another ZeRO stage or learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rluf.backends import deepspeed as ds
from rluf.backends import optimizer_state
from rluf.backends.optimizer_state import load_optimizer_state, save_optimizer_state
from rluf.errors import ModelError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

pytestmark = pytest.mark.usefixtures("process_group")

STAGES = [0, 1, 2, 3]


class TwoLayers(nn.Module):  # type: ignore[misc]
    """Layers of odd sizes, one of them frozen."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.frozen, self.last = nn.Linear(3, size), nn.Linear(size, size), nn.Linear(size, 1, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.frozen(self.first(values.to(self.last.weight.dtype)).tanh())
        return self.last(hidden).float().square().mean()


def make_engine(stage: int, dtype: str = "float32", *, size: int = 5, **options: Any) -> DeepSpeedEngine:
    options = {"learning_rate": 1e-2, "warmup_steps": 3, **options}
    cpu = torch.device("cpu")
    return ds.init_deepspeed(
        TwoLayers(size), zero_stage=stage, dtype=getattr(torch, dtype), world_size=1, device=cpu, **options
    )


def advance(engine: DeepSpeedEngine, steps: range) -> None:
    for step in steps:
        values = torch.linspace(-1.0, 2.0, 12).view(4, 3) * (step + 1)
        ds.accumulate_gradients(engine, lambda values=values: (engine(values), None), is_last=True)  # type: ignore[misc]
        assert ds.apply_optimizer_step(engine)[0]


def copy_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in ds.gather_parameters(engine, 1 << 20) for name, tensor in bucket}


@dataclass(frozen=True)
class SavedRun:
    """State and weights of a run after two steps, and the state of another run that took four without a stop."""

    state_file: Path
    schedule: dict[str, Any]
    weights: dict[str, Tensor]
    learning_rate: float
    uninterrupted_file: Path


@pytest.fixture(scope="module")
def get_saved_run(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], SavedRun]:
    """The saved run of a ZeRO stage and dtype: every test that resumes at another stage starts from the same."""

    @cache
    def run(stage: int, dtype: str) -> SavedRun:
        folder = tmp_path_factory.mktemp("saved")
        uninterrupted, interrupted = make_engine(stage, dtype), make_engine(stage, dtype)
        advance(uninterrupted, range(4))
        save_optimizer_state(uninterrupted, folder / "uninterrupted", {})
        advance(interrupted, range(2))
        schedule = save_optimizer_state(interrupted, folder / "state.safetensors", {"random": torch.arange(3)})
        return SavedRun(
            folder / "state.safetensors",
            schedule,
            copy_weights(interrupted),
            ds.get_learning_rate(interrupted),
            folder / "uninterrupted",
        )

    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("saved_stage", STAGES)
def test_two_steps_resumed_at_any_stage_equal_four(
    saved_stage: int, stage: int, dtype: str, tmp_path: Path, get_saved_run: Callable[[int, str], SavedRun]
) -> None:
    saved, uninterrupted_file = get_saved_run(saved_stage, dtype), get_saved_run(stage, dtype).uninterrupted_file
    resumed = make_engine(stage, dtype)
    assert load_optimizer_state(resumed, [saved.state_file], saved.schedule)["random"].tolist() == [0, 1, 2]
    assert all(torch.equal(tensor, saved.weights[name]) for name, tensor in copy_weights(resumed).items())
    assert ds.get_learning_rate(resumed) == saved.learning_rate
    advance(resumed, range(2, 4))
    save_optimizer_state(resumed, tmp_path / "resumed", {})
    if stage == saved_stage:
        assert (tmp_path / "resumed").read_bytes() == uninterrupted_file.read_bytes()
    expected = load_file(uninterrupted_file)
    for name, tensor in load_file(tmp_path / "resumed").items():
        # In bfloat16 stages sum gradients in different dtypes.
        assert torch.allclose(tensor, expected[name], rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-6), name
    assert not torch.equal(copy_weights(resumed)["first.weight"], saved.weights["first.weight"])


@pytest.mark.parametrize(("changes", "factor"), [({"learning_rate": 2e-2}, 2.0), ({"warmup_steps": 6}, 0.5)])
def test_a_changed_schedule_takes_effect_at_the_saved_step(
    changes: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    interrupted = make_engine(2)
    advance(interrupted, range(1))
    schedule = save_optimizer_state(interrupted, tmp_path / "state", {})
    resumed = make_engine(2, **changes)
    load_optimizer_state(resumed, [tmp_path / "state"], schedule)
    assert ds.get_learning_rate(resumed) == pytest.approx(factor * ds.get_learning_rate(interrupted))
    advance(resumed, range(1, 2))
    advance(interrupted, range(1, 2))
    assert ds.get_learning_rate(resumed) == pytest.approx(factor * ds.get_learning_rate(interrupted))


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_state_of_another_model_is_refused(stage: int, tmp_path: Path) -> None:
    file = tmp_path / "state"
    schedule = save_optimizer_state(make_engine(2), file, {})
    with pytest.raises(ModelError, match=r"expected 6 elements of first\.bias, got 5; resume with the model"):
        load_optimizer_state(make_engine(stage, size=6), [file], schedule)


@pytest.mark.parametrize("saved_stage", STAGES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_whose_range_is_padding_only_resumes(
    saved_stage: int,
    stage: int,
    get_saved_run: Callable[[int, str], SavedRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With more ranks than a small model (a head, a LoRA) fills, the last ranks have no parameter.
    saved = get_saved_run(saved_stage, "float32")
    resumed = make_engine(stage)
    masters = optimizer_state.list_master_weights(resumed)
    monkeypatch.setattr(optimizer_state, "_describe_layout", lambda _: [[] for _ in masters])
    assert load_optimizer_state(resumed, [saved.state_file], saved.schedule)["random"].tolist() == [0, 1, 2]
    assert not any(master.any() for master in masters)
    advance(resumed, range(1))


def test_a_file_of_an_earlier_release_fits_its_own_layout_only(tmp_path: Path) -> None:
    file = tmp_path / "state"
    schedule = save_optimizer_state(make_engine(2), file, {})
    save_file(load_file(file), file)
    load_optimizer_state(make_engine(2), [file], schedule)
    with pytest.raises(ModelError, match=r"expected master weights of shape.*learner\.zero_stage"):
        load_optimizer_state(make_engine(0), [file], schedule)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="resume from another one"):
        load_optimizer_state(make_engine(2), [file], schedule)
