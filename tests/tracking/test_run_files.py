"""Provenance of a run: the commit if the code is in a repository, the ids if Ray provides them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import rluf
from rluf.tracking import run_files
from rluf.tracking.run_files import COMMIT_VARIABLE, RAY_JOB_VARIABLE, read_provenance


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RAY_JOB_VARIABLE, raising=False)
    values = read_provenance()
    command = ["git", "-C", str(Path(rluf.__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert values["git_commit"] == (result.stdout.strip() or None)
    assert values["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", str(values["git_commit"]))
    assert values["submission_id"] is None


def test_a_submitted_job_has_its_id_and_a_package_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(RAY_JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    monkeypatch.setattr(run_files, "__file__", str(tmp_path / "run_files.py"))
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    values = read_provenance()
    assert (values["submission_id"], values["git_commit"], values["git_changed"]) == ("raysubmit_1", None, None)
    monkeypatch.setenv(RAY_JOB_VARIABLE, "not json")
    assert read_provenance()["submission_id"] is None


@pytest.mark.parametrize(
    ("environment", "metadata", "commit"),
    [
        ({COMMIT_VARIABLE: "abc"}, {}, "abc"),
        ({}, {"git_commit": "def"}, "def"),
        ({COMMIT_VARIABLE: "abc"}, {"git_commit": "def"}, "abc"),
        ({COMMIT_VARIABLE: ""}, {}, None),
        ({}, {"git_commit": ""}, None),
    ],
)
def test_a_submitted_job_has_the_commit_that_it_was_given(
    environment: dict[str, str], metadata: dict[str, str], commit: str | None, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_files, "__file__", str(tmp_path / "run_files.py"))
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(RAY_JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "job_1", **metadata}}))
    values = read_provenance()
    assert (values["git_commit"], values["submission_id"], values["git_changed"]) == (commit, "job_1", None)
    assert re.fullmatch(r"[0-9a-f]{12}", str(values["code_digest"]))


def test_a_package_inside_another_repository_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (COMMIT_VARIABLE, RAY_JOB_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "run_files.py").touch()
    (tmp_path / "README").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "README"], ["commit", "-qm", "Start"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(run_files, "__file__", str(tmp_path / "site" / "run_files.py"))
    assert read_provenance()["git_commit"] is None
