"""Record a new user's way from `pip install` of the wheel to a reward function and its report, in a transcript.

python benchmarks/newcomer_wheel.py [--out docs/transcripts/newcomer_wheel.md] [key=value ...]

Builds the wheel of this repository, installs it by pip into a new environment in an empty folder, away from the
repository, and runs there a program of a few lines. The pinned dependencies are those of the environment that runs this
script, read through a path file, so that no network is needed. Caches of earlier runs are not used. Trailing
settings are passed to the program, such as a deadline on a busy machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from newcomer import ROOT, Session, describe_machine, format_steps

PROGRAM = """\
import sys

import rluf


def score_brevity(rows):
    return [-len(row["response"].split()) / 100 for row in rows]


settings = rluf.load_settings("tiny", sys.argv[1:], reward_functions={"brevity": score_brevity})
report = rluf.train_policy(settings)
print(report.folder / "report.html", report.verdict, report.metrics[-1]["brevity"])
"""
SITE_PACKAGES = f"env/lib/python3.{sys.version_info.minor}/site-packages"
COMMANDS = (
    "pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist {origin}",
    "python -m venv env",
    f"python -c 'import site; print(*site.getsitepackages())' > {SITE_PACKAGES}/dependencies.pth",
    "env/bin/pip install --quiet --no-deps dist/rluf-*.whl",
    "cat brevity.py",
    "env/bin/python brevity.py {settings}",
    "env/bin/rluf report runs/tiny/latest",
)
"""What the user types; {origin} is the checkout of rluf."""


def main() -> int:
    """Run the session; returns 0 if every command succeeded."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/transcripts/newcomer_wheel.md", help="transcript")
    args, overrides = parser.parse_known_args()
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "RLUF_RUNS", "RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder_name:
        work_folder = Path(folder_name)
        inherited = {key: value for key, value in os.environ.items() if key not in dropped}
        inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        session = Session(work_folder, {**inherited, "RLUF_CACHE": str(work_folder / "cache"), "NO_COLOR": "1"})
        (work_folder / "brevity.py").write_text(PROGRAM)
        for command in COMMANDS:
            if session.run(command.format(origin=ROOT, settings=" ".join(overrides)).strip(), work_folder):
                break
    machine = describe_machine()
    lines = [
        "# From pip install to your own reward function",
        "",
        "The transcript of `python benchmarks/newcomer_wheel.py`: the wheel in a new environment, and a program that",
        "adds a reward function to the smallest configuration, whose models have random weights. The dependencies are",
        "those of the repository's environment, read through a path file; elsewhere",
        f"`pip install --no-deps -r constraints/cpu-py3{sys.version_info.minor}.txt` installs them. Paths of the",
        "machine are replaced, long outputs are cut in the middle.",
        "",
        f"{machine['cpus']} cores ({machine['cpu']}), {machine['memory_gib']:.0f} GiB of memory, {machine['system']}.",
    ]
    args.out.write_text("\n".join([*lines, *format_steps(session)]) + "\n", "utf-8")
    codes = [step["exit_code"] for step in session.steps]
    sys.stdout.write(json.dumps({"benchmark": "newcomer_wheel", "codes": codes, "commands": len(COMMANDS)}) + "\n")
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
