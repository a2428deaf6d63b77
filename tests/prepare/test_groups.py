"""Logs with a row for each message: chats are put together from all files, and a job that resumes reads none again."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import DataSource
from rluf.errors import DataError
from rluf.prepare.erasure import erase_users
from rluf.prepare.readers import groups
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import LogSource
from tests.prepare.test_log_faults import build, write_rows


def list_messages(chat_count: int) -> list[dict[str, Any]]:
    """Two turns of each chat, of which the first reply is rated up or down and the second is not rated."""
    return [
        {"_id": {"$oid": f"{chat:012x}{index:012x}"}, "messageId": f"c{chat}-m{index}", "conversationId": f"c{chat}",
         "parentMessageId": f"c{chat}-m{index - 1}", "isCreatedByUser": index % 2 == 0, "text": f"{chat} text {index}",
         "user": f"u{chat % 50}", "createdAt": {"$date": f"2026-01-05T10:0{index}:00.000Z"},
         "feedback": {"rating": "thumbsUp" if chat % 3 == 0 else "thumbsDown"} if index == 1 else None}
        for chat in range(chat_count) for index in range(4)
    ]  # fmt: skip


def test_the_messages_of_a_collection_become_chats(tmp_path: Path) -> None:
    messages = list_messages(300)
    random.Random(3).shuffle(messages)
    for name, rows in (("a", messages[:500]), ("b", messages[500:])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    entry = {"path": f"{tmp_path}/*.jsonl", "reader": "librechat_messages"}
    card, rows = build(tmp_path, {"feedback": [entry]})
    assert len(rows) == 600 and card["counts"]["feedback"]["in"] == 600
    for chat in range(300):
        first, second = rows[f"c{chat}-m1"], rows[f"c{chat}-m3"]
        assert first["label"] == (chat % 3 == 0) and first["messages"] == [
            {"role": "user", "content": f"{chat} text 0"}
        ]
        assert [message["content"] for message in second["messages"]] == [f"{chat} text {index}" for index in range(3)]
        assert first["continued"] and not second["continued"] and second["reaction"] is None
    assert erase_users(tmp_path / "data", ["u7"])["rows_removed"]["love/train.parquet"] in (0, 12)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".prepare")]


def test_rows_that_are_no_messages_are_quarantined(tmp_path: Path) -> None:
    good = [json.dumps(message) for message in list_messages(60)]
    bad = ['{"text": "no chat", "messageId": "x"}', "[1, 2]", '{"conversationId": 5', '"text"']
    (tmp_path / "log.jsonl").write_text("\n".join([*good, *bad, ""]))
    card, rows = build(tmp_path, {"feedback": [{"path": f"{tmp_path}/log.jsonl", "reader": "librechat_messages"}]})
    assert len(rows) == 120 and sum(card["counts"]["feedback"]["quarantined"].values()) == 4
    assert (
        "not a row of reader librechat_messages: a message has no conversationId"
        in (card["counts"]["feedback"]["quarantined"])
    )


def test_a_broken_file_of_messages_stops_the_job(tmp_path: Path) -> None:
    data = gzip.compress("".join(json.dumps(message) + "\n" for message in list_messages(200)).encode())
    (tmp_path / "log.jsonl.gz").write_bytes(data[:-500])
    entry = {"path": f"{tmp_path}/log.jsonl.gz", "reader": "librechat_messages"}
    with pytest.raises(DataError, match=r"broken gzip file at .*which chats miss messages is unknown"):
        build(tmp_path, {"feedback": [entry]}, broken_files="count")


def test_grouping_is_not_repeated_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "log.jsonl", list_messages(20))
    monkeypatch.setattr(groups, "_BUCKET_BYTES", 1000)
    source = LogSource("feedback", path, DataSource(path=path, reader="librechat_messages"), 0)
    plain = LogSource("feedback", path, DataSource(path=path), 1)
    first = groups.group_messages([source, plain], tmp_path / "grouped")
    assert len(first) > 5 and first[-1] is plain and {found.entry.format for found in first[:-1]} == {"jsonl"}
    monkeypatch.setattr(groups, "read_line_batches", lambda *_, **__: pytest.fail("read again"))
    assert groups.group_messages([source, plain], tmp_path / "grouped") == first
    lines = [line for found in first[:-1] for batch in read_line_batches(found.location) for line in batch]
    assert sorted(len(json.loads(line.raw)["messages"]) for line in lines) == [4] * 20


def test_channels_of_slack_are_read_from_the_folder_of_an_export(tmp_path: Path) -> None:
    for channel in range(80):
        folder = tmp_path / "export" / f"channel-{channel}"
        folder.mkdir(parents=True)
        for day, text in enumerate(("q", "a", "thanks")):
            ts, root = f"17672{channel:02d}600.{day:06d}", f"17672{channel:02d}600.000000"
            message = {
                "type": "message",
                "ts": ts,
                "thread_ts": root,
                "text": f"{text} {channel}",
                "user": f"U{channel}",
            }
            if text == "a":
                message |= {
                    "bot_id": "B",
                    "user": "UB",
                    "reactions": [{"name": ["heart", "-1"][channel % 2], "users": ["U1"]}],
                }
            (folder / f"2026-01-0{day + 1}.json").write_text(json.dumps([message]))
    card, rows = build(tmp_path, {"feedback": [{"path": f"{tmp_path}/export", "reader": "slack_messages"}]})
    labels = {row["response"]: row["label"] for row in rows.values()}
    assert labels == {f"a {channel}": 1 - channel % 2 for channel in range(80)}
    assert card["entries"][0]["reactions"] == [
        {"name": "heart", "rows": 40, "label": "loved"}, {"name": "-1", "rows": 40, "label": "not loved"}
    ]  # fmt: skip
