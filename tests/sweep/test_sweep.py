"""Sweep: which finished runs are reused, and the error for failed runs; tests/e2e/test_sweep.py runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ActorError, SettingsError
from rluf.sweep.__main__ import main, parse_arguments
from rluf.sweep.runs import build_run_overrides, find_finished_run, list_grid_points, raise_for_failed_runs


def load_overrides(*overrides: str) -> Settings:
    return load_settings(None, overrides).settings


def write_run(folder: Path, settings: Settings | None, **summary: Any) -> None:
    folder.mkdir(parents=True)
    if settings is not None:
        (folder / "config.json").write_text(settings.model_dump_json(), "utf-8")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def test_overrides_may_follow_the_grid() -> None:
    args = parse_arguments(["a=1", "--seeds", "4", "5", "b=[2, 3]", "--weights", "0.2", "c.d=x", "--config=f.yaml"])
    assert (args.seeds, args.weights, args.overrides) == ([4, 5], [0.2], ["a=1", "b=[2, 3]", "c.d=x"])
    assert args.config == Path("f.yaml")


def test_a_run_with_other_settings_is_not_reused(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides("algorithm.steps=5", "seed=2"), love=0.1)
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=5", "seed=2")) == {"love": 0.1}
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=6", "seed=2")) is None
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=5", "seed=2", "run.deterministic=true")) is None


def test_location_settings_do_not_prevent_reuse(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides("run.root=/elsewhere", "tracking.wandb=off"), love=0.1)
    assert find_finished_run(tmp_path, load_overrides("name=here", "cluster.max_restarts_per_hour=1")) == {"love": 0.1}


def test_the_newest_finished_run_with_the_settings_is_used(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides(), love=0.1)
    write_run(tmp_path / "20260102-000000", load_overrides(), love=0.2)
    write_run(tmp_path / "20260103-000000", load_overrides("seed=9"), love=0.3)
    write_run(tmp_path / "20260104-000000", load_overrides())
    (tmp_path / "latest").symlink_to("20260104-000000")
    assert find_finished_run(tmp_path, load_overrides()) == {"love": 0.2}


def test_a_run_with_missing_or_unknown_settings_is_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, love=0.1)
    write_run(tmp_path / "b", load_overrides(), love=0.1)
    run_config = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    (tmp_path / "b" / "config.json").write_text(json.dumps({**run_config, "gone": 1}), "utf-8")
    assert find_finished_run(tmp_path, load_overrides()) is None
    assert find_finished_run(tmp_path / "nowhere", load_overrides()) is None


def test_failed_runs_are_named_with_their_logs() -> None:
    raise_for_failed_runs({"failed": {}})
    with pytest.raises(ActorError, match=r"2 runs .* a \(see a\.log\), b \(see b\.log\)"):
        raise_for_failed_runs({"failed": {"a": "a.log", "b": "b.log"}})


def list_points(*arguments: str, tmp_path: Path) -> dict[str, Settings]:
    """Settings of every run of a command line, by run name."""
    args = parse_arguments(list(arguments))
    settings = load_settings(None, args.overrides).settings
    overrides = [build_run_overrides(args, settings, tmp_path, point) for point in list_grid_points(args)]
    return {loaded.name: loaded for loaded in (load_settings(None, texts).settings for texts in overrides)}


def test_any_setting_can_be_swept(tmp_path: Path) -> None:
    points = list_points(
        "--grid", "learner.learning_rate=1e-6,1e-5", "--grid", "algorithm.name=grpo,rloo", "--seeds", "1", "2",
        "algorithm.steps=3", tmp_path=tmp_path,
    )  # fmt: skip
    assert len(points) == 8
    assert {(s.learner.learning_rate, s.algorithm.name, s.seed) for s in points.values()} == {
        (rate, name, seed) for rate in (1e-6, 1e-5) for name in ("grpo", "rloo") for seed in (1, 2)
    }
    assert {settings.algorithm.steps for settings in points.values()} == {3}
    # Weights and KL are those of the configuration.
    default = load_settings(None).settings
    assert {settings.objectives.love.weight for settings in points.values()} == {default.objectives.love.weight}
    assert {settings.algorithm.kl_coef for settings in points.values()} == {default.algorithm.kl_coef}
    assert {settings.tracking.group for settings in points.values()} == {tmp_path.name}


def test_a_sweep_without_kl_keeps_the_configured_one(tmp_path: Path) -> None:
    points = list_points("--seeds", "1", "algorithm.kl_coef=0.07", tmp_path=tmp_path)
    assert [settings.objectives.love.weight for settings in points.values()] == [0.0, 0.1, 0.3]
    assert {settings.algorithm.kl_coef for settings in points.values()} == {0.07}


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        ("rollout.temperature=0.7,1.0", [0.7, 1.0]),
        ("model.path=tiny,smollm2-135m-instruct", ["tiny", "smollm2-135m-instruct"]),
        ("aggregation.gate_judges=[refusal, length],[]", [("refusal", "length"), ()]),
        ("aggregation.topic_objectives={risky: safety},{}", [{"risky": "safety"}, {}]),
        ("evaluate.candidate=null,'a, b'", [None, "a, b"]),
        ("run.deterministic=true", None),
        ("seed=1,2", None),
        ("name=a,b", None),
        ("learner.learning_rate=", None),
        ("learner.learning_rat=1e-6", None),
        ("=1,2", None),
    ],
)
def test_values_of_every_kind_are_swept_and_invalid_grids_are_refused(
    grid: str, values: list[Any] | None, tmp_path: Path
) -> None:
    if values is None:
        with pytest.raises(SettingsError):
            list_points("--grid", grid, "--seeds", "1", tmp_path=tmp_path)
        return
    points = list_points("--grid", grid, "--seeds", "1", tmp_path=tmp_path)
    key = grid.partition("=")[0]
    swept_values = []
    for settings in points.values():
        value: Any = settings
        for name in key.split("."):
            value = getattr(value, name)
        swept_values.append(value)
    assert swept_values == values


def test_weights_and_grid_combine_and_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    points = list_points(
        "--weights", "0.1", "0.3", "--grid=rollout.temperature=0.5,1", "--seeds", "1", tmp_path=tmp_path
    )
    assert sorted(points) == [
        "love0.1-seed1-rollout.temperature-0.5", "love0.1-seed1-rollout.temperature-1",
        "love0.3-seed1-rollout.temperature-0.5", "love0.3-seed1-rollout.temperature-1",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="conflicts with --weights"):
        list_points("--weights", "0.1", "--grid", "objectives.love.weight=0.1,0.2", tmp_path=tmp_path)
    with pytest.raises(SettingsError, match="given twice"):
        list_points("--grid", "seed_=1", "--grid", "seed_=2", tmp_path=tmp_path)
    assert len(list_points(tmp_path=tmp_path)) == 9


def test_a_dry_run_lists_the_runs_and_starts_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"run.root={tmp_path}", "name=trial", "algorithm.steps=2"]
    finished = load_overrides(*overrides, "learner.learning_rate=1e-6", "seed=1")
    write_run(tmp_path / "trial-sweep" / "seed1-learner.learning_rate-1e-06" / "1", finished, gates={"verdict": "pass"})
    arguments = ["--grid", "learner.learning_rate=1e-6,1e-5", "--seeds", "1", "2", "--dry-run", *overrides]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'trial-sweep'}: 4 runs",
        "seed1-learner.learning_rate-1e-06 (finished): learner.learning_rate=1e-06 seed=1",
        "seed2-learner.learning_rate-1e-06 (to run): learner.learning_rate=1e-06 seed=2",
        "seed1-learner.learning_rate-1e-05 (to run): learner.learning_rate=1e-05 seed=1",
        "seed2-learner.learning_rate-1e-05 (to run): learner.learning_rate=1e-05 seed=2",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trial-sweep"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--grid", "model.path=tiny,./missing"], 4, "./missing"),
        (["--grid", "data.prompts=missing.jsonl"], 3, "missing.jsonl"),
        (["--grid", "learner.learning_rat=1e-6"], 2, "did you mean learner.learning_rate?"),
        (["--grid", "evaluate.monitors=[nowhere:shout]"], 2, "nowhere:shout"),
        (["--weights", "-0.1"], 2, "--weights and --kl 0 or more"),
        (["--concurrent", "0"], 2, "--concurrent must be 1 or more"),
        (["--config", "missing.yaml"], 2, "missing.yaml"),
        (["--grid", "learner.learning_rate", "1e-6", "1e-5"], 2, "by commas: --grid learner.learning_rate=1e-6,1e-5"),
        (["--grid", "learner.learning_rate=[1e-6, 1e-5]"], 2, "without its brackets: learner.learning_rate=1e-6, 1e-5"),
        (["--weights", "0.1,0.2"], 2, "invalid float value: '0.1,0.2'; separate the values by spaces"),
        (["--seeds", "1,2"], 2, "invalid int value: '1,2'; separate the values by spaces"),
        (["seed=3"], 2, "seed=3: every run of a sweep gets this setting from --seeds; set it there"),
        (["--kl", "0.1", "algorithm.kl_coef=0.2"], 2, "algorithm.kl_coef=0.2: every run of a sweep gets this setting"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(
    arguments: list[str], exit_code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*arguments, "--dry-run", f"run.root={tmp_path}"])
    error = capsys.readouterr().err
    assert (raised.value.code, len(error.splitlines())) == (exit_code, 1) and message in error
    assert not list(tmp_path.iterdir())
