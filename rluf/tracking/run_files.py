"""Row types of a run folder's JSON lines, and the provenance of a run: the commit of its code, its Ray job."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from rluf.errors import DataError
from rluf.types import ANSWERS_FILE, PolicyAnswer
from rluf.utils.cache import hash_source_code
from rluf.utils.files import read_jsonl, write_jsonl

SAMPLE_TABLE_ROWS = 16
"""Rows of each table of samples in the report and in W&B: as many as a person reads."""


class PolicyResponse(TypedDict):
    """One policy's response of a comparison: text, calibrated scores by objective, judges that it fails."""

    text: str
    scores: dict[str, float]
    failed: list[str]


class RolloutSample(TypedDict):
    """One response sampled in a training step.

    `reward` is the combined reward, `kl` the KL to the reference policy in nats (None if the step did not measure it),
    `failed` the judges that the response fails.
    """

    step: int
    version: int
    topic: str
    prompt: str
    response: str
    scores: dict[str, float]
    reward: float
    kl: float | None
    failed: list[str]


class PromptComparison(TypedDict):
    """One prompt with the responses of both policies. `prompt` is the last user message."""

    prompt_id: str
    topic: str
    prompt: str
    base: PolicyResponse
    aligned: PolicyResponse


def write_answers(run_folder: Path, answers: Iterable[PolicyAnswer]) -> None:
    """Write answers.jsonl, one row per response, with the fields of PolicyAnswer."""
    write_jsonl(run_folder / ANSWERS_FILE, map(asdict, answers))


def read_answers(run_folder: Path) -> list[PolicyAnswer]:
    """The responses of answers.jsonl; empty without the file. DataError for rows without the fields of PolicyAnswer."""
    path = run_folder / ANSWERS_FILE
    try:
        return [PolicyAnswer(**{**row, "messages": tuple(row["messages"])}) for row in read_jsonl(path)]
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} has a row that is not a response: {error}; restore the file of the run") from error


GIT_TIMEOUT_S = 5.0
COMMIT_VARIABLE = "RLUF_GIT_COMMIT"
"""Environment variable with the commit of code that has no .git folder."""
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which `ray job submit` passes the submission id to the driver."""


def read_provenance() -> dict[str, str | bool | None]:
    """Return git_commit and git_changed of rluf's source folder, code_digest, ray_job_id and submission_id.

    Ray leaves .git out of a submitted job's package, so there the commit is the job's: RLUF_GIT_COMMIT, or git_commit
    of its metadata. The digest of rluf's source always exists. Other values that do not exist are None: an installed
    package has no commit, a driver started by hand no submission id.
    """
    metadata = _parse_job_metadata(os.environ.get(RAY_JOB_VARIABLE, ""))
    # An installed package may lie inside another project's repository, whose commit says nothing about this code.
    is_tracked = _run_git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _run_git("rev-parse", "HEAD") if is_tracked else None
    changes = _run_git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "git_commit": commit or os.environ.get(COMMIT_VARIABLE) or metadata.get("git_commit") or None,
        "git_changed": None if changes is None else bool(changes),
        "code_digest": hash_source_code("")[:12],
        "ray_job_id": _get_ray_job_id(),
        "submission_id": metadata.get("job_submission_id"),
    }


def _run_git(*arguments: str) -> str | None:
    # The folder of the code, not the working directory: a run may be started from anywhere.
    source_folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(source_folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _get_ray_job_id() -> str | None:
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else None


def _parse_job_metadata(job_config_json: str) -> dict[str, str]:
    """The metadata of a submitted job: that of Ray, and that of `ray job submit --metadata-json`."""
    try:
        return {str(key): str(value) for key, value in json.loads(job_config_json)["metadata"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
