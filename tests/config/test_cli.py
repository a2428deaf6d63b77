import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rluf.config.cli import dry_run_text, guard, parse, settings_help
from rluf.config.load import fields, load_settings
from rluf.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_loads_and_dry_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("train", "about", ["--config", str(file), "--dry-run"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "# samples a step:" in text
    assert load_settings(file).settings.name == yaml.safe_load(file.read_text())["name"]


def test_the_quickstart_file_is_the_defaults() -> None:
    assert load_settings(CONFIGS / "quickstart.yaml").settings == load_settings(None).settings


def test_gpu_configs_fill_their_machines() -> None:
    for name, gpus in (("qwen-0.5b-1gpu", 1), ("llama3-8b-8gpu", 8), ("llama3-70b-64gpu", 64)):
        assert f", {gpus} GPU, about" in dry_run_text(load_settings(CONFIGS / f"{name}.yaml"))


def test_a_dry_run_is_a_config_that_means_the_same(tmp_path: Path) -> None:
    loaded = load_settings(CONFIGS / "human.yaml", ["algorithm.steps=3", "tracking.project='yes: no'"])
    again = tmp_path / "again.yaml"
    again.write_text(dry_run_text(loaded))
    assert load_settings(again).settings == loaded.settings
    assert "steps: 3" in again.read_text()
    line = next(line for line in again.read_text().splitlines() if line.strip().startswith("steps: 3"))
    assert line.endswith("# override")


def test_flags_and_overrides_may_stand_in_any_order() -> None:
    loaded = parse("train", "about", ["seed=2", "--config", str(CONFIGS / "tiny.yaml"), "algorithm.steps=3"])
    assert (loaded.settings.seed, loaded.settings.name, loaded.settings.algorithm.steps) == (2, "tiny", 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nonsense"], "--nonsense"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["step=1"], "did you mean"),
        (["--config"], "--help"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse("train", "about", arguments)
    shown = capsys.readouterr()
    assert left.value.code == 2
    assert told in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""


def test_help_lists_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("rluf.train", "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "python -m rluf.train [--config FILE]" in text
    assert "What it does." in text
    assert [key for key, _ in fields() if f"\n  {key} = " not in text] == []
    assert settings_help() in text


def test_guard_turns_errors_into_one_message_and_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("the log x.jsonl is empty; give one with rows")

    def stop() -> None:
        raise KeyboardInterrupt

    assert guard(lambda: None) == 0
    for function, code, told in ((fail, 3, "error: the log x.jsonl is empty"), (stop, 130, "interrupted")):
        with pytest.raises(SystemExit) as left:
            guard(function)
        shown = capsys.readouterr().err
        assert left.value.code == code
        assert told in shown
        assert len(shown.strip().splitlines()) == 1
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        guard(lambda: 1 // 0)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_and_leave_one_line(sent: signal.Signals, code: int) -> None:
    program = (
        "import sys, time\nfrom rluf.config.cli import guard\n"
        "def work():\n"
        "    try:\n        print('ready', flush=True); time.sleep(30)\n"
        "    finally:\n        print('cleaned', flush=True)\n"
        "sys.exit(guard(work))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
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
def test_the_exit_code_tells_even_where_the_message_has_no_room(work: str, code: int) -> None:
    """The output of a job often goes to a file beside what filled the disk."""
    program = (
        "import os, signal, sys\nfrom rluf.config.cli import guard\nfrom rluf.errors import ResourceError\n"
        f"def work():\n    sys.stdout.write('begun\\n')\n    {work}\n"
        "sys.exit(guard(work))\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # "begun" is held back
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdout=full, stderr=full, env=env, timeout=60, check=False)
    assert done.returncode == code


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_flags_answer_within_a_second_of_cpu_time(flag: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", f"from rluf.config.cli import parse; parse('train', '', [{flag!r}])"]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the clock on the wall would count the neighbours' work too
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_full_disk_is_one_message_and_other_os_errors_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/x")

    with pytest.raises(SystemExit) as caught:
        guard(full)
    assert caught.value.code == 5
    assert capsys.readouterr().err.startswith("error: No space left on device while writing /runs/x; free some space")

    def other() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        guard(other)


@pytest.mark.parametrize("flag", [["--profile", "steps=3"], ["--profile=steps=3"], ["--profile", "3"]])
def test_profile_is_the_setting(flag: list[str]) -> None:
    assert parse("train", "", [*flag, "seed=2"]).settings.run.profile_steps == 3


def test_profile_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("train", "", ["--profile", "steps=many"])
    assert "--profile takes steps=N, such as steps=3, not 'steps=many'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("reward", "", ["--profile", "steps=3"])
