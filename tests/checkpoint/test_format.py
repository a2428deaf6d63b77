"""Checkpoint format: which ones are complete, which one is resumed from, which ones are retained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.checkpoint.format import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    ControllerState,
    RunState,
    diff_settings,
    find_newest_complete,
    get_optimizer_state_path,
    hash_prompts,
    prune_checkpoints,
    select_steps_to_delete,
    write_run_state,
)
from rluf.config.load import load_settings
from rluf.errors import SettingsError
from rluf.train.checkpoint_manager import CheckpointManager
from rluf.types import Message, Prompt

PROMPT = Prompt("p", (Message(role="user", content="é?"),), (1, 2), "chat", "train")


def make_state(step: int, settings: Mapping[str, Any] | None = None) -> RunState:
    controller_state = ControllerState({"prompt_cursor": 6, "in_flight": [[5, "p", 1001]]}, {"kl_coef": 0.1}, {}, {})
    return RunState(
        step, 1, settings or {"seed": 1}, "digest", controller_state, [{"steps": step}],
        [{"step": step, "reward": 0.1 + 0.2}],
    )  # fmt: skip


def write_checkpoint(root: Path, step: int, settings: Mapping[str, Any] | None = None) -> Path:
    folder = root / f"step-{step}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "learner-0-of-1.safetensors").write_bytes(bytes(100))
    write_run_state(folder, make_state(step, settings))
    return folder


def test_the_newest_complete_checkpoint_is_selected_with_its_state(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step)
    newest = find_newest_complete(tmp_path)
    assert newest is not None and (newest.step, newest.folder.name) == (10, "step-10")
    assert newest.read_state() == make_state(10)
    assert get_optimizer_state_path(newest.folder, 0, 1).is_file() and (newest.folder / MANIFEST_FILE).is_file()
    assert find_newest_complete(tmp_path / "nothing") is None


def damage(folder: Path, fault: str) -> None:
    if fault == "truncated":
        (folder / "learner-0-of-1.safetensors").write_bytes(bytes(99))
    elif fault == "missing":
        (folder / "state.json").unlink()
    elif fault == "unfinished":
        (folder / "complete.json").unlink()
    elif fault == "garbled":
        (folder / "complete.json").write_text('{"files": {"sta')
    else:
        text = (folder / "complete.json").read_text()
        (folder / "complete.json").write_text(text.replace(f'"format": {FORMAT_VERSION}', '"format": 1'))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "learner-0-of-1.safetensors has 99 bytes instead of 100"),
        ("missing", "state.json is missing"),
        ("unfinished", "has no complete.json, so it was never finished"),
        ("garbled", "complete.json cannot be read"),
        ("format", f"format 1, this version of rluf reads format {FORMAT_VERSION} only"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, message: str
) -> None:
    write_checkpoint(tmp_path, 1)
    damage(write_checkpoint(tmp_path, 2), fault)
    (tmp_path / ".step-3-abcd.part").mkdir()
    newest = find_newest_complete(tmp_path)
    assert newest is not None and newest.step == 1
    assert message in caplog.text
    assert ".step-3-abcd.part: skipped" in caplog.text


@given(st.dictionaries(st.integers(1, 50), st.floats(-9, 9)), st.integers(0, 5))
def test_the_last_k_and_the_best_are_retained(rewards: dict[int, float], keep_count: int) -> None:
    deleted = set(select_steps_to_delete(rewards, keep_count))
    retained = rewards.keys() - deleted
    assert deleted <= rewards.keys()
    if keep_count == 0:
        assert not deleted
        return
    assert retained >= set(sorted(rewards)[-keep_count:])
    assert len(retained) <= keep_count + 1
    if rewards:
        assert max(rewards[step] for step in retained) == max(rewards.values())


def test_pruning_deletes_only_superfluous_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".step-9-dead.part").mkdir()
    prune_checkpoints(tmp_path, {1: 0.0, 2: 5.0, 3: 1.0, 4: 0.0}, keep_count=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4"]


def test_only_settings_that_affect_training_prevent_resuming() -> None:
    before = {
        "seed": 1,
        "algorithm": {"steps": 2, "kl_coef": 0.1},
        "cluster": {"threads_per_actor": 1},
        "run": {"resume": None},
    }
    after = {
        "seed": 1,
        "algorithm": {"steps": 9, "kl_coef": 0.1},
        "cluster": {"threads_per_actor": 8},
        "run": {"resume": "x"},
    }
    assert diff_settings(before, after) == {}
    after["algorithm"] = {"steps": 2, "kl_coef": 0.2}
    assert diff_settings(before, after) == {"algorithm.kl_coef": "algorithm.kl_coef (then 0.1, now 0.2)"}


def test_the_prompt_hash_depends_on_the_order() -> None:
    other = Prompt("q", (), (3,), "chat", "train")
    assert hash_prompts([PROMPT, other]) == hash_prompts([PROMPT, other])
    assert hash_prompts([PROMPT, other]) != hash_prompts([other, PROMPT])


def test_a_checkpoint_with_settings_of_an_earlier_release_is_refused_with_the_reason(tmp_path: Path) -> None:
    settings = load_settings(None, [f"run.resume={tmp_path}"]).settings
    tree = settings.model_dump(mode="json")
    tree["algorithm"]["dual_clip"] = None
    write_checkpoint(tmp_path / "checkpoints", 1, tree)
    message = r"an earlier release wrote checkpoint .*step-1.*algorithm\.dual_clip.*start a new run"
    with pytest.raises(SettingsError, match=message):
        CheckpointManager(settings, tmp_path, [PROMPT]).load_newest()


def load_with(tmp_path: Path, *overrides: str, saved_overrides: Sequence[str] = ()) -> RunState:
    """State of the checkpoint of a run with `saved_overrides`, loaded by a run with `overrides`."""
    saved_settings = load_settings(None, list(saved_overrides)).settings
    write_checkpoint(tmp_path / "checkpoints", 1, saved_settings.model_dump(mode="json"))
    settings = load_settings(None, [f"run.resume={tmp_path}", *overrides]).settings
    manager = CheckpointManager(settings, tmp_path, [PROMPT])
    manager._prompts_digest = "digest"
    newest = manager.load_newest()
    assert newest is not None
    return newest[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.workers=2"],
        ["learner.zero_stage=3", "algorithm.micro_batch_tokens=2048"],
        ["learner.learning_rate=1e-5", "run.resume_with=[learner.learning_rate]"],
        [
            "algorithm.clip=[0.2, 0.3]",
            "learner.warmup_steps=9",
            "run.resume_with=[algorithm.clip,learner.warmup_steps]",
        ],
        ["objectives.safety.weight=0.5", "run.resume_with=[objectives.safety.weight]"],
        ["run.resume_with=[algorithm.kl_coef]"],
    ],
)
def test_ranks_may_change_and_schedules_on_explicit_wish(overrides: list[str], tmp_path: Path) -> None:
    assert load_with(tmp_path, *overrides).controller_state.policy_updater["kl_coef"] == 0.1


def test_naming_a_mapping_accepts_its_entries(tmp_path: Path) -> None:
    saved, changed = (
        ["aggregation.method=constrained", f"aggregation.floors={{safety: {floor}}}"] for floor in (0.1, 0.2)
    )
    checkpoint = load_with(tmp_path, *changed, "run.resume_with=[aggregation.floors]", saved_overrides=saved)
    assert checkpoint.controller_state.policy_updater["kl_coef"] == 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["learner.learning_rate=1e-5"],
            r"then 6e-05, now 1e-05.*name them in run\.resume_with=\[learner\.learning_rate\]",
        ),
        (
            ["algorithm.kl_coef=1", "learner.warmup_steps=9", "run.resume_with=[learner.warmup_steps]"],
            r"algorithm\.kl_coef",
        ),
        (["objectives.safety.weight=0.5", "run.resume_with=[objectives.love.weight]"], r"objectives\.safety\.weight"),
        (["learner.lora_rank=4"], r"learner\.lora_rank \(then 0, now 4\); undo these changes, or start"),
        (["learner.learning_rate=1", "run.resume_with=[learner.learning]"], "cannot change when a run is resumed"),
        (["run.resume_with=[model.path]"], "'model.path' cannot change when a run is resumed"),
        (["run.resume_with=[algorithm]"], "cannot change when a run is resumed"),
    ],
)
def test_other_changes_are_refused_with_what_to_do(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        load_with(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "kl_coef"),
    [
        (["algorithm.kl_coef=0.5", "run.resume_with=[algorithm.kl_coef]"], 0.5),
        (["algorithm.kl_target=0.5", "run.resume_with=[algorithm.kl_target]"], 0.1),
    ],
)
def test_a_changed_kl_coefficient_replaces_the_adapted_one(
    overrides: list[str], kl_coef: float, tmp_path: Path
) -> None:
    assert load_with(tmp_path, *overrides).controller_state.policy_updater["kl_coef"] == kl_coef
