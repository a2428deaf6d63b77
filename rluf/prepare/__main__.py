"""From raw logs to training data: validate, quarantine, split, sample; with a card of what became of every row.

python -m rluf.prepare --config configs/prepare.yaml prepare.output=runs/data

--forget USER  take a user out of the data set that is there, with proof (may be given more than once)
--signals      rank the signals of users (love, thumbs, continue, follow-up, return) on the data set, made if missing
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.prepare")


def output_folder(settings: Settings) -> Path:
    """Where the command writes: prepare.output, else <run.root>/<name>/data."""
    from rluf.utils.paths import runs_root

    if settings.prepare.output is not None:
        return Path(settings.prepare.output).expanduser().resolve()
    return runs_root(settings) / settings.name / "data"


def build_command(settings: Settings, out: Path) -> None:
    """Look at the logs, then start or join Ray and build."""
    from cluster.connect import connected
    from rluf.prepare.pipeline import build
    from rluf.prepare.readers.sources import resolve

    for kind, entries in settings.data:
        resolve(entries, kind)
    with connected(settings):
        build(settings, out)
    logger.info("data set: %s", out)


def forget_command(out: Path, users: Sequence[str]) -> None:
    """Take users out of the data set and say what is left."""
    from rluf.prepare.erasure import forget

    proof = forget(out, users)
    gone = sum(proof["rows_removed"].values())
    logger.info("%d rows of %d users are gone, none is left; proof in %s", gone, len(users), out / "data_card.json")


def signals_command(out: Path) -> None:
    """Rank the signals of the data set."""
    from rluf.prepare.signals import signal_lines, write_signals

    for line in signal_lines(write_signals(out)):
        logger.info("%s", line)
    logger.info("signals: %s", out / "signals.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--forget", action="append", default=[], metavar="USER")
    flags.add_argument("--signals", action="store_true")
    asked, rest = flags.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    settings = parse("prepare", __doc__ or "", rest).settings

    def run() -> None:
        from rluf.tracking.console import setup_logging

        setup_logging()
        out = output_folder(settings)
        if asked.forget:
            forget_command(out, asked.forget)
        elif not asked.signals or not (out / "data_card.json").is_file():
            build_command(settings, out)
        if asked.signals:
            signals_command(out)

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
