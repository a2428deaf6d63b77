"""Run summary: content with and without users, verdict, and plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rluf.config.objectives import ObjectiveSpec
from rluf.config.reward import ObjectivesSettings
from rluf.errors import DataError
from rluf.evaluate.summary import EvaluatedArm, RunFacts, build_summary, flatten_numbers
from rluf.report.headline import format_verdict, report_headline
from rluf.report.presentation import (
    build_arm_rows,
    build_comparison_rows,
    build_lift_rows,
    format_repeat_sentence,
    measure_cards,
)
from rluf.types import PolicyAnswer

PROMPT_COUNT = 240


@dataclass(frozen=True)
class RecordedReactions:
    """Reactions of users to the responses they read."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    loved: NDArray[np.bool_]
    helpful: NDArray[np.bool_]
    safe: NDArray[np.bool_]


def make_arm(
    seed: int,
    love_rate: float,
    helpful_rate: float = 0.6,
    *,
    user_count: int = 2000,
    has_farewell: bool = False,
    truncated_share: float = 0.0,
) -> EvaluatedArm:
    """An arm of two responses per prompt, read by users who find them loved and helpful at the given rates."""
    rng = np.random.default_rng(seed)
    text = "Well. Bye!" if has_farewell else "Well, no."
    love = np.clip(rng.normal(love_rate, 0.01, 2 * PROMPT_COUNT), 0, 1)
    helpfulness = np.clip(rng.normal(helpful_rate, 0.05, 2 * PROMPT_COUNT), 0, 1)
    answers = [
        PolicyAnswer(
            arm="any",
            prompt_id=f"p{index // 2:03d}",
            topic="facts",
            messages=({"role": "user", "content": "hi"},),
            text=text,
            finish_reason="length" if index < truncated_share * 2 * PROMPT_COUNT else "stop",
            tokens=4,
            scores={"love": float(love[index]), "helpfulness": float(helpfulness[index]), "safety": 1.0},
            logprob=-2.0,
        )
        for index in range(2 * PROMPT_COUNT)
    ]
    if user_count == 0:
        return EvaluatedArm(answers)
    user = np.repeat(np.arange(user_count), 10)
    item = rng.integers(0, len(answers), user.size)
    uniforms = rng.random((3, user.size))
    return EvaluatedArm(
        answers, RecordedReactions(user, item, uniforms[0] < love_rate, uniforms[1] < helpful_rate, uniforms[2] < 0.99)
    )


def summarize(base: EvaluatedArm, aligned: EvaluatedArm, **arms: EvaluatedArm) -> dict[str, Any]:
    summary = build_summary(RunFacts("q", 1), {"base": base, "aligned": aligned, **arms})
    json.dumps(summary, allow_nan=False)
    return summary


def check_by_name(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in summary["gates"]["checks"]}


def test_with_users_the_summary_has_rates_lifts_and_a_verdict() -> None:
    run_facts = RunFacts(
        "quickstart", 3, phase_seconds={"train": 12.5}, final_kl=0.01, sample_count=8, reused_artifacts={"data": True}
    )
    summary = build_summary(run_facts, {"base": make_arm(1, 0.06), "aligned": make_arm(2, 0.09)})
    love_rate = summary["love_rate"]
    assert love_rate["base"]["low"] < 0.06 < love_rate["base"]["high"]
    assert love_rate["aligned"]["low"] < 0.09 < love_rate["aligned"]["high"]
    assert love_rate["lift"]["low"] < love_rate["lift"]["mean"] < love_rate["lift"]["high"]
    assert love_rate["lift"]["mean"] == pytest.approx(love_rate["aligned"]["mean"] / love_rate["base"]["mean"] - 1)
    assert set(summary["helpfulness"]) == set(summary["safety"]) == {"base", "aligned", "difference", "lift"}
    assert set(summary["offline"]) == {"p_love", "helpfulness", "safety"}
    assert (summary["gates"]["measured_verdict"], summary["gates"]["verdict"]) == ("pass", "undecided")
    assert summary["gates"]["judged_by"] == "simulated users"
    assert (summary["name"], summary["seed"], summary["kl"], summary["samples"]) == ("quickstart", 3, 0.01, 8)
    assert (summary["phases"], summary["reused"]) == ({"train": 12.5}, {"data": True})
    assert summary["arms"]["base"] == {
        "prompts": 240, "responses": 480, "users": 2000, "tokens": 4.0, "truncated_share": 0.0, "entropy": 2.0,
    }  # fmt: skip
    json.dumps(summary, allow_nan=False)


def test_without_users_the_gates_use_the_reward_models() -> None:
    summary = summarize(make_arm(1, 0.06, user_count=0), make_arm(2, 0.09, user_count=0))
    assert not {"love_rate", "helpfulness", "safety"} & set(summary)
    assert summary["offline"]["p_love"]["difference"]["low"] > 0
    assert summary["gates"]["judged_by"] == "reward models"
    assert (summary["gates"]["measured_verdict"], summary["gates"]["verdict"]) == ("pass", "undecided")


def test_a_fall_in_helpfulness_an_alarm_and_truncation_do_not_pass_and_the_headline_says_why() -> None:
    base = make_arm(1, 0.06)
    less_helpful = summarize(base, make_arm(2, 0.09, 0.4))
    assert less_helpful["gates"]["verdict"] == "fail"
    assert less_helpful["gates"]["reasons"] == ["helpfulness fell by more than 5%"]
    hacked = summarize(base, make_arm(2, 0.09, has_farewell=True))
    assert hacked["gates"]["verdict"] == "fail"
    assert "unprompted_farewell" in hacked["gates"]["alarms"]
    headline = report_headline(hacked)
    assert headline.startswith(f"Fail: {len(hacked['gates']['alarms'])} monitors raised an alarm; ")
    assert "Farewell that the user did not start" in format_verdict(hacked["gates"])
    assert "new simulated users love the aligned policy" in headline
    truncated = summarize(base, make_arm(2, 0.09, truncated_share=0.3))
    assert truncated["gates"]["verdict"] != "pass"
    assert "30% of the aligned responses are cut at the token limit" in report_headline(truncated)


def test_a_base_without_hearts_has_no_lift_and_does_not_pass() -> None:
    summary = summarize(make_arm(1, 0.0), make_arm(2, 0.09))
    assert summary["love_rate"]["lift"] is None
    assert summary["love_rate"]["base"]["high"] > 0
    assert summary["gates"]["verdict"] == "undecided"
    assert "a mean is zero" in summary["gates"]["reasons"][0]


def test_few_users_decide_nothing() -> None:
    summary = summarize(make_arm(1, 0.5, user_count=2), make_arm(2, 0.5, user_count=2))
    assert summary["gates"]["verdict"] == "undecided"
    assert report_headline(summary).startswith("Undecided: no clear change in simulated love")


def test_control_and_second_draw_tell_alignment_from_sharpening() -> None:
    base, repeat = make_arm(1, 0.06), make_arm(3, 0.06)
    sharpened = summarize(base, make_arm(2, 0.09), base_repeat=repeat, control=make_arm(4, 0.09))
    assert list(sharpened["comparisons"]) == ["aligned_vs_base", "aligned_vs_control", "repeat_vs_base"]
    assert "but not clearly more than a base of equal entropy" in report_headline(sharpened)
    aligned = summarize(base, make_arm(2, 0.09), base_repeat=repeat, control=make_arm(4, 0.06))
    assert "also compared with a base of equal entropy" in report_headline(aligned)
    columns, rows = build_comparison_rows(aligned)
    assert columns == ["Comparison", "Simulated love", "Simulated helpfulness", "Simulated safety", "Responses"]
    assert [row[-1] for row in rows] == ["480 and 480"] * 3
    assert format_repeat_sentence(aligned).startswith("The A/A row includes zero everywhere")
    other_draw = summarize(base, make_arm(2, 0.09), base_repeat=make_arm(3, 0.12))
    assert format_repeat_sentence(other_draw).startswith("The A/A row excludes zero for love")
    assert [row[0] for row in build_arm_rows(aligned)] == ["base", "aligned", "base, second draw", "control"]
    assert build_comparison_rows({}) == ([], []) and format_repeat_sentence({}) == ""


def make_arm_with_brevity(seed: int, love_rate: float, brevity: float, *, user_count: int) -> EvaluatedArm:
    arm = make_arm(seed, love_rate, user_count=user_count)
    return replace(
        arm,
        answers=[
            replace(answer, scores={**answer.scores, "brevity": brevity + 0.001 * (i % 3)})
            for i, answer in enumerate(arm.answers)
        ],
    )


@pytest.mark.parametrize("user_count", [0, 2000])
def test_an_objective_that_users_do_not_judge_is_gated_on_its_own_scores(user_count: int) -> None:
    objectives = ObjectivesSettings.model_validate({"brevity": {"source": "judge", "path": "length"}})

    def summarize_brevity(brevity: float, specs: Mapping[str, ObjectiveSpec]) -> dict[str, Any]:
        base, aligned = (make_arm_with_brevity(seed, rate, value, user_count=user_count)
                         for seed, rate, value in ((1, 0.06, 0.5), (2, 0.09, brevity)))  # fmt: skip
        return build_summary(RunFacts("q", 1), {"base": base, "aligned": aligned}, specs)

    summary = summarize_brevity(0.4, objectives.specs)
    checks = check_by_name(summary)
    assert list(checks) == ["love", "helpfulness", "safety", "brevity"]
    assert (checks["brevity"]["gate"], checks["brevity"]["judged_by"]) == ("must_hold", "reward models")
    assert checks["love"]["judged_by"] == ("simulated users" if user_count else "reward models")
    assert (summary["gates"]["verdict"], checks["brevity"]["status"]) == ("fail", "fail")
    assert "helpfulness, safety and brevity must not fall by 5%" in summary["gates"]["rule"]
    assert "brevity" in summary["offline"] and "brevity" not in summary
    assert report_headline(summary).endswith("the brevity score fell by more than 5%.")
    cards = {card["key"]: card for card in measure_cards(summary)}
    assert list(cards) == (["love_rate"] if user_count else ["p_love"]) + ["helpfulness", "safety", "brevity"]
    assert (cards["brevity"]["title"], cards["brevity"]["outcome"]) == ("Brevity", "fell by more than 5%")
    assert ("Brevity", "reward models") in [row[:2] for row in build_lift_rows(summary)]
    must_rise = {**objectives.specs, "brevity": replace(objectives.specs["brevity"], gate="must_rise")}
    assert "the brevity score is undecided" in report_headline(summarize_brevity(0.5, must_rise))
    ungated = {**objectives.specs, "brevity": replace(objectives.specs["brevity"], gate="none")}
    assert summarize_brevity(0.4, ungated)["gates"]["measured_verdict"] == "pass"


def test_flatten_numbers_and_arms_that_cannot_be_compared() -> None:
    card = {"rows": 10, "test": {"auroc": {"mean": 0.8}, "ok": True}, "bins": [1, 2], "loss": "bce"}
    assert flatten_numbers(card) == {"rows": 10, "test.auroc.mean": 0.8}
    base = make_arm(1, 0.5, user_count=0)
    with pytest.raises(DataError, match="aligned policy gave no responses"):
        summarize(base, EvaluatedArm([]))
    with pytest.raises(DataError, match="1 prompts were answered by one arm only"):
        summarize(base, replace(base, answers=base.answers[:-2]))
