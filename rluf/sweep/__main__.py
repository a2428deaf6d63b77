"""Sweep over the love weight, the KL coefficient, any setting, and seeds: training runs by Ray Tune, Pareto front.

python -m rluf.sweep --config configs/love-0.3.yaml --weights 0 0.1 0.3 --kl 0.02 0.1 --seeds 1 2 3
python -m rluf.sweep --grid learner.learning_rate=1e-6,1e-5 --grid algorithm.name=grpo,rloo --seeds 1 2

Each run is python -m rluf.train with objectives.love.weight, algorithm.kl_coef and seed set; the other settings come
from the config and from key=value. helpfulness absorbs the change of the love weight, so the sum of the two stays
constant and a weight is a share of the reward. With --grid, weights and KL change only where they are given. Finished
runs with the same settings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from rluf.config.cli import CommandParser, run_command
from rluf.sweep.runs import check_sweep, raise_for_failed_runs, run_sweep


def build_parser() -> CommandParser:
    """Parser of the command line."""
    parser = CommandParser("rluf.sweep", description=__doc__)
    add_argument = parser.add_argument
    add_argument("--config", type=Path, metavar="FILE", help="settings of the training job (default: the quickstart)")
    add_argument("--weights", type=float, nargs="+", help="love weights (default 0 0.1 0.3, or unchanged with --grid)")
    add_argument("--kl", type=float, nargs="+", help="KL coefficients (default: the configured one)")
    add_argument(
        "--grid", action="append", default=[], metavar="key=a,b,c", help="values of any setting; may be repeated"
    )
    add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default 1 2 3)")
    add_argument("--concurrent", type=int, default=1, help="maximum number of concurrent runs (default 1)")
    add_argument("--dry-run", action="store_true", help="check and list the runs, then exit")
    add_argument("overrides", nargs="*", metavar="key=value", help="override single settings of all runs")
    return parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; key=value words may be anywhere."""
    # Removed first: after --seeds, which takes any number of values, argparse would read them as seeds.
    is_override = [
        "=" in argument and not argument.startswith("-") and previous != "--grid"
        for previous, argument in zip(["", *arguments], arguments, strict=False)
    ]
    args = build_parser().parse_intermixed_args(list(compress(arguments, (not flag for flag in is_override))))
    args.overrides += compress(arguments, is_override)
    args.weights = args.weights or ([None] if args.grid else [0.0, 0.1, 0.3])
    args.kl = args.kl or [None]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the last line of stdout is JSON even if runs failed, and an error is one message on stderr."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)

    def run_and_print() -> None:
        if args.dry_run:
            sys.stdout.write(check_sweep(args))
            return
        from rluf.utils.files import to_jsonable

        report = run_sweep(args)
        sys.stdout.write(json.dumps(to_jsonable(report), allow_nan=False) + "\n")
        raise_for_failed_runs(report)

    return run_command(run_and_print)


if __name__ == "__main__":
    raise SystemExit(main())
