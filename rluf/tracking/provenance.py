"""Provenance of a run: the commit of its code and the Ray job that it belongs to."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

GIT_TIMEOUT_S = 5.0
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which `ray job submit` passes the submission id to the driver."""


def read_provenance() -> dict[str, str | bool | None]:
    """Return git_commit and git_changed of rluf's source folder, ray_job_id and submission_id.

    Values that do not exist are None: an installed package has no commit, a driver started by hand no submission id.
    """
    commit = _run_git("rev-parse", "HEAD")
    changes = _run_git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "git_commit": commit or None,
        "git_changed": None if changes is None else bool(changes),
        "ray_job_id": _ray_job_id(),
        "submission_id": _submission_id(os.environ.get(RAY_JOB_VARIABLE, "")),
    }


def _run_git(*arguments: str) -> str | None:
    # The folder of the code, not the working directory: a run may be started from anywhere.
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _ray_job_id() -> str | None:
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else None


def _submission_id(job_config_json: str) -> str | None:
    try:
        submission_id = json.loads(job_config_json)["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(submission_id)
