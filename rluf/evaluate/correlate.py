"""Does the offline score foretell the online lift: correlation over policies and the release gate it would make.

python -m rluf.evaluate correlate --data policies.jsonl [--control base]

A row of the file: {"policy": "w0.3", "offline": 0.12, "offline_se": 0.004, "online": 0.28, "online_se": 0.02,
"trained_on_love": true, "hacked": false}; offline is the mean score (a change, unless --control is given), online the
relative change of the love rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rluf.config.cli import guard


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. The last line of stdout is JSON; errors of the user's are one clear message on stderr."""
    parser = argparse.ArgumentParser(
        prog="rluf.evaluate.correlate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, one policy a row")
    parser.add_argument("--control", metavar="POLICY", help="the row whose offline mean the others are compared with")
    parser.add_argument("--seed", type=int, default=1, help="seed of the bootstrap over policies (default 1)")
    given = parser.parse_args(arguments)

    def run() -> None:
        from rluf.evaluate.correlation import correlate, read_policies
        from rluf.evaluate.tables import correlate_text
        from rluf.tracking.run_files import jsonable

        found = correlate(read_policies(given.data, given.control), seed=given.seed)
        sys.stdout.write(correlate_text(found))
        sys.stdout.write(json.dumps(jsonable(found), allow_nan=False) + "\n")

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
