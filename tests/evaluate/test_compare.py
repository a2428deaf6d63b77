"""Sample rows of the report and verdict lines of the log."""

from __future__ import annotations

from rluf.evaluate.compare import build_sample_rows, verdict_lines
from rluf.types import EvalResponse, Group, Message, Prompt, Sample, TrainResult


def make_eval_response(index: int, text: str, love_score: float) -> EvalResponse:
    prompt = Prompt(f"p{index}", (Message(role="user", content=f"question {index}"),), (1, 2), "facts", "test")
    sample = Sample(prompt.id, prompt.token_ids, (3,), (-0.5,), ((0, 0),), "stop", text)
    return EvalResponse(Group(prompt, (sample,), 0), {"love": (love_score,)})


def test_samples_are_spread_over_the_prompts_and_pair_both_policies() -> None:
    result = TrainResult(
        base_responses=[make_eval_response(n, f"base {n}", 0.1) for n in range(10)],
        aligned_responses=[make_eval_response(n, f"new {n}", 0.2) for n in range(10)],
    )
    rows = build_sample_rows(result, 5)
    assert [row["prompt_id"] for row in rows] == ["p0", "p2", "p4", "p6", "p8"]
    assert rows[1]["base"] == {"text": "base 2", "scores": {"love": 0.1}, "failed": []}
    assert rows[1]["aligned"] == {"text": "new 2", "scores": {"love": 0.2}, "failed": []}
    assert build_sample_rows(result, 0) == []
    assert len(build_sample_rows(result, 100)) == 10


def test_verdict_lines_show_lift_interval_and_verdict() -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = verdict_lines(
        {
            "love_rate": {"base": estimate, "aligned": estimate, "lift": {"mean": 0.25, "low": 0.1, "high": 0.4}},
            "offline": {"p_love": {"base": estimate, "aligned": estimate, "difference": estimate}},
            "gates": {"verdict": "pass"},
            "phases": {"align": 12.6},
        }
    )
    assert lines[0] == "love_rate of new simulated users: 0.500 -> 0.500, lift +25.0% [+10.0%, +40.0%]"
    assert lines[-1] == 'gates: pass; seconds: {"align": 13}'
