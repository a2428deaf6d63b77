"""Write the report of a run folder again, from the files in it.

python -m rluf.report runs/quickstart/latest
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from rluf.config.cli import guard

logger = logging.getLogger("rluf.report")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message on stderr."""
    parser = argparse.ArgumentParser(
        prog="rluf.report",
        usage="python -m rluf.report FOLDER",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="run folder, such as runs/quickstart/latest")
    folder: Path = parser.parse_args(arguments).folder

    def run() -> int:
        from rluf.tracking.console import setup_logging
        from rluf.tracking.report import write_report

        setup_logging()
        logger.info("report: %s", write_report(folder.expanduser()))
        return 0

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
