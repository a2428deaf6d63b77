"""The wheel in a clean environment: commands, shipped files, and the notebook of the docs, away from the repository."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK_RUNNER = """
import ast, asyncio, inspect, json, sys
async def run_cells():
    names = {"__name__": "__main__"}
    for cell in json.load(open(sys.argv[1]))["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)
            if inspect.iscoroutine(result):
                await result
    report = names["report"]
    print(json.dumps({
        "verdict": report.verdict, "metrics": sorted(report.metrics[-1]), "artifacts": sorted(report.summary["reused"]),
        "frame": len(report._repr_html_()),
        "modules": [name for name in ("actors", "cluster") if name in sys.modules],
        "file": sys.modules["rluf"].__file__,
    }))
asyncio.run(run_cells())
"""
"""Runs the code cells as Jupyter does: in one namespace, inside a running event loop."""


@pytest.fixture(scope="module")
def wheel_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Virtual environment with the wheel of this repository and the installed dependencies, without the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, timeout=200,
    )  # fmt: skip
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A plain path line: the .pth file of the editable install in that folder is not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "-q", "--no-deps",
            "--no-compile", *folder.glob("rluf-*.whl"),
        ],
        check=True, timeout=120,
    )  # fmt: skip
    return environment


def run_in(environment: Path, folder: Path, *command: str | Path, timeout: float) -> str:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "RLUF_RUNS": str(folder / "runs")}
    result = subprocess.run(
        [environment / "bin" / str(command[0]), *map(str, command[1:])],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_wheel_has_one_top_level_package_with_configurations_and_launch_files(wheel_environment: Path) -> None:
    (wheel,) = wheel_environment.parent.glob("rluf-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rluf"}
    shipped = [str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")]
    shipped += [str(path.relative_to(ROOT)) for path in (ROOT / "cluster" / "launch").iterdir()]
    assert {f"rluf/{path}" for path in shipped} <= set(names)


@pytest.mark.slow
def test_the_command_runs_away_from_the_repository(wheel_environment: Path, tmp_path: Path) -> None:
    assert run_in(wheel_environment, tmp_path, "rluf", "--version", timeout=60).startswith("rluf ")
    listing = run_in(wheel_environment, tmp_path, "rluf", "train", "--config", "love-0.3", "--dry-run", timeout=60)
    assert "configs/love-0.3.yaml" in listing


@pytest.mark.slow
def test_the_notebook_of_the_docs_trains_a_policy(wheel_environment: Path, tmp_path: Path) -> None:
    import json

    runner = tmp_path / "run_notebook.py"
    runner.write_text(NOTEBOOK_RUNNER)
    notebook = ROOT / "docs/notebooks/first_steps.ipynb"
    output = run_in(wheel_environment, tmp_path, "python", runner, notebook, timeout=280)
    result = json.loads(output.splitlines()[-1])
    assert result["verdict"] in ("pass", "undecided", "fail")
    assert {"brevity", "love", "helpfulness", "safety"} <= set(result["metrics"])
    assert result["artifacts"] == ["data", "reward-helpfulness", "reward-love", "reward-safety"]
    assert result["frame"] > 10_000
    assert result["modules"] == []
    assert Path(result["file"]).is_relative_to(wheel_environment)
