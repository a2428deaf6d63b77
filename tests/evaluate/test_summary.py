"""The summary: what is in it with and without users, its verdict, and that it is plain JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.gates import holds, rises, verdict
from rluf.evaluate.intervals import Estimate
from rluf.evaluate.monitors import Reply
from rluf.evaluate.summary import Arm, RunFacts, build_summary, key_numbers

PROMPTS = 24


@dataclass(frozen=True)
class Read:
    """What users did with the responses they read."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    loved: NDArray[np.bool_]
    helpful: NDArray[np.bool_]
    safe: NDArray[np.bool_]


def arm(seed: int, love: float, helpful: float = 0.6, *, users: int = 600, farewell: bool = False) -> Arm:
    """An arm of two replies a prompt, read by users who love and value them at the given rates."""
    rng = np.random.default_rng(seed)
    replies = [
        Reply(f"p{index // 2:03d}", ({"role": "user", "content": "hi"},), "Well. Bye!" if farewell else "Well, no.", 4)
        for index in range(2 * PROMPTS)
    ]
    scores = {
        "love": np.clip(rng.normal(love, 0.01, len(replies)), 0, 1).tolist(),
        "helpfulness": np.clip(rng.normal(helpful, 0.05, len(replies)), 0, 1).tolist(),
        "safety": [1.0] * len(replies),
    }
    if users == 0:
        return Arm(replies, scores)
    user = np.repeat(np.arange(users), 10)
    item = rng.integers(0, len(replies), user.size)
    draws = rng.random((3, user.size))
    return Arm(replies, scores, Read(user, item, draws[0] < love, draws[1] < helpful, draws[2] < 0.99))


def test_with_users_the_summary_has_rates_lifts_and_a_verdict() -> None:
    facts = RunFacts("quickstart", 3, phases={"train": 12.5}, kl=0.01, samples=8, reused={"data": True})
    found = build_summary(facts, arm(1, 0.06), arm(2, 0.09), resamples=200, margin=0.02, seed=3)
    rate = found["love_rate"]
    assert rate["base"]["low"] < 0.06 < rate["base"]["high"]
    assert rate["aligned"]["low"] < 0.09 < rate["aligned"]["high"]
    assert rate["lift"]["low"] < rate["lift"]["mean"] < rate["lift"]["high"]
    assert rate["lift"]["mean"] == pytest.approx(rate["aligned"]["mean"] / rate["base"]["mean"] - 1)
    assert rate["lift_by_prompt"]["mean"] == pytest.approx(rate["lift"]["mean"])
    assert set(found["helpfulness"]) == set(found["safety"]) == {"base", "aligned", "lift", "lift_by_prompt"}
    assert set(found["offline"]) == {"p_love", "helpfulness", "safety"}
    assert found["gates"]["verdict"] == "pass"
    assert found["gates"]["judged_by"] == "simulated users"
    assert (found["name"], found["seed"], found["kl"], found["samples"]) == ("quickstart", 3, 0.01, 8)
    assert (found["phases"], found["reused"]) == ({"train": 12.5}, {"data": True})
    assert found["evaluated"]["users"] == {"base": 600, "aligned": 600}
    json.dumps(found, allow_nan=False)


def test_without_users_the_reward_models_judge() -> None:
    found = build_summary(
        RunFacts("human", 1), arm(1, 0.06, users=0), arm(2, 0.09, users=0), resamples=200, margin=0.02, seed=1
    )
    assert not {"love_rate", "helpfulness", "safety"} & set(found)
    assert found["offline"]["p_love"]["difference"]["low"] > 0
    assert found["gates"]["judged_by"] == "reward models"
    assert found["gates"]["verdict"] == "pass"
    json.dumps(found, allow_nan=False)


def test_a_fall_in_helpfulness_fails_and_an_alarm_warns() -> None:
    facts = RunFacts("quickstart", 1)
    worse = build_summary(facts, arm(1, 0.06), arm(2, 0.09, 0.4), resamples=200, margin=0.02, seed=1)
    assert worse["gates"]["verdict"] == "fail"
    assert [check["name"] for check in worse["gates"]["checks"] if not check["passed"]] == ["helpfulness"]
    hacked = build_summary(facts, arm(1, 0.06), arm(2, 0.09, farewell=True), resamples=200, margin=0.02, seed=1)
    assert hacked["gates"]["verdict"] == "warn"
    assert "unprompted_farewell" in hacked["gates"]["alarms"]


def test_an_arm_that_nobody_loves_has_no_lift_and_does_not_pass() -> None:
    found = build_summary(RunFacts("q", 1), arm(1, 0.0), arm(2, 0.09), resamples=200, margin=0.02, seed=1)
    assert found["love_rate"]["lift"] is None
    assert found["love_rate"]["base"]["high"] > 0
    assert found["gates"]["verdict"] == "fail"
    json.dumps(found, allow_nan=False)


def test_few_users_who_share_no_prompt_still_give_a_summary() -> None:
    found = build_summary(
        RunFacts("q", 1), arm(1, 0.5, users=2), arm(2, 0.5, users=2), resamples=200, margin=0.02, seed=1
    )
    assert found["gates"]["verdict"] in ("pass", "fail")


def test_gate_rules() -> None:
    assert rises(Estimate(0.1, 0.01, 0.2))
    assert not rises(Estimate(0.1, 0.0, 0.2))
    assert holds(Estimate(-0.01, -0.05, 0.03), 0.02)
    assert holds(Estimate(-0.01, -0.015, -0.005), 0.02)
    assert not holds(Estimate(-0.02, -0.03, -0.01), 0.02)
    assert not holds(None, 0.02)
    assert verdict({}, margin=0.02, judged_by="nobody", alarms=[])["verdict"] == "fail"


def test_key_numbers_and_empty_arms() -> None:
    card = {"rows": 10, "test": {"auroc": {"mean": 0.8}, "ok": True}, "bins": [1, 2], "loss": "bce"}
    assert key_numbers(card) == {"rows": 10, "test.auroc.mean": 0.8}
    with pytest.raises(DataError, match="aligned policy gave no replies"):
        build_summary(RunFacts("q", 1), arm(1, 0.5), Arm([], {}), resamples=200, margin=0.02, seed=1)
