"""A/B tests from event logs: files in, assignment, checks, effects by user, looks, and the command itself."""

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
from rluf.evaluate.ab_analysis import Design, aa_check, analyse, observed
from rluf.evaluate.abtest import main
from rluf.evaluate.effects import Totals, proportion_effect, ratio_effect
from rluf.evaluate.events import Events, assigned, read_events, unit_interval

BEGIN = datetime(2026, 2, 1, tzinfo=UTC)
Row = dict[str, Any]


def log(seed: int = 0, users: int = 600, lift: float = 1.0, days: int = 10, before: int = 0) -> list[Row]:
    """Events of `users` users over `days`, and `before` days of control before; hearts at 20%, times `lift` treated."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(users):
        own, treated = rng.beta(2, 8), user % 2 == 1
        for day in range(-before, days):
            for _ in range(rng.poisson(0.7)):
                rate = own * (lift if treated and day >= 0 else 1.0)
                arm = "treatment" if treated and day >= 0 else "control"
                rows.append({
                    "id": f"e{len(rows)}", "user_id": f"u{user}", "conversation_id": f"c{len(rows) // 2}",
                    "time": (BEGIN + timedelta(days=day, seconds=int(rng.integers(86_400)))).isoformat(), "arm": arm,
                    "reaction": "love" if rng.random() < rate else None, "continued": bool(rng.random() < 0.5),
                    "messages": [{"role": "user", "content": "Hi"}], "response": "Hello.", "tokens": int(day * day),
                })  # fmt: skip
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with a pre-period and a lift of 50%."""
    path = tmp_path_factory.mktemp("events")
    write(path / "events.jsonl", log(1, lift=1.5, before=10))
    return path


@pytest.fixture(scope="module")
def events(folder: Path) -> Events:
    return read_events([folder / "events.jsonl"])


DESIGN = Design("control", "treatment", start=BEGIN.timestamp())


def test_effects_are_those_of_rows_added_up_by_user(events: Events) -> None:
    rows = [row for row in log(1, lift=1.5, before=10) if datetime.fromisoformat(row["time"]) >= BEGIN]
    sums: dict[str, dict[str, float]] = {"control": {}, "treatment": {}}
    counts: dict[str, dict[str, float]] = {"control": {}, "treatment": {}}
    for row in rows:
        loved = float(row["reaction"] == "love")
        sums[row["arm"]][row["user_id"]] = sums[row["arm"]].get(row["user_id"], 0.0) + loved
        counts[row["arm"]][row["user_id"]] = counts[row["arm"]].get(row["user_id"], 0.0) + 1
    arms = [Totals.of(list(sums[arm].values()), list(counts[arm].values())) for arm in ("control", "treatment")]
    found = analyse(events, DESIGN)
    by_hand = ratio_effect(arms[0], arms[1])
    assert found["metrics"]["love"]["effect"] == pytest.approx(by_hand.as_dict(), rel=1e-9)
    hits = [float((one.sums > 0).sum()) for one in arms]
    share = proportion_effect((hits[0], hits[1]), (arms[0].users, arms[1].users))
    assert found["metrics"]["users_who_loved"]["effect"] == pytest.approx(share.as_dict(), rel=1e-9)
    assert found["users"] == [one.users for one in arms]
    assert found["responses"] == [one.counts.sum() for one in arms]


def test_a_lift_is_found_and_cuped_narrows_it(events: Events) -> None:
    found = analyse(events, DESIGN)
    love, other = found["metrics"]["love"], found["metrics"]["continued"]
    assert love["significant"]
    assert not other["significant"]
    assert found["srm"]["ok"]
    cuped = love["cuped"]
    assert cuped["low"] < 0.1 < cuped["high"]
    assert cuped["error"] < love["effect"]["error"]
    assert cuped["variance_cut"] == pytest.approx(cuped["correlation"] ** 2, abs=0.05)


def test_looks_widen_backwards_and_end_at_the_whole_log(events: Events) -> None:
    looks = analyse(events, DESIGN)["looks"]["love"]
    widths = [one["high"] - one["low"] for one in looks]
    assert len(looks) >= 8
    assert widths == sorted(widths, reverse=True)
    assert [one["p"] for one in looks] == sorted((one["p"] for one in looks), reverse=True)
    whole = analyse(events, DESIGN)["metrics"]["love"]
    assert looks[-1]["difference"] == pytest.approx(whole["effect"]["difference"])
    assert looks[-1]["high"] - looks[-1]["low"] > whole["effect"]["high"] - whole["effect"]["low"]
    four = Design("control", "treatment", start=BEGIN.timestamp(), looks=4)
    assert len(analyse(events, four)["looks"]["love"]) == 4


def test_parquet_gzip_duplicates_and_more_columns(tmp_path: Path, events: Events) -> None:
    rows = log(1, lift=1.5, before=10)
    zipped = read_events([write(tmp_path / "events.jsonl.gz", [*rows, *rows[:7]])], columns=["tokens"])
    assert zipped.duplicates == 7
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "events.parquet")
    parquet = read_events([tmp_path / "events.parquet"])
    for one in (zipped, parquet):
        found, wanted = analyse(one, DESIGN)["metrics"]["love"], analyse(events, DESIGN)["metrics"]["love"]
        assert found["effect"] == pytest.approx(wanted["effect"], rel=1e-12)
    design = Design("control", "treatment", start=BEGIN.timestamp(), metrics=("tokens",))
    assert analyse(zipped, design)["metrics"]["tokens"]["effect"]["control"] > 10
    with pytest.raises(DataError, match="no values in column 'tokens'"):
        read_events([write(tmp_path / "few.jsonl", [{k: v for k, v in rows[0].items() if k != "tokens"}])],
                    columns=["tokens"])  # fmt: skip


def test_hashed_arms_are_fixed_even_and_independent_of_other_salts() -> None:
    users = [f"user-{n}" for n in range(20_000)]
    first, again, other = (assigned(users, salt, (0.5, 0.5)) for salt in ("one", "one", "two"))
    assert (first == again).all()
    assert abs(first.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
    assert unit_interval("user-1", "one") == pytest.approx(0.06, abs=1.0)
    assert abs((assigned(users, "one", (0.9, 0.1)) == 1).mean() - 0.1) < 0.01
    long = "an experiment with a long name, number "
    assert (assigned(users, long + "1", (0.5, 0.5)) != assigned(users, long + "2", (0.5, 0.5))).mean() > 0.4


def test_a_salt_splits_the_log_into_an_aa_test(events: Events) -> None:
    found = analyse(events, Design("control", "treatment", salt="aa-1", start=BEGIN.timestamp()))
    assert sum(found["users"]) == sum(analyse(events, DESIGN)["users"])
    assert found["srm"]["ok"]


def test_aa_check_finds_no_fault_in_the_tests(events: Events) -> None:
    found = aa_check(events, DESIGN, splits=800, seed=1)
    assert found["suspect"] == []
    assert {"love", "love_cuped", "users_who_loved", "continued"} <= set(found["false_positives"])


def test_a_broken_assignment_is_told(tmp_path: Path) -> None:
    rows = [row for row in log(2, users=800) if not (row["arm"] == "treatment" and int(row["user_id"][1:]) % 3 == 0)]
    found = analyse(read_events([write(tmp_path / "broken.jsonl", rows)]), Design("control", "treatment"))
    assert not found["srm"]["ok"]


def test_users_in_both_arms(tmp_path: Path) -> None:
    rows = log(3, users=200)
    strays = [row | {"arm": "treatment", "id": f"s{row['id']}"} for row in rows if row["user_id"] in ("u0", "u2")]
    found = analyse(read_events([write(tmp_path / "strays.jsonl", rows + strays)]), Design("control", "treatment"))
    assert found["crossed_users"] == 2
    mixed = [row | {"arm": ("control", "treatment")[n % 2]} for n, row in enumerate(rows)]
    assert found["pre_period"] is False
    with pytest.raises(DataError, match="saw both control and treatment"):
        analyse(read_events([write(tmp_path / "mixed.jsonl", mixed)]), Design("control", "treatment"))


def test_responses_split_at_random_are_judged_within_users(tmp_path: Path) -> None:
    """The same users in both arms: their habits cancel, so the interval is narrower than with users apart."""
    rng = np.random.default_rng(5)
    rows = []
    for row in log(5, users=400, days=15):
        arm = ("control", "treatment")[rng.integers(2)]
        lucky = row["reaction"] == "love" or (arm == "treatment" and rng.random() < 0.08)
        rows.append(row | {"arm": arm, "reaction": "love" if lucky else None})
    events = read_events([write(tmp_path / "crossed.jsonl", rows)])
    found = analyse(events, Design("control", "treatment", crossed=True))
    love = found["metrics"]["love"]
    assert love["effect"]["low"] < 0.064 < love["effect"]["high"]
    assert love["significant"]
    assert "users_who_loved" not in found["metrics"]
    assert found["crossed_users"] > 350
    assert found["looks"]["love"][-1]["low"] < love["effect"]["low"]
    with pytest.raises(DataError, match="splits users"):
        aa_check(events, Design("control", "treatment", crossed=True), splits=10, seed=1)


def test_what_the_planner_reads_off_a_log(events: Events) -> None:
    found = observed(events, DESIGN)
    assert found["base_rate"] == pytest.approx(0.2, abs=0.03)
    assert found["responses"] == pytest.approx(7.0, abs=0.5)
    assert found["icc"] == pytest.approx(1 / 11, abs=0.04)  # of a beta(2, 8): 1 / (2 + 8 + 1)
    assert 0.2 < found["correlation"] < 0.7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"user_id": None}, "have no user_id"),
        ({"time": "2026-02-01 12:00"}, "write times with their zone"),
        ({"arm": None}, "have no arm"),
    ],
)
def test_bad_rows_are_told(tmp_path: Path, change: Row, told: str) -> None:
    path = write(tmp_path / "bad.jsonl", [row | change for row in log(4, users=10)])
    with pytest.raises(DataError, match=told):
        read_events([path])


def test_files_and_arms_that_are_not_there(tmp_path: Path, events: Events) -> None:
    with pytest.raises(DataError, match="is no file"):
        read_events([tmp_path / "none.jsonl"])
    (tmp_path / "text.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="must be JSON lines or Parquet"):
        read_events([tmp_path / "text.jsonl"])
    with pytest.raises(DataError, match="no event has the arm 'c'; the log has control, treatment"):
        analyse(events, Design("c", "treatment"))
    with pytest.raises(DataError, match="no metric 'joy'"):
        analyse(events, Design("control", "treatment", start=BEGIN.timestamp(), metrics=("joy",)))
    with pytest.raises(DataError, match="at or after --start"):
        analyse(events, Design("control", "treatment", start=9e9))


def test_the_command_tells_a_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(folder / "events.jsonl"), "--start", "2026-02-01", "--aa", "50"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["metrics"]["love"]["significant"]
    assert found["aa"]["splits"] == 50
    assert "sample ratio: p = " in told
    assert "love, look by look" in told
    assert main([*arguments[:4], "--plan", "--daily-users", "100"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["question"]["base_rate"] == pytest.approx(0.2, abs=0.03)
    assert plan["designs"]["one_look"]["days"] > 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no event log"),
        (["--plan"], "--plan needs --base-rate"),
        (["--data", "x", "--start", "soon"], "--start soon"),
        (["--data", "x", "--alpha", "2"], "--alpha 2"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_a_simulated_experiment_can_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "simulated.jsonl"
    assert main(["--simulate", str(path), "--users", "300"]) == 0
    start = json.loads(capsys.readouterr().out.splitlines()[-1])["start"]
    assert main(["--data", str(path), "--start", start]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["pre_period"]
    assert found["metrics"]["love"]["effect"]["lift"] > 0.2
    assert found["metrics"]["love"]["significant"]
