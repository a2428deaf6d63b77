"""JSON files of a run: round trips, no NaN in a file, and files of a killed run that can still be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.utils.files import JsonlWriter, read_json, read_jsonl, to_jsonable, write_json, write_jsonl


def test_rows_can_be_read_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with JsonlWriter(path) as metrics:
        metrics.append_row({"step": 1, "love": np.float32(0.5), "kl": float("nan")})
        assert read_jsonl(path) == [{"step": 1, "love": 0.5, "kl": None}]
        metrics.append_row({"step": 2, "ratio_max": float("inf"), "lengths": np.arange(3)})
    assert read_jsonl(path)[1] == {"step": 2, "ratio_max": None, "lengths": [0, 1, 2]}


def test_the_incomplete_last_line_of_a_killed_run_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_jsonl(path)


def test_a_resumed_run_appends_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with JsonlWriter(path) as metrics:
        metrics.append_row({"step": 2})
    with JsonlWriter(path) as metrics:
        metrics.append_row({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_json_files_are_complete_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"love": float("nan"), "name": "é", "path": tmp_path, "3": (np.int64(1), True)})
    assert json.loads(path.read_text("utf-8"), parse_constant=pytest.fail) == {
        "love": None,
        "name": "é",
        "path": str(tmp_path),
        "3": [1, True],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert read_json(tmp_path / "absent.json") == {}
    assert read_jsonl(tmp_path / "absent.jsonl") == []
    path.write_text("[1]")
    with pytest.raises(DataError, match="is a JSON list, expected an object"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_json(path)


def test_write_jsonl_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [{"a": 1}, {"a": 2}])
    write_jsonl(path, [{"a": "two\nlines"}])
    assert read_jsonl(path) == [{"a": "two\nlines"}]
    assert to_jsonable(None) is None


def test_a_full_disk_stops_the_metrics_and_loses_no_earlier_row(small_disk: Callable[[int], Path]) -> None:
    path = small_disk(1) / "metrics.jsonl"
    row_count = 0
    with pytest.raises(OSError, match="No space left"), JsonlWriter(path) as metrics:
        while True:
            metrics.append_row({"step": row_count + 1, "text": "x" * 3000})
            row_count += 1
    assert [row["step"] for row in read_jsonl(path)] == list(range(1, row_count + 1))
    assert row_count > 100
