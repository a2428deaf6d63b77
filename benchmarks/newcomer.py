"""From nothing to the first report as a new user would: clone, the README's two commands, look at the report; timed.

python benchmarks/newcomer.py [--out docs/transcripts/newcomer.md] [--look FOLDER] [key=value ... | --config FILE ...]

Clones the repository as it is committed into an empty folder and runs there what stands in the first block under
"Start" in its README, nothing else. Then the report is opened in headless Chromium where there is one, at phone and
desktop width. Caches of earlier runs are not used, those of package installers are. Settings at the end are given to
`make quickstart` (ARGS), to try this script out; the transcript then says so. The last line is JSON.
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

from rluf.report.figures import duration

ROOT = Path(__file__).parents[1]
LIMIT_S = 900.0
"""The promise: under 15 minutes, set-up included."""
DEADLINE_S = 3600.0
SHOWN_LINES = 60
"""Lines of a command's output that the transcript keeps from each end."""

logger = logging.getLogger("benchmarks.newcomer")


@dataclass(slots=True)
class Session:
    """Commands in one folder with their output as (seconds since the start, line)."""

    place: Path
    environment: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def run(self, line: str, folder: Path) -> int:
        """Run one command line; its output is shown while it comes, and kept. Returns its exit code."""
        begun = time.monotonic()
        logger.info("[%s] $ %s", stamp(begun - self.began), line)
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=folder, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said: list[tuple[float, str]] = []
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        reader = threading.Thread(target=self._read, args=(process.stdout, said), daemon=True)
        reader.start()
        try:
            code = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        reader.join(10.0)
        self.steps.append({
            "line": line, "began": begun - self.began, "seconds": time.monotonic() - begun, "code": code, "said": said,
        })  # fmt: skip
        return code

    def _read(self, pipe: IO[str], said: list[tuple[float, str]]) -> None:
        for text in pipe:
            said.append((time.monotonic() - self.began, self.public(text.rstrip("\n"))))
            logger.info("%s", said[-1][1])

    def public(self, text: str) -> str:
        """A line without terminal codes and without the paths and names of this machine."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        hidden = {self.place: "~", ROOT: "~/origin", Path.home(): "~", platform.node(): "localhost"}
        for name, shown in hidden.items():
            text = text.replace(str(name), shown) if str(name) else text
        text = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?=[:/ ]|$)", "127.0.0.1", text)
        text = re.sub(r"/tmp/[\w./-]+", "/tmp/...", text)
        text = re.sub(r"file://[^\s']+", "file://...", text)
        return re.sub(r"https?://(?!127\.0\.0\.1|localhost)\S+", "<address>", text)


def stamp(seconds: float) -> str:
    """Minutes and seconds: 03:07."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"


def readme_commands(folder: Path) -> list[str]:
    """The commands of the README's first indented block under Start."""
    text = (folder / "README.md").read_text("utf-8")
    found = re.search(r"^## Start\n+((?:    .+\n)+)", text, re.MULTILINE)
    if found is None:
        raise SystemExit("README.md has no block of commands under Start")
    return [line.strip() for line in found.group(1).splitlines()]


def looked_at(session: Session, clone: Path, run: Path, pictures: Path | None) -> dict[str, Any] | None:
    """What a browser says of the report; None where there is none."""
    if shutil.which("chromium", path=session.environment["PATH"]) is None:
        logger.info("no chromium here: the report was not opened")
        return None
    asked = [".venv/bin/python", "benchmarks/screenshots.py", str(run)]
    asked += ["--out", str(pictures)] if pictures is not None else []
    done = subprocess.run(asked, cwd=clone, env=session.environment, capture_output=True, text=True, timeout=600)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"wrong": [done.stderr[-2000:]]}
    return found


def transcript(session: Session, facts: dict[str, Any], args: str) -> str:
    """The session in Markdown: what was typed, when, and what was answered."""
    commit, total = facts["commit"], facts["seconds"]
    lines = [
        "# A new user's first quarter of an hour", "",
        "The transcript of `python benchmarks/newcomer.py`: an empty folder, a clone, and what the README says under",
        "Start; nothing else. Paths of the machine are replaced, long outputs cut in the middle.", "",
        f"- {facts['cpus']} cores ({facts['cpu']}), {facts['memory_gib']:.0f} GiB of memory, {facts['system']}",
        f"- commit {commit}",
        f"- from clone to the report: **{duration(total)}** (promised: under {duration(LIMIT_S)})",
    ]  # fmt: skip
    if args:
        lines.append(f"- a trial of the script itself, not the quickstart: `ARGS={args}`")
    if facts.get("headline"):
        lines.append(f"- the report's first line: “{facts['headline']}”")
    if facts.get("wrong") is not None:
        opened = "; ".join(facts["wrong"]) or "no console error, nothing found by axe"
        lines.append(f"- opened in Chromium at phone and desktop width, light and dark: {opened}")
    lines += ["", "| began | took | exit code | command |", "|---|---|---|---|"]
    lines += [
        f"| {stamp(step['began'])} | {duration(step['seconds'])} | {step['code']} | `{session.public(step['line'])}` |"
        for step in session.steps
    ]
    for step in session.steps:
        lines += ["", "```text", f"[{stamp(step['began'])}] $ {session.public(step['line'])}"]
        said = [f"[{stamp(at)}] {text}" for at, text in step["said"]]
        cut = len(said) - 2 * SHOWN_LINES
        lines += said if cut <= 0 else [*said[:SHOWN_LINES], f"... {cut} lines ...", *said[-SHOWN_LINES:]]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def main(arguments: list[str]) -> int:
    """Be the newcomer; returns 0 when every command worked and nothing is wrong with the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="newcomer.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "transcripts" / "newcomer.md", help="transcript")
    parser.add_argument("--look", type=Path, help="folder for the pictures of the report, such as docs/images")
    parser.add_argument("--keep", type=Path, help="copy the run folder here")
    given, settings = parser.parse_known_args(arguments)
    args = " ".join(settings)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        place = Path(name)
        dropped = ("VIRTUAL_ENV", "PYTHONPATH", "RLUF_RUNS", "EXTRA", "RAY_ADDRESS")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        session = Session(place, {**kept, "RLUF_CACHE": str(place / "cache")})
        code = session.run(f"git clone --quiet {ROOT} rluf", place)
        clone = place / "rluf"
        for line in readme_commands(clone) if code == 0 else []:
            told = f"{line} ARGS='{args}'" if args and "quickstart" in line else line
            code = code or session.run(told, clone)
        seconds = time.monotonic() - session.began
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
        facts: dict[str, Any] = {**machine(), "commit": commit.stdout.strip(), "seconds": seconds, "code": code}
        runs = sorted((clone / "runs").glob("*/latest"))
        if code == 0 and runs:
            page = (runs[0] / "report.html").read_text("utf-8")
            facts["headline"] = next(iter(re.findall(r"<h1>(.*?)</h1>", page)), "")
            look = looked_at(session, clone, runs[0], given.look and given.look.resolve())
            facts["wrong"] = None if look is None else look["wrong"]
            if given.keep is not None:
                shutil.copytree(runs[0].resolve(), given.keep, dirs_exist_ok=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(transcript(session, facts, args), "utf-8")
        steps = [{"line": session.public(one["line"]), "seconds": round(one["seconds"], 1)} for one in session.steps]
    good = code == 0 and not facts.get("wrong")
    found = {
        "benchmark": "newcomer",
        **facts,
        "seconds": round(seconds, 1),
        "within": seconds < LIMIT_S,
        "steps": steps,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
