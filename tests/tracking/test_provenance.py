"""Where a run comes from: the commit when the code lies in a repository, the ids when Ray tells them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import rluf
from rluf.tracking import provenance as module
from rluf.tracking.provenance import JOB_VARIABLE, origin


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    found = origin()
    asked = ["git", "-C", str(Path(rluf.__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert found["git_commit"] == (done.stdout.strip() or None)
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", str(found["git_commit"]))
    assert found["submission_id"] is None


def test_a_submitted_job_has_its_id_and_a_package_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "origin.py"))
    found = origin()
    assert (found["submission_id"], found["git_commit"], found["git_changed"]) == ("raysubmit_1", None, None)
    monkeypatch.setenv(JOB_VARIABLE, "not json")
    assert origin()["submission_id"] is None
