"""A/B tests from event logs: reading, assignment, checks, effects by user, sequential looks, and the command."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.errors import DataError
from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_checks import measure_planning_inputs, run_aa_check
from rluf.evaluate.ab_design import ExperimentDesign
from rluf.evaluate.abtest import main
from rluf.evaluate.effects import UserTotals, estimate_proportion_effect, estimate_ratio_effect
from rluf.evaluate.events import EventLog, assign_users, hash_to_unit_interval, read_event_log

BEGIN = datetime(2026, 2, 1, tzinfo=UTC)
Row = dict[str, Any]


def simulate_log(
    seed: int = 0, user_count: int = 600, lift: float = 1.0, days: int = 10, pre_period_days: int = 0
) -> list[Row]:
    """Events of `user_count` users; hearts at 20%, times `lift` in the treatment arm; pre-period: control only."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(user_count):
        user_rate, is_treated = rng.beta(2, 8), user % 2 == 1
        for day in range(-pre_period_days, days):
            for _ in range(rng.poisson(0.7)):
                rate = user_rate * (lift if is_treated and day >= 0 else 1.0)
                arm = "treatment" if is_treated and day >= 0 else "control"
                rows.append({
                    "id": f"e{len(rows)}", "user_id": f"u{user}", "conversation_id": f"c{len(rows) // 2}",
                    "time": (BEGIN + timedelta(days=day, seconds=int(rng.integers(86_400)))).isoformat(), "arm": arm,
                    "reaction": "love" if rng.random() < rate else None, "continued": bool(rng.random() < 0.5),
                    "messages": [{"role": "user", "content": "Hi"}], "response": "Hello.", "tokens": int(day * day),
                })  # fmt: skip
    return rows


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with a pre-period and a lift of 50%."""
    path = tmp_path_factory.mktemp("events")
    write_jsonl(path / "events.jsonl", simulate_log(1, lift=1.5, pre_period_days=10))
    return path


@pytest.fixture(scope="module")
def events(folder: Path) -> EventLog:
    return read_event_log([folder / "events.jsonl"])


DESIGN = ExperimentDesign("control", "treatment", start_time=BEGIN.timestamp())


def test_effects_match_rows_summed_by_user(events: EventLog) -> None:
    rows = [
        row for row in simulate_log(1, lift=1.5, pre_period_days=10) if datetime.fromisoformat(row["time"]) >= BEGIN
    ]
    sums: dict[str, dict[str, float]] = {"control": {}, "treatment": {}}
    counts: dict[str, dict[str, float]] = {"control": {}, "treatment": {}}
    for row in rows:
        loved = float(row["reaction"] == "love")
        sums[row["arm"]][row["user_id"]] = sums[row["arm"]].get(row["user_id"], 0.0) + loved
        counts[row["arm"]][row["user_id"]] = counts[row["arm"]].get(row["user_id"], 0.0) + 1
    arms = [
        UserTotals.from_arrays(list(sums[arm].values()), list(counts[arm].values())) for arm in ("control", "treatment")
    ]
    report = analyze_experiment(events, DESIGN)
    expected_love = estimate_ratio_effect(arms[0], arms[1])
    for key in ("control", "treatment", "difference", "error", "lift", "df"):
        assert report["metrics"]["love"]["effect"][key] == pytest.approx(float(getattr(expected_love, key)), rel=1e-9)
    hit_counts = [float((totals.sums > 0).sum()) for totals in arms]
    expected_share = estimate_proportion_effect(
        (hit_counts[0], hit_counts[1]), (arms[0].user_count, arms[1].user_count)
    )
    assert report["metrics"]["users_who_loved"]["effect"] == pytest.approx(expected_share.as_dict(), rel=1e-9)
    assert report["users"] == [totals.user_count for totals in arms]
    assert report["responses"] == [totals.counts.sum() for totals in arms]


def test_a_lift_is_significant_and_cuped_narrows_its_interval(events: EventLog) -> None:
    report = analyze_experiment(events, DESIGN)
    love, continued = report["metrics"]["love"], report["metrics"]["continued"]
    assert love["significant"]
    assert not continued["significant"]
    assert report["srm"]["ok"]
    cuped = love["cuped"]
    assert cuped["low"] < 0.1 < cuped["high"]
    assert cuped["error"] < love["effect"]["error"]
    assert cuped["variance_cut"] == pytest.approx(cuped["correlation"] ** 2, abs=0.05)


def test_looks_narrow_over_time_and_end_with_the_full_log(events: EventLog) -> None:
    looks = analyze_experiment(events, DESIGN)["looks"]["love"]
    widths = [look["high"] - look["low"] for look in looks]
    assert len(looks) >= 8
    assert widths == sorted(widths, reverse=True)
    assert [look["p"] for look in looks] == sorted((look["p"] for look in looks), reverse=True)
    full_log = analyze_experiment(events, DESIGN)["metrics"]["love"]
    assert looks[-1]["difference"] == pytest.approx(full_log["effect"]["difference"])
    assert looks[-1]["high"] - looks[-1]["low"] > full_log["effect"]["high"] - full_log["effect"]["low"]
    four_looks = ExperimentDesign("control", "treatment", start_time=BEGIN.timestamp(), look_count=4)
    assert len(analyze_experiment(events, four_looks)["looks"]["love"]) == 4


def test_parquet_gzip_duplicates_and_additional_columns(tmp_path: Path, events: EventLog) -> None:
    rows = simulate_log(1, lift=1.5, pre_period_days=10)
    gzip_events = read_event_log(
        [write_jsonl(tmp_path / "events.jsonl.gz", [*rows, *rows[:7]])], metric_columns=["tokens"]
    )
    assert gzip_events.duplicate_count == 7
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "events.parquet")
    parquet_events = read_event_log([tmp_path / "events.parquet"])
    expected = analyze_experiment(events, DESIGN)["metrics"]["love"]["effect"]
    for event_log in (gzip_events, parquet_events):
        effect = analyze_experiment(event_log, DESIGN)["metrics"]["love"]["effect"]
        assert effect == pytest.approx(expected, rel=1e-12)
    design = ExperimentDesign("control", "treatment", start_time=BEGIN.timestamp(), metric_names=("tokens",))
    assert analyze_experiment(gzip_events, design)["metrics"]["tokens"]["effect"]["control"] > 10
    with pytest.raises(DataError, match="column 'tokens' of the log has no values"):
        read_event_log([write_jsonl(tmp_path / "few.jsonl", [{k: v for k, v in rows[0].items() if k != "tokens"}])],
                    metric_columns=["tokens"])  # fmt: skip


def test_hashed_arms_are_stable_balanced_and_independent_across_salts() -> None:
    user_ids = [f"user-{n}" for n in range(20_000)]
    first, repeated, other_salt = (assign_users(user_ids, salt, (0.5, 0.5)) for salt in ("one", "one", "two"))
    assert (first == repeated).all()
    assert abs(first.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(first, other_salt)[0, 1]) < 0.03
    assert hash_to_unit_interval("user-1", "one") == pytest.approx(0.06, abs=1.0)
    assert abs((assign_users(user_ids, "one", (0.9, 0.1)) == 1).mean() - 0.1) < 0.01
    prefix = "an experiment with a long name, number "
    assert (
        assign_users(user_ids, prefix + "1", (0.5, 0.5)) != assign_users(user_ids, prefix + "2", (0.5, 0.5))
    ).mean() > 0.4


def test_a_salt_turns_the_log_into_an_aa_test(events: EventLog) -> None:
    report = analyze_experiment(
        events, ExperimentDesign("control", "treatment", assignment_salt="aa-1", start_time=BEGIN.timestamp())
    )
    assert sum(report["users"]) == sum(analyze_experiment(events, DESIGN)["users"])
    assert report["srm"]["ok"]


def test_aa_check_reports_valid_false_positive_rates(events: EventLog) -> None:
    report = run_aa_check(events, DESIGN, split_count=800, seed=1)
    assert report["suspect"] == []
    assert {"love", "love_cuped", "users_who_loved", "continued"} <= set(report["false_positives"])


def test_a_broken_assignment_fails_the_sample_ratio_check(tmp_path: Path) -> None:
    rows = [
        row
        for row in simulate_log(2, user_count=800)
        if not (row["arm"] == "treatment" and int(row["user_id"][1:]) % 3 == 0)
    ]
    report = analyze_experiment(
        read_event_log([write_jsonl(tmp_path / "broken.jsonl", rows)]), ExperimentDesign("control", "treatment")
    )
    assert not report["srm"]["ok"]


def test_users_in_both_arms_are_excluded_or_refused(tmp_path: Path) -> None:
    rows = simulate_log(3, user_count=200)
    crossed = [row | {"arm": "treatment", "id": f"s{row['id']}"} for row in rows if row["user_id"] in ("u0", "u2")]
    report = analyze_experiment(
        read_event_log([write_jsonl(tmp_path / "crossed_users.jsonl", rows + crossed)]),
        ExperimentDesign("control", "treatment"),
    )
    assert report["crossed_users"] == 2
    mixed = [row | {"arm": ("control", "treatment")[n % 2]} for n, row in enumerate(rows)]
    assert report["pre_period"] is False
    with pytest.raises(DataError, match="saw both control and treatment"):
        analyze_experiment(
            read_event_log([write_jsonl(tmp_path / "mixed.jsonl", mixed)]), ExperimentDesign("control", "treatment")
        )


def test_randomized_responses_are_compared_within_users(tmp_path: Path) -> None:
    """The same users are in both arms: user traits cancel, so the interval is narrower than with randomized users."""
    rng = np.random.default_rng(5)
    rows = []
    for row in simulate_log(5, user_count=400, days=15):
        arm = ("control", "treatment")[rng.integers(2)]
        is_loved = row["reaction"] == "love" or (arm == "treatment" and rng.random() < 0.08)
        rows.append(row | {"arm": arm, "reaction": "love" if is_loved else None})
    events = read_event_log([write_jsonl(tmp_path / "crossed.jsonl", rows)])
    report = analyze_experiment(events, ExperimentDesign("control", "treatment", is_crossed=True))
    love = report["metrics"]["love"]
    assert love["effect"]["low"] < 0.064 < love["effect"]["high"]
    assert love["significant"]
    assert "users_who_loved" not in report["metrics"]
    assert report["crossed_users"] > 350
    assert report["looks"]["love"][-1]["low"] < love["effect"]["low"]
    with pytest.raises(DataError, match="A/A check randomizes users"):
        run_aa_check(events, ExperimentDesign("control", "treatment", is_crossed=True), split_count=10, seed=1)


def test_planning_inputs_are_measured_from_the_log(events: EventLog) -> None:
    report = measure_planning_inputs(events, DESIGN)
    assert report["base_rate"] == pytest.approx(0.2, abs=0.03)
    assert report["responses"] == pytest.approx(7.0, abs=0.5)
    assert report["icc"] == pytest.approx(1 / 11, abs=0.04)  # of a beta(2, 8): 1 / (2 + 8 + 1)
    assert 0.2 < report["correlation"] < 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "have no user_id"),
        ({"time": "2026-02-01 12:00"}, "expected times with a time zone"),
        ({"arm": None}, "have no arm"),
    ],
)
def test_invalid_rows_are_refused(tmp_path: Path, change: Row, message: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row | change for row in simulate_log(4, user_count=10)])
    with pytest.raises(DataError, match=message):
        read_event_log([path])


def test_missing_files_and_unknown_arms_are_refused(tmp_path: Path, events: EventLog) -> None:
    with pytest.raises(DataError, match="is not a file"):
        read_event_log([tmp_path / "none.jsonl"])
    (tmp_path / "text.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="expected JSON lines or Parquet"):
        read_event_log([tmp_path / "text.jsonl"])
    with pytest.raises(DataError, match="no event has the arm 'c'; the log has control, treatment"):
        analyze_experiment(events, ExperimentDesign("c", "treatment"))
    with pytest.raises(DataError, match="no metric 'joy'"):
        analyze_experiment(
            events, ExperimentDesign("control", "treatment", start_time=BEGIN.timestamp(), metric_names=("joy",))
        )
    with pytest.raises(DataError, match="at or after --start"):
        analyze_experiment(events, ExperimentDesign("control", "treatment", start_time=9e9))


def test_the_command_writes_a_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(folder / "events.jsonl"), "--start", "2026-02-01", "--aa", "50"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    assert report["metrics"]["love"]["significant"]
    assert report["aa"]["splits"] == 50
    assert "sample ratio: p = " in output
    assert "love, sequential looks" in output
    assert main([*arguments[:4], "--plan", "--daily-users", "100"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["question"]["base_rate"] == pytest.approx(0.2, abs=0.03)
    assert plan["designs"]["one_look"]["days"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no event log"),
        (["--plan"], "--plan needs --base-rate"),
        (["--data", "x", "--start", "soon"], "--start soon"),
        (["--data", "x", "--alpha", "2"], "--alpha 2"),
    ],
)
def test_an_invalid_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_simulated_experiment_can_be_analyzed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "simulated.jsonl"
    assert main(["--simulate", str(path), "--users", "2500"]) == 0
    start = json.loads(capsys.readouterr().out.splitlines()[-1])["start"]
    assert main(["--data", str(path), "--start", start]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["pre_period"]
    assert report["metrics"]["love"]["effect"]["lift"] > 0.2
    assert report["metrics"]["love"]["significant"]
