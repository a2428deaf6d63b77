"""Judge an A/B test from its event log, or plan one: effects by user, CUPED, always-valid intervals, Holm.

python -m rluf.evaluate abtest --data events.jsonl --control base --treatment aligned --start 2026-02-01T00:00:00+00:00
python -m rluf.evaluate abtest --plan --base-rate 0.02 --lift 0.1 --daily-users 5000
python -m rluf.evaluate abtest --simulate runs/experiment.jsonl --users 4000
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard
from rluf.errors import SettingsError

if TYPE_CHECKING:
    from rluf.evaluate.ab_analysis import Design
    from rluf.evaluate.power import Question

SIMULATED = ("base-cool", "base-warm")
"""Control and treatment of the simulated experiment: two model versions of the sample log."""


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rluf.evaluate.abtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="event logs: .jsonl, .jsonl.gz or .parquet")
    add("--control", default="control", help="name of the control arm (default: control)")
    add("--treatment", default="treatment", help="name of the treatment arm (default: treatment)")
    add("--arm", metavar="COLUMN", help="column that names the arm (default: arm, else model_version)")
    add("--salt", help="put the log's users into two arms by salted hash instead of reading their arm")
    add("--crossed", action="store_true", help="responses, not users, were given an arm at random: users saw both")
    add("--shares", type=float, nargs=2, default=(0.5, 0.5), metavar="S", help="the arms' shares, control first")
    add("--start", metavar="TIME", help="when the experiment began; earlier events are CUPED's pre-period")
    add("--metrics", type=names, default=(), metavar="A,B,...", help="what to test (default: all usual ones)")
    add("--column", action="append", default=[], help="a further numeric or yes/no column, usable as a metric")
    add("--alpha", type=float, default=0.05, help="false-positive rate (default 0.05)")
    add("--looks", type=int, default=0, help="number of looks for the always-valid intervals (default: one a day)")
    add("--planned-users", type=int, help="users of both arms where these are tightest (default: all there are)")
    add("--aa", type=int, default=0, metavar="SPLITS", help="A/A check: split the control at random this often")
    add("--seed", type=int, default=1, help="seed of the A/A splits and of --simulate (default 1)")
    add("--plan", action="store_true", help="how many users and days it takes; --data: from the control arm")
    add("--base-rate", type=float, help="plan: the metric's rate per response in the control")
    add("--lift", type=float, default=0.1, help="plan: relative change to be found (default 0.1)")
    add("--responses-per-user", type=float, help="plan: responses of a user during the experiment (default 1)")
    add("--icc", type=float, help="plan: correlation of two responses' reactions within a user (default 0)")
    add("--correlation", type=float, help="plan: of a user's rate with the pre-period's, for CUPED (default 0)")
    add("--power", type=float, default=0.8, help="plan: chance to find the change (default 0.8)")
    add("--daily-users", type=float, help="plan: new users a day over both arms")
    add("--simulate", type=Path, metavar="FILE", help="write a log: simulated users, two versions of the sample")
    add("--users", type=int, default=4000, help="simulate: users over both arms (default 4000)")
    return parser


def design_of(given: argparse.Namespace) -> Design:
    """The experiment that the command line describes. SettingsError for values that describe none."""
    from rluf.evaluate.ab_analysis import Design

    if not 0.0 < given.alpha < 1.0 or given.looks < 0 or given.aa < 0 or min(given.shares) <= 0.0:
        raise SettingsError(
            f"--alpha {given.alpha:g} must lie between 0 and 1, --shares {given.shares[0]:g} {given.shares[1]:g} above "
            f"0, --looks {given.looks} and --aa {given.aa} at 0 or above"
        )
    start = None
    if given.start:
        try:
            when = datetime.fromisoformat(given.start)
        except ValueError as error:
            raise SettingsError(f"--start {given.start}: {error}; write 2026-02-01T00:00:00+00:00") from error
        start = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return Design(
        control=given.control, treatment=given.treatment, shares=tuple(given.shares), salt=given.salt, start=start,
        crossed=given.crossed, metrics=given.metrics, alpha=given.alpha, looks=given.looks,
        planned_users=given.planned_users,
    )  # fmt: skip


def question_of(given: argparse.Namespace, measured: dict[str, float]) -> Question:
    """What the planner is asked: the command line first, then what a log's control arm showed, then the defaults."""
    from rluf.evaluate.power import Question

    said = {
        "base_rate": given.base_rate, "responses": given.responses_per_user, "icc": given.icc,
        "correlation": given.correlation,
    }  # fmt: skip
    values = {"responses": 1.0, "icc": 0.0, "correlation": 0.0} | measured
    values |= {name: value for name, value in said.items() if value is not None}
    if "base_rate" not in values:
        raise SettingsError("--plan needs --base-rate, such as 0.02, or --data with a control arm to read it from")
    return Question(
        **values, lift=given.lift, alpha=given.alpha, power=given.power, metrics=max(1, len(given.metrics)),
        treated=given.shares[1] / sum(given.shares), daily_users=given.daily_users,
    )  # fmt: skip


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Do what is asked; returns the JSON line and writes the table. Raises RlufError."""
    if given.simulate:
        return simulate(given.simulate, given.users, given.seed)
    from rluf.evaluate import ab_analysis as abtest
    from rluf.evaluate import power
    from rluf.evaluate import tables as view

    design = design_of(given)
    if given.plan:
        found = power.plan(question_of(given, abtest.observed(read(given), design) if given.data else {}))
        sys.stdout.write(view.plan_text(found))
        return found
    events = read(given)
    found = abtest.analyse(events, design)
    if given.aa:
        found["aa"] = abtest.aa_check(events, design, splits=given.aa, seed=given.seed)
    sys.stdout.write(view.abtest_text(found))
    return found


def read(given: argparse.Namespace) -> Any:
    """The event log. SettingsError when none is named."""
    from rluf.evaluate.events import read_events

    if not given.data:
        raise SettingsError("no event log; name one with --data, or plan with --plan --base-rate")
    return read_events(given.data, arm=given.arm, columns=given.column)


def simulate(out: Path, users: int, seed: int) -> dict[str, Any]:
    """Write a simulated experiment of 14 days after 14 days of pre-period; returns its counts."""
    from rluf.evaluate.events import assigned
    from rluf.prepare.splits import short_hash
    from rluf.simulate.experiment import experiment_rows, read_served
    from rluf.tracking.run_files import write_jsonl
    from rluf.utils.paths import sample_file

    if users < 2:
        raise SettingsError(f"--users {users} is too few for two arms; give 2 or more")
    people = [short_hash("user", str(seed), str(n)) for n in range(users)]
    served = read_served(sample_file("feedback"), SIMULATED)
    rows = experiment_rows(
        dict(zip(("control", "treatment"), served, strict=True)), assigned(people, f"simulated-{seed}", (0.5, 0.5)),
        names=people, days=14, pre_days=14, reads_per_day=1.0, seed=seed,
    )  # fmt: skip
    write_jsonl(out, rows)
    return {"written": str(out), "rows": len(rows), "users": users, "start": "2025-05-15T00:00:00+00:00"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. The last line of stdout is JSON; errors of the user's are one clear message on stderr."""
    given = options().parse_args(arguments)

    def work() -> None:
        from rluf.tracking.run_files import jsonable

        sys.stdout.write(json.dumps(jsonable(run(given)), allow_nan=False) + "\n")

    return guard(work)


if __name__ == "__main__":
    raise SystemExit(main())
