"""Event logs as products write them: odd forms are read right, or refused with column, value and remedy."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.errors import DataError
from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_design import ExperimentDesign
from rluf.evaluate.abtest import main
from rluf.evaluate.events import EventLog, read_event_log

Row = dict[str, Any]
BEGIN = datetime(2026, 2, 1, tzinfo=UTC).timestamp()
DESIGN = ExperimentDesign("control", "treatment")


def make_rows(count: int = 60, **changes: Any) -> list[Row]:
    """Rows of count / 3 users, every fourth with love; a callable in `changes` gets the row number."""
    rows = []
    for n in range(count):
        row: Row = {
            "id": f"r{n}", "user_id": n // 3, "time": BEGIN + 3600 * n, "arm": ("control", "treatment")[n // 3 % 2],
            "reaction": "love" if n % 4 == 0 else None, "continued": n % 2 == 0,
        }  # fmt: skip
        rows.append(row | {name: value(n) if callable(value) else value for name, value in changes.items()})
    return rows


def write_log(path: Path, rows: list[Row]) -> Path:
    """The rows as JSON lines, CSV or Parquet, by the name of the file."""
    if ".csv" in path.suffixes:
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(tmp_path: Path, rows: list[Row], **options: Any) -> EventLog:
    return read_event_log([write_log(tmp_path / "log.jsonl", rows)], **options)


def test_csv_parquet_and_json_give_the_same_log(tmp_path: Path) -> None:
    rows = make_rows()
    logs = [read_event_log([write_log(tmp_path / f"log.{suffix}", rows)]) for suffix in ("jsonl", "csv", "parquet")]
    array_path = tmp_path / "log.json"
    array_path.write_text(json.dumps(rows), encoding="utf-8")
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    for log in (*logs[1:], read_event_log([array_path]), read_event_log([packed])):
        assert log.user_ids == logs[0].user_ids == tuple(str(n) for n in range(20))
        assert log.timestamps.tolist() == logs[0].timestamps.tolist()
        for name in ("love", "continued"):
            assert log.metric_values[name].tolist() == logs[0].metric_values[name].tolist()
    assert logs[0].metric_values["love"].sum() == 15


@pytest.mark.parametrize(
    "spelling",
    ["LOVE", "Loved", "\u2764\ufe0f", "\u2665", "\U0001f496", "\U0001f970", ":heart:", "heart", "<3", ["love", "haha"],
     {"love": 2, "haha": 0}, '["love"]', "['love']", "love|haha"],
)  # fmt: skip
def test_usual_spellings_of_love_are_read(tmp_path: Path, spelling: Any) -> None:
    log = read_rows(tmp_path, make_rows(reaction=lambda n: spelling if n % 4 == 0 else None))
    assert log.metric_values["love"].sum() == 15
    assert sum(log.love_spellings.values()) == 15


@pytest.mark.parametrize("other", ["\U0001f494", "dislove", "unloved", "thumbs_up", "not_love"])
def test_other_reactions_are_not_love_and_stop_the_analysis(tmp_path: Path, other: str) -> None:
    log = read_rows(tmp_path, make_rows(reaction=lambda n: other if n % 4 == 0 else None))
    assert log.reaction_counts == {"love": 0, other: 15}
    with pytest.raises(DataError, match=r"no response has the reaction love.*\(15\).*--love NAME"):
        analyze_experiment(log, DESIGN)
    assert analyze_experiment(log, ExperimentDesign("control", "treatment", metric_names=("continued",)))["metrics"]


def test_love_names_choose_the_reaction(tmp_path: Path) -> None:
    rows = make_rows(reaction=lambda n: ("up", "love", 1, None)[n % 4])
    log = read_rows(tmp_path, rows, love_names=["UP", "1"])
    assert log.love_spellings == {"up": 15, "1": 15}
    assert log.reaction_counts == {"love": 30, "love (not --love)": 15}
    with pytest.raises(DataError, match="no row has the reaction 'star' of --love; column 'reaction' has"):
        read_rows(tmp_path, make_rows(), love_names=["star"])


@pytest.mark.parametrize(
    "time",
    [
        lambda n: BEGIN + n, lambda n: int(BEGIN + n) * 1000, lambda n: str(int(BEGIN + n)),
        lambda n: int(BEGIN + n) * 10**6, lambda n: datetime.fromtimestamp(BEGIN + n, UTC).isoformat(),
        lambda n: datetime.fromtimestamp(BEGIN + n, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        lambda n: datetime.fromtimestamp(BEGIN + n, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    ],
)  # fmt: skip
def test_times_are_iso_or_epoch(tmp_path: Path, time: Any) -> None:
    log = read_rows(tmp_path, make_rows(time=time))
    assert log.timestamps.tolist() == [BEGIN + n for n in range(60)]


@pytest.mark.parametrize(
    ("yes", "no"), [("yes", "no"), ("TRUE", "false"), (1, 0), ("1", "0"), (1.0, 0.0), ("Y", "N"), ("t", "f")]
)
def test_flags_have_many_spellings(tmp_path: Path, yes: Any, no: Any) -> None:
    log = read_rows(tmp_path, make_rows(continued=lambda n: (yes, no, None)[n % 3]))
    assert np.nansum(log.metric_values["continued"]) == 20
    assert np.isnan(log.metric_values["continued"]).sum() == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continued": "maybe"}, r"column 'continued', row 1: expected yes or no .* got 'maybe'"),
        ({"continued": 2}, r"column 'continued', row 1: expected yes or no .* got 2"),
        ({"reaction": True}, r"column 'reaction', row 1: .* add --love True"),
        ({"reaction": lambda n: 5 if n == 7 else None}, r"row 8: .* add --love 5"),
        ({"time": "2026-02-01 12:00"}, r"column 'time', row 1: expected times with a time zone"),
        ({"time": 17}, r"row 1: expected times with a time zone.* or epoch seconds, got 17"),
        ({"time": True}, r"row 1: expected times"),
        ({"user_id": [["a"]]}, r"column 'user_id', row 1: expected a text or a whole number"),
        ({"user_id": 1.5}, r"column 'user_id', row 1: expected a text or a whole number, got 1.5"),
        ({"tokens": "12 ms"}, r"column 'tokens', row 1: expected a number or yes/no, got '12 ms'"),
        ({"user_id": lambda n: None if n % 5 == 0 else n}, "12 of 60 rows have no user_id"),
        ({"user_id": lambda n: "anonymous" if n % 5 == 0 else n}, "12 of 60 rows have no user_id"),
    ],
)
def test_values_that_are_not_understood_are_refused_with_their_row(tmp_path: Path, changes: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path, make_rows(**changes), metric_columns=["tokens"] if "tokens" in changes else [])


def test_a_few_missing_user_ids_are_dropped_and_counted_never_joined(tmp_path: Path) -> None:
    missing = {3: None, 17: "", 40: "nan"}
    log = read_rows(tmp_path, make_rows(300, user_id=lambda n: missing.get(n, n // 3)))
    assert log.missing_user_count == 3
    assert len(log.user_index) == 297
    assert not {"", "nan", "None"} & set(log.user_ids)
    assert analyze_experiment(log, DESIGN)["missing_user_responses"] == 3


def test_a_user_with_many_responses_is_named(tmp_path: Path) -> None:
    rows = make_rows(
        400, user_id=lambda n: "demo" if n % 10 == 0 else n, arm=lambda n: "control" if n % 10 == 0 else "treatment"
    )
    assert any("user 'demo' has 40 of 400 responses" in note for note in read_rows(tmp_path, rows).notes)


def test_repeated_rows_are_dropped_or_reported(tmp_path: Path) -> None:
    rows = make_rows()
    without_ids = [{name: value for name, value in row.items() if name != "id"} for row in [*rows, *rows[:9]]]
    log = read_rows(tmp_path, without_ids)
    assert log.duplicate_count == 9
    assert any("69 rows have no id" in note for note in log.notes)
    log = read_rows(tmp_path, [*rows, *(row | {"id": f"again{n}"} for n, row in enumerate(rows[:9]))])
    assert log.duplicate_count == 0
    assert any("9 rows repeat user, time, arm" in note for note in log.notes)
    log = read_rows(tmp_path, make_rows(id=lambda n: n % 3))
    assert log.duplicate_count == 0
    assert any("3 ids occur" in note or "ids occur with more than one user" in note for note in log.notes)


def test_columns_that_start_late_or_are_missing(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows[:30]:
        del row["reaction"]
    assert read_rows(tmp_path, rows).metric_values["love"].sum() == 7
    for row in rows:
        del row["user_id"]
    with pytest.raises(DataError, match="no column user_id; it has id, time, arm, continued, reaction; rename one"):
        read_rows(tmp_path, rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.csv", "id,user_id\n1,2,3\n", "line 2: expected 2 fields as in the header, got 3"),
        ("log.jsonl", '{"id": 1}\n{"id": \n', "line 2: expected one JSON object"),
        ("log.jsonl", "[1, 2", "not a JSON array"),
        ("log.parquet", "hello", "is not a readable Parquet file"),
        ("log.csv", "", "no rows"),
        ("log.jsonl.gz", "hello", "cannot be read"),
    ],
)
def test_broken_files_are_refused_in_plain_words(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_event_log([tmp_path / name])
    assert "Column(" not in str(error.value)


def test_the_header_says_what_was_dropped_and_what_love_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(
        300,
        reaction=lambda n: ("LOVE", "haha", None)[n % 3],
        user_id=lambda n: None if n == 5 else n // 3,
        continued=lambda n: n % 7 < 4,
    )
    path = write_log(tmp_path / "log.csv", [*rows, rows[0]])
    assert main(["--data", str(path), "--guard", "continued:-10%", "--segments"]) == 0
    output = capsys.readouterr().out
    assert "responses dropped: 1 duplicates, 1 without a user id, 0 of 0 users in several arms" in output
    assert "love is 'LOVE' (100); not love: 'haha' (100)" in output
    assert "continued: undecided, about" in output
    assert json.loads(output.splitlines()[-1])["missing_user_responses"] == 1


@pytest.mark.parametrize(
    ("love", "spelling", "other"),
    [("5", 5, 3), ("2", 2, 1), ("1", 1.0, 0.0), ("1.0", 1.0, 0.0), ("1.0", "1.0", "2.0"), ("True", True, False)],
)
def test_reactions_may_be_numbers_with_a_love_name(tmp_path: Path, love: str, spelling: Any, other: Any) -> None:
    log = read_rows(tmp_path, make_rows(reaction=lambda n: spelling if n % 4 == 0 else other), love_names=[love])
    assert log.metric_values["love"].sum() == 15
    assert sum(log.reaction_counts.values()) == (60 if other else 15)


@pytest.mark.parametrize(
    "spelling", [":heart_eyes:", ":sparkling_heart:", ":two_hearts:", "\u2764\ufe0f\u200d\U0001f525", "\U0001f63b"]
)
def test_names_of_love_emoji_are_read_as_the_emoji(tmp_path: Path, spelling: str) -> None:
    log = read_rows(tmp_path, make_rows(reaction=lambda n: (spelling, ":broken_heart:", None)[n % 3]))
    assert log.reaction_counts == {"love": 20, ":broken_heart:": 20}


@pytest.mark.parametrize(
    "value", [{"love": "0", "haha": "1"}, [{"name": "heart", "count": 1}], {"name": "love"}, '[{"type": "love"}]']
)
def test_a_mapping_without_counts_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"column 'reaction', row 1: expected counts by name, such as"):
        read_rows(tmp_path, make_rows(reaction=value))


def test_a_map_column_of_parquet_has_counts_by_name(tmp_path: Path) -> None:
    rows = make_rows(reaction=None)
    reactions = pa.array([{"love": int(n % 4 == 0), "haha": 1} for n in range(60)], pa.map_(pa.string(), pa.int32()))
    table = pa.Table.from_pylist(rows).drop_columns("reaction").append_column("reaction", reactions)
    pq.write_table(table, tmp_path / "log.parquet")
    assert read_event_log([tmp_path / "log.parquet"]).reaction_counts == {"love": 15, "haha": 60}


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_the_nan_of_python_is_a_missing_value(tmp_path: Path, name: str) -> None:
    rows = make_rows(reaction=lambda n: "love" if n % 4 == 0 else float("nan"), continued=float("nan"))
    text = json.dumps(rows) if name == "log.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_event_log([tmp_path / name]).metric_values["love"].sum() == 15


def test_ids_that_would_join_users_are_refused_or_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'user_id', row 1: .*a float above 2\^53 has lost digits"):
        read_rows(tmp_path, make_rows(user_id=lambda n: float(2**60 + n // 3)))
    assert len(read_rows(tmp_path, make_rows(user_id=lambda n: 2**70 + n // 3)).user_ids) == 20
    log = read_rows(tmp_path, make_rows(user_id=lambda n: f"{'uU'[n % 2]}{n // 3}"))
    assert len(log.user_ids) == 40
    assert any("20 user ids differ from another one in upper and lower case only" in note for note in log.notes)
    assert len(read_rows(tmp_path, make_rows(user_id=lambda n: f"u{n // 3}{' ' * (n % 2)}")).user_ids) == 20


def test_a_repeated_row_with_another_reaction_is_reported(tmp_path: Path) -> None:
    rows = make_rows()
    log = read_rows(tmp_path, [*(row | {"reaction": None} for row in rows), *rows])
    assert (log.duplicate_count, log.reaction_counts["love"]) == (60, 0)
    assert any("15 repeated rows have another reaction than the first row with their id" in note for note in log.notes)
    assert not any("another reaction" in note for note in read_rows(tmp_path, [*rows, *rows]).notes)


def test_named_metrics_and_guardrails_need_no_column_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(300, helpful=lambda n: n % 5 > 0, seconds=lambda n: n % 9, arm=lambda n: "AB"[n // 3 % 2])
    path = str(
        write_log(tmp_path / "log.csv", [row | {"arm": "Control"} if n < 9 else row for n, row in enumerate(rows)])
    )
    arguments = ["--data", path, "--control", "A", "--treatment", "B"]
    assert main([*arguments, "--guard", "helpful:-2%", "--primary", "love,seconds"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["primary"] == ["love", "seconds"]
    assert "helpful: " in output and "9 of other arms (Control)" in output
    with pytest.raises(SystemExit):
        main([*arguments, "--guard", "unheard:-2%"])
    assert "no metric 'unheard' in this log" in capsys.readouterr().err
