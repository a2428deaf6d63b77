"""Table of a few training samples, for people to read while the run continues."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rluf.errors import ActorLostError
from rluf.objectives.judges import get_last_user_text, list_failed_judges
from rluf.tracking.run_files import SAMPLE_TABLE_ROWS, RolloutSample
from rluf.train.actor_calls import fetch_group

if TYPE_CHECKING:
    from rluf.tracking.wandb import WandbTracker
    from rluf.train.controller import TrainController
    from rluf.types import Group

logger = logging.getLogger(__name__)

NON_OBJECTIVE_VALUES = ("reward", "response_length", "kl")
"""Values of a sample that are not scores of an objective."""


def should_log_samples(step: int, last_step: int) -> bool:
    """Whether to log samples of `step`: steps 1, 2, 4, 8 ... and the last, so that tables stay few in a long run."""
    is_power_of_two = step.bit_count() == 1
    return is_power_of_two or step == last_step


async def log_sample_table(controller: TrainController, step: int, tracker: WandbTracker) -> None:
    """Log `collect_samples`. Samples lost with their machine cause only a warning: no run is rolled back for that."""
    try:
        tracker.log_rollout_samples(step, await collect_samples(controller, step, SAMPLE_TABLE_ROWS))
    except ActorLostError as error:
        logger.warning("sample table: step %d has none: %s", step, error)


async def collect_samples(controller: TrainController, step: int, sample_count: int) -> list[RolloutSample]:
    """The first response to each of `sample_count` prompts of the last step, spread evenly over its groups.

    Raises ActorLostError when one is no longer in the object store, DeadlineError when it cannot be read in time.
    """
    group_refs = controller.last_batch_refs
    stride = max(1, len(group_refs) // sample_count) if sample_count else 1
    rows: list[RolloutSample] = []
    for group_index in range(0, len(group_refs), stride)[:sample_count]:
        group: Group = await fetch_group(group_refs[group_index])
        values = {name: table[group_index][0] for name, table in controller.sample_values.items()}
        response_text = group.samples[0].text
        rows.append(
            {
                "step": step,
                "version": group.weight_version,
                "topic": group.prompt.topic,
                "prompt": get_last_user_text(group.prompt.messages),
                "response": response_text,
                "scores": {name: value for name, value in values.items() if name not in NON_OBJECTIVE_VALUES},
                "reward": values["reward"],
                "kl": values["kl"],
                "failed": list_failed_judges(group.prompt.messages, response_text),
            }
        )
    return rows
