"""The worked examples of docs/howto/extend.md, checked, and run together as a job, without a change of the library."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "extend.md"
BLOCK_PATTERN = re.compile(r'^```(python|yaml|bash)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def read_blocks(kind: str) -> list[tuple[str, str]]:
    """(title, content) of the page's code blocks of a language."""
    return [
        (title, content)
        for language, title, content in BLOCK_PATTERN.findall(PAGE.read_text("utf-8"))
        if language == kind
    ]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page; blocks of the same title are parts of one file."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "configs").symlink_to(ROOT / "configs")
    for title, content in read_blocks("python") + read_blocks("yaml"):
        if title != "check":
            with (folder / title).open("a", encoding="utf-8") as file:
                file.write(content + "\n\n")
    return folder


def build_environment(user_folder: Path) -> dict[str, str]:
    """Environment in which Python and its child processes import the modules of the folder."""
    return {
        **os.environ,
        "PYTHONPATH": f"{user_folder}{os.pathsep}{ROOT}",
        "RLUF_RUNS": str(user_folder / "runs"),
        "RLUF_CACHE": str(user_folder / "cache"),
    }


def test_each_example_does_what_the_page_says(user_folder: Path) -> None:
    checks = [content for title, content in read_blocks("python") if title == "check"]
    assert len(checks) == 7
    code = "\n".join(checks)
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=user_folder,
        env=build_environment(user_folder),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.nightly
@pytest.mark.timeout(420)
def test_a_job_runs_with_all_of_them(user_folder: Path) -> None:
    ((_, line),) = read_blocks("bash")
    command = [sys.executable, *shlex.split(line)[1:], "model.dtype=float32"]
    completed = subprocess.run(
        command, cwd=user_folder, env=build_environment(user_folder), capture_output=True, text=True, timeout=400
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    run_folder = user_folder / "runs" / "objectives" / "latest"
    metric_rows = [json.loads(step) for step in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [0.0 <= row["brevity"] <= 1.0 for row in metric_rows] == [True, True]
    assert [len({row["lists"], row["lists_raw"]}) for row in metric_rows] == [1, 1]
    tracked = (run_folder / "rewards.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in tracked] == ["1", "2", "gates"]
    assert float(tracked[0].split(",")[1]) == metric_rows[0]["reward"]
    assert "shouting" in json.loads((run_folder / "summary.json").read_text())["monitors"]["items"]
    assert 'id="figures">' in (report_html := (run_folder / "report.html").read_text("utf-8"))
    assert '"curve_brevity"' in report_html and '"pareto_brevity"' in report_html
