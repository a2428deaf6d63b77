"""What comes with the data: card and page, drift, signals, erasure, and jobs that are killed midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError, SettingsError
from rluf.prepare.erasure import (
    compute_erasure_mark,
    erase_users,
    find_named_ids,
    is_row_of_erased_user,
    match_erased_users,
)
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.prepare.schema import DATA_KINDS, SPLIT_NAMES
from rluf.prepare.signals import estimate_return_association, format_signal_lines, rank_signals, write_signal_report
from rluf.utils.hashing import hash_user_id, hash_user_id_legacy

RowFactory = Callable[..., dict[str, Any]]


def run_in_process(task_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [result for task_row in task_rows for result in run_task(task_row)]


def build_settings(log: Mapping[str, Path], **prepare: Any) -> Settings:
    data = {kind: [str(log[kind])] if kind in log else [] for kind in DATA_KINDS}
    return Settings.model_validate({"data": data, "prepare": {"positive_share": 0.05} | prepare})


def read_love_rows(data_folder: Path) -> list[dict[str, Any]]:
    files = [data_folder / "love" / f"{split}.parquet" for split in SPLIT_NAMES]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_card_page_and_drift(log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any) -> None:
    output_folder = tmp_path / "data"
    first_card = build_data_set(build_settings(log), output_folder, run_in_process)
    assert first_card["drift"] == {}
    love = first_card["love"]
    assert love["base_rate_by_topic"]["casual"]["rows"] == 550
    assert sum(rate["hits"] for rate in love["base_rate_by_day"].values()) == love["base_rate"]["hits"] == 100
    assert len(love["base_rate_by_day"]) == 28
    page = (output_folder / "data_card.html").read_text(encoding="utf-8")
    assert "1,640 of 1,640 rows became training data" in page
    assert all(f'data-figure="by_{name}"' in page for name in ("topic", "day", "locale", "model"))
    assert "://" not in page.partition('<script type="application/json"')[0]
    loved_rows = [rows["feedback"](n, reaction="love" if n % 3 == 0 else None, topic="new") for n in range(1100)]
    log["feedback"] = jsonl(tmp_path / "loved.jsonl", loved_rows)
    second_card = build_data_set(build_settings(log), output_folder, run_in_process)
    assert second_card["drift"]["base_rate_differs"] and second_card["drift"]["topic_psi"] > 0.2
    assert second_card["drift"]["locale_psi"] == pytest.approx(0)
    third_card = build_data_set(build_settings(log), output_folder, run_in_process)
    assert not third_card["drift"]["base_rate_differs"]


def test_labeled_rows_of_an_objective_get_a_folder_of_their_own(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any
) -> None:
    settings = build_settings({"safety": log["safety"]})
    data = settings.data.model_dump() | {"labels": {"warmth": [str(log["safety"])]}}
    objectives = {"objectives": {"warmth": {}}}
    settings = Settings.model_validate({**settings.model_dump(), "data": data, **objectives})
    card = build_data_set(settings, tmp_path / "data", run_in_process)
    for split in SPLIT_NAMES:
        safety, warmth = (pq.read_table(tmp_path / "data" / name / f"{split}.parquet") for name in ("safety", "warmth"))
        assert warmth.num_rows and warmth.equals(safety)
    assert card["counts"]["labels.warmth"] == card["counts"]["safety"]
    assert card["splits"]["warmth"] == card["splits"]["safety"]
    one_class = jsonl(tmp_path / "one.jsonl", [rows["safety"](n, label=1) for n in range(60)])
    data["labels"] = {"warmth": [str(one_class)]}
    settings = Settings.model_validate({**settings.model_dump(), "data": data})
    with pytest.raises(DataError, match=r"data\.labels\.warmth: all training rows are labeled 1"):
        build_data_set(settings, tmp_path / "other", run_in_process)


def test_weights_are_sampling_times_trust(tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any) -> None:
    log_rows = [rows["feedback"](n, author="u3" if n // 2 % 97 == 3 else None) for n in range(1100)]
    file = jsonl(tmp_path / "log.jsonl", log_rows)
    build_data_set(build_settings({"feedback": file}, positive_share=0.3), tmp_path / "data", run_in_process)
    love_rows = read_love_rows(tmp_path / "data")
    assert all(row["weight"] == pytest.approx(row["sampling"] * row["trust"]) for row in love_rows)
    assert {row["trust"] for row in love_rows if row["user_id"] == "u3"} == {0.01}
    assert {row["trust"] for row in love_rows if row["user_id"] != "u3"} == {1.0}
    assert all(0 < row["propensity"] < 1 for row in love_rows)


def test_strict_splits_of_a_log_share_no_user_or_prompt(
    tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any
) -> None:
    log_rows = [
        rows["feedback"](n, conversation_id=f"c{n}", messages=[{"role": "user", "content": f"say {n % 300}"}])
        for n in range(3000)
    ]
    file = jsonl(tmp_path / "log.jsonl", log_rows)
    card = build_data_set(build_settings({"feedback": file}, split="strict"), tmp_path / "data", run_in_process)
    assert card["love"]["test_later_than_train"]
    split_rows = [pq.read_table(tmp_path / "data" / "love" / f"{split}.parquet").to_pylist() for split in SPLIT_NAMES]
    for key in (lambda row: row["user_id"], lambda row: row["messages"][-1]["content"]):
        values = [{key(row) for row in one_split} for one_split in split_rows]
        assert sum(map(len, values)) == len(set.union(*values))
    dropped = card["counts"]["feedback"]["dropped"]
    assert {"after the time split", "test row before the time split"} < set(dropped)


def test_users_are_hashed_with_the_salt_and_columns_mapped(
    tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_rows = [rows["feedback"](n) for n in range(600)]
    foreign_rows = [{"who": row.pop("user_id"), "text": row.pop("response"), **row} for row in log_rows]
    log = {"feedback": jsonl(tmp_path / "log.jsonl", foreign_rows)}
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    columns = {"user_id": "who", "response": "text"}
    card = build_data_set(build_settings(log, columns=columns), tmp_path / "data", run_in_process)
    love_rows = read_love_rows(tmp_path / "data")
    assert len(love_rows) == 600 == card["counts"]["feedback"]["in"]
    user_ids = {row["user_id"] for row in love_rows}
    assert user_ids == {hash_user_id(f"u{n}", b"pepper") for n in range(97)}
    assert "pepper" not in json.dumps(card) and card["user_ids"] == "hashed with RLUF_USER_SALT"
    proof = erase_users(tmp_path / "data", ["u5"])
    assert sum(proof["rows_removed"].values()) == 8 and len(read_love_rows(tmp_path / "data")) == 592
    with pytest.raises(SettingsError, match=r"prepare\.columns\.shoe"):
        build_data_set(build_settings(log, columns={"shoe": "size"}), tmp_path / "new", run_in_process)


@pytest.mark.parametrize("prepare_salt", ["", "pepper"])
@pytest.mark.parametrize("is_old_log", [False, True])
def test_a_user_of_the_service_is_erased_by_the_id_that_the_user_has(
    tmp_path: Path,
    rows: dict[str, RowFactory],
    jsonl: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prepare_salt: str,
    is_old_log: bool,
) -> None:
    served_id = hash_user_id_legacy("alice", b"old") if is_old_log else hash_user_id("alice", b"pepper")
    log_rows = [rows["feedback"](n) for n in range(400)] + [rows["feedback"](9000, user_id=served_id)]
    log = {"feedback": jsonl(tmp_path / "log.jsonl", log_rows)}
    monkeypatch.setenv("RLUF_USER_SALT", prepare_salt)
    build_data_set(build_settings(log), tmp_path / "data", run_in_process)
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    monkeypatch.setenv("RLUF_SERVE_SALT", "old")
    proof = erase_users(tmp_path / "data", ["alice"])
    assert sum(proof["rows_removed"].values()) == 1
    monkeypatch.setenv("RLUF_USER_SALT", prepare_salt)
    card = build_data_set(build_settings(log), tmp_path / "data", run_in_process)
    assert card["counts"]["feedback"]["dropped"]["user asked to be forgotten"] == 1


def test_marks_of_earlier_releases_match_tagged_ids() -> None:
    old_mark = compute_erasure_mark(hash_user_id("alice", b"pepper").removeprefix("u1_"))
    user_ids = [hash_user_id(user, b"pepper") for user in ("alice", "bob")]
    assert match_erased_users(user_ids, [old_mark]) == [True, False]
    assert compute_erasure_mark("bob") not in ("bob", compute_erasure_mark("eve"))


def test_an_erased_user_stays_out_of_later_builds(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any
) -> None:
    make = rows["feedback"]
    valid_rows = [make(n) for n in range(1100)]
    invalid_rows = [
        make(5000 + n, user_id=("secret-0", "secret-1", "secret-12")[n % 3], response="") for n in range(30)
    ]
    secret_rows = [make(6000 + n, user_id="secret-1") for n in range(20)]
    log["feedback"] = jsonl(tmp_path / "log.jsonl", [*valid_rows, *invalid_rows, *secret_rows])
    output_folder = tmp_path / "data"
    build_data_set(build_settings(log), output_folder, run_in_process)
    old_rows = read_love_rows(output_folder)
    old_pairs = pq.read_table(output_folder / "helpfulness" / "train.parquet")
    proof = erase_users(output_folder, ["secret-1"])
    assert proof["rows_of_these_users_left"] == 0
    assert sum(proof["rows_removed"].values()) == 30
    assert read_love_rows(output_folder) == [row for row in old_rows if row["user_id"] != "secret-1"]
    assert pq.read_table(output_folder / "helpfulness" / "train.parquet").equals(old_pairs)
    quarantined = [row["raw"] for row in pq.read_table(output_folder / "quarantine.parquet").to_pylist()]
    assert len(quarantined) == 20 and not any(b'"secret-1"' in raw for raw in quarantined)
    assert sum(b'"secret-12"' in raw for raw in quarantined) == 10
    card_text = (output_folder / "data_card.json").read_text()
    assert "secret-1" not in card_text
    counts = json.loads(card_text)["counts"]["feedback"]
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["quarantined"].values())
    rebuilt_card = build_data_set(build_settings(log), output_folder, run_in_process)
    assert rebuilt_card["counts"]["feedback"]["dropped"]["user asked to be forgotten"] == 30
    assert "secret-1" not in {row["user_id"] for row in read_love_rows(output_folder)}
    with pytest.raises(DataError, match="none of 1 users has a row"):
        erase_users(output_folder, ["unknown"])
    with pytest.raises(DataError, match=r"has no data_card\.json"):
        erase_users(tmp_path, ["secret-1"])


def test_a_cut_row_of_escaped_quotes_is_searched_in_linear_time() -> None:
    mark = compute_erasure_mark('a"b')
    assert is_row_of_erased_user(b'{"user_id": "a\\"b", "text": "cut', {mark}, str)
    start = time.process_time()
    assert not is_row_of_erased_user(b'{"text": "' + b'\\"' * 30_000, {mark}, str)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("user_id", ["user-7", "kåre-7", "Wang Fang", 'a"b'])
def test_a_hashed_id_also_removes_the_raw_rows_that_name_the_user(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any, monkeypatch: Any, user_id: str
) -> None:
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    make = rows["feedback"]
    log_rows = [make(n) for n in range(500)] + [make(6000 + n, user_id=user_id, response="a" * n) for n in range(8)]
    log["feedback"] = jsonl(tmp_path / "log.jsonl", log_rows)
    log["prompts"] = jsonl(tmp_path / "p.jsonl", [rows["prompts"](n, owner=user_id) for n in range(20)] + [
        rows["prompts"](n) for n in range(20, 40)
    ])  # fmt: skip
    build_data_set(build_settings(log), tmp_path / "data", run_in_process)
    assert search_files(tmp_path / "data", user_id)
    proof = erase_users(tmp_path / "data", [hash_user_id(user_id, b"pepper")])
    assert proof["rows_removed"]["quarantine.parquet"] == 1 and sum(proof["rows_removed"].values()) == 28
    assert search_files(tmp_path / "data", user_id, hash_user_id(user_id, b"pepper")) == []


@pytest.mark.parametrize("raw", [b'f1,"a""b",x', b'f1;"a""b"', b'"a""b"', b'{"user_id": "a\\"b"}', b'f1\t"a""b"\t"c'])
def test_an_id_with_a_quote_is_found_as_a_csv_and_as_json_write_it(raw: bytes) -> None:
    assert find_named_ids(raw, ['a"b']) == {'a"b'}
    assert is_row_of_erased_user(raw, {compute_erasure_mark('a"b')}, str)


USER_FORMS = {
    "plain": "user-7", "escaped": "kåre-7", "e-mail": "wang@post.example", "quote": 'a"b',
    "emoji": "x😀y", "digits": "4711008151",
}  # fmt: skip


def search_files(folder: Path, *needles: str) -> list[str]:
    """Files with one of the needles in their bytes, or in a value of a table, as it is or as JSON escapes it."""
    forms = {form for needle in needles for form in (needle, json.dumps(needle)[1:-1])}
    hits = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
            text = "\n".join(row["raw"].decode("utf-8", "replace") if "raw" in row else repr(row) for row in rows)
        hits += [f"{path.name}: {form}" for form in forms if form in text]
    return hits


@pytest.mark.parametrize("salt", ["", "pepper"])
@pytest.mark.parametrize("user_id", USER_FORMS.values(), ids=USER_FORMS)
def test_no_file_names_an_erased_user_also_after_preparing_again(
    log: dict[str, Path],
    tmp_path: Path,
    rows: dict[str, RowFactory],
    jsonl: Any,
    monkeypatch: Any,
    *,
    salt: str,
    user_id: str,
) -> None:
    monkeypatch.setenv("RLUF_USER_SALT", salt)
    make = rows["feedback"]
    log_rows = [make(n) for n in range(500)]
    log_rows += [make(6000 + n, user_id=user_id) for n in range(8)] + [
        make(7000 + n, user_id=user_id, response="") for n in range(3)
    ]
    broken_line = json.dumps(make(8000, user_id=user_id))[:-5].encode()
    log["feedback"] = jsonl(tmp_path / "log.jsonl", [*log_rows, broken_line])
    log["prompts"] = jsonl(
        tmp_path / "p.jsonl", [rows["prompts"](n, owner=user_id if n == 5 else "z") for n in range(40)]
    )
    output_folder = tmp_path / "data"
    build_data_set(build_settings(log), output_folder, run_in_process)
    needles = user_id, hash_user_id(user_id, b"pepper")
    assert search_files(output_folder, *needles)
    is_redacted = "@" in user_id  # in the prompt's further fields
    proof = erase_users(output_folder, [user_id, "stranger"])
    assert proof["users_not_found"] == ["stranger"] and sum(proof["rows_removed"].values()) == 13 - is_redacted
    assert search_files(output_folder, *needles, "stranger") == []
    card = build_data_set(build_settings(log), output_folder, run_in_process)
    assert search_files(output_folder, *needles) == []
    assert card["counts"]["feedback"]["dropped"]["user asked to be forgotten"] == 12


def test_the_association_is_adjusted_for_a_confounder() -> None:
    rng = np.random.default_rng(3)
    user_code = np.repeat(np.arange(800), 5)
    activity = rng.normal(size=800)[user_code]
    has_signal = rng.random(4000) < 1 / (1 + np.exp(1 - 1.5 * activity))
    returned = rng.random(4000) < 1 / (1 + np.exp(-1.5 * activity))
    no_controls, controls = np.empty((4000, 0)), activity[:, None]
    unadjusted = estimate_return_association(has_signal, returned, no_controls, user_code)
    adjusted = estimate_return_association(has_signal, returned, controls, user_code)
    assert unadjusted.low > 0.5 and adjusted.low < 0 < adjusted.high
    returned_by_signal = rng.random(4000) < 1 / (1 + np.exp(-1.5 * activity - 1.0 * has_signal))
    association = estimate_return_association(has_signal, returned_by_signal, controls, user_code)
    assert association.low < 1.0 < association.high and association.low > 0.5


def test_signals_are_ranked(tmp_path: Path, rows: dict[str, RowFactory], jsonl: Any) -> None:
    rng = np.random.default_rng(1)
    log_rows = []
    for n in range(4000):
        is_good = bool(rng.random() < 0.4)
        follow_up = "that was wonderful, thank you!" if n % 4 == 1 else "and then?"
        log_rows.append(
            rows["feedback"](
                n,
                user_id=f"u{n // 2 % 400}",
                turn=n % 2,
                conversation_id=f"c{n // 2}",
                messages=[{"role": "user", "content": follow_up}],
                reaction="love" if is_good and rng.random() < 0.5 else None,
                continued=bool(rng.random() < 0.5),
                returned=bool(rng.random() < (0.8 if is_good else 0.3)),
            )
        )
    file = jsonl(tmp_path / "log.jsonl", log_rows)
    build_data_set(build_settings({"feedback": file}), tmp_path / "data", run_in_process)
    ranking = write_signal_report(tmp_path / "data")
    row_by_signal = {row["signal"]: row for row in ranking}
    assert ranking[0]["signal"] == "love" and row_by_signal["love"]["link"]["low"] > 0
    assert row_by_signal["continue"]["link"]["low"] < 0.2 and row_by_signal["thumbs up"]["link"] is None
    assert 200 < row_by_signal["pleased follow-up"]["per_1000"] < 300
    assert row_by_signal["return"]["ambiguity"] == pytest.approx(0.5, abs=0.1)
    assert len(format_signal_lines(ranking)) == 7
    assert "love comes first of 6 signals" in (tmp_path / "data" / "signals.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "data" / "signals.json").read_text())["signals"] == ranking
    table = pq.read_table(tmp_path / "data" / "love" / "test.parquet")
    assert rank_signals(pa.concat_tables([table, table]))[0]["link"]["rows"] == 2 * table.num_rows


KILLED_JOB = """
import json, os, signal, sys
from pathlib import Path
from rluf.config.settings import Settings
from rluf.prepare.pipeline import build_data_set, run_task
max_tasks, finished_tasks = int(sys.argv[3]), 0
def execute(task_rows):
    global finished_tasks
    results = []
    for task_row in task_rows:
        if finished_tasks == max_tasks:
            os.kill(os.getpid(), signal.SIGKILL)
        results += run_task(task_row)
        finished_tasks += 1
    return results
build_data_set(Settings.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), execute)
"""


def test_a_killed_job_is_invisible_and_resumes(log: dict[str, Path], tmp_path: Path) -> None:
    max_tasks = 9  # the eight tasks of the first pass and one of the second
    settings = build_settings(log)
    output_folder = tmp_path / "made" / "data"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_JOB, settings.model_dump_json(), str(output_folder), str(max_tasks)],
        capture_output=True,
        env=os.environ,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-500:]
    assert not output_folder.exists()
    assert [path.name[:9] for path in output_folder.parent.iterdir()] == [".prepare-"]
    executed: dict[str, list[Any]] = {"resumed": [], "complete": []}

    def build_and_count(name: str, folder: Path) -> dict[str, Any]:
        def execute(task_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            executed[name].extend(task_rows)
            return run_in_process(task_rows)

        return build_data_set(settings, folder, execute)

    resumed_card = build_and_count("resumed", output_folder)
    complete_card = build_and_count("complete", tmp_path / "complete")
    assert len(executed["resumed"]) == len(executed["complete"]) - max_tasks
    assert [path.name for path in output_folder.parent.iterdir()] == ["data"]
    for section in ("counts", "splits", "love"):
        assert resumed_card[section] == complete_card[section]
    assert read_love_rows(output_folder) == read_love_rows(tmp_path / "complete")
