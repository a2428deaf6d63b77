"""prepare on a real local Ray: counts add up, splits share no user, invalid logs stop with one clear message."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare import pipeline
from rluf.prepare.card import count_rows_by_outcome
from rluf.prepare.pipeline import build_data_set
from rluf.prepare.schema import DATA_KINDS, SPLIT_NAMES
from rluf.prepare.workspace import RowCount

RowFactory = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _short_progress_timeout(local_ray: None) -> Iterator[None]:
    """Tasks take longer than Ray Data would wait for progress, as those of millions of rows do."""
    import ray

    context = ray.data.DataContext.get_current()
    default_timeout_s, context.execution_no_progress_timeout_s = context.execution_no_progress_timeout_s, 0.05
    yield
    assert context.execution_no_progress_timeout_s == 0.05
    context.execution_no_progress_timeout_s = default_timeout_s


def build_settings(log: dict[str, Path], **prepare: Any) -> Settings:
    data = {kind: [str(log[kind])] if kind in log else [] for kind in DATA_KINDS}
    return Settings.model_validate({"data": data, "prepare": prepare})


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def test_long_passes_log_tasks_and_rows(
    log: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "PROGRESS_INTERVAL_S", 0.05)

    def execute_slowly(task_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        results = [result for row in task_rows for result in pipeline.run_task(row)]
        time.sleep(0.2)
        return results

    with caplog.at_level(logging.INFO):
        build_data_set(build_settings(log), tmp_path / "data", execute_slowly)
    assert re.search(r"prepare: validate pass: (\d+) of \1 tasks finished, [\d,]+ rows read in", caplog.text)
    assert re.search(r"prepare: write pass: (\d+) of \1 tasks finished in", caplog.text)


def test_a_valid_log_becomes_a_data_set(log: dict[str, Path], tmp_path: Path) -> None:
    output_folder = tmp_path / "made" / "data"
    card = build_data_set(build_settings(log, positive_share=0.5), output_folder)
    assert card == json.loads((output_folder / "data_card.json").read_text())
    assert sorted(path.name for path in output_folder.iterdir()) == [
        "data_card.html", "data_card.json", "helpfulness", "love", "prompts", "quarantine.parquet", "safety",
    ]  # fmt: skip
    assert [path.name for path in output_folder.parent.iterdir()] == ["data"]
    love_rows = {split: read_rows(output_folder / "love", split) for split in SPLIT_NAMES}
    users = {split: {row["user_id"] for row in split_rows} for split, split_rows in love_rows.items()}
    assert (
        users["train"]
        and not users["train"] & users["dev"] | users["train"] & users["test"] | users["dev"] & users["test"]
    )
    for split in ("dev", "test"):
        assert {row["weight"] for row in love_rows[split]} == {1.0}
    labels = np.array([row["label"] for row in love_rows["train"]])
    weights = np.array([row["weight"] for row in love_rows["train"]])
    assert labels.mean() == pytest.approx(0.5)
    assert (labels * weights).sum() / weights.sum() == pytest.approx(
        card["love"]["base_rate_by_split"]["train"]["mean"]
    )
    assert card["love"]["base_rate"]["mean"] == pytest.approx(100 / 1100)
    assert card["counts"]["feedback"]["dropped"] == {"sampled out of train": 1100 - sum(map(len, love_rows.values()))}
    for name in ("helpfulness", "safety"):
        groups = [{row["group"] for row in read_rows(output_folder / name, split)} for split in SPLIT_NAMES]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    prompt_counts = [len(read_rows(output_folder / "prompts", split)) for split in ("train", "test")]
    assert prompt_counts == [30, 10]


def test_invalid_rows_are_quarantined_and_counts_add_up(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    test_prompt = rows["prompts"](0)["messages"]  # user u1 is in train, as the count of dropped rows shows
    invalid_lines: list[dict[str, Any] | bytes] = [
        b'{"id": "cut', b"\xff\xfe", b"[]", make(9001, response=""), make(9002, time="2999-01-01T00:00:00Z"), make(3),
        make(4, response="twice and different"), make(9003, response="\ud800"), make(9004, turn="1"),
    ]  # fmt: skip
    valid_rows = [make(index) for index in range(1000)]
    log["feedback"] = jsonl(
        tmp_path / "mixed.jsonl", [*valid_rows, *invalid_lines, make(9100, user_id="u1", messages=test_prompt)]
    )
    output_folder = tmp_path / "data"
    card = build_data_set(build_settings(log), output_folder)
    counts = card["counts"]["feedback"]
    assert counts["in"] == 1010
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["quarantined"].values())
    assert counts["dropped"]["context is a test prompt"] == 1
    assert counts["dropped"]["replaced by a later row of the same id"] == 1
    assert counts["quarantined"] == {
        "duplicate id": 1, "broken JSON": 1, "not UTF-8": 1, "not an object": 1, "empty response": 1, "future time": 1,
        "lone surrogate": 1, "wrong type: turn": 1,
    }  # fmt: skip
    quarantined = sorted(read_rows(output_folder, "quarantine"), key=lambda row: row["line"])
    assert [row["line"] for row in quarantined] == [line for line in range(1001, 1010) if line != 1006]
    assert quarantined[0]["raw"] == b'{"id": "cut' and quarantined[1]["raw"] == b"\xff\xfe"
    assert Counter(row["reason"] for row in quarantined) == counts["quarantined"]
    assert {row["source"] for row in quarantined} == {str(log["feedback"])}
    love_rows = [row for split in SPLIT_NAMES for row in read_rows(output_folder / "love", split)]
    assert "twice and different" not in {row["response"] for row in love_rows}
    assert len({row["id"] for row in love_rows}) == len(love_rows)


def test_the_number_of_read_tasks_does_not_change_the_data(
    log: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for task_count in (1, 3):
        monkeypatch.setattr("rluf.prepare.pipeline._count_read_tasks", lambda count=task_count: count)
        build_data_set(build_settings(log), tmp_path / "data")
        results.append([read_rows(tmp_path / "data" / name, "train") for name in ("love", "helpfulness", "prompts")])
    assert results[0] == results[1]
    assert [row["id"] for row in results[0][2]] != sorted(row["id"] for row in results[0][2])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_above_the_quarantine_budget_stop_with_a_summary(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    log["safety"] = jsonl(tmp_path / "s.jsonl", [rows["safety"](i, label=5 if i % 4 == 0 else 1) for i in range(80)])
    with pytest.raises(DataError) as error:
        build_data_set(build_settings(log), tmp_path / "data")
    for phrase in (
        "data.safety",
        "20 of 80 rows (25.0%)",
        "quarantine_budget=0.05",
        "bad value: label: 20",
        "s.jsonl:1)",
    ):
        assert phrase in str(error.value)
    assert not (tmp_path / "data").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_logs_that_cannot_work_are_refused(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    output_folder = tmp_path / "data"
    empty_log = jsonl(tmp_path / "empty.jsonl.gz", [])
    with pytest.raises(DataError, match=r"data\.feedback: no rows in .*empty\.jsonl\.gz"):
        build_data_set(build_settings(log | {"feedback": empty_log}), output_folder)
    with pytest.raises(DataError, match=r"no such file: .*gone\.jsonl"):
        build_data_set(build_settings(log | {"feedback": tmp_path / "gone.jsonl"}), output_folder)
    with pytest.raises(DataError, match="all empty"):
        build_data_set(build_settings({}), output_folder)
    unloved_log = jsonl(tmp_path / "unloved.jsonl", [rows["feedback"](i, reaction=None) for i in range(200)])
    with pytest.raises(DataError, match="all training rows are unloved"):
        build_data_set(build_settings({"feedback": unloved_log}), output_folder)
    one_group_log = jsonl(tmp_path / "one_group.jsonl", [rows["preferences"](i, group="one") for i in range(50)])
    with pytest.raises(DataError, match=r"data\.preferences: none of 50 valid rows is in the"):
        build_data_set(build_settings({"preferences": one_group_log}), output_folder)
    assert not output_folder.exists()


def test_a_folder_with_other_files_is_not_overwritten(log: dict[str, Path], tmp_path: Path) -> None:
    output_folder = tmp_path / "thesis"
    output_folder.mkdir()
    (output_folder / "chapter.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis exists and is not a data set of rluf"):
        build_data_set(build_settings(log), output_folder)
    assert (output_folder / "chapter.txt").read_text() == "precious"


def test_counts_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(DataError, match="do not add up"):
        count_rows_by_outcome([RowCount("feedback", "in", 3), RowCount("feedback", "quarantined", 2)], {})
