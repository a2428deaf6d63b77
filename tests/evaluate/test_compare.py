"""From answers to the report's samples and the log's headline."""

from __future__ import annotations

from rluf.evaluate.compare import headline, sample_rows
from rluf.train.loop import Answered, Outcome
from rluf.types import Group, Message, Prompt, Sample


def answered(number: int, text: str, love: float) -> Answered:
    prompt = Prompt(f"p{number}", (Message(role="user", content=f"question {number}"),), (1, 2), "facts", "test")
    sample = Sample(prompt.id, prompt.token_ids, (3,), (-0.5,), ((0, 0),), "stop", text)
    return Answered(Group(prompt, (sample,), 0), {"love": (love,)})


def test_samples_are_spread_over_the_prompts_and_pair_both_policies() -> None:
    outcome = Outcome(
        base=[answered(n, f"base {n}", 0.1) for n in range(10)],
        aligned=[answered(n, f"new {n}", 0.2) for n in range(10)],
    )
    rows = sample_rows(outcome, 5)
    assert [row["prompt_id"] for row in rows] == ["p0", "p2", "p4", "p6", "p8"]
    assert rows[1]["base"] == {"text": "base 2", "scores": {"love": 0.1}, "failed": []}
    assert rows[1]["aligned"] == {"text": "new 2", "scores": {"love": 0.2}, "failed": []}
    assert sample_rows(outcome, 0) == []
    assert len(sample_rows(outcome, 100)) == 10


def test_headline_tells_lift_with_interval_and_verdict() -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = headline(
        {
            "love_rate": {"base": estimate, "aligned": estimate, "lift": {"mean": 0.25, "low": 0.1, "high": 0.4}},
            "offline": {"p_love": {"base": estimate, "aligned": estimate, "difference": estimate}},
            "gates": {"verdict": "pass"},
            "phases": {"align": 12.6},
        }
    )
    assert lines[0] == "love_rate of new simulated users: 0.500 -> 0.500, lift +25.0% [+10.0%, +40.0%]"
    assert lines[-1] == 'gates: pass; seconds: {"align": 13}'
