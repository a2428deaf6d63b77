"""The five tasks of docs/howto/migrate.md: rluf's programs run, and are no longer than TRL's."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import rluf
from rluf.config.settings import Settings
from rluf.objectives.reward_function import build_function_scorer
from rluf.sweep.__main__ import parse_arguments
from rluf.sweep.runs import list_grid_points
from rluf.tracking.plugin_tracker import PluginTracker
from rluf.types import ScoringItem

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "migrate.md").read_text("utf-8")
BLOCKS = {
    (project, task): source
    for project, task, source in re.findall(
        r'^```\w+ title="(TRL|rluf): (.+?)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL
    )
}
TASKS = [task for project, task in BLOCKS if project == "rluf"]


def count_lines(project: str, task: str) -> int:
    return sum(bool(line.strip()) for line in BLOCKS[project, task].splitlines())


def run_program(task: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Settings:
    """Run rluf's program of a task; returns the settings that reach the training, which does not start."""
    captured: list[Settings] = []
    monkeypatch.setenv("RLUF_CACHE", str(cache))
    monkeypatch.setattr(rluf, "train_policy", captured.append, raising=False)
    exec(compile(BLOCKS["rluf", task], task, "exec"), {"__name__": "__main__"})
    (settings,) = captured
    return settings


def test_the_page_has_five_tasks_and_their_counts() -> None:
    assert len(TASKS) == 5
    for task in TASKS:
        counts = [count_lines(project, task) for project in ("TRL", "rluf")]
        assert f"| {task} | {counts[0]} | {counts[1]} |" in PAGE, (task, counts)
        assert counts[1] <= counts[0]


def test_the_reward_function_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = run_program("own reward function", monkeypatch, tmp_path)
    objective = settings.objectives.by_objective["score_brevity"]
    (score,) = build_function_scorer("score_brevity", str(objective.path))([ScoringItem([], "two words")])
    assert (objective.source, score.value) == ("function", -0.02)
    assert settings.data.prompts == ("trl-lib/ultrafeedback-prompt",)


def test_the_reward_model_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = run_program("own reward model", monkeypatch, tmp_path)
    assert settings.objectives.by_objective["helpfulness"].path == "owner/reward-model"


def test_the_prompts_reach_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (path,) = run_program("own prompts", monkeypatch, tmp_path).data.prompts
    rows = [json.loads(line) for line in Path(str(path)).read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows][:2] == ["Explain rain.", "Explain tides."]


def test_the_tracker_writes_each_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = run_program("own tracker", monkeypatch, tmp_path)
    (reference,) = settings.tracking.trackers
    tracker = PluginTracker(reference, settings, tmp_path)
    tracker.log_step(1, {"reward": 0.25})
    tracker.finish(failed=False)
    assert (tmp_path / "rewards.txt").read_text() == "1 0.25\n"


def test_the_sweep_is_a_command() -> None:
    arguments = BLOCKS["rluf", "sweep over the learning rate"].split()
    assert arguments[:3] == ["python", "-m", "rluf.sweep"]
    points = list_grid_points(parse_arguments(arguments[3:]))
    rates = [float(point.grid_overrides[0].removeprefix("learner.learning_rate=")) for point in points]
    assert [(rate, point.seed) for rate, point in zip(rates, points, strict=True)] == [
        (1e-6, 1), (1e-6, 2), (1e-5, 1), (1e-5, 2),
    ]  # fmt: skip


def test_the_programs_for_trl_use_names_that_it_has() -> None:
    trl = pytest.importorskip("trl")
    for task in TASKS:
        tree = ast.parse(BLOCKS["TRL", task])
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", "")
            if name in ("GRPOTrainer", "GRPOConfig"):
                parameters: Any = inspect.signature(getattr(trl, name)).parameters
                assert {keyword.arg for keyword in call.keywords} <= set(parameters), (task, name)


def test_every_task_of_the_page_names_a_test_that_exists() -> None:
    references = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(references) >= 19
    for path, name in references:
        source = (Path(__file__).parents[2] / path).read_text("utf-8")
        assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), f"{path}::{name}"
