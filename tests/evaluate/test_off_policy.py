"""Off-policy estimates against a planted truth, and the warnings where they mean nothing."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.evaluate.off_policy import OffPolicyReport, estimate_off_policy, main, read_off_policy_log
from rluf.evaluate.policy_scores import compute_target_scores
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.prepare.schema import ChatMessage, FeedbackRecord, build_records_table
from rluf.types import Message
from rluf.utils.paths import resolve_cache_folder

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


def make_record(row_id: str, user_id: str, is_loved: bool, logprob: float | None = -3.0) -> FeedbackRecord:
    return FeedbackRecord(
        id=row_id, conversation_id=f"c-{row_id}", turn=0, user_id=user_id, time=datetime(2026, 1, 1, tzinfo=UTC),
        model_version="m", messages=[ChatMessage(role="user", content="Hi")], response="Hello",
        reaction="love" if is_loved else None, response_logprob=logprob, response_tokens=4,
    )  # fmt: skip


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


@pytest.mark.parametrize(
    ("columns", "missing"),
    [
        ({"value": 0.2, "target_value": 0.3}, 0),
        ({"value": 0.2}, 40),
        ({"target_value": 0.2}, 40),
        ({"value": 0.2, "target_value": None}, 40),
        ({}, 0),
    ],
)
@pytest.mark.parametrize("unscored", [0, 3])
def test_rows_without_values_are_counted_and_leave_out_the_doubly_robust_estimate(
    tmp_path: Path, columns: dict[str, float | None], missing: int, unscored: int
) -> None:
    records = [make_record(f"r{i}", f"u{i % 10}", i % 4 == 0) for i in range(40)]
    pq.write_table(build_records_table(records, FeedbackRecord), tmp_path / "a.parquet")
    rows = [{"id": f"r{i}", "target_logprob": -3.0, **(columns if i >= unscored else {})} for i in range(40)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = estimate_off_policy(**read_off_policy_log(tmp_path, tmp_path / "scores.jsonl"))
    expected = missing or (unscored if columns else 0)
    assert report.rows_without_values == expected
    assert (report.doubly_robust is None) == (expected > 0 or not columns)
    assert any(f"{expected} of 40 rows have no value" in text for text in report.warnings) == (expected > 0)


def write_scores(folder: Path, logprobs: dict[str, float]) -> Path:
    file = folder / "scores.jsonl"
    file.write_text("".join(json.dumps({"id": key, "target_logprob": value}) + "\n" for key, value in logprobs.items()))
    return file


def test_a_row_in_two_files_of_a_store_counts_once(tmp_path: Path) -> None:
    """A merged file appears before those that it replaces are deleted."""
    records = [make_record(f"r{i}", f"u{i % 10}", i < 10) for i in range(40)]
    pq.write_table(build_records_table(records, FeedbackRecord), tmp_path / "feedback-merged-1.parquet")
    pq.write_table(build_records_table(records[:20], FeedbackRecord), tmp_path / "feedback-1.parquet")
    scores = write_scores(tmp_path, {f"r{i}": -3.0 for i in range(40)})
    report = estimate_off_policy(**read_off_policy_log(tmp_path, scores))
    assert (report.row_count, report.dropped_rows, report.logged_rate) == (40, 20, 0.25)


@pytest.mark.parametrize(("logged", "target", "name"), [(0.3, -3.0, "response_logprob"), (-3.0, 0.3, "target_logprob")])
def test_a_probability_in_place_of_its_logarithm_is_refused(
    tmp_path: Path, logged: float, target: float, name: str
) -> None:
    records = [make_record(f"r{i}", f"u{i}", i % 2 == 0, logged) for i in range(4)]
    pq.write_table(build_records_table(records, FeedbackRecord), tmp_path / "a.parquet")
    scores = write_scores(tmp_path, {f"r{i}": target for i in range(4)})
    with pytest.raises(DataError, match=f"'{name}': expected log-probabilities, which are at most 0, got 0.3"):
        read_off_policy_log(tmp_path, scores)


def test_two_scores_of_one_response_are_refused(tmp_path: Path) -> None:
    pq.write_table(build_records_table([make_record("r1", "u", True)], FeedbackRecord), tmp_path / "a.parquet")
    scores = write_scores(tmp_path, {"r1": -3.0})
    scores.write_text(2 * scores.read_text())
    with pytest.raises(DataError, match="the id 'r1' has 2 rows; give each response one score"):
        read_off_policy_log(tmp_path, scores)


@pytest.mark.slow
def test_a_policy_scores_the_log_as_it_was_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve_model("tiny", resolve_cache_folder(Settings()))
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = []
    for i, (text, finish_reason, temperature) in enumerate(itertools.product(
        ("Hello, friend!", "Yes.", "I love that idea, tell me more."), ("stop", "length"), (0.7, 1.0),
    )):  # fmt: skip
        prompt_ids = render_prompt(tokenizer, [Message(role="user", content="Hi")])
        response_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        response_ids += [tokenizer.eos_token_id] * (finish_reason == "stop")
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits / temperature, -1)[range(len(response_ids)), response_ids]
        records.append(make_record(f"r{i}", f"u{i}", i % 2 == 0).model_copy(update={
            "response": text, "finish_reason": finish_reason, "temperature": temperature,
            "response_tokens": len(response_ids) + (i == 0), "response_logprob": float(logprobs.sum()),
        }))  # fmt: skip
    records.append(make_record("cut", "u1", True))  # without a temperature
    pq.write_table(build_records_table(records, FeedbackRecord), tmp_path / "a.parquet")
    scores = compute_target_scores(folder, pq.read_table(tmp_path / "a.parquet").to_pylist())
    assert scores == {record.id: pytest.approx(record.response_logprob, abs=1e-4) for record in records[1:-1]}
    assert main(["--data", str(tmp_path), "--policy", "tiny"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["row_count"], report["dropped_rows"]) == (11, 2)
    assert report["mean_weight"] == pytest.approx(1.0, abs=1e-3)


def test_the_command_reads_the_store_and_counts_dropped_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [make_record(f"r{i}", f"u{i % 20}", i % 4 == 0, None if i < 10 else -3.0) for i in range(80)]
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
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path)])
    assert "--policy" in capsys.readouterr().err


def test_ids_and_reactions_are_read_as_by_the_ab_test(tmp_path: Path) -> None:
    """Whole numbers as ids, another spelling of love, placeholders for users, and a row that was sent twice."""
    rows = [
        {"id": n, "user_id": "anonymous" if n < 2 else n % 10, "reaction": "LOVE" if n % 4 == 0 else None,
         "response_logprob": -3.0}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[39]]))
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"id": n, "target_logprob": -3.0}) + "\n" for n in range(40)))
    report = estimate_off_policy(**read_off_policy_log(tmp_path / "log.jsonl", scores))
    assert (report.row_count, report.user_count, report.dropped_rows) == (38, 10, 3)
    assert report.logged_rate == pytest.approx(9 / 38)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row | {"reaction": "star"}) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"no response has the reaction love, but the log has 'star'; .*--love NAME"):
        read_off_policy_log(tmp_path / "log.jsonl", scores)
    assert read_off_policy_log(tmp_path / "log.jsonl", scores, love_names=["star"])["rewards"].all()
    scores.write_text('{"id": 1, "target_logprob": -3}\n{"id": "1", "target_logprob": -9}\n')
    with pytest.raises(DataError, match="the id '1' has 2 rows; give each response one score"):
        read_off_policy_log(tmp_path / "log.jsonl", scores, love_names=["star"])
