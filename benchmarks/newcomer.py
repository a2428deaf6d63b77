"""Time a new user's first run: clone, the README's two commands, open the report.

python benchmarks/newcomer.py [--out docs/transcripts/newcomer.md] [--look FOLDER] [key=value ... | --config FILE ...]

Clones the committed repository into an empty folder and runs there the first block under "Start" of its README, nothing
else. Then it opens the report in headless Chromium, if available, at phone and desktop width. Caches of earlier runs
are not used, those of package installers are. Trailing settings are passed to `make quickstart` (ARGS), to test this
script itself; the transcript then says so. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rluf.report.figures import format_duration

ROOT = Path(__file__).parents[1]
PROMISED_SECONDS = 900.0
"""Promise of the docs: under 15 minutes, including set-up."""
COMMAND_TIMEOUT_S = 3600.0
TRANSCRIPT_LINES = 60
"""Lines of a command's output that the transcript shows from each end."""

logger = logging.getLogger("benchmarks.newcomer")


@dataclass(slots=True)
class Session:
    """Commands in one folder, with their output as (seconds since the start, line)."""

    work_folder: Path
    environment: dict[str, str]
    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def run(self, command: str, folder: Path) -> int:
        """Run one command line, log its output live, and record it. Returns the exit code."""
        command_started = time.monotonic()
        logger.info("[%s] $ %s", format_timestamp(command_started - self.started), command)
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        output: list[tuple[float, str]] = []
        assert process.stdout is not None  # noqa: S101 - stdout is a pipe
        # A thread, so that the deadline also holds for a command that prints nothing.
        reader = threading.Thread(target=self._read_output, args=(process.stdout, output), daemon=True)
        reader.start()
        try:
            exit_code = process.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            exit_code = process.wait()
        reader.join(10.0)
        self.steps.append(
            {
                "command": command,
                "started": command_started - self.started,
                "seconds": time.monotonic() - command_started,
                "exit_code": exit_code,
                "output": output,
            }
        )
        return exit_code

    def _read_output(self, pipe: IO[str], output: list[tuple[float, str]]) -> None:
        for text in pipe:
            output.append((time.monotonic() - self.started, self.redact(text.rstrip("\n"))))
            logger.info("%s", output[-1][1])

    def redact(self, text: str) -> str:
        """A line without terminal codes and without the paths and names of this machine."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        replacements = {self.work_folder: "~", ROOT: "~/origin", Path.home(): "~", platform.node(): "localhost"}
        for private_text, public_text in replacements.items():
            text = text.replace(str(private_text), public_text) if str(private_text) else text
        text = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?=[:/ ]|$)", "127.0.0.1", text)
        text = re.sub(r"/tmp/[\w./-]+", "/tmp/...", text)
        text = re.sub(r"file://[^\s']+", "file://...", text)
        return re.sub(r"https?://(?!127\.0\.0\.1|localhost)\S+", "<address>", text)


def format_timestamp(seconds: float) -> str:
    """Minutes and seconds: 03:07."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


def read_readme_commands(folder: Path) -> list[str]:
    """Commands of the README's first indented block under Start."""
    readme = (folder / "README.md").read_text("utf-8")
    block = re.search(r"^## Start\n+((?:    .+\n)+)", readme, re.MULTILINE)
    if block is None:
        raise SystemExit("README.md has no indented block of commands under Start")
    return [line.strip() for line in block.group(1).splitlines()]


def check_report_in_browser(
    session: Session, checkout: Path, run_folder: Path, picture_folder: Path | None
) -> dict[str, Any] | None:
    """Open the report in a browser and return its findings; None without a browser."""
    if shutil.which("chromium", path=session.environment["PATH"]) is None:
        logger.info("report: not opened, no chromium on the PATH")
        return None
    command = [".venv/bin/python", "benchmarks/screenshots.py", str(run_folder)]
    command += ["--out", str(picture_folder)] if picture_folder is not None else []
    completed = subprocess.run(
        command, cwd=checkout, env=session.environment, capture_output=True, text=True, timeout=600
    )
    try:
        findings: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problems": [completed.stderr[-2000:]]}
    return findings


def format_transcript(session: Session, facts: dict[str, Any], args: str) -> str:
    """Format the session as Markdown: commands, times and output."""
    commit, total_seconds = facts["commit"], facts["seconds"]
    promise = format_duration(PROMISED_SECONDS)
    lines = [
        "# A new user's first quarter of an hour",
        "",
        "The transcript of `python benchmarks/newcomer.py`: an empty folder, a clone, and the commands of the README",
        "under Start; nothing else. Paths of the machine are replaced, long outputs are cut in the middle.",
        "",
        f"- {facts['cpus']} cores ({facts['cpu']}), {facts['memory_gib']:.0f} GiB of memory, {facts['system']}",
        f"- commit {commit}",
        f"- from clone to the report: **{format_duration(total_seconds)}** (promised: under {promise})",
    ]
    if args:
        lines.append(f"- a test of the script itself, not the quickstart: `ARGS={args}`")
    if facts.get("headline"):
        lines.append(f"- the report's first line: “{facts['headline']}”")
    if facts.get("findings") is not None:
        findings = "; ".join(facts["findings"]) or "no console error, no axe finding"
        lines.append(f"- opened in Chromium at phone and desktop width, light and dark: {findings}")
    return "\n".join([*lines, *format_steps(session)]) + "\n"


def format_steps(session: Session) -> list[str]:
    """Lines of Markdown: the commands with their times and exit codes, then each with its output."""
    lines = ["", "| started | duration | exit code | command |", "|---|---|---|---|"]
    for step in session.steps:
        times = f"{format_timestamp(step['started'])} | {format_duration(step['seconds'])}"
        lines.append(f"| {times} | {step['exit_code']} | `{session.redact(step['command'])}` |")
    for step in session.steps:
        lines += ["", "```text", f"[{format_timestamp(step['started'])}] $ {session.redact(step['command'])}"]
        output = [f"[{format_timestamp(seconds)}] {line_text}" for seconds, line_text in step["output"]]
        cut_lines = len(output) - 2 * TRANSCRIPT_LINES
        lines += (
            output
            if cut_lines <= 0
            else [*output[:TRANSCRIPT_LINES], f"... {cut_lines} lines ...", *output[-TRANSCRIPT_LINES:]]
        )
        lines += ["```"]
    return lines


def describe_machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    cpu_name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": cpu_name.group(1) if cpu_name else platform.machine(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def main(arguments: list[str]) -> int:
    """Run the session; returns 0 if every command succeeded and the report has no finding."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="newcomer.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcripts" / "newcomer.md", help="transcript")
    parser.add_argument("--look", type=Path, help="folder for the pictures of the report, such as docs/images")
    parser.add_argument("--keep", type=Path, help="copy the run folder here")
    args, settings = parser.parse_known_args(arguments)
    make_args = " ".join(settings)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder_name:
        work_folder = Path(folder_name)
        dropped_variables = ("VIRTUAL_ENV", "PYTHONPATH", "RLUF_RUNS", "EXTRA", "RAY_ADDRESS")
        environment = {key: value for key, value in os.environ.items() if key not in dropped_variables}
        session = Session(work_folder, {**environment, "RLUF_CACHE": str(work_folder / "cache")})
        exit_code = session.run(f"git clone --quiet {ROOT} rluf", work_folder)
        checkout = work_folder / "rluf"
        for line in read_readme_commands(checkout) if exit_code == 0 else []:
            command = f"{line} ARGS='{make_args}'" if make_args and "quickstart" in line else line
            exit_code = exit_code or session.run(command, checkout)
        seconds = time.monotonic() - session.started
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
        facts: dict[str, Any] = {
            **describe_machine(),
            "commit": commit.stdout.strip(),
            "seconds": seconds,
            "exit_code": exit_code,
        }
        run_folders = sorted((checkout / "runs").glob("*/latest"))
        if exit_code == 0 and run_folders:
            report_html = (run_folders[0] / "report.html").read_text("utf-8")
            facts["headline"] = next(iter(re.findall(r"<h1>(.*?)</h1>", report_html)), "")
            browser_result = check_report_in_browser(
                session, checkout, run_folders[0], args.look and args.look.resolve()
            )
            facts["findings"] = None if browser_result is None else browser_result["problems"]
            if args.keep is not None:
                shutil.copytree(run_folders[0].resolve(), args.keep, dirs_exist_ok=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(format_transcript(session, facts, make_args), "utf-8")
        steps = [
            {"command": session.redact(step["command"]), "seconds": round(step["seconds"], 1)} for step in session.steps
        ]
    success = exit_code == 0 and not facts.get("findings")
    report = {
        "benchmark": "newcomer",
        **facts,
        "seconds": round(seconds, 1),
        "within": seconds < PROMISED_SECONDS,
        "steps": steps,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if success else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
