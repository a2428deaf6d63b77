import ast
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rluf
from rluf.config.cli import format_dry_run, format_settings_help, parse_command_line, run_command
from rluf.config.load import iter_setting_fields, load_settings
from rluf.config.settings import Settings
from rluf.errors import DataError, RlufError
from rluf.train.__main__ import COMMAND_OPTIONS

CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"
CONFIG_FILES = sorted(CONFIGS_FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: str(file.relative_to(CONFIGS_FOLDER)))
def test_every_config_loads_and_dry_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_command_line("train", "about", ["--config", str(file), "--dry-run"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert "# samples per step:" in text
    assert load_settings(file).settings.name == yaml.safe_load(file.read_text())["name"]


def test_without_a_config_the_shipped_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_settings(CONFIGS_FOLDER / "quickstart.yaml").settings
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("seed: 7\n")  # not the shipped one
    monkeypatch.chdir(tmp_path)
    assert parse_command_line("train", "about", []).settings == expected
    assert rluf.load_settings() == expected
    assert expected.learner.lora_rank > 0 and Settings().learner.lora_rank == 0


def test_gpu_configs_fill_their_machines() -> None:
    for name, gpus in (("qwen-0.5b-1gpu", 1), ("llama3-8b-8gpu", 7.99), ("llama3-70b-64gpu", 64)):
        assert f", {gpus} GPU, about" in format_dry_run(load_settings(CONFIGS_FOLDER / f"{name}.yaml"))


def test_a_dry_run_is_a_config_with_the_same_settings(tmp_path: Path) -> None:
    loaded = load_settings(CONFIGS_FOLDER / "human.yaml", ["algorithm.steps=3", "tracking.project='yes: no'"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(format_dry_run(loaded))
    assert load_settings(saved).settings == loaded.settings
    assert "steps: 3" in saved.read_text()
    line = next(line for line in saved.read_text().splitlines() if line.strip().startswith("steps: 3"))
    assert line.endswith("# override")


def test_options_and_overrides_may_be_in_any_order() -> None:
    loaded = parse_command_line(
        "train", "about", ["seed=2", "--config", str(CONFIGS_FOLDER / "tiny.yaml"), "algorithm.steps=3"]
    )
    assert (loaded.settings.seed, loaded.settings.name, loaded.settings.algorithm.steps) == (2, "tiny", 3)


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        (["--nonsense"], "--nonsense"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["step=1"], "did you mean"),
        (["--config"], "--help"),
    ],
)
def test_an_invalid_command_line_is_one_message_and_exit_2(
    arguments: list[str], expected_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_command_line("train", "about", arguments)
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert expected_text in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_help_lists_every_setting_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_command_line("rluf.train", "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert "python -m rluf.train [--config FILE]" in text
    assert "What it does." in text
    assert [key for key, _ in iter_setting_fields() if f"\n  {key} = " not in text] == []
    assert format_settings_help() in text


def test_run_command_prints_one_message_and_exits_with_the_errors_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_with_data_error() -> None:
        raise DataError("the log x.jsonl is empty; give one with rows")

    def stop() -> None:
        raise KeyboardInterrupt

    assert run_command(lambda: None) == 0
    for function, code, message in (
        (fail_with_data_error, 3, "error: the log x.jsonl is empty"),
        (stop, 130, "interrupted"),
    ):
        with pytest.raises(SystemExit) as raised:
            run_command(function)
        captured = capsys.readouterr().err
        assert raised.value.code == code
        assert message in captured
        assert len(captured.strip().splitlines()) == 1
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_the_stack_and_print_one_line(signal_number: signal.Signals, code: int) -> None:
    program = (
        "import sys, time\nfrom rluf.config.cli import run_command\n"
        "def work():\n"
        "    try:\n        print('ready', flush=True); time.sleep(30)\n"
        "    finally:\n        print('cleaned', flush=True)\n"
        "sys.exit(run_command(work))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "cleaned\n")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which refuses as a full disk does")
@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("raise ResourceError('no space')", 5),
        ("raise KeyboardInterrupt", 130),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_the_exit_code_is_right_when_the_disk_is_full(work: str, code: int) -> None:
    """The output of a job often goes to a file on the disk that is full."""
    program = (
        "import os, signal, sys\nfrom rluf.config.cli import run_command\nfrom rluf.errors import ResourceError\n"
        f"def work():\n    sys.stdout.write('begun\\n')\n    {work}\n"
        "sys.exit(run_command(work))\n"
    )
    env = {
        key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"
    }  # so that "begun" stays in the buffer
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", program]
        completed = subprocess.run(command, stdout=full, stderr=full, env=env, timeout=60, check=False)
    assert completed.returncode == code


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_help_and_dry_run_take_less_than_a_second_of_cpu_time(flag: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", f"from rluf.config.cli import parse_command_line as p; p('train', '', [{flag!r}])"]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # wall-clock time would include other processes' work
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_full_disk_is_one_message_and_other_os_errors_are_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def fill_disk() -> None:
        raise OSError(errno.ENOSPC, "No space raised on device", "/runs/x")

    with pytest.raises(SystemExit) as raised:
        run_command(fill_disk)
    assert raised.value.code == 5
    assert capsys.readouterr().err.startswith("error: No space raised on device while writing /runs/x; free some space")

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        run_command(fail)


@pytest.mark.parametrize("flag", [["--profile", "steps=3"], ["--profile=steps=3"], ["--profile", "3"]])
def test_profile_is_a_number_of_steps(flag: list[str]) -> None:
    assert parse_command_line("train", "", [*flag, "seed=2"], COMMAND_OPTIONS).options.profile == 3


def test_an_invalid_profile_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line("train", "", ["--profile", "steps=many"], COMMAND_OPTIONS)
    assert "--profile expects steps=N, such as steps=3, got 'steps=many'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_command_line("reward", "", ["--profile", "steps=3"])


def list_error_classes(error_class: type[RlufError] = RlufError) -> list[type[RlufError]]:
    return [error_class, *(leaf for child in error_class.__subclasses__() for leaf in list_error_classes(child))]


@pytest.mark.parametrize("error_class", [c for c in list_error_classes() if c.__module__ == "rluf.errors"])
def test_every_exit_code_is_documented(error_class: type[RlufError]) -> None:
    rows = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    assert any(row.startswith(f"| {error_class.exit_code} | `{error_class.__name__}` |") for row in rows)


def test_every_setting_to_change_after_exit_code_1_is_documented() -> None:
    """A plain RlufError ends a run that diverged; the table says what to lower."""
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith("| 1 |")]
    messages = [
        ast.unparse(node)
        for folder in ("rluf", "actors", "cluster")
        for file in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise RlufError(")
    ]
    settings = {name for message in messages for name in re.findall(r"lower ([a-z_]+\.(?:<name>\.)?[a-z_]+)", message)}
    assert len(settings) >= 3
    assert not [name for name in settings if f"`{name}`" not in row]
