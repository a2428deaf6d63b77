"""Write the report of a run folder again, from the files in it; with --wandb as a W&B Report.

python -m rluf.report runs/quickstart/latest
python -m rluf.report runs/quickstart/latest --wandb --dry-run
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from rluf.config.cli import guard

logger = logging.getLogger("rluf.report")

SPEC = "wandb-report.json"


def html(folder: Path) -> None:
    """Write report.html."""
    from rluf.report.html import write_report

    logger.info("report: %s", write_report(folder))


def wandb(folder: Path, *, dry_run: bool) -> None:
    """Save a W&B Report; a dry run writes its specification into the folder instead and asks no server."""
    from rluf.report.wandb_report import build, check, entity_of
    from rluf.tracking.run_files import write_json

    report = build(folder, entity="" if dry_run else entity_of(folder))
    spec = check(report)
    if dry_run:
        write_json(folder / SPEC, spec)
        logger.info("W&B Report, not sent: %s, %d blocks in %s", report.title, len(spec["blocks"]), folder / SPEC)
        return
    logger.info("W&B Report: %s", report.save().url)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message on stderr."""
    parser = argparse.ArgumentParser(
        prog="rluf.report",
        usage="python -m rluf.report FOLDER [--wandb [--dry-run]]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="run folder, such as runs/quickstart/latest")
    parser.add_argument("--wandb", action="store_true", help="save a W&B Report instead (needs wandb-workspaces)")
    parser.add_argument("--dry-run", action="store_true", help=f"with --wandb: write {SPEC}, send nothing")
    given = parser.parse_args(arguments)
    folder: Path = given.folder.expanduser()
    if given.dry_run and not given.wandb:
        parser.error("--dry-run goes with --wandb; the HTML report is only a file")

    def run() -> int:
        from rluf.tracking.console import setup_logging

        setup_logging()
        if given.wandb:
            wandb(folder, dry_run=given.dry_run)
        else:
            html(folder)
        return 0

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
