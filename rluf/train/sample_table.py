"""A few of the responses that training draws, for people to read while the run goes on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rluf.errors import LostError
from rluf.objectives.judges import failed, last_user
from rluf.tracking.run_files import DrawnRow
from rluf.train.actor_groups import within

if TYPE_CHECKING:
    from rluf.tracking.wandb import Tracker
    from rluf.train.controller import Pipeline
    from rluf.types import Group

logger = logging.getLogger(__name__)

FETCH_S = 60.0
BESIDES = ("reward", "response_length", "kl")
"""Values of a sample that are no objective's."""


def due(step: int, last: int) -> bool:
    """Whether to show the draws of `step`: 1, 2, 4, 8 ... and the last, so that tables stay few however long a run."""
    return step.bit_count() == 1 or step == last


async def show(pipeline: Pipeline, step: int, count: int, tracker: Tracker) -> None:
    """Log what `drawn` finds. Where it is lost with its machine, a warning says so: no run goes back for a table."""
    try:
        tracker.log_drawn(step, await drawn(pipeline, step, count))
    except LostError as error:
        logger.warning("step %d has no table of responses: %s", step, error)


async def drawn(pipeline: Pipeline, step: int, count: int) -> list[DrawnRow]:
    """The first response to `count` prompts of the last step, spread over its groups.

    Raises LostError when one is no longer in the object store, StallError when it takes more than FETCH_S.
    """
    places = range(0, len(pipeline.learnt), max(1, len(pipeline.learnt) // count)) if count else ()
    rows: list[DrawnRow] = []
    for place in list(places)[:count]:
        group: Group = await within(pipeline.learnt[place], FETCH_S, "the object store")
        values = {name: table[place][0] for name, table in pipeline.values.items()}
        text = group.samples[0].text
        rows.append(
            {
                "step": step,
                "version": group.version,
                "topic": group.prompt.topic,
                "prompt": last_user(group.prompt.messages),
                "response": text,
                "scores": {name: value for name, value in values.items() if name not in BESIDES},
                "reward": values["reward"],
                "kl": values.get("kl"),
                "failed": failed(group.prompt.messages, text),
            }
        )
    return rows
