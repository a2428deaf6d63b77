"""The worked examples of docs/howto/extend.md, applied to a copy of the code, checked, and run together as a job."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "extend.md"
BLOCK_PATTERN = re.compile(r'^```(python|yaml|diff|bash)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def read_blocks(kind: str) -> list[tuple[str, str]]:
    """(title, content) of the page's code blocks of a language."""
    return [
        (title, content)
        for language, title, content in BLOCK_PATTERN.findall(PAGE.read_text("utf-8"))
        if language == kind
    ]


def apply_diff(text: str, diff: str) -> str:
    """Apply a diff without line numbers to `text`; its context must occur exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    assert text.count(before) == 1, f"the code must contain this exactly once:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def code_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the changes of the page."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("rluf", "actors", "cluster", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for title, content in read_blocks("python"):
        if title != "check":
            (folder / title).write_text(content, "utf-8")
    for title, content in read_blocks("yaml"):
        (folder / title).write_text(content, "utf-8")
    for title, content in read_blocks("diff"):
        path = folder / title
        path.write_text(apply_diff(path.read_text("utf-8"), content), "utf-8")
    return folder


def build_environment(code_copy: Path) -> dict[str, str]:
    """Environment in which Python and its child processes import the copy."""
    return {
        **os.environ,
        "PYTHONPATH": str(code_copy),
        "RLUF_RUNS": str(code_copy / "runs"),
        "RLUF_CACHE": str(code_copy / "cache"),
    }


def test_each_example_does_what_the_page_says(code_copy: Path) -> None:
    checks = [content for title, content in read_blocks("python") if title == "check"]
    assert len(checks) == 4
    code = f"import rluf\nassert rluf.__file__.startswith({str(code_copy)!r})\n" + "\n".join(checks)
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=code_copy,
        env=build_environment(code_copy),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.nightly
@pytest.mark.timeout(420)
def test_a_job_runs_with_all_of_them(code_copy: Path) -> None:
    ((_, line),) = read_blocks("bash")
    command = [sys.executable, *shlex.split(line)[1:], "model.dtype=float32", "reward.dtype=float32"]
    completed = subprocess.run(
        command, cwd=code_copy, env=build_environment(code_copy), capture_output=True, text=True, timeout=400
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    run_folder = code_copy / "runs" / "objectives" / "latest"
    metric_rows = [json.loads(step) for step in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [0.0 <= row["brevity"] <= 1.0 for row in metric_rows] == [True, True]
    assert "shouting" in json.loads((run_folder / "summary.json").read_text())["monitors"]["items"]
    assert 'id="figures">' in (report_html := (run_folder / "report.html").read_text("utf-8"))
    assert '"curve_brevity"' in report_html and '"pareto_brevity"' in report_html
