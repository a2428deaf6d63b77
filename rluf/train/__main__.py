"""The main job: from reactions to a better policy.

Reads the log, trains missing reward models, moves the policy, compares it with its base on unseen prompts, writes a
report. Without --config it runs the quickstart.

    ray job submit --working-dir . -- python -m rluf.train --config configs/human.yaml
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.train")


def train(settings: Settings) -> Path:
    """Run the whole job; returns the run folder. Raises RlufError with one clear message."""
    from cluster.autoscaling import capacity
    from cluster.connect import connected
    from cluster.plan import check_host, plan, table
    from rluf.artifacts import check_inputs, model_folders, prepared, rewarded
    from rluf.checkpoint.upload import Uploader
    from rluf.evaluate.compare import compare, write_cards, write_outcome
    from rluf.models.hub import resolve_model
    from rluf.report.model_card import write_model_card
    from rluf.tracking.console import setup_logging
    from rluf.tracking.run_files import write_json
    from rluf.tracking.wandb import Tracker
    from rluf.train.checkpoint_manager import resumed_folder
    from rluf.train.loop import align
    from rluf.utils.paths import cache_dir, new_run_folder, runs_root
    from rluf.utils.timing import Phases

    setup_logging()
    phases, cache = Phases(), cache_dir(settings)
    check_inputs(settings)
    check_host(settings, runs_root(settings), cache)
    model = phases.time("model", resolve_model, settings.model.path, cache)

    with ExitStack() as stack:
        phases.time("ray", stack.enter_context, connected(settings))
        planned = plan(settings)
        logger.info("actors:\n%s", table(planned, fancy=False))
        stack.enter_context(capacity(planned, settings.cluster.grow_deadline_s))

        folder = resumed_folder(settings, runs_root(settings) / settings.name) or new_run_folder(settings)
        setup_logging(folder / "run.log")
        logger.info("run folder: %s", folder)
        write_json(folder / "config.json", settings.model_dump(mode="json"))
        uploads = Uploader.of(settings, folder)
        if uploads is not None:
            uploads.begin()

        data = phases.time("prepare", prepared, settings)
        rewards = phases.time("reward", rewarded, settings, data)
        write_cards(folder, data, rewards)

        tracker = stack.enter_context(Tracker(settings, folder))
        tracker.log_stages(data, rewards)
        outcome = asyncio.run(align(settings, folder, model, data.folder, model_folders(rewards), tracker))
        phases.add(outcome.phases)

        summary = phases.time("compare", compare, settings, outcome, data, rewards)
        write_outcome(settings, folder, summary, outcome, phases, tracker)
        write_model_card(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message on stderr."""
    loaded = parse("train", __doc__ or "", arguments)
    return guard(lambda: train(loaded.settings))


if __name__ == "__main__":
    raise SystemExit(main())
