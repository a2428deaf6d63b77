"""Analyze an A/B test from its event log, or plan one: effects by user, verdicts, CUPED, always-valid intervals.

python -m rluf.evaluate abtest --data events.jsonl --control base --treatment aligned --start 2026-02-01T00:00:00+00:00
python -m rluf.evaluate abtest --data events.csv --primary love --guard continued:-2% --segments
python -m rluf.evaluate abtest --plan --base-rate 0.02 --lift 0.1 --daily-users 5000
python -m rluf.evaluate abtest --simulate runs/experiment.jsonl --users 4000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import CommandParser, run_command
from rluf.errors import SettingsError

if TYPE_CHECKING:
    from rluf.evaluate.ab_design import ExperimentDesign
    from rluf.evaluate.events import EventLog
    from rluf.evaluate.power import PowerQuery

SIMULATED_ARMS = ("base-upbeat", "base-terse")
"""Control and treatment of the simulated experiment: two model versions of the sample log."""


def parse_name_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def build_parser() -> CommandParser:
    """Parser of the command line."""
    parser = CommandParser("rluf.evaluate abtest", description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="logs: .jsonl, .csv (.gz too) or .parquet, or the folder of a feedback store",
    )
    add("--control", default="control", help="name of the control arm (default: control)")
    add("--treatment", nargs="+", default=["treatment"], metavar="ARM", help="treatment arms (default: treatment)")
    add("--arm", metavar="COLUMN", help="column that names the arm (default: arm, else model_version)")
    add("--salt", help="assign the log's users to the two arms by salted hash instead of reading their arm")
    add("--crossed", action="store_true", help="responses, not users, were randomized: users saw both arms")
    add(
        "--shares",
        type=float,
        nargs="+",
        metavar="S",
        help="planned shares of the arms, control first (default: equal)",
    )
    add("--start", metavar="TIME", help="start of the experiment; earlier events are the pre-period for CUPED")
    add(
        "--metrics",
        type=parse_name_list,
        default=(),
        metavar="A,B,...",
        help="metrics to test (default: all standard ones)",
    )
    add(
        "--primary",
        type=parse_name_list,
        default=(),
        metavar="A,B",
        help="metrics that decide, higher is better "
        "(default: the first of --metrics, else love); alpha is divided over these alone",
    )
    add(
        "--guard",
        action="append",
        default=[],
        metavar="NAME:MARGIN",
        help="metric that must not fall by more than a "
        "negative margin or rise by more than a positive one: helpful:-2%%, latency:+50",
    )
    add(
        "--quantile",
        action="append",
        default=[],
        metavar="COLUMN:LEVEL",
        help="quantile of a numeric column as a metric: latency:0.95",
    )
    add("--cap", type=float, metavar="LEVEL", help="cap numeric values and responses per user at this quantile: 0.999")
    add(
        "--love",
        action="append",
        default=[],
        metavar="NAME",
        help="reaction that means love (default: love, heart, heart emoji and the like)",
    )
    add("--segments", action="store_true", help="effects by topic, locale, activity and users who never react")
    add("--column", action="append", default=[], help="additional numeric or yes/no column to use as a metric")
    add("--alpha", type=float, default=0.05, help="false-positive rate (default 0.05)")
    add("--looks", type=int, default=0, help="number of looks of the always-valid intervals (default: one per day)")
    add("--planned-users", type=int, help="users of both arms at which these are tightest (default: all)")
    add(
        "--aa",
        type=int,
        default=0,
        metavar="SPLITS",
        help="A/A check: number of splits of the control by --shares",
    )
    add("--seed", type=int, default=1, help="seed of the A/A splits and of --simulate (default 1)")
    _add_planning_arguments(parser)
    return parser


def _add_planning_arguments(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--plan",
        action="store_true",
        help="compute users and days needed; --data: measure the inputs on the control arm",
    )
    add("--base-rate", type=float, help="plan: rate of the metric per response in the control")
    add("--lift", type=float, default=0.1, help="relative change to plan for, or worth detecting (default 0.1)")
    add("--responses-per-user", type=float, help="plan: responses per user during the experiment (default 1)")
    add("--activity-cv", type=float, help="plan: standard deviation of responses per user over their mean (default 0)")
    add("--icc", type=float, help="plan: correlation of the reactions to two responses within a user (default 0)")
    add("--correlation", type=float, help="plan: correlation of user rates with the pre-period, for CUPED (default 0)")
    add("--power", type=float, default=0.8, help="probability of detecting the change (default 0.8)")
    add("--daily-users", type=float, help="plan: new users per day over both arms")
    add(
        "--simulate",
        type=Path,
        metavar="FILE",
        help="write a log of simulated users on two model versions of the sample log",
    )
    add("--users", type=int, default=4000, help="simulate: users in both arms together (default 4000)")


def build_design(args: argparse.Namespace) -> ExperimentDesign:
    """Experiment design from the command line. SettingsError for invalid values."""
    from rluf.evaluate.ab_design import ExperimentDesign, parse_guardrail, parse_quantile_metric

    shares = tuple(args.shares or [1.0 / (1 + len(args.treatment))] * (1 + len(args.treatment)))
    if (
        not 0.0 < args.alpha < 1.0 or min(args.looks, args.aa, args.seed) < 0
        or not all(0.0 < share < math.inf for share in shares)
    ):  # fmt: skip
        raise SettingsError(
            f"--alpha {args.alpha:g} must be between 0 and 1, --shares {' '.join(f'{share:g}' for share in shares)} "
            f"above 0, --looks {args.looks}, --aa {args.aa} and --seed {args.seed} 0 or more"
        )
    if args.planned_users is not None and args.planned_users < 2:
        raise SettingsError(f"--planned-users {args.planned_users} must be 2 or more: the users of all arms together")
    if args.lift == 0.0 or not math.isfinite(args.lift):
        raise SettingsError(f"--lift {args.lift:g} must be a relative change other than 0, such as 0.1")
    if len(shares) != 1 + len(args.treatment):
        raise SettingsError(
            f"--shares has {len(shares)} values for {1 + len(args.treatment)} arms; give one for the control and one "
            "for each treatment"
        )
    if not (args.cap is None or 0.5 <= args.cap < 1.0) or not 0.0 < args.power < 1.0:
        raise SettingsError(f"--cap {args.cap} must be from 0.5 to below 1, and --power {args.power:g} from 0 to 1")
    start_time = None
    if args.start:
        try:
            start = datetime.fromisoformat(args.start)
        except ValueError as error:
            raise SettingsError(
                f"--start {args.start}: {error}; expected a time such as 2026-02-01T00:00:00+00:00"
            ) from error
        # A time without a zone is UTC, like the times of the log: the local zone would shift the start by hours.
        start_time = (start if start.tzinfo else start.replace(tzinfo=UTC)).timestamp()
    return ExperimentDesign(
        control=args.control, treatment=args.treatment[0], other_treatments=tuple(args.treatment[1:]), shares=shares,
        assignment_salt=args.salt, start_time=start_time, is_crossed=args.crossed, metric_names=args.metrics,
        alpha=args.alpha, look_count=args.looks, planned_users=args.planned_users, primary_names=args.primary,
        guardrails=tuple(map(parse_guardrail, args.guard)), cap=args.cap, lift=args.lift, power=args.power,
        quantile_metrics=tuple(map(parse_quantile_metric, args.quantile)), has_segments=args.segments,
    )  # fmt: skip


def build_power_query(
    args: argparse.Namespace, design: ExperimentDesign, measured_values: dict[str, float]
) -> PowerQuery:
    """Planner inputs: the command line first, then values measured on the control arm, then the defaults.

    Alpha is divided as in the analysis: over the primary metrics and the treatments.
    """
    from rluf.evaluate.power import PowerQuery

    from_arguments = {
        "base_rate": args.base_rate, "responses": args.responses_per_user, "activity_cv": args.activity_cv,
        "icc": args.icc, "correlation": args.correlation,
    }  # fmt: skip
    values = {"responses": 1.0, "activity_cv": 0.0, "icc": 0.0, "correlation": 0.0} | measured_values
    values |= {name: value for name, value in from_arguments.items() if value is not None}
    if "base_rate" not in values:
        raise SettingsError("--plan needs --base-rate, such as 0.02, or --data with a control arm to read it from")
    return PowerQuery(
        **values, lift=args.lift, alpha=args.alpha, power=args.power,
        metrics=max(1, len(design.primary_names)) * len(args.treatment),
        treated=min(design.shares[1:]) / (design.shares[0] + min(design.shares[1:])), daily_users=args.daily_users,
    )  # fmt: skip


def run_abtest(args: argparse.Namespace) -> dict[str, Any]:
    """Run the requested task; writes the table and returns the content of the JSON line. Raises RlufError."""
    if args.simulate:
        return simulate_experiment(args.simulate, args.users, args.seed)
    from rluf.evaluate import ab_analysis, ab_checks, ab_tables, power

    design = build_design(args)
    if args.plan:
        measured_values = ab_checks.measure_planning_inputs(load_events(args), design) if args.data else {}
        plan = power.plan_experiment(build_power_query(args, design, measured_values))
        sys.stdout.write(ab_tables.format_plan(plan))
        return plan
    events = load_events(args)
    report = ab_analysis.analyze_experiment(events, design)
    if args.aa:
        report["aa"] = ab_checks.run_aa_check(events, design, split_count=args.aa, seed=args.seed)
    sys.stdout.write(ab_tables.format_abtest_report(report))
    return report


def load_events(args: argparse.Namespace) -> EventLog:
    """The event log of --data. SettingsError when none is named."""
    from rluf.evaluate.ab_design import DEFAULT_METRICS
    from rluf.evaluate.events import read_event_log

    if not args.data:
        raise SettingsError("no event log; give one with --data, or plan with --plan --base-rate")
    quantile_columns = [text.rpartition(":")[0] for text in args.quantile]
    columns = list(dict.fromkeys([*args.column, *filter(None, quantile_columns)]))
    # A metric that is named needs no --column as well. The standard ones are computed, whatever columns are called.
    named = [*args.metrics, *args.primary, *(text.rpartition(":")[0] for text in args.guard)]
    return read_event_log(
        args.data, arm_column=args.arm, metric_columns=columns, love_names=args.love,
        optional_columns=[name for name in named if name and name not in DEFAULT_METRICS],
    )  # fmt: skip


def simulate_experiment(output_path: Path, user_count: int, seed: int) -> dict[str, Any]:
    """Write a simulated experiment of 14 days after a pre-period of 14 days; returns its counts."""
    from rluf.config.settings import Settings
    from rluf.evaluate.events import assign_users
    from rluf.simulate.experiment import read_served_responses, simulate_experiment_rows
    from rluf.simulate.ground_truth import load_reader
    from rluf.utils.files import write_jsonl
    from rluf.utils.hashing import hash_parts
    from rluf.utils.paths import find_sample_log, resolve_cache_folder

    if user_count < 2:
        raise SettingsError(f"--users {user_count} is too few for two arms; give 2 or more")
    user_ids = [hash_parts("user", str(seed), str(n)) for n in range(user_count)]
    arm_responses = read_served_responses(find_sample_log("feedback"), SIMULATED_ARMS)
    rows = simulate_experiment_rows(
        dict(zip(("control", "treatment"), arm_responses, strict=True)),
        assign_users(user_ids, f"simulated-{seed}", (0.5, 0.5)),
        user_ids=user_ids,
        days=14,
        pre_days=14,
        reads_per_day=1.0,
        seed=seed,
        reader=load_reader(resolve_cache_folder(Settings())),
    )
    write_jsonl(output_path, rows)
    return {"written": str(output_path), "rows": len(rows), "users": user_count, "start": "2025-05-15T00:00:00+00:00"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; the last line of stdout is JSON, and an error is one message on stderr."""
    args = build_parser().parse_args(arguments)

    def run_and_print() -> None:
        from rluf.utils.files import to_jsonable

        sys.stdout.write(json.dumps(to_jsonable(run_abtest(args)), allow_nan=False) + "\n")

    return run_command(run_and_print)
