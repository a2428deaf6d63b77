"""Do a step again whose gradient was not finite: python -m rluf.train.replay FOLDER (the folder that the error named).

Writes one JSON line a micro-batch: its prompts, and what in it was not finite, in the order of computation. Exits with
1 when something was not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rluf.algorithms.debug_dump import replay
from rluf.errors import RlufError


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        sys.stderr.write("usage: python -m rluf.train.replay FOLDER\n")
        return 2
    found = False
    try:
        for finding in replay(Path(given[0])):
            sys.stdout.write(json.dumps(asdict(finding)) + "\n")
            found = found or bool(finding.not_finite)
    except RlufError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return int(found)


if __name__ == "__main__":
    raise SystemExit(main())
