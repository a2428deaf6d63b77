"""Run a command by name: `rluf train ...` is `python -m rluf.train ...`.

rluf train --config quickstart
rluf prepare --config prepare --dry-run
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import rluf

COMMANDS = {
    "prepare": "read feedback logs into a checked data set",
    "reward": "train reward models",
    "train": "run the main job: prepare, reward models, training, evaluation, report",
    "evaluate": "compare policies, score a file, analyze an A/B test, read pairs blind",
    "report": "write the report of a run folder again",
    "serve": "serve reward models and policies over HTTP",
    "simulate": "write the log of simulated users, or score a file with the reader model",
    "sweep": "run the main job over a grid of settings",
}
"""Subcommands, each of which is the module `rluf.<name>`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. An unknown name is one message on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else "--help"
    if name in {"-h", "--help", "help"}:
        if arguments[1:]:
            return main([arguments[1], "--help"])
        sys.stdout.write(_format_help())
        return 0
    if name in {"-V", "--version", "version"}:
        sys.stdout.write(f"rluf {rluf.__version__}\n")
        return 0
    if name not in COMMANDS:
        candidates = [*COMMANDS, "--help", "--version"]
        similar_names = [command for command in COMMANDS if name and command.startswith(name.lower())]
        similar_names = similar_names or difflib.get_close_matches(name.lower(), candidates, 1)
        hint = f"did you mean {similar_names[0]}? " if similar_names else ""
        sys.stderr.write(f"error: unknown command {name!r}; {hint}expected one of {', '.join(COMMANDS)}\n")
        return 2
    # As python -m does: reward functions, judges and trackers are modules in the folder where the command starts.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return int(importlib.import_module(f"rluf.{name}.__main__").main(arguments[1:]))


def _format_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "usage: rluf COMMAND [...]\n\n" + "\n".join(lines) + "\n\n`rluf COMMAND --help` describes every setting.\n"


if __name__ == "__main__":
    raise SystemExit(main())
