"""Which checkpoints are whole, which one is resumed from, which ones are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.checkpoint.format import (  # fmt: skip
    RunState,
    changed,
    group_from_json,
    group_to_json,
    newest_whole,
    prompts_digest,
    prune,
    superfluous,
    write_state,
)
from rluf.types import Group, Message, Prompt, Sample

PROMPT = Prompt("p", (Message(role="user", content="é?"),), (1, 2), "chat", "train")


def state(step: int) -> RunState:
    pipeline = {"order": 6, "unlearnt": [["p", 1001]]}
    return RunState(step, 1, {"seed": 1}, "digest", pipeline, [{"steps": step}], [{"step": step, "reward": 0.1 + 0.2}])


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"step-{step}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "learner-0-of-1.safetensors").write_bytes(bytes(100))
    write_state(folder, state(step))
    return folder


def test_the_newest_whole_one_is_found_and_its_state_comes_back(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    found = newest_whole(tmp_path)
    assert found is not None and (found.step, found.folder.name) == (10, "step-10")
    assert found.state() == state(10)
    assert newest_whole(tmp_path / "nothing") is None


def break_(folder: Path, how: str) -> None:
    if how == "truncated":
        (folder / "learner-0-of-1.safetensors").write_bytes(bytes(99))
    elif how == "missing":
        (folder / "state.json").unlink()
    elif how == "unfinished":
        (folder / "complete.json").unlink()
    elif how == "garbled":
        (folder / "complete.json").write_text('{"files": {"sta')
    else:
        text = (folder / "complete.json").read_text()
        (folder / "complete.json").write_text(text.replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "learner-0-of-1.safetensors has 99 bytes instead of 100"),
        ("missing", "state.json is missing"),
        ("unfinished", "has no complete.json, so it was never finished"),
        ("garbled", "complete.json cannot be read"),
        ("format", "format 99, this version reads 1"),
    ],
)
def test_a_broken_one_is_left_out_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, message: str
) -> None:
    checkpoint(tmp_path, 1)
    break_(checkpoint(tmp_path, 2), how)
    (tmp_path / ".step-3-abcd.part").mkdir()
    found = newest_whole(tmp_path)
    assert found is not None and found.step == 1
    assert message in caplog.text
    assert ".step-3-abcd.part is left out" in caplog.text


@given(st.dictionaries(st.integers(1, 50), st.floats(-9, 9)), st.integers(0, 5))
def test_the_last_k_and_the_best_stay(rewards: dict[int, float], keep: int) -> None:
    gone = set(superfluous(rewards, keep))
    left = rewards.keys() - gone
    assert gone <= rewards.keys()
    if keep == 0:
        assert not gone
        return
    assert left >= set(sorted(rewards)[-keep:])
    assert len(left) <= keep + 1
    if rewards:
        assert max(rewards[step] for step in left) == max(rewards.values())


def test_pruning_deletes_only_what_is_superfluous(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    (tmp_path / ".step-9-dead.part").mkdir()
    prune(tmp_path, {1: 0.0, 2: 5.0, 3: 1.0, 4: 0.0}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4"]


def test_only_settings_that_matter_to_what_is_learnt_are_held_against_a_resumption() -> None:
    before = {"seed": 1, "algorithm": {"steps": 2, "kl_coef": 0.1}, "cluster": {"threads": 1}, "run": {"resume": None}}
    after = {"seed": 1, "algorithm": {"steps": 9, "kl_coef": 0.1}, "cluster": {"threads": 8}, "run": {"resume": "x"}}
    assert changed(before, after) == []
    after["algorithm"] = {"steps": 2, "kl_coef": 0.2}
    assert changed(before, after) == ["algorithm.kl_coef (then 0.1, now 0.2)"]


def test_groups_survive_json() -> None:
    sample = Sample("p", (1, 2), (3, 4), (-0.1, -1e-17), ((0, 3), (1, 4)), "stop", "hé")
    group = Group(PROMPT, (sample, sample), 3)
    assert group_from_json(group_to_json(group)) == group


def test_prompts_in_another_order_are_other_prompts() -> None:
    other = Prompt("q", (), (3,), "chat", "train")
    assert prompts_digest([PROMPT, other]) == prompts_digest([PROMPT, other])
    assert prompts_digest([PROMPT, other]) != prompts_digest([other, PROMPT])
