"""The docs build without warnings, the reference matches the code, and every command in them parses."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from rluf.config.cli import CommandOptions, parse_command_line
from rluf.config.load import iter_setting_fields
from rluf.tracking.metric_registry import STEP_METRICS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NO_OPTIONS = CommandOptions(lambda _: None)
OWN_PARSER = "CommandParser("
PROGRAM_NAMES = (
    "python", "make", "ray", "source", "export", "cp", "wandb", "pip", "kubectl", "curl", "git", "docker", "helm",
)  # fmt: skip
"""First words of code block lines that are commands; other lines are output or data."""


def list_commands(page: Path) -> list[str]:
    """Commands in the fenced and indented blocks of a page, with continuation lines joined."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    shell_blocks = re.findall(r"^ *```(?:bash|sh|shell|console)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    unfenced = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in shell_blocks for line in block.splitlines()]
    lines += [line for line in unfenced.splitlines() if line.startswith("    ")]
    candidates = [re.sub(r"^(\$ |\.venv/bin/)", "", line.strip()) for line in lines]
    return [line for line in candidates if re.match(rf"(\w+=\S+ )*({'|'.join(PROGRAM_NAMES)}) ", line)]


FILE_SUFFIXES = ("safetensors", "py", "md", "json", "jsonl", "yaml", "html", "log", "parquet", "gz")
ALL_COMMANDS = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in list_commands(page)]


OWN_CONFIG = "configs/mine.yaml"


def read_own_config(configs: Path, log_path: str) -> str:
    """The config of docs/howto/logs.md, with the log at `log_path`, extending files in `configs`."""
    text = (ROOT / "docs" / "howto" / "logs.md").read_text("utf-8")
    (block,) = re.findall(r"^ *```yaml\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    config_text = textwrap.dedent(block).replace("/data/feedback/*.jsonl.gz", log_path)
    return config_text.replace("extends: ", f"extends: {configs}/")


def load_file(path: str) -> ModuleType:
    """Import a file of the repository that is not in a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def load_hooks() -> ModuleType:
    """Import docs/hooks.py."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the site was not built")
    return load_file("docs/hooks.py")


def test_there_are_commands_to_test() -> None:
    assert len(ALL_COMMANDS) > 15
    assert ("docs/quickstart.md", "python -m rluf.train seed=2 objectives.love.weight=0.1") in ALL_COMMANDS


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_a_command_parses(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if OWN_CONFIG in line:
        own_config = tmp_path / "mine.yaml"
        own_config.write_text(read_own_config(ROOT / "configs", "/data/*.jsonl.gz"), "utf-8")
        line = line.replace(OWN_CONFIG, str(own_config))
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
        if OWN_PARSER in source.read_text() or (words[3:4] and re.fullmatch(r"[a-z_]+", words[3])):
            # As python -m does, but in this process, which has imported most of it.
            monkeypatch.setattr(sys, "argv", [str(source), *words[3:], "--help"])
            monkeypatch.delitem(sys.modules, f"{words[2]}.__main__", raising=False)  # another test may have imported it
            with pytest.raises(SystemExit) as exit_info:
                runpy.run_module(f"{words[2]}.__main__", run_name="__main__", alter_sys=True)
            assert exit_info.value.code == 0, page + capsys.readouterr().err
            return
        arguments = [word for word in words[3:] if word != "--dry-run"]
        with pytest.raises(SystemExit) as exit_info:
            command_module = importlib.import_module(f"{words[2]}.__main__")
            # The words are tested, not whether the files that they name exist on this machine.
            options = replace(getattr(command_module, "COMMAND_OPTIONS", None) or NO_OPTIONS, check=lambda _: None)
            parse_command_line(words[2], "", [*arguments, "--dry-run"], options)
        assert exit_info.value.code == 0, page + capsys.readouterr().err
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2].partition(".")[0]) is not None


def test_the_reference_has_every_setting_and_every_metric() -> None:
    hooks = load_hooks()
    settings, metrics = hooks.settings_page(), hooks.metrics_page()
    for key, info in iter_setting_fields():
        row = next(line for line in settings.splitlines() if line.startswith(f"| `{key}` |"))
        assert " ".join((info.description or "?").split()) in html.unescape(row)
    assert all(f"| `{spec.key}` | `{spec.wandb_name}` |" in metrics for spec in STEP_METRICS)
    assert "| `algorithm.steps` | `int` | `12` |" in settings
    for row in (
        "| `algorithm.mix` | algorithm.topic_weights |",
        "| `reward.<name>.probe` | reward.<name>.linear_probe |",
    ):
        assert row in html.unescape(settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_named_in_prose_exist(page: Path) -> None:
    known_keys = {key for key, _ in iter_setting_fields(["brevity"])}  # the example of docs/howto/extend.md
    sections = {".".join(key.split(".")[:depth]) for key in known_keys for depth in range(1, key.count(".") + 1)}
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", page.read_text("utf-8"))
    setting_names = [
        key for key in names if key.split(".")[0] in sections and key.rpartition(".")[2] not in FILE_SUFFIXES
    ]
    assert [key for key in setting_names if key not in known_keys | sections] == []


def test_newcomer_runs_the_readme_commands_and_hides_local_paths(tmp_path: Path) -> None:
    newcomer = load_file("benchmarks/newcomer.py")
    assert newcomer.read_readme_commands(ROOT) == ["make setup", "make quickstart"]
    session = newcomer.Session(tmp_path, dict(os.environ))
    assert (
        session.run(f"echo {tmp_path}/rluf {ROOT} && echo https://mirror.example.org/simple && exit 3", tmp_path) == 3
    )
    facts = {
        **newcomer.describe_machine(),
        "commit": "abc",
        "seconds": 605.0,
        "headline": "All is well.",
        "findings": [],
    }
    text = newcomer.format_transcript(session, facts, "")
    assert all(str(path) not in text for path in (tmp_path, ROOT, Path.home(), "mirror.example.org"))
    for expected in ("**10 min 5 s** (promised: under 15 min 0 s)", "~/rluf ~/origin", "<address>", "| 3 | `echo"):
        assert expected in text, text


@pytest.mark.parametrize("source", sorted((ROOT / "docs" / "images").glob("*.mmd")), ids=lambda source: source.stem)
def test_pictures_match_their_source(source: Path) -> None:
    """Pictures are rendered in advance, so that the site needs no network."""
    text = source.read_text().replace("P[Love]", "")
    labels = [
        label_part for label in re.findall(r'[\[(]"?([^\[\]()"]+?)"?[\])]', text) for label_part in label.split("<br/>")
    ]
    picture_text = re.sub(r"\s+", " ", " ".join(re.findall(r">([^<>]+)<", source.with_suffix(".svg").read_text())))
    words = {word for label in labels for word in re.findall(r"[\w.]+", label)}
    assert len(words) > 10 and [word for word in words if word not in picture_text] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the site was not built")
    completed = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    api_page = (tmp_path / "site" / "reference" / "python" / "rluf.tracking" / "index.html").read_text("utf-8")
    assert "rluf.tracking.timeline.find_gaps" in api_page
    assert "algorithm.steps" in (tmp_path / "site" / "reference" / "settings" / "index.html").read_text("utf-8")


def test_the_names_of_trl_in_the_migration_guide_exist() -> None:
    # Read, not imported: importing the trainer takes a quarter of a minute.
    folders = [Path(str(find_spec(name).origin)).parent for name in ("trl", "transformers")]  # type: ignore[union-attr]
    files = ("trainer/grpo_config.py", "trainer/grpo_trainer.py", "training_args.py")
    source = "".join((folder / file).read_text() for folder in folders for file in files if (folder / file).is_file())
    page = (ROOT / "docs/howto/migrate.md").read_text("utf-8")
    rows = page.partition("## From TRL")[2].partition("## From verl")[0].splitlines()[4:]
    names = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert len(names) > 10
    assert names <= set(re.findall(r"^ {4,8}(\w+):", source, re.MULTILINE))
