"""Build training data from raw logs: validate, quarantine, split, sample; with a data card that accounts for every row.

python -m rluf.prepare --config configs/prepare.yaml prepare.output=runs/data

--forget USER  remove a user from the existing data set, with proof (repeatable)
--signals      rank user signals (love, thumbs, continue, follow-up, return) on the data set; builds it if missing
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import CommandOptions, parse_command_line, run_command

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.prepare")


def resolve_output_folder(settings: Settings) -> Path:
    """Folder of the data set: prepare.output, else <run.root>/<name>/data."""
    from rluf.utils.paths import resolve_runs_root

    if settings.prepare.output is not None:
        return Path(settings.prepare.output).expanduser().resolve()
    return resolve_runs_root(settings) / settings.name / "data"


def run_build(settings: Settings, output_folder: Path) -> None:
    """Check that the logs exist, then start or join Ray and build the data set."""
    from cluster.connect import ray_connection
    from rluf.prepare.pipeline import build_data_set
    from rluf.prepare.readers.sources import resolve_sources

    # Before Ray starts, so that a wrong path fails in milliseconds.
    for kind, entries in settings.data:
        resolve_sources(entries, kind)
    with ray_connection():
        build_data_set(settings, output_folder)
    logger.info("data set %s: written", output_folder)


def run_erasure(output_folder: Path, user_ids: Sequence[str]) -> None:
    """Remove users from the data set and report the number of rows removed."""
    from rluf.errors import DataError
    from rluf.prepare.erasure import erase_users

    proof = erase_users(output_folder, user_ids)
    removed_rows = sum(proof["rows_removed"].values())
    logger.info(
        "data set %s: erased users=%d rows_removed=%d rows_left=0; proof in data_card.json",
        output_folder,
        len(user_ids) - len(proof["users_not_found"]),
        removed_rows,
    )
    if proof["users_not_found"]:
        raise DataError(
            f"{len(proof['users_not_found'])} of {len(user_ids)} users have no row in {output_folder}: "
            f"{', '.join(proof['users_not_found'])}; the others are erased. Check these ids, and the salt"
        )


def run_signal_ranking(output_folder: Path) -> None:
    """Rank the signals of the data set."""
    from rluf.prepare.signals import format_signal_lines, write_signal_report

    for line in format_signal_lines(write_signal_report(output_folder)):
        logger.info("%s", line)
    logger.info("signals: written to %s", output_folder / "signals.html")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--forget", action="append", default=[], metavar="USER", help="erase the rows of a user id; repeatable"
    )
    parser.add_argument("--signals", action="store_true", help="rank the signals of the data set")


def _check_logs(settings: Settings) -> None:
    """Find every log, without opening one; logs on the hub are not downloaded. Raises DataError."""
    from rluf.prepare.readers.sources import is_hub_data_set, resolve_sources

    for kind_name, entries in settings.data.sources_by_kind.items():
        resolve_sources([entry for entry in entries if not is_hub_data_set(entry)], kind_name)


COMMAND_OPTIONS = CommandOptions(_add_options, check=_check_logs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; expected errors are one message (see rluf.config.cli.run_command)."""
    loaded = parse_command_line("prepare", __doc__ or "", arguments, COMMAND_OPTIONS)
    settings, options = loaded.settings, loaded.options

    def run_action() -> None:
        from rluf.tracking.console import setup_logging

        setup_logging()
        output_folder = resolve_output_folder(settings)
        if options.forget:
            run_erasure(output_folder, options.forget)
        elif not options.signals or not (output_folder / "data_card.json").is_file():
            run_build(settings, output_folder)
        if options.signals:
            run_signal_ranking(output_folder)

    return run_command(run_action)


if __name__ == "__main__":
    raise SystemExit(main())
