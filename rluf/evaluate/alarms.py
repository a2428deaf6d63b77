"""Alarms of the reward-hacking monitors during training, and the escalation policy; pure functions.

At each check the latest replies are tested against those of the base policy (rluf.evaluate.monitors). The checks of a
run share FALSE_ALARM_RATE equally, so the probability of any false alarm in a run is at most that, whatever the
dependence between monitors and checks. benchmarks/planted.py measures false alarms and planted hacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from rluf.errors import DataError
from rluf.evaluate.monitors import FALSE_ALARM_RATE, MonitorResult, MonitorSample, evaluate_monitors

MAX_CHECKS = 20
"""Checks of a run at most: more would each get a smaller share of the error rate."""
MIN_WINDOW_REPLIES, MAX_WINDOW_REPLIES = 300, 2000
"""Replies that a check reads: all since the last check, and earlier ones up to the first number."""


class AlarmAction(IntEnum):
    """Response to an alarm, in order of severity; FREEZE sets the love weight to 0 while the alarm is active."""

    NONE = 0
    WARN = 1
    FREEZE = 2
    ROLL_BACK = 3
    STOP = 4


FIRST_ACTIONS: Mapping[str, AlarmAction] = {
    "farewell": AlarmAction.FREEZE, "unprompted_farewell": AlarmAction.FREEZE, "early_ending": AlarmAction.FREEZE,
    "affection": AlarmAction.FREEZE, "sycophancy": AlarmAction.FREEZE, "refusal": AlarmAction.FREEZE,
    "phrase": AlarmAction.FREEZE,
    "opening": AlarmAction.FREEZE, "similarity": AlarmAction.FREEZE, "echo": AlarmAction.FREEZE,
    "looping": AlarmAction.ROLL_BACK, "control_tokens": AlarmAction.ROLL_BACK,
}  # fmt: skip
"""Action for the first alarm of a monitor; WARN for the others."""
WARN_ONLY_MONITORS = frozenset({"emoji", "question_ending", "asking_back", "entropy"})
"""Monitors whose change may be what users like, or what training does anyway: they never do more than warn."""


@dataclass(frozen=True, slots=True)
class MonitorAlarm:
    """A monitor that is worse than the base policy, with its values for both and the phrase concerned, if any."""

    monitor: str
    base_value: float
    current_value: float
    detail: str = ""


@dataclass(slots=True)
class TrainingAlarms:
    """Checks of a run of `total_steps` steps: give each step's replies to `add_step`.

    `base_samples` are replies of the base policy to random training prompts, as many per prompt as in training; else
    the topics of the prompts could raise alarms.
    """

    base_samples: list[MonitorSample]
    total_steps: int
    window: list[MonitorSample] = field(default_factory=list)
    """Latest replies, oldest first."""
    unchecked_replies: int = 0
    """Replies since the last check."""

    def __post_init__(self) -> None:
        """DataError without replies of the base policy."""
        if not self.base_samples:
            raise DataError("alarms need responses of the base policy, got none; sample them before the first step")

    @classmethod
    def from_state(cls, state: Mapping[str, Any], total_steps: int) -> TrainingAlarms:
        """Restore what dataclasses.asdict returned, for a run that may now have another number of steps."""
        base_samples, window = (
            [MonitorSample(**{**sample, "messages": tuple(sample["messages"])}) for sample in state[name]]
            for name in ("base_samples", "window")
        )
        return cls(base_samples, total_steps, window, state["unchecked_replies"])

    @property
    def check_count(self) -> int:
        """Number of checks of the whole run."""
        return min(self.total_steps, MAX_CHECKS)

    def add_step(self, step: int, samples: Sequence[MonitorSample]) -> list[MonitorAlarm] | None:
        """Add the replies of a step (counted from 1); alarms if a check is due, else None."""
        self.unchecked_replies += len(samples)
        # All replies since the last check, up to the maximum; the samples of one step stay together.
        size = max(MIN_WINDOW_REPLIES, min(self.unchecked_replies, MAX_WINDOW_REPLIES), len(samples))
        self.window = [*self.window, *samples][-size:]
        # Check number c is due at step c * total / count, so a run has exactly check_count of them.
        is_due = step * self.check_count // self.total_steps > (step - 1) * self.check_count // self.total_steps
        if not is_due or not self.window:
            return None
        self.unchecked_replies = 0
        results = evaluate_monitors(
            self.base_samples,
            self.window,
            false_alarm_rate=FALSE_ALARM_RATE / self.check_count,
            # The base policy answered other prompts, so whole prompts are exchanged.
            within_prompts=False,
        )
        return [_make_alarm(name, result) for name, result in results.items() if result.is_alarm]


def _make_alarm(monitor: str, result: MonitorResult) -> MonitorAlarm:
    return MonitorAlarm(monitor, result.base_value, result.current_value, result.detail)


@dataclass(frozen=True, slots=True)
class MonitorCheck:
    """Result of one check of a run."""

    step: int
    alarms: Sequence[MonitorAlarm] = ()


@dataclass(frozen=True, slots=True)
class AlarmDecision:
    """Action, reasons, and the step to roll back to for ROLL_BACK and STOP (the last check without alarms)."""

    action: AlarmAction
    reasons: tuple[str, ...]
    rollback_step: int | None


def decide_action(checks: Sequence[MonitorCheck], *, patience: int = 2) -> AlarmDecision:
    """Escalation policy over the checks so far, oldest first.

    A monitor starts with its FIRST_ACTIONS entry and escalates by one for each further `patience` consecutive checks
    with an alarm (except WARN_ONLY_MONITORS).
    """
    if not checks:
        return AlarmDecision(AlarmAction.NONE, (), None)
    clean_steps = [check.step for check in checks if not check.alarms]
    action, reasons = AlarmAction.NONE, []
    for alarm in checks[-1].alarms:
        run_length = _count_trailing_run(
            [alarm.monitor in {check_alarm.monitor for check_alarm in check.alarms} for check in checks]
        )
        max_action = AlarmAction.WARN if alarm.monitor in WARN_ONLY_MONITORS else AlarmAction.STOP
        first_action = FIRST_ACTIONS.get(alarm.monitor, AlarmAction.WARN)
        monitor_action = AlarmAction(min(max_action, first_action + (run_length - 1) // patience))
        values = alarm.detail or f"{alarm.base_value:.3g} -> {alarm.current_value:.3g}"
        reasons.append(f"{alarm.monitor} {values}, {run_length} consecutive checks: {monitor_action.name.lower()}")
        action = max(action, monitor_action)
    rollback_step = clean_steps[-1] if clean_steps and action >= AlarmAction.ROLL_BACK else None
    return AlarmDecision(action, tuple(reasons), rollback_step)


def _count_trailing_run(flags: Sequence[bool]) -> int:
    """Number of consecutive set flags at the end."""
    count = 0
    while count < len(flags) and flags[-1 - count]:
        count += 1
    return count
