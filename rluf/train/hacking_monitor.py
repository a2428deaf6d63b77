"""Watches each step's replies for reward hacking and acts on alarms as `algorithm.alarms` says.

The decisions are those of rluf.evaluate.alarms; here is where they meet the run. Replies on topics that one objective
owns (refusals of harmful requests) are left out: there a change of manners is what was asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.config.settings import Settings
from rluf.errors import AlarmError, DataError, LostError
from rluf.evaluate.alarms import Action, Alarm, Baseline, Look, Question, Stream, decide
from rluf.evaluate.monitors import Reply, measure
from rluf.train.actor_groups import within
from rluf.train.controller import prompt_order
from rluf.train.prompt_store import topics_of
from rluf.types import Group, Prompt

if TYPE_CHECKING:
    from rluf.tracking.wandb import Tracker
    from rluf.train.controller import Pipeline

logger = logging.getLogger(__name__)

SEED = 3_000_017
FETCH_S = 60.0


class Watch:
    """The alarms of one run. `begin` before the first step, `look` after each one."""

    def __init__(self, settings: Settings, tracker: Tracker, *, held: bool = False) -> None:
        """Nothing is watched where algorithm.alarms is off.

        `held` keeps the love weight at 0: the run went back a checkpoint once, and would go the same way.
        """
        self._settings, self._tracker = settings, tracker
        self._acts = settings.algorithm.alarms == "act"
        self._stream: Stream | None = None
        self._looks: list[Look] = []
        self._told = Action.NONE
        self._held = held

    async def begin(self, pipeline: Pipeline) -> None:
        """Let the base policy answer `algorithm.alarm_prompts` training prompts once each: what steps compare with.

        Raises DataError where every training prompt is of a topic that one objective owns.
        """
        algorithm = self._settings.algorithm
        if algorithm.alarms == "off" or self._stream is not None:
            return
        asked = self._drawn(pipeline.prompts, algorithm.alarm_prompts)
        found = await pipeline.respond(asked, 1, self._settings.seed + SEED, lambda: None)
        baseline = Baseline.of(measure(_replies([group for group, _ in found])))
        self._stream = Stream(baseline, algorithm.steps)

    def _drawn(self, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
        """As training draws them: topics mixed alike, in an order of their own."""
        owners, topics = self._settings.objectives.owners, topics_of(prompts)
        free = [index for index, topic in enumerate(topics) if topic not in owners]
        if not free:
            raise DataError(
                "algorithm.alarms compares replies on prompts that no objective owns alone, but there are none in the "
                "training split; add prompts, or set algorithm.alarms=off"
            )
        times = self._settings.algorithm.times
        order = prompt_order([times.get(topics[index], 1) for index in free], self._settings.seed + SEED)
        return [prompts[free[index]] for index in itertools.islice(order, count)]

    async def look(self, pipeline: Pipeline, number: int, kl: float) -> None:
        """Measure the replies of step `number`; warn, freeze, go back or stop. Replies that are lost are not watched.

        Raises AlarmError, with the step to go back to, for the last two where algorithm.alarms is act.
        """
        if self._stream is None:
            return
        owners = self._settings.objectives.owners
        try:
            groups = [await within(ref, FETCH_S, "the object store") for ref in pipeline.learnt]
        except LostError as error:
            logger.warning("step %d is not watched for reward hacking: %s", number, error)
            return
        replies = _replies([group for group in groups if group.prompt.topic not in owners])
        if not replies:
            return
        names = [reply.prompt_id for reply in replies]
        values = await asyncio.to_thread(measure, replies)
        self._stream = self._stream.seen(values, names)
        self._looks.append(Look(number, self._stream.alarms(), kl))
        decision = decide(self._looks)
        if decision.action > self._told:
            text = f"step {number}: {'; '.join(decision.reasons)}"
            logger.warning("alarm at %s (algorithm.alarms=%s)", text, self._settings.algorithm.alarms)
            self._tracker.alert("reward hacking", text)
        self._told = decision.action
        if not self._acts:
            return
        self._freeze(pipeline, decision.action)
        if decision.action >= Action.ROLL_BACK:
            back = None if self._held or decision.action is Action.STOP else decision.back_to
            raise AlarmError(f"reward hacking at step {number}: {'; '.join(decision.reasons)}", back)

    def _freeze(self, pipeline: Pipeline, action: Action) -> None:
        frozen = frozenset({"love"}) if self._held or action >= Action.FREEZE else frozenset()
        if frozen != pipeline.combiner.frozen:
            logger.warning("the love weight is %s", "0 until the alarm is over" if frozen else "back")
        pipeline.combiner.frozen = frozen

    def state(self) -> dict[str, Any] | None:
        """All of it as plain JSON, for a checkpoint; None where nothing is watched."""
        if self._stream is None:
            return None
        stream = self._stream
        return {
            "baseline": asdict(stream.baseline),
            "gains": [gain.tolist() for gain in stream.gains],
            "last": dict(stream.last),
            "looks": [asdict(look) for look in self._looks],
            "held": self._held,
        }

    def restore(self, state: Mapping[str, Any] | None, pipeline: Pipeline) -> None:
        """Go on where `state` was taken; a run that was not watched then is not watched now."""
        if state is None:
            if self._settings.algorithm.alarms != "off":
                logger.warning("the checkpoint knows of no alarms, so this run goes on without them")
            return
        kept = dict(state["baseline"])
        questions = {name: Question(**one) for name, one in kept.pop("questions").items()}
        gains = tuple(np.asarray(gain, dtype=np.float64) for gain in state["gains"])
        self._stream = Stream(
            Baseline(questions=questions, **kept), self._settings.algorithm.steps, gains=gains, last=state["last"]
        )
        self._looks = [Look(**{**look, "alarms": [Alarm(**one) for one in look["alarms"]]}) for look in state["looks"]]
        self._held = self._held or bool(state["held"])
        if self._acts:
            self._freeze(pipeline, decide(self._looks).action)


def _replies(groups: Sequence[Group]) -> list[Reply]:
    return [
        Reply(group.prompt.id, group.prompt.messages, sample.text, len(sample.response_ids), group.prompt.topic)
        for group in groups
        for sample in group.samples
    ]
