"""Where a run comes from: the commit of its code and the Ray job it belongs to."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

GIT_SECONDS = 5.0
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where `ray job submit` tells the driver its submission id."""


def origin() -> dict[str, str | bool | None]:
    """git_commit and git_changed of the folder that rluf's code lies in, ray_job_id and submission_id.

    None for what there is not: a package has no commit, a driver started by hand no submission id.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "git_commit": commit or None,
        "git_changed": None if changes is None else bool(changes),
        "ray_job_id": _ray_job(),
        "submission_id": _submission(os.environ.get(JOB_VARIABLE, "")),
    }


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _ray_job() -> str | None:
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else None


def _submission(blob: str) -> str | None:
    try:
        found = json.loads(blob)["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)
