"""The Dockerfile, as far as it can be built without Docker: its files, its tools, the install of its first layer."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = ("ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR")


def read_instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


def list_copied_files() -> list[str]:
    """Sources of the COPY instructions before the one of the whole checkout."""
    sources = [shlex.split(arguments)[1:-1] for name, arguments in read_instructions() if name == "COPY"]
    assert sources[-1] == ["."]
    return [source for group in sources[:-1] for source in group]


def test_instructions_are_known_and_copy_files_that_exist() -> None:
    assert {name for name, _ in read_instructions()} <= set(INSTRUCTIONS)
    assert all((ROOT / source).exists() for source in list_copied_files())
    patterns = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".git", "runs", "cache"} <= set(patterns)
    # Nothing that the image needs is left out of the build context.
    assert not set(patterns) & {source.split("/")[0] for source in (*list_copied_files(), "rluf", "configs")}


def test_python_and_tools_are_those_that_setup_needs() -> None:
    setup, packages = (ROOT / ".ci" / "setup").read_text(), ""
    arguments = dict(value.split("=") for name, value in read_instructions() if name == "ARG")
    assert arguments == {"PYTHON_VERSION": "3.11", "EXTRA": "cpu"}
    for extra in ("cpu", "gpu"):
        assert (ROOT / "constraints" / f"{extra}-py311.txt").is_file()
    packages = next(value for name, value in read_instructions() if name == "RUN" and "apt-get" in value)
    for tool in re.findall(r"command -v (\S+)", setup):
        assert f" {tool} " in packages, f"{tool} is needed by .ci/setup"
    assert " make " in packages and " wget " in packages  # KubeRay's probes call wget


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "uv").exists(), reason="the environment was not made by make setup")
def test_the_first_layer_installs_packages_that_the_whole_checkout_then_fills(tmp_path: Path) -> None:
    """Ray's workers import rluf from any working folder, although its code is copied after the install."""
    for source in list_copied_files():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, tmp_path / source)  # type: ignore[operator]
    run = next(value for name, value in read_instructions() if name == "RUN" and "make setup" in value)
    prepare, _, _ = run.partition("&& EXTRA=")
    subprocess.run(["bash", "-c", prepare], cwd=tmp_path, check=True)
    install = [ROOT / ".venv" / "bin" / "uv", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--offline", "--python", sys.executable, "--target", "site", "-e", "."]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (finder,) = (tmp_path / "site").glob("__editable___rluf*_finder.py")
    mapping = re.search(r"MAPPING: dict\[str, str\] = (\{.*\})", finder.read_text())
    assert mapping is not None
    names = json.loads(mapping[1].replace("'", '"'))
    assert names == {name: str(tmp_path / name) for name in ("rluf", "actors", "cluster")}


def test_the_image_is_the_one_that_the_launch_files_expect() -> None:
    values = dict(read_instructions())
    assert values["WORKDIR"] == "/app"  # entry points name configs relative to it
    environment = dict(shlex.split(part)[0].split("=", 1) for part in values["ENV"].split() if "=" in part)
    assert environment["PATH"].startswith(f"{values['WORKDIR']}/.venv/bin:")
    assert environment["RAY_AUTH_MODE"] == "token"
    # A user id without a name would have the home folder /, and Python's getpass would find no name.
    (create_user,) = (value for name, value in read_instructions() if name == "RUN" and "useradd" in value)
    writable = shlex.split(create_user.partition("chmod 1777 ")[2])
    assert {environment[name] for name in ("HOME", "RLUF_RUNS", "RLUF_CACHE")} == {*writable}
    assert environment["USER"] == Path(environment["HOME"]).name
    assert json.loads(values["CMD"])[:2] == ["python", "-m"]
    user = next(value for name, value in read_instructions() if name == "RUN" and "useradd" in value)
    for name in ("raycluster.yaml", "rayjob.yaml"):
        spec = yaml.safe_load((ROOT / "cluster" / "launch" / name).read_text())["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert f"--uid {group['template']['spec']['securityContext']['runAsUser']} " in user
