"""Compare a policy with its base on unseen prompts: objectives, simulated users, monitors, gates, report.

python -m rluf.evaluate offline --config configs/quickstart.yaml evaluate.candidate=runs/quickstart/latest/policy

The word offline may be left out. Other sub-commands, each with its own --help:
python -m rluf.evaluate score --model FOLDER --data FILE.jsonl[.gz]   held-out rows through a reward model
python -m rluf.evaluate correlate --help
python -m rluf.evaluate abtest --help
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.evaluate")

SUBCOMMANDS = {"score": "rluf.evaluate.score", "correlate": "rluf.evaluate.correlate", "abtest": "rluf.evaluate.abtest"}
"""Sub-command -> module with main(arguments) -> exit code, imported when asked for."""


def evaluate(settings: Settings) -> Path:
    """Compare and report; returns the run folder <run.root>/<name>-evaluate/<time>. Raises RlufError."""
    from cluster.connect import connected
    from rluf.artifacts import check_inputs, model_folders, prepared, rewarded
    from rluf.evaluate.compare import compare, write_cards, write_outcome
    from rluf.models.hub import resolve_model
    from rluf.tracking.console import setup_logging
    from rluf.tracking.run_files import write_json
    from rluf.tracking.wandb import Tracker
    from rluf.train.loop import contrast
    from rluf.utils.paths import cache_dir, new_run_folder, runs_root
    from rluf.utils.timing import Phases

    setup_logging()
    phases, cache = Phases(), cache_dir(settings)
    check_inputs(settings)
    newest = runs_root(settings) / settings.name / "latest" / "policy"
    base = phases.time("model", resolve_model, settings.model.path, cache)
    candidate = resolve_model(settings.evaluate.candidate or str(newest), cache)

    with ExitStack() as stack:
        phases.time("ray", stack.enter_context, connected(settings))
        folder = new_run_folder(settings, suffix="-evaluate")
        setup_logging(folder / "run.log")
        logger.info("run folder: %s; %s against %s", folder, candidate, base)
        write_json(folder / "config.json", settings.model_dump(mode="json"))

        data = phases.time("prepare", prepared, settings)
        rewards = phases.time("reward", rewarded, settings, data)
        write_cards(folder, data, rewards)

        tracker = stack.enter_context(Tracker(settings, folder))
        outcome = asyncio.run(contrast(settings, base, candidate, data.folder, model_folders(rewards)))
        phases.add(outcome.phases)

        summary = phases.time("compare", compare, settings, outcome, data, rewards)
        write_outcome(settings, folder, summary, outcome, phases, tracker)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in SUBCOMMANDS:
        code: int = import_module(SUBCOMMANDS[given[0]]).main(given[1:])
        return code
    loaded = parse("evaluate", __doc__ or "", given[1:] if given[:1] == ["offline"] else given)
    return guard(lambda: evaluate(loaded.settings))


if __name__ == "__main__":
    raise SystemExit(main())
