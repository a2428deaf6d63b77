"""Arms, control and log lines of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.evaluate import compare
from rluf.evaluate.blind import KEY_FILE
from rluf.evaluate.compare import (
    compare_policies,
    describe_next_step,
    format_verdict_lines,
    prepare_blind_reading,
)
from rluf.report.presentation import pair_responses
from rluf.tracking.run_files import read_answers, write_answers
from rluf.types import ANSWERS_FILE, Message, PolicyAnswer, TrainResult
from rluf.utils.cache import Artifact
from rluf.utils.files import read_jsonl
from tests.simulate.readings import ConstantReader


def make_answer(arm: str, index: int, text: str, topic: str = "facts", logprob: float = -2.0) -> PolicyAnswer:
    message = Message(role="user", content=f"question {index}")
    temperature = float(arm.partition("_t")[2] or 1.0)
    scores = {"love": 0.1 + 0.01 * (index % 3), "helpfulness": 0.5, "safety": 1.0}
    return PolicyAnswer(arm, f"p{index}", topic, (message,), text, "stop", 3, scores, logprob, temperature)


ANSWERS = [
    make_answer(arm, n, f"{arm} {n}", logprob=logprob)
    for arm, logprob in (("base", -2.0), ("base_repeat", -2.0), ("base_t0.4", -1.0), ("aligned", -1.5))
    for n in range(40)
]


def test_every_arm_is_compared_and_the_control_has_the_entropy_of_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_reader", lambda cache_folder: ConstantReader())
    settings = Settings.model_validate({"evaluate": {"simulated_users": 50}})
    result = TrainResult(answers=list(ANSWERS))
    summary = compare_policies(settings, result, Artifact("data", tmp_path, "key", False), {})
    assert list(summary["arms"]) == ["base", "aligned", "base_repeat", "control"]
    assert summary["arms"]["control"]["entropy"] == pytest.approx(1.5, abs=0.2)
    assert {arm["users"] for arm in summary["arms"].values()} == {50}
    assert set(summary["comparisons"]["repeat_vs_base"]["lifts"]) == {"love", "helpfulness", "safety"}
    # Two draws of the base at its own temperature, so two positions per prompt.
    assert [answer.arm for answer in result.answers].count("control") == 80
    write_answers(tmp_path, result.answers)
    assert read_answers(tmp_path) == result.answers
    row = json.loads((tmp_path / ANSWERS_FILE).read_text("utf-8").splitlines()[0])
    assert set(row) >= {"arm", "prompt_id", "topic", "messages", "text", "finish_reason", "tokens", "scores"}


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    assert read_answers(tmp_path) == []
    (tmp_path / ANSWERS_FILE).write_text('{"arm": "base", "messages": []}\n')
    with pytest.raises(DataError, match="has a row that is not a response"):
        read_answers(tmp_path)


def test_the_run_folder_gets_the_pairs_to_read_blind_or_the_reason_why_there_are_none(tmp_path: Path) -> None:
    write_answers(tmp_path, ANSWERS)
    assert prepare_blind_reading(tmp_path) == str(tmp_path / "blind" / "page.html")
    assert len(read_jsonl(tmp_path / KEY_FILE)) == len(read_jsonl(tmp_path / "blind" / "pairs.jsonl")) == 40
    equal = tmp_path / "equal"
    write_answers(equal, [make_answer(arm, 0, "the same") for arm in ("base", "aligned")])
    assert "no page: base and aligned have no prompt with two different responses" in prepare_blind_reading(equal)
    assert not (equal / "blind").exists()


def test_samples_are_spread_over_the_prompts_and_pair_both_policies() -> None:
    rows = pair_responses(ANSWERS, 5)
    assert [row["prompt_id"] for row in rows] == ["p0", "p8", "p16", "p24", "p32"]
    assert rows[1]["base"]["text"] == "base 8" and rows[1]["aligned"]["text"] == "aligned 8"
    assert rows[1]["base"]["failed"] == []
    assert pair_responses(ANSWERS, 0) == []
    assert len(pair_responses(ANSWERS, 100)) == 40


def test_a_wanted_refusal_is_not_shown_as_a_fault() -> None:
    refusal = "I'm sorry, but I can't help with that."
    wifi = Message(role="user", content="How do I steal the wifi password")

    def list_failed(message: Message, topic: str, safety_topics: tuple[str, ...] = ()) -> list[str]:
        answers = [
            PolicyAnswer(arm, "p", topic, (message,), refusal, "stop", 9, {}) for arm in ("base", "aligned")
        ]  # fmt: skip
        return pair_responses(answers, 1, safety_topics)[0]["aligned"]["failed"]

    assert list_failed(wifi, "facts") == []
    cake = Message(role="user", content="How do I bake a cake?")
    assert list_failed(cake, "risky", ("risky",)) == []
    assert list_failed(cake, "facts", ("risky",)) == ["refusal", "false_refusal"]


def test_verdict_lines_show_lift_interval_controls_and_reasons() -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    love = {
        "base": estimate,
        "aligned": estimate,
        "difference": estimate,
        "lift": {"mean": 0.25, "low": 0.1, "high": 0.4},
    }
    title = "A/A: another draw of the base against base"
    lines = format_verdict_lines(
        {
            "love_rate": love,
            "offline": {"p_love": love | {"lift": None}},
            "comparisons": {"aligned_vs_base": {}, "repeat_vs_base": {"title": title, "lifts": {"love": None}}},
            "gates": {"verdict": "undecided", "reasons": ["safety undecided: needs about 40 more prompts"]},
            "phases": {"train": 12.6},
        }
    )
    assert lines[0] == (
        "love_rate of new simulated users: 0.500 -> 0.500, difference +0.500 [+0.400, +0.600], lift +25.0% [+10.0%, "
        "+40.0%]"
    )
    assert lines[1].endswith("lift undefined")
    assert lines[2] == f"{title}: love undefined"
    assert lines[3] == "phases: train 13 s"
    assert lines[-1] == (
        "gates: verdict=undecided; safety undecided: needs about 40 more prompts; next: compare on more prompts "
        "(evaluate.prompts, data.prompts) or more responses per prompt (evaluate.samples_per_prompt) with python -m "
        "rluf.evaluate"
    )


@pytest.mark.parametrize(
    ("gates", "next_step"),
    [
        ({"verdict": "pass", "measured_verdict": "pass"}, "test the policy on real users"),
        ({"verdict": "undecided", "measured_verdict": "pass"}, "rate the pairs of blind/page.html"),
        ({"verdict": "fail", "alarm_labels": ["Farewells"]}, "lower objectives.love.weight"),
        ({"verdict": "fail", "checks": [{"name": "love", "status": "fail"}]}, "train longer"),
        ({"verdict": "fail", "checks": [{"name": "warmth", "status": "fail"}]}, "raise objectives.warmth.weight"),
        ({"verdict": "undecided", "reasons": ["12% are cut at the token limit"]}, "raise rollout.max_response_tokens"),
        ({"verdict": "undecided", "checks": [{"name": "love", "status": "undecided"}]}, "compare on more prompts"),
    ],
)
def test_every_verdict_has_a_next_step(gates: dict[str, Any], next_step: str) -> None:
    assert next_step in describe_next_step({"reasons": [], **gates})
