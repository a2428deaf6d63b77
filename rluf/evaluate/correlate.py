"""Does the offline score predict the online lift: correlation over policies, and the release gate it would make.

python -m rluf.evaluate correlate --data policies.jsonl [--control base]

One row per policy: {"policy": "w0.3", "offline": 0.12, "offline_se": 0.004, "online": 0.28, "online_se": 0.02,
"trained_on_love": true, "hacked": false}; offline is the mean score (a change, unless --control is given), online the
relative change of the love rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rluf.config.cli import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; the last line of stdout is JSON, and an error is one message on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m rluf.evaluate correlate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, one policy per row")
    parser.add_argument("--control", metavar="POLICY", help="policy whose offline mean the others are compared with")
    parser.add_argument("--seed", type=int, default=1, help="seed of the bootstrap over policies (default 1)")
    args = parser.parse_args(arguments)

    def run_and_print() -> None:
        from rluf.evaluate.correlation import correlate_policies, read_policies
        from rluf.evaluate.tables import format_correlation_report
        from rluf.utils.files import to_jsonable

        report = correlate_policies(read_policies(args.data, args.control), seed=args.seed)
        sys.stdout.write(format_correlation_report(report))
        sys.stdout.write(json.dumps(to_jsonable(report), allow_nan=False) + "\n")

    return run_command(run_and_print)
