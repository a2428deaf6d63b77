"""The check of the docs site in a browser: problems are named with page, width and style."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = """<!doctype html>
<html lang="en"><head><title>Page</title><link rel="icon" href="data:,"></head>
<body><main><h1>Page</h1>{}</main></body></html>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the pages were not opened")
def test_the_site_check_names_page_and_view_of_each_problem(tmp_path: Path) -> None:
    for package in ("playwright", "axe_playwright_python"):
        pytest.importorskip(package, reason=f"{package} is not installed: the pages were not opened")
    (tmp_path / "howto" / "wide").mkdir(parents=True)
    (tmp_path / "index.html").write_text(PAGE.format("<p>Narrow.</p>"))
    (tmp_path / "howto" / "wide" / "index.html").write_text(PAGE.format('<div style="width:900px">wide</div>'))
    command = [sys.executable, str(ROOT / "benchmarks" / "screenshots.py"), str(tmp_path), "--site"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    problems = json.loads(result.stdout.splitlines()[-1])["problems"]
    assert result.returncode == 1
    assert [problem.partition(":")[0] for problem in problems] == [
        f"phone, {scheme}, howto/wide" for scheme in ("light", "dark")
    ]
