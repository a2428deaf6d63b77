"""Off-policy estimates against a planted truth, and the warnings where they mean nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rluf.errors import DataError
from rluf.evaluate.off_policy import OffPolicyReport, estimate_off_policy, main
from rluf.prepare.schema import ChatMessage, FeedbackRecord, build_records_table

RESPONSE_COUNT = 12


def simulate_log(seed: int, tilt: float, user_count: int = 60, rows_per_user: int = 5) -> tuple[OffPolicyReport, float]:
    """Estimate from a log of a softmax policy; the target's logits differ by `tilt` standard deviations."""
    rng = np.random.default_rng(seed)
    logged = rng.normal(size=RESPONSE_COUNT)
    target = logged + tilt * rng.normal(size=RESPONSE_COUNT)
    logged_probs, target_probs = (np.exp(x) / np.exp(x).sum() for x in (logged, target))
    love = rng.uniform(0.05, 0.6, RESPONSE_COUNT)
    users = np.repeat(np.arange(user_count), rows_per_user)
    responses = rng.choice(RESPONSE_COUNT, len(users), p=logged_probs)
    # Users differ in how readily they react, so that the rows of one user are not independent.
    user_shift = rng.uniform(-0.04, 0.04, user_count)[users]
    rewards = (rng.random(len(users)) < love[responses] + user_shift).astype(float)
    model = np.clip(love + rng.normal(0, 0.05, RESPONSE_COUNT), 0, 1)
    report = estimate_off_policy(
        np.log(target_probs / logged_probs)[responses], rewards, [f"u{user}" for user in users],
        model[responses], np.full(len(users), model @ target_probs),
    )  # fmt: skip
    return report, float(love @ target_probs)


@pytest.mark.parametrize("tilt", [0.0, 0.3, 0.8])
def test_intervals_cover_the_truth_in_93_percent_of_200_small_logs(tilt: float) -> None:
    hits = {"snips": 0, "doubly_robust": 0}
    for seed in range(200):
        report, truth = simulate_log(seed, tilt)
        for name in hits:
            estimate = getattr(report, name)
            hits[name] += estimate.low <= truth <= estimate.high
    assert min(hits.values()) >= 186, hits


def test_the_doubly_robust_interval_is_narrower_with_a_good_model() -> None:
    reports = [simulate_log(seed, 0.8)[0] for seed in range(40)]
    widths = {
        name: np.mean([getattr(report, name).high - getattr(report, name).low for report in reports])
        for name in ("snips", "doubly_robust")
    }
    assert widths["doubly_robust"] < widths["snips"]


@pytest.mark.parametrize("tilt", [6.0, 9.0, 14.0])
def test_a_small_effective_sample_is_reported(tilt: float) -> None:
    warned = 0
    for seed in range(100):
        report, _ = simulate_log(seed, tilt)
        is_small = report.effective_rows < 0.05 * report.row_count
        assert is_small == any("mean nothing" in warning for warning in report.warnings)
        warned += is_small
    assert warned > 0


@pytest.mark.parametrize("shift", [-400.0, -2.0, 2.0, 400.0, 900.0])
def test_log_probabilities_of_other_tokens_are_noticed(shift: float) -> None:
    report = estimate_off_policy(np.full(100, shift), np.ones(100), [str(i) for i in range(100)])
    assert any("mean weight" in warning for warning in report.warnings)
    assert report.snips.value == pytest.approx(1.0)


def test_equal_policies_give_the_logged_rate_without_warnings() -> None:
    rewards = np.tile([1.0, 0.0, 0.0, 0.0], 50)
    report = estimate_off_policy(np.zeros(200), rewards, [str(i // 2) for i in range(200)])
    assert report.snips.value == report.logged_rate == 0.25
    assert (report.warnings, report.effective_rows, report.doubly_robust) == ((), 200.0, None)
    with pytest.raises(DataError, match="at least 2 users"):
        estimate_off_policy(np.zeros(9), np.zeros(9), ["u"] * 9)


def test_the_command_reads_the_store_and_counts_dropped_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        FeedbackRecord(
            id=f"r{i}", conversation_id=f"c{i}", turn=0, user_id=f"u{i % 20}", time=datetime(2026, 1, 1, tzinfo=UTC),
            model_version="m", messages=[ChatMessage(role="user", content="Hi")], response="Hello",
            reaction="love" if i % 4 == 0 else None, response_logprob=None if i < 10 else -3.0, response_tokens=4,
        )
        for i in range(80)
    ]  # fmt: skip
    pq.write_table(build_records_table(records[:50], FeedbackRecord), tmp_path / "a.parquet")
    pq.write_table(build_records_table(records[50:], FeedbackRecord), tmp_path / "b.parquet")
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"id": f"r{i}", "target_logprob": -3.0}) + "\n" for i in range(70)))
    assert main(["--data", str(tmp_path), "--scores", str(scores)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["row_count"], report["dropped_rows"]) == (60, 20)
    assert report["snips"]["value"] == pytest.approx(15 / 60)
    scores.write_text('{"id": "other", "target_logprob": -1}\n')
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path), "--scores", str(scores)])
    assert "no row of" in capsys.readouterr().err
