"""The docs: they build strictly, the reference is that of the code, and every command in them parses."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from rluf.config.cli import parse
from rluf.config.load import fields
from rluf.tracking.metric_registry import METRICS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
OWN_FLAGS = "argparse.ArgumentParser("
PROGRAMS = (
    "python", "make", "ray", "source", "export", "cp", "wandb", "pip", "kubectl", "curl", "git", "docker", "helm",
)  # fmt: skip
"""What a line of a code block starts with when it is a command; other lines are output or data."""


def commands(page: Path) -> list[str]:
    """Commands in the fenced and the indented blocks of a page, with their continued lines."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    shell = re.findall(r"^ *```(?:bash|sh|shell|console)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    bare = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in shell for line in block.splitlines()]
    lines += [line for line in bare.splitlines() if line.startswith("    ")]
    stripped = [re.sub(r"^(\$ |\.venv/bin/)", "", line.strip()) for line in lines]
    return [line for line in stripped if re.match(rf"(\w+=\S+ )*({'|'.join(PROGRAMS)}) ", line)]


SUFFIXES = ("safetensors", "py", "md", "json", "jsonl", "yaml", "html", "log", "parquet", "gz")
ALL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


MINE = "configs/mine.yaml"


def own_config(configs: Path, log: str) -> str:
    """The config that docs/howto/logs.md makes, with the log at `log`; it extends files in `configs`."""
    text = (ROOT / "docs" / "howto" / "logs.md").read_text("utf-8")
    (block,) = re.findall(r"^ *```yaml\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    own = textwrap.dedent(block).replace("/data/feedback/*.jsonl.gz", log)
    return own.replace("extends: ", f"extends: {configs}/")


def loaded(path: str) -> ModuleType:
    """A file of the repository that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def hooks() -> ModuleType:
    """docs/hooks.py as a module."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the site was not built")
    return loaded("docs/hooks.py")


def test_there_are_commands_to_test() -> None:
    assert len(ALL) > 15
    assert ("docs/quickstart.md", "python -m rluf.train seed=2 objectives.love.weight=0.1") in ALL


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_parses(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if MINE in line:
        mine = tmp_path / "mine.yaml"
        mine.write_text(own_config(ROOT / "configs", "/data/*.jsonl.gz"), "utf-8")
        line = line.replace(MINE, str(mine))
    monkeypatch.setenv("RLUF_DATA", "/data")
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if "--" in words and words[0] == "ray":
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["python", "-m"] and words[2].startswith("rluf."):
        source = ROOT / words[2].replace(".", "/") / "__main__.py"
        assert source.is_file()
        if OWN_FLAGS in source.read_text() or (words[3:4] and re.fullmatch(r"[a-z_]+", words[3])):
            asked = [sys.executable, "-m", words[2], *words[3:], "--help"]
            subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, timeout=60)
            return
        given = [word for word in words[3:] if word != "--dry-run"]
        with pytest.raises(SystemExit) as left:
            parse(words[2], "", [*given, "--dry-run"])
        assert left.value.code == 0, page + capsys.readouterr().err
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2].partition(".")[0]) is not None


def test_the_reference_has_every_setting_and_every_metric() -> None:
    made = hooks()
    settings, metrics = made.settings_page(), made.metrics_page()
    for key, info in fields():
        row = next(line for line in settings.splitlines() if line.startswith(f"| `{key}` |"))
        assert " ".join((info.description or "?").split()) in html.unescape(row)
    assert all(f"| `{spec.key}` | `{spec.name}` |" in metrics for spec in METRICS)
    assert "| `algorithm.steps` | `int` | `14` |" in settings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_named_in_prose_exist(page: Path) -> None:
    known = {key for key, _ in fields()}
    sections = {".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)}
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", page.read_text("utf-8"))
    ours = [key for key in named if key.split(".")[0] in sections and key.rpartition(".")[2] not in SUFFIXES]
    assert [key for key in ours if key not in known | sections] == []


def test_the_newcomer_types_what_the_readme_says_and_tells_no_path(tmp_path: Path) -> None:
    newcomer = loaded("benchmarks/newcomer.py")
    assert newcomer.readme_commands(ROOT) == ["make setup", "make quickstart"]
    session = newcomer.Session(tmp_path, dict(os.environ))
    assert (
        session.run(f"echo {tmp_path}/rluf {ROOT} && echo https://mirror.example.org/simple && exit 3", tmp_path) == 3
    )
    facts = {**newcomer.machine(), "commit": "abc", "seconds": 605.0, "headline": "All is well.", "wrong": []}
    text = newcomer.transcript(session, facts, "")
    assert all(str(path) not in text for path in (tmp_path, ROOT, Path.home(), "mirror.example.org"))
    for part in ("**10 min 5 s** (promised: under 15 min 0 s)", "~/rluf ~/origin", "<address>", "| 3 | `echo"):
        assert part in text, text


@pytest.mark.parametrize("source", sorted((ROOT / "docs" / "images").glob("*.mmd")), ids=lambda source: source.stem)
def test_a_picture_is_that_of_its_source(source: Path) -> None:
    """Rendered once and kept, so that the site needs no network to show it."""
    text = source.read_text().replace("P[Love]", "")
    labels = [part for label in re.findall(r'[\[(]"?([^\[\]()"]+?)"?[\])]', text) for part in label.split("<br/>")]
    shown = re.sub(r"\s+", " ", " ".join(re.findall(r">([^<>]+)<", source.with_suffix(".svg").read_text())))
    words = {word for label in labels for word in re.findall(r"[\w.]+", label)}
    assert len(words) > 10 and [word for word in words if word not in shown] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the site was not built")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "reference" / "python" / "rluf.tracking" / "index.html").read_text("utf-8")
    assert "rluf.tracking.timeline.gaps" in api
    assert "algorithm.steps" in (tmp_path / "site" / "reference" / "settings" / "index.html").read_text("utf-8")
