"""Record `ray job submit`, `logs`, `status` and `stop`, as a new user types them, in a transcript.

python benchmarks/jobs.py [--out docs/transcripts/job.md]

Starts a Ray head with ports and a folder of its own, submits the main job with configs/tiny.yaml, stops it during the
run, prints its log, and submits it again with --resume. At the end the head's processes are ended by their ids: `ray
stop` would end every Ray cluster of the machine. The transcript shows each command with its output and exit code. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from newcomer import ROOT, Session, describe_machine, format_timestamp

BIN_FOLDER = Path(sys.executable).parent
JOB_COMMAND = "python -m rluf.train --config configs/tiny.yaml algorithm.steps=60 learner.checkpoint_every_steps=10"
STEPS_BEFORE_STOP = "train: 12/60"
DEADLINE_S = 420.0
START_DEADLINE_S = 120.0
DROPPED_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RLUF_RUNS")
"""Not passed on: they would lead to another cluster or runs folder."""
MAX_LINE_CHARS = 240
"""Longer lines are cut in the transcript."""


def find_open_ports(count: int) -> list[int]:
    """Ports of this machine that are free now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def is_listening(port: int) -> bool:
    """Whether something of this machine accepts connections at the port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def end_process_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants by their ids; those that still run 10 s after SIGTERM are killed."""
    try:
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:  # Ray ends its own processes; this is for one that it left
        with suppress(psutil.NoSuchProcess):
            descendant.terminate()
    _, survivors = psutil.wait_procs(descendants, timeout=10.0)
    for survivor in survivors:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()


@contextmanager
def run_ray_head(session: Session) -> Iterator[str]:
    """A Ray head that ends with the block; yields the address of its dashboard. Raises SystemExit if it does not start.

    Its start is recorded as a step. Its folder is not that of Ray, where it would leave its address for other programs;
    the path is short, as the paths of sockets are limited.
    """
    port, dashboard_port, agent_port = find_open_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = (
            f"ray start --head --block --disable-usage-stats --port={port} --dashboard-port={dashboard_port} "
            f"--dashboard-agent-listen-port={agent_port} --temp-dir={folder}"
        )
        started, output_path = time.monotonic(), session.work_folder / "ray-start.log"
        with output_path.open("wb") as output_file:
            process = subprocess.Popen(
                shlex.split(command), executable=BIN_FOLDER / "ray", cwd=ROOT, env=session.environment,
                stdin=subprocess.DEVNULL, stdout=output_file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            while not is_listening(dashboard_port):
                if process.poll() is not None or time.monotonic() - started > START_DEADLINE_S:
                    raise SystemExit(f"the Ray head did not start:\n{output_path.read_text(errors='replace')[-3000:]}")
                time.sleep(0.5)
            seconds = time.monotonic() - session.started
            lines = output_path.read_text(errors="replace").splitlines()
            session.steps.append(
                {
                    "command": session.redact(command),
                    "started": started - session.started,
                    "seconds": time.monotonic() - started,
                    "exit_code": 0,
                    "output": [(seconds, session.redact(line)) for line in lines],
                }
            )
            yield f"http://127.0.0.1:{dashboard_port}"
        finally:
            end_process_tree(process)


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
        "of the machine are replaced, long lines are cut. The head has ports and a folder of its own, and",
        "`RAY_API_SERVER_ADDRESS` names it, so that other clusters of the machine go on; without any,",
        "`ray start --head` and `ray stop` do the same.", "",
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
        inherited = {key: value for key, value in os.environ.items() if key not in DROPPED_VARIABLES}
        search_path = f"{BIN_FOLDER}{os.pathsep}{os.environ['PATH']}"
        added = {
            "PATH": search_path,
            "RAY_AUTH_MODE": "token",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RLUF_RUNS": str(work_folder / "runs"),
            "NO_COLOR": "1",
        }
        session = Session(work_folder, {**inherited, **added})
        session.run("ray get-auth-token --generate > /dev/null", ROOT)
        with run_ray_head(session) as dashboard_address:
            session.environment["RAY_API_SERVER_ADDRESS"] = dashboard_address
            session.run(submit_command("first", follow=False), ROOT)
            wait_for_log_text(session, "first", STEPS_BEFORE_STOP)
            session.run("ray job status first", ROOT)
            session.run("ray job logs first | tail -n 15", ROOT)
            session.run("ray job stop first", ROOT)
            session.run("ray job logs first | tail -n 6", ROOT)
            session.run(submit_command("second", follow=True, extra_arguments=" --resume"), ROOT)
            session.run("ray job status second", ROOT)
    codes = [step["exit_code"] for step in session.steps]
    args.out.write_text(format_transcript(session, describe_machine()), "utf-8")
    sys.stdout.write(json.dumps({"benchmark": "jobs", "codes": codes, "commands": len(codes)}) + "\n")
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
