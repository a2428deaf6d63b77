"""Record `ray job submit`, `logs`, `status` and `stop`, as a new user types them, in a transcript.

python benchmarks/jobs.py [--out docs/transcripts/job.md]

Starts a Ray head on this machine (no other Ray may run: the final `ray stop` ends all of them), submits the main job
with configs/tiny.yaml, stops it during the run, prints its log, and submits it again with --resume. The transcript
shows each command with its output and exit code. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from newcomer import ROOT, Session, describe_machine, format_timestamp

BIN_FOLDER = Path(sys.executable).parent
JOB_COMMAND = "python -m rluf.train --config configs/tiny.yaml algorithm.steps=60 learner.checkpoint_every_steps=10"
STEPS_BEFORE_STOP = "train: 12/60"
DEADLINE_S = 420.0
MAX_LINE_CHARS = 240
"""Longer lines are cut in the transcript; `ray stop` prints processes with all of their arguments."""


def submit_command(job_id: str, *, follow: bool, extra_arguments: str = "") -> str:
    """The command that submits the job with submission id `job_id`."""
    no_wait = "" if follow else "--no-wait "
    return f"ray job submit {no_wait}--submission-id {job_id} --working-dir . -- {JOB_COMMAND}{extra_arguments}"


def wait_for_log_text(session: Session, job_id: str, text: str) -> None:
    """Wait until the job's log contains `text`. Raises SystemExit past the deadline, or if the job ends before."""
    deadline = time.monotonic() + DEADLINE_S
    polling_session = Session(session.work_folder, session.environment)
    while time.monotonic() < deadline:
        polling_session.steps.clear()
        polling_session.run(f"ray job logs {job_id}; ray job status {job_id}", ROOT)
        output = "\n".join(line for _, line in polling_session.steps[-1]["output"])
        if text in output:
            return
        if "FAILED" in output or "SUCCEEDED" in output or "STOPPED" in output:
            raise SystemExit(f"job {job_id} ended before {text!r}:\n{output[-3000:]}")
        time.sleep(2.0)
    raise SystemExit(f"job {job_id}: no {text!r} in its log after {DEADLINE_S:g} s")


def format_transcript(session: Session, machine_facts: dict[str, Any]) -> str:
    """The session in Markdown."""
    lines = [
        "# A job on a Ray cluster, stopped and resumed", "",
        "The transcript of `python benchmarks/jobs.py`: commands of [Run on a cluster](../howto/cluster.md) with",
        "the smallest configuration. `RAY_AUTH_MODE=token` and `RAY_JOB_STOP_WAIT_TIME_S=120` are set, paths",
        "of the machine are replaced, long lines are cut.", "",
        f"{machine_facts['cpus']} cores, {machine_facts['memory_gib']:.0f} GiB of memory, {machine_facts['system']}.",
    ]  # fmt: skip
    for step in session.steps:
        lines += [
            "",
            f"Exit code {step['exit_code']}:",
            "",
            "```text",
            f"[{format_timestamp(step['started'])}] $ {step['command']}",
        ]
        lines += [text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]} ..." for _, text in step["output"]]
        lines += ["```"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> int:
    """Run the session; returns 0 if every command succeeded."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcripts" / "job.md", help="transcript")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jobs-") as folder_name:
        work_folder = Path(folder_name)
        inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RLUF_RUNS")}
        search_path = f"{BIN_FOLDER}{os.pathsep}{os.environ['PATH']}"
        added = {
            "PATH": search_path,
            "RAY_AUTH_MODE": "token",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RLUF_RUNS": str(work_folder / "runs"),
            "NO_COLOR": "1",
        }
        session = Session(work_folder, {**inherited, **added})
        try:
            session.run("ray get-auth-token --generate > /dev/null", ROOT)
            session.run("ray start --head --disable-usage-stats", ROOT)
            session.run(submit_command("first", follow=False), ROOT)
            wait_for_log_text(session, "first", STEPS_BEFORE_STOP)
            session.run("ray job status first", ROOT)
            session.run("ray job logs first | tail -n 15", ROOT)
            session.run("ray job stop first", ROOT)
            session.run("ray job logs first | tail -n 6", ROOT)
            session.run(submit_command("second", follow=True, extra_arguments=" --resume"), ROOT)
            session.run("ray job status second", ROOT)
        finally:
            session.run("ray stop", ROOT)
    codes = [step["exit_code"] for step in session.steps]
    args.out.write_text(format_transcript(session, describe_machine()), "utf-8")
    sys.stdout.write(json.dumps({"benchmark": "jobs", "codes": codes, "commands": len(codes)}) + "\n")
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
