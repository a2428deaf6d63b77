"""The worked examples of docs/howto/extend.md: made in a copy of the code, checked, and run together as a job."""

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
BLOCK = re.compile(r'^```(python|diff|bash)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[tuple[str, str]]:
    """(title, content) of the page's blocks of a language."""
    return [(title, content) for language, title, content in BLOCK.findall(PAGE.read_text("utf-8")) if language == kind]


def changed(text: str, diff: str) -> str:
    """`text` with the lines of a diff without line numbers; what surrounds them must be there exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    assert text.count(before) == 1, f"the code has no longer one place of:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with the page's changes."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("rluf", "actors", "cluster", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for title, content in blocks("python"):
        if title != "check":
            (folder / title).write_text(content, "utf-8")
    for title, content in blocks("diff"):
        path = folder / title
        path.write_text(changed(path.read_text("utf-8"), content), "utf-8")
    return folder


def environment(copy: Path) -> dict[str, str]:
    """Python there finds the copy first, and what it starts too."""
    return {**os.environ, "PYTHONPATH": str(copy), "RLUF_RUNS": str(copy / "runs"), "RLUF_CACHE": str(copy / "cache")}


def test_each_example_does_what_the_page_says(copy: Path) -> None:
    checks = [content for title, content in blocks("python") if title == "check"]
    assert len(checks) == 4
    code = f"import rluf\nassert rluf.__file__.startswith({str(copy)!r})\n" + "\n".join(checks)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(420)
def test_a_job_runs_with_all_of_them(copy: Path) -> None:
    ((_, line),) = blocks("bash")
    command = [sys.executable, *shlex.split(line)[1:], "model.dtype=float32", "reward.dtype=float32"]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    run = copy / "runs" / "tiny" / "latest"
    rows = [json.loads(step) for step in (run / "metrics.jsonl").read_text().splitlines()]
    assert [0.0 <= row["brevity"] <= 1.0 for row in rows] == [True, True]
    assert "shouting" in json.loads((run / "summary.json").read_text())["monitors"]["items"]
    assert 'id="figures">' in (page := (run / "report.html").read_text("utf-8"))
    assert '"curve_brevity"' in page and '"pareto_brevity"' in page
