"""Replay a step whose gradient was not finite: python -m rluf.train.replay FOLDER (the folder named in the error).

Writes one JSON line per micro-batch: its prompts, and the values in it that are not finite, in order of computation.
The exit code is 1 when there are any.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rluf.algorithms.debug_dump import replay_step
from rluf.errors import RlufError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m rluf.train.replay FOLDER\n")
        return 2
    has_non_finite = False
    try:
        for finding in replay_step(Path(arguments[0])):
            sys.stdout.write(json.dumps(asdict(finding)) + "\n")
            has_non_finite = has_non_finite or bool(finding.non_finite_names)
    except RlufError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return int(has_non_finite)


if __name__ == "__main__":
    raise SystemExit(main())
