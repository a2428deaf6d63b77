"""Provenance of a run: the commit if the code is in a repository, the ids if Ray provides them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import rluf
from rluf.tracking import run_files
from rluf.tracking.run_files import RAY_JOB_VARIABLE, read_provenance


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
    values = read_provenance()
    assert (values["submission_id"], values["git_commit"], values["git_changed"]) == ("raysubmit_1", None, None)
    monkeypatch.setenv(RAY_JOB_VARIABLE, "not json")
    assert read_provenance()["submission_id"] is None
