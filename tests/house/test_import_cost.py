"""--help and --dry-run are fast, because the commands import torch and ray only when they need them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY_PACKAGES = ("torch", "ray", "vllm", "deepspeed", "transformers", "pandas", "wandb", "plotly")
COMMANDS = [
    name
    for name in ("train", "prepare", "reward", "evaluate", "simulate", "serve")
    if (ROOT / "rluf" / name / "__main__.py").is_file()
]


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_dry_run_import_no_heavy_package(command: str, flag: str) -> None:
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"rluf.{command}", flag, "evaluate.candidate=tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in completed.stderr.splitlines() if "|" in line}
    assert completed.returncode == 0
    assert "algorithm" in completed.stdout
    assert sorted(imported.intersection(HEAVY_PACKAGES)) == []


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
        "rluf.evaluate.correlation",
        "rluf.sweep",
        "rluf.utils.files",
        "rluf.utils.plugins",
    ],
)
def test_light_modules_import_no_heavy_package(module: str) -> None:
    program = f"import sys, {module}; sys.exit(','.join(sorted(set({HEAVY_PACKAGES!r}) & set(sys.modules))) or 0)"
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert completed.stderr.strip() == ""


def test_public_names_are_imported_on_first_use() -> None:
    program = (
        "import sys, rluf; rluf.load_settings; "
        f"sys.exit(','.join(sorted(set({HEAVY_PACKAGES!r}) & set(sys.modules))) or 0)"
    )
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert completed.stderr.strip() == ""
    import rluf

    for name in rluf.__all__:
        assert getattr(rluf, name).__module__.startswith("rluf.")
