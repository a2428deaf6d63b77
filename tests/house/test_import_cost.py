"""--help and --dry-run answer at once, because the commands load neither torch nor ray before they must."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "pandas", "wandb", "plotly")
COMMANDS = [
    name
    for name in ("train", "prepare", "reward", "evaluate", "simulate", "serve")
    if (ROOT / "rluf" / name / "__main__.py").is_file()
]


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_answer_without_heavy_imports(command: str, flag: str) -> None:
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"rluf.{command}", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in told.stderr.splitlines() if "|" in line}
    assert told.returncode == 0
    assert "algorithm" in told.stdout
    assert sorted(imported.intersection(HEAVY)) == []


@pytest.mark.parametrize(
    "module",
    [
        "rluf",
        "rluf.config.cli",
        "rluf.config.derived",
        "rluf.types",
        "rluf.errors",
        "cluster.plan",
        "rluf.evaluate.abtest",
        "rluf.evaluate.correlate",
        "rluf.sweep",
    ],
)
def test_light_modules_stay_light(module: str) -> None:
    program = f"import sys, {module}; sys.exit(','.join(sorted(set({HEAVY!r}) & set(sys.modules))) or 0)"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.stderr.strip() == ""
