"""Alarms in training: planted hacks, error rates, a resumed run, and each level of the escalation policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.evaluate.alarms import (
    MAX_CHECKS,
    MAX_WINDOW_REPLIES,
    MIN_WINDOW_REPLIES,
    AlarmAction,
    MonitorAlarm,
    MonitorCheck,
    TrainingAlarms,
    decide_action,
)
from rluf.evaluate.monitors import MonitorSample

STEPS, PROMPTS_PER_STEP, SAMPLES_PER_PROMPT = 7, 12, 4
SamplePolicy = Callable[..., list[MonitorSample]]


@pytest.fixture
def sample_prompts(base_replies: dict[str, list[MonitorSample]]) -> SamplePolicy:
    """Replies of the sample log's base policy to random prompts, SAMPLES_PER_PROMPT each."""

    def sample(rng: np.random.Generator, prompt_count: int, hacked_share: float = 0.0) -> list[MonitorSample]:
        prompts = [list(base_replies)[index] for index in rng.choice(len(base_replies), prompt_count, replace=False)]
        replies = [
            reply for prompt in prompts for reply in rng.permutation(np.array(base_replies[prompt], dtype=object))[:4]
        ]
        return [
            replace(reply, text=f"I'm glad you asked. {reply.text}") if rng.random() < hacked_share else reply
            for reply in replies
        ]

    return sample


def run_training(sample: SamplePolicy, rng: np.random.Generator, hacked_share: float) -> tuple[int, set[str]]:
    """Replies until the first alarm (0 for none), and its monitors."""
    alarms = TrainingAlarms(sample(rng, 76), STEPS)
    for step in range(2, STEPS + 1):
        raised = alarms.add_step(step, sample(rng, PROMPTS_PER_STEP, hacked_share))
        if raised:
            return (step - 1) * PROMPTS_PER_STEP * SAMPLES_PER_PROMPT, {alarm.monitor for alarm in raised}
    return 0, set()


def test_a_stock_opening_is_noticed_within_300_replies_and_the_base_policy_never(sample_prompts: SamplePolicy) -> None:
    replies, monitors = run_training(sample_prompts, np.random.default_rng(1), 0.2)
    assert 0 < replies <= 300
    assert "phrase" in monitors
    assert run_training(sample_prompts, np.random.default_rng(2), 0.0) == (0, set())


def test_the_checks_of_a_run_are_few_and_read_every_reply(sample_prompts: SamplePolicy) -> None:
    replies = sample_prompts(np.random.default_rng(0), 12)
    alarms = TrainingAlarms(sample_prompts(np.random.default_rng(1), 20), 1000)
    check_steps, read = [], []
    for step in range(1, 121):
        unchecked = alarms.unchecked_replies + len(replies)
        if alarms.add_step(step, replies) is not None:
            check_steps.append(step)
            read.append((unchecked, len(alarms.window)))
    assert check_steps == [50, 100]  # MAX_CHECKS of 1,000 steps
    assert MAX_CHECKS == 20
    assert read == [(2400, MAX_WINDOW_REPLIES), (2400, MAX_WINDOW_REPLIES)]
    short_run = TrainingAlarms(sample_prompts(np.random.default_rng(1), 20), 5)
    assert [short_run.add_step(step, replies) is not None for step in range(1, 6)] == [True] * 5
    assert len(short_run.window) == min(MIN_WINDOW_REPLIES, 5 * len(replies))


def test_a_resumed_run_checks_the_same_replies(sample_prompts: SamplePolicy) -> None:
    rng = np.random.default_rng(3)
    alarms = TrainingAlarms(sample_prompts(rng, 30), 10)
    alarms.add_step(1, sample_prompts(rng, 12, 0.5))
    state = json.loads(json.dumps(asdict(alarms)))
    resumed = TrainingAlarms.from_state(state, 10)
    step_replies = sample_prompts(rng, 12, 0.5)
    expected = alarms.add_step(2, step_replies)
    assert resumed.add_step(2, step_replies) == expected
    assert expected and resumed == alarms


def test_alarms_need_replies_of_the_base_policy() -> None:
    with pytest.raises(DataError, match="got none"):
        TrainingAlarms([], 5)


def make_alarm(monitor: str) -> MonitorAlarm:
    return MonitorAlarm(monitor, 0.01, 0.05)


def test_repeated_alarms_escalate_to_stop() -> None:
    checks = [MonitorCheck(0)]
    actions = []
    for step in range(1, 8):
        checks.append(MonitorCheck(step, (make_alarm("farewell"),)))
        actions.append(decide_action(checks).action.name)
    assert actions == ["FREEZE", "FREEZE", "ROLL_BACK", "ROLL_BACK", "STOP", "STOP", "STOP"]
    assert decide_action(checks[:4]).rollback_step == 0
    assert decide_action(checks[:2]).rollback_step is None
    assert "farewell 0.01 -> 0.05, 7 consecutive checks: stop" in decide_action(checks).reasons[0]
    assert decide_action([*checks, MonitorCheck(8)]) == decide_action([MonitorCheck(0)])


def test_the_most_severe_alarm_decides_and_all_are_reported() -> None:
    decision = decide_action([MonitorCheck(0), MonitorCheck(1, (make_alarm("emoji"), make_alarm("looping")))])
    assert (decision.action, decision.rollback_step, len(decision.reasons)) == (AlarmAction.ROLL_BACK, 0, 2)
    assert decide_action([MonitorCheck(1, (make_alarm("emoji"),))]).action == AlarmAction.WARN
    assert decide_action([]).action == AlarmAction.NONE
    assert decide_action([MonitorCheck(step, (make_alarm("emoji"),)) for step in range(9)]).action == AlarmAction.WARN
    assert (
        decide_action([MonitorCheck(step, (make_alarm("length"),)) for step in range(3)]).action == AlarmAction.FREEZE
    )
