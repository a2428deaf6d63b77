"""Reward hacking monitor: measures the replies of each step and acts on alarms as `algorithm.hacking_alarms` selects.

rluf.evaluate.alarms holds the tests and the escalation policy; this module applies their decisions to the run. Replies
on topics with an objective of their own (refusals of harmful requests) are not measured: there training is meant to
change the style of the replies.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rluf.algorithms.registry import find_algorithm
from rluf.config.settings import Settings
from rluf.errors import ActorLostError, DataError, RewardHackingError
from rluf.evaluate.alarms import AlarmAction, MonitorAlarm, MonitorCheck, TrainingAlarms, decide_action
from rluf.evaluate.monitors import MonitorSample
from rluf.train.actor_calls import fetch_group
from rluf.types import Group

if TYPE_CHECKING:
    from rluf.tracking.wandb import WandbTracker
    from rluf.train.controller import TrainController

logger = logging.getLogger(__name__)


class RewardHackingMonitor:
    """Alarms of one run: `set_baseline` before the first step, `check_step` after each one."""

    def __init__(self, settings: Settings, tracker: WandbTracker, *, love_frozen: bool = False) -> None:
        """Do nothing where algorithm.hacking_alarms is off, or the steps of the algorithm sample no replies.

        `love_frozen` holds the love weight at 0 for good: the run was rolled back once and would take the same path.
        """
        self._settings, self._tracker = settings, tracker
        is_offline = find_algorithm(settings.algorithm.name).offline
        self._mode = "off" if is_offline else settings.algorithm.hacking_alarms
        self._act_on_alarms = self._mode == "act"
        self._alarms: TrainingAlarms | None = None
        self._checks: list[MonitorCheck] = []
        self._last_action = AlarmAction.NONE
        self._love_frozen = love_frozen

    def set_baseline(self, groups: Sequence[Group]) -> None:
        """Use replies of the base policy to training prompts as the baseline.

        Each prompt has as many as in training, so that prompts of both are comparable. Raises DataError where every
        prompt is of a topic with an objective of its own.
        """
        if self._mode == "off" or self._alarms is not None:
            return
        topic_objectives = self._settings.aggregation.topic_objectives
        groups = [group for group in groups if group.prompt.topic not in topic_objectives]
        if not groups:
            raise DataError(
                "algorithm.hacking_alarms compares replies on prompts without an objective of their own "
                "(aggregation.topic_objectives), but the training split has none; add prompts, or set "
                "algorithm.hacking_alarms=off"
            )
        self._alarms = TrainingAlarms(_monitor_samples(groups), self._settings.algorithm.steps)

    async def check_step(self, controller: TrainController, step: int) -> None:
        """Measure the replies of a step, then warn, freeze the love weight, roll back or stop.

        A step whose replies were lost with their machine is not measured. Raises RewardHackingError, with the step to
        roll back to, for the last two actions where algorithm.hacking_alarms is act.
        """
        if self._alarms is None:
            return
        topic_objectives = self._settings.aggregation.topic_objectives
        try:
            groups: list[Group] = [await fetch_group(group_ref) for group_ref in controller.last_batch_refs]
        except ActorLostError as error:
            logger.warning("reward hacking monitor: step %d not checked: %s", step, error)
            return
        groups = [group for group in groups if group.prompt.topic not in topic_objectives]
        # Groups of weight version 0 are the base policy's: the first batch is more baseline for free.
        self._alarms.base_samples += _monitor_samples([group for group in groups if group.weight_version == 0])
        samples = _monitor_samples([group for group in groups if group.weight_version > 0])
        # In a thread: reading all replies would delay health checks and running rollouts.
        alarms = await asyncio.to_thread(self._alarms.add_step, step, samples)
        if alarms is None:
            self._freeze_love_weight(controller, self._last_action)
            return
        self._checks.append(MonitorCheck(step, alarms))
        decision = decide_action(self._checks)
        reasons = "; ".join(decision.reasons)
        # Only an escalation is reported: an alarm that lasts would repeat its message at every step.
        if decision.action > self._last_action:
            logger.warning(
                "reward hacking monitor: alarm at step %d (algorithm.hacking_alarms=%s): %s", step, self._mode, reasons
            )
            self._tracker.send_alert("reward hacking", f"step {step}: {reasons}")
        self._last_action = decision.action
        self._freeze_love_weight(controller, decision.action)
        if not self._act_on_alarms:
            return
        if decision.action >= AlarmAction.ROLL_BACK:
            # A second alarm with the love weight at 0 has another cause, which a second rollback would not remove.
            stop = self._love_frozen or decision.action is AlarmAction.STOP
            rollback_step = None if stop else decision.rollback_step
            raise RewardHackingError(f"reward hacking at step {step}: {reasons}", rollback_step)

    def _freeze_love_weight(self, controller: TrainController, action: AlarmAction) -> None:
        if not self._act_on_alarms:
            return
        is_frozen = self._love_frozen or action >= AlarmAction.FREEZE
        suspended = frozenset({"love"}) if is_frozen else frozenset()
        if suspended != controller.reward_aggregator.suspended_objectives:
            change = "set to 0 while the alarm is active" if is_frozen else "restored"
            logger.warning("reward hacking monitor: objectives.love.weight %s", change)
        controller.reward_aggregator.suspended_objectives = suspended

    def get_state(self) -> dict[str, Any] | None:
        """State as plain JSON; None where nothing is monitored."""
        if self._alarms is None:
            return None
        return {
            "alarms": asdict(self._alarms),
            "checks": [asdict(check) for check in self._checks],
            "love_frozen": self._love_frozen,
        }

    def restore(self, state: Mapping[str, Any] | None, controller: TrainController) -> None:
        """Restore `state`. Without one the run was not monitored, and is not from here on: it has no baseline."""
        if state is None:
            if self._mode != "off":
                logger.warning("reward hacking monitor: checkpoint has no alarm state; continuing with alarms disabled")
            return
        self._alarms = TrainingAlarms.from_state(state["alarms"], self._settings.algorithm.steps)
        self._checks = [
            MonitorCheck(**{**check, "alarms": [MonitorAlarm(**alarm) for alarm in check["alarms"]]})
            for check in state["checks"]
        ]
        # Either may hold: a run rolled back just now starts from a checkpoint that was written before the alarm.
        self._love_frozen = self._love_frozen or bool(state["love_frozen"])
        self._last_action = decide_action(self._checks).action
        self._freeze_love_weight(controller, self._last_action)


def _monitor_samples(groups: Sequence[Group]) -> list[MonitorSample]:
    return [
        MonitorSample.from_sample(sample, group.prompt.messages, group.prompt.topic)
        for group in groups
        for sample in group.samples
    ]
