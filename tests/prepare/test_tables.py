"""Entries that are tables: a real SQLite database through Ray Data; others name the package that they need."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import DataSource
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.prepare.readers.sources import resolve_sources
from rluf.prepare.readers.tables import export_tables
from rluf.prepare.schema import DATA_KINDS


def write_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE chats (id, owner, created, turns, stars INTEGER, mixed, gone INTEGER)")
    rows = [
        (f"r{i}", f"u{i % 60}", 1767225600 + 60 * i, json.dumps([{"role": "user", "content": f"question {i}"},
         {"role": "assistant", "content": f"answer {i}"}]), i % 5 + 1, i if i % 2 else "text", int(i >= 300))
        for i in range(320)
    ]  # fmt: skip
    connection.executemany("INSERT INTO chats VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()


def build_entry(path: Path, query: str = "SELECT * FROM chats WHERE gone = 0", **changes: Any) -> dict[str, Any]:
    columns = {"id": "id", "user_id": "owner", "time": "created", "messages": "turns", "reaction": "stars"}
    return {
        "source": "sql", "path": query, "options": {"driver": "sqlite3", "database": str(path)}, "columns": columns,
        "labels": {">=5": "loved", "<=4": "not_loved"}, "where": {"id": "!=r7"},
    } | changes  # fmt: skip


def run_in_process(tasks: Any) -> list[dict[str, Any]]:
    return [result for task in tasks for result in run_task(task)]


def build_settings(entry: dict[str, Any]) -> Settings:
    data = {kind: [entry] if kind == "feedback" else [] for kind in DATA_KINDS}
    return Settings.model_validate({"data": data, "prepare": {"positive_share": 0.01}})


@pytest.mark.slow
def test_a_database_is_read_row_by_row_and_leaves_no_copy(tmp_path: Path, local_ray: None) -> None:
    database = tmp_path / "chats.db"
    write_database(database)
    query = "SELECT id, owner, created, turns, stars FROM chats WHERE gone = 0"
    card = build_data_set(build_settings(build_entry(database, query)), tmp_path / "data", run_in_process)
    counts = card["counts"]["feedback"]
    assert counts["in"] == 300 and counts["quarantined"] == {} and counts["dropped"]["excluded by where: id"] == 1
    assert card["love"]["base_rate"]["hits"] == 60 and card["entries"][0]["path"] == query
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.db", "data"]
    for query, words in (
        ("SELECT * FROM chat_log", "cannot read sql 'SELECT . FROM chat_log'.*no such table: chat_log"),
        ("SELECT id FROM chats WHERE gone = 7", "has no rows"),
        ("SELECT id, mixed FROM chats", "column 'mixed'|cannot read sql"),
    ):
        with pytest.raises(DataError, match=words):
            build_data_set(build_settings(build_entry(database, query)), tmp_path / "other", run_in_process)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.db", "data"]


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("sql", {"database": "x"}, "needs options.driver"),
        ("sql", {"driver": "nodriver"}, "needs nodriver; install it: pip install nodriver"),
        ("mongo", {}, "needs options.uri"),
        ("mongo", {"uri": "mongodb://h"}, "pip install pymongoarrow"),
        ("bigquery", {"project_id": "p"}, "pip install google-cloud-bigquery google-cloud-bigquery-storage"),
        ("snowflake", {"account": "a"}, "pip install snowflake-connector-python"),
        (
            "snowflake",
            {"account": "a", "password": "x"},
            "options.password looks like a secret.*=.NAME",
        ),
        ("delta", {}, "pip install deltalake"),
        ("iceberg", {"catalog_kwargs": {}}, "pip install pyiceberg"),
        ("iceberg", {}, "needs options.catalog_kwargs"),
    ],
)
def test_what_a_table_needs_is_said_before_ray_starts(source: Any, options: dict[str, Any], words: str) -> None:
    entry = DataSource(path="a.b", source=source, options=options)
    with pytest.raises(DataError, match=words):
        resolve_sources([entry], "feedback")


def test_a_table_that_can_be_read_has_no_files_before_the_job(tmp_path: Path) -> None:
    entry = DataSource(**build_entry(tmp_path / "x.db"))
    assert resolve_sources([entry], "feedback") == []
    with export_tables({"feedback": ["a.jsonl"], "safety": []}, tmp_path) as folders:
        assert folders == {} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("marker", "advice"), [("_delta_log/0.json", "source: delta"), ("metadata/v1.metadata.json", "source: iceberg")]
)
def test_a_table_folder_named_as_files_says_how_to_read_it(tmp_path: Path, marker: str, advice: str) -> None:
    (tmp_path / marker).parent.mkdir(parents=True)
    (tmp_path / marker).write_text("{}")
    (tmp_path / "part-0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=advice):
        resolve_sources([str(tmp_path)], "feedback")
