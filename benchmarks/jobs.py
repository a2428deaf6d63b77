"""`ray job submit`, `logs`, `status` and `stop` as a new user would type them; writes the transcript.

python benchmarks/jobs.py [--out docs/transcripts/job.md]

Starts a Ray head of this machine (none may run: at the end comes `ray stop`, which ends every Ray here), submits the
main job with configs/tiny.yaml, stops it in mid-run, reads what it said, and submits it again with --resume. The
transcript tells each command with its output and exit code. The last line is JSON.
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

from newcomer import ROOT, Session, machine, stamp

BIN = Path(sys.executable).parent
JOB = "python -m rluf.train --config configs/tiny.yaml algorithm.steps=60 learner.save_every=10"
STEPS_BEFORE_STOP = "align: 12/60"
DEADLINE_S = 420.0
WIDTH = 240
"""Characters of a line that the transcript shows; `ray stop` names processes with all of their arguments."""


def submitted(name: str, *, follow: bool, more: str = "") -> str:
    """The command that submits the job under a name of its own."""
    wait = "" if follow else "--no-wait "
    return f"ray job submit {wait}--submission-id {name} --working-dir . -- {JOB}{more}"


def wait_for(session: Session, name: str, text: str) -> None:
    """Until the job's log has `text`. Raises SystemExit past the deadline, or when the job has ended before."""
    end = time.monotonic() + DEADLINE_S
    quiet = Session(session.place, session.environment)
    while time.monotonic() < end:
        quiet.steps.clear()
        quiet.run(f"ray job logs {name}; ray job status {name}", ROOT)
        said = "\n".join(line for _, line in quiet.steps[-1]["said"])
        if text in said:
            return
        if "FAILED" in said or "SUCCEEDED" in said or "STOPPED" in said:
            raise SystemExit(f"job {name} ended before {text!r}:\n{said[-3000:]}")
        time.sleep(2.0)
    raise SystemExit(f"job {name} never came to {text!r} in {DEADLINE_S:g} s")


def transcript(session: Session, facts: dict[str, Any]) -> str:
    """The session in Markdown."""
    lines = [
        "# A job on a Ray cluster, stopped and resumed", "",
        "The transcript of `python benchmarks/jobs.py`: commands of [Run on a cluster](../howto/cluster.md) with",
        "the smallest configuration. `RAY_AUTH_MODE=token` and `RAY_JOB_STOP_WAIT_TIME_S=120` are set, paths",
        "of the machine are replaced, long lines are cut.", "",
        f"{facts['cpus']} cores, {facts['memory_gib']:.0f} GiB of memory, {facts['system']}.",
    ]  # fmt: skip
    for step in session.steps:
        lines += ["", f"Exit code {step['code']}:", "", "```text", f"[{stamp(step['began'])}] $ {step['line']}"]
        lines += [text if len(text) <= WIDTH else f"{text[:WIDTH]} ..." for _, text in step["said"]]
        lines += ["```"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> int:
    """Be the user; returns 0 when every command ended as it should."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcripts" / "job.md", help="transcript")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jobs-") as name:
        place = Path(name)
        kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RLUF_RUNS")}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        told = {
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RLUF_RUNS": str(place / "runs"),
            "NO_COLOR": "1",
        }
        session = Session(place, {**kept, **told})
        try:
            session.run("ray start --head --disable-usage-stats", ROOT)
            session.run(submitted("first", follow=False), ROOT)
            wait_for(session, "first", STEPS_BEFORE_STOP)
            session.run("ray job status first", ROOT)
            session.run("ray job logs first | tail -n 15", ROOT)
            session.run("ray job stop first", ROOT)
            session.run("ray job logs first | tail -n 6", ROOT)
            session.run(submitted("second", follow=True, more=" --resume"), ROOT)
            session.run("ray job status second", ROOT)
        finally:
            session.run("ray stop", ROOT)
    codes = [step["code"] for step in session.steps]
    given.out.write_text(transcript(session, machine()), "utf-8")
    sys.stdout.write(json.dumps({"benchmark": "jobs", "codes": codes, "commands": len(codes)}) + "\n")
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
