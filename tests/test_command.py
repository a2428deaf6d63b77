import sys
from pathlib import Path

import pytest

import rluf
from rluf.__main__ import COMMANDS, main
from rluf.errors import DataError


def test_each_command_is_listed_and_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listing = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listing
        with pytest.raises(SystemExit) as exit_info:
            main([name, "--help"])
        assert exit_info.value.code == 0
        assert f"rluf.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trane", "did you mean train?"), ("Train", "did you mean train?"), ("eval", "did you mean evaluate?"),
        ("--verison", "did you mean --version?"), ("xyz", "expected one of"), ("", "expected one of"),
    ],
)  # fmt: skip
def test_an_unknown_command_is_one_message(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert f"unknown command {name!r}; {hint}" in message and "expected one of prepare, reward, train" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--confg", "tiny"], "did you mean --config?"),
        (["train", "--dry_run"], "did you mean --dry-run?"),
        (["train", "--algorithm.steps=3"], "key=value, without dashes; write algorithm.steps=VALUE"),
        (["train", "--steps", "5"], "key=value, without dashes; did you mean algorithm.steps?"),
        (["train", "--learning-rate", "5"], "did you mean learner.learning_rate?"),
        (["train", "tiny"], "write --config tiny"),
        (["train", "tracking.trackers=tensorboard"], "must be a list, such as [a, b]"),
        (["train", "tracking.wandb=tensorboard"], "tracking.trackers names others, such as tensorboard"),
        (["sweep", "--dry-run", "learner.learning_rate=1e-6,1e-5"], "are --grid learner.learning_rate=1e-6,1e-5"),
        (["train", "algorithm.topic_weights=risky"], "must be a mapping, such as {a: 1}"),
        (["train", "algorithm.steps", "3"], "'algorithm.steps' is not an override"),
        (
            ["train", "--resume", "runs/x"],
            "--resume takes no folder; write run.resume=runs/x to resume another run",
        ),
        (["train", "--resume=runs/x"], "ignored explicit argument 'runs/x'; the option takes no value"),
        (["evaluate", "gaet"], "'gaet' is neither a sub-command (offline, blind, gate, "),
        (["simulate", "rescor"], "'rescor' is neither a sub-command (rescore, judge) nor key=value"),
    ],
)
def test_a_wrong_word_gets_a_hint(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_help_and_version_may_be_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["help"]), main(["version"])) == (0, 0)
    with pytest.raises(SystemExit):
        main(["help", "report"])
    assert "usage: python -m rluf.report" in capsys.readouterr().out


def test_modules_of_the_folder_where_the_command_starts_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as of the installed command
    (tmp_path / "rewards_of_mine.py").write_text("def score(rows):\n    return [1.0 for _ in rows]\n")
    words = ["objectives.x.source=function", "objectives.x.path=rewards_of_mine:score", "objectives.x.weight=1"]
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--config", "tiny", "--dry-run", *words])
    assert exit_info.value.code == 0


def test_arguments_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--config", "tiny", "--dry-run", "seed=11"])
    assert "seed: 11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--seeds", "x"], "error: argument --seeds: invalid int value: 'x'; see python -m rluf.sweep --help"),
        (["sweep", "--weigths", "0.1"], "error: unrecognized arguments: --weigths; did you mean --weights?;"),
        (["sweep", "--steps", "3"], "settings are written key=value, without dashes; did you mean algorithm.steps?"),
        (["report"], "error: the following arguments are required: FOLDER; see python -m rluf.report --help"),
        (["report", "x", "--public"], "error: --public requires --push-to-hub;"),
        (["report", "x", "--html"], "error: unrecognized arguments: --html; see python -m rluf.report --help"),
        (["evaluate", "score", "--model", "m"], "arguments are required: --data; see python -m rluf.evaluate score"),
        (["evaluate", "abtest", "--looks", "many"], "error: argument --looks: invalid int value: 'many';"),
        (["evaluate", "gate"], "error: the following arguments are required: RUN;"),
        (["evaluate", "blind", "x", "--pairs", "0"], "error: --pairs 0 must be 1 or more;"),
        (["evaluate", "rescore", "x"], "error: the following arguments are required: --model;"),
        (["evaluate", "correlate", "--seed"], "error: argument --seed: expected one argument;"),
        (["evaluate", "offpolicy"], "error: the following arguments are required: --data;"),
        (["simulate", "judge", "--data", "x", "--score", "y"], "error: argument --score: invalid choice: 'y'"),
        (["simulate", "rescore"], "error: the following arguments are required: --log;"),
        (["train", "--config"], "error: argument --config: expected one argument; see python -m rluf.train --help"),
    ],
)
def test_a_wrong_option_of_any_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        ["report", "--push-to-hub", "owner/name"],
        ["evaluate", "gate"],
        ["evaluate", "blind"],
        ["evaluate", "rescore", "--model", "tiny-encoder"],
    ],
)
def test_the_folder_above_the_runs_gets_the_name_of_the_newest_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 3 and lines[-1].endswith(f"; did you mean {tmp_path / 'latest'}?")
    with pytest.raises(DataError, match=r"did you mean .*latest\?"):
        _ = rluf.Report(tmp_path).verdict


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_earlier_log_that_is_missing_is_refused_before_ray_starts(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.connect.ray_connection", lambda: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as exit_info:
        main(["simulate", "rescore", "--log", str(tmp_path), "--config", "tiny", *flags])
    assert exit_info.value.code == 3
    assert capsys.readouterr().err.endswith(
        f"error: {tmp_path} has no feedback.jsonl.gz; give the folder of a simulated log\n"
    )
