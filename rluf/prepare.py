"""From raw logs to training data: validate, quarantine, split, sample; with a card of what became of every row.

python -m rluf.prepare --config configs/human.yaml prepare.output=runs/data
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.prepare")


def prepare(settings: Settings, out: Path) -> dict[str, Any]:
    """Write the data set of `settings.data` to the folder `out` and return its data card. Ray must be initialised.

    Raises DataError for logs that are missing, empty or too bad, ResourceError when the disk is full; `out` is then as
    it was before.
    """
    from rluf.feedback.pipeline import build

    return build(settings, out)


def output_folder(settings: Settings) -> Path:
    """Where the command writes: prepare.output, else <run.root>/<name>/data."""
    from rluf.paths import runs_root

    if settings.prepare.output is not None:
        return Path(settings.prepare.output).expanduser().resolve()
    return runs_root(settings) / settings.name / "data"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    loaded = parse("prepare", __doc__ or "", arguments)
    settings = loaded.settings

    def run() -> None:
        from cluster.connect import connected
        from rluf.feedback.sources import resolve
        from rluf.tracking.console import setup_logging

        setup_logging()
        for kind, entries in settings.data:
            resolve(entries, kind)
        out = output_folder(settings)
        with connected(settings):
            prepare(settings, out)
        logger.info("data set: %s", out)

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
