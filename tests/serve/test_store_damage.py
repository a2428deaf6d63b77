"""The feedback store where ids repeat, a disk changed a row, or a killed writer left half a file."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from rluf.errors import DataError, ResourceError
from rluf.prepare.readers.feedback_folder import read_late_reactions
from rluf.prepare.schema import ChatMessage
from rluf.serve.store import FeedbackStore
from rluf.serve.store_database import DATABASE_FILE
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent
from tests.serve.test_store import FakeClock, make_record, make_served_event, open_store, read_rows

LEFTOVERS = {
    "rows": "date=2026-01-31/.feedback-20260131T120000000000-0a1b2c3d.parquet.1234abcd.part",
    "late reactions": "_reactions/date=2026-01-31/.reactions-20260131T120000000000-0a1b2c3d.parquet.1234abcd.part",
    "choices": "_preferences/date=2026-01-31/.preferences-20260131T120000000000-0a1b2c3d.parquet.1234abcd.part",
    "a merge": "date=2026-01-29/.feedback-merged-0a1b2c3d4e5f.parquet.1234abcd.part",
    "an erasure": "date=2025-01-29/.feedback-merged-0a1b2c3d4e5f.parquet.ffffffff.part",
    "no day": ".feedback-20250131T120000000000-0a1b2c3d.parquet.1234abcd.part",
}
"""What SIGKILL leaves of a file that is being written: the texts of users, also of those who are erased later."""
FOREIGN_FILES = ("notes.part", "date=2026-01-31/x.parquet.part", "date=2026-01-31/.x.part", "writer=b/date=1/.y.txt")
"""Files that are not half-written files of this store."""


@pytest.mark.parametrize("is_by_url", [False, True])
def test_half_written_files_are_deleted_at_the_start(tmp_path: Path, is_by_url: bool) -> None:
    of_other_writer = f"writer=b/{LEFTOVERS['rows']}"  # it may still run
    for path in (*LEFTOVERS.values(), *FOREIGN_FILES, of_other_writer):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"a text of ann")
    root = tmp_path.as_uri() if is_by_url else str(tmp_path)
    store = FeedbackStore(root, tmp_path / ".log", reaction_window_s=0, clock=FakeClock())
    store.start()
    assert not [name for name, path in LEFTOVERS.items() if (tmp_path / path).exists()]
    assert all((tmp_path / path).exists() for path in (of_other_writer, *FOREIGN_FILES))
    store.append_events([make_served_event("a")])
    store.flush_settled()
    assert set(read_rows(tmp_path)) == {"a"}
    store.close()
    other = FeedbackStore(str(tmp_path / "writer=b"), tmp_path / "writer=b" / ".log", reaction_window_s=0)
    other.start()
    assert not (tmp_path / of_other_writer).exists()


DAMAGES = {
    "no JSON": "UPDATE rows SET record = substr(record, 1, 40) WHERE id = 'b'",
    "a field is missing": "UPDATE rows SET record = replace(record, '\"response\"', '\"resp0nse\"') WHERE id = 'b'",
    "a byte of the response": "UPDATE rows SET record = replace(record, 'Answer b', 'Answer c') WHERE id = 'b'",
    "a byte of the message": "UPDATE rows SET record = replace(record, 'Grüße', 'Grüsse') WHERE id = 'b'",
    "another user": "UPDATE rows SET record = replace(record, '\"u\"', '\"v\"') WHERE id = 'b'",
    "an empty record": "UPDATE rows SET record = '' WHERE id = 'b'",
    "another id": "UPDATE rows SET record = replace(record, '\"b\"', '\"x\"') WHERE id = 'b'",
    "no UTF-8": "UPDATE rows SET record = CAST(x'7bff' || CAST(record AS BLOB) AS TEXT) WHERE id = 'b'",
    "no UTF-8 in a text": "UPDATE rows SET record = CAST(replace(CAST(record AS BLOB), 'Answer', x'ff') AS TEXT) "
    "WHERE id = 'b'",
    "bytes": "UPDATE rows SET record = CAST(substr(record, 2) AS BLOB) WHERE id = 'b'",
    "a number": "UPDATE rows SET record = 17 WHERE id = 'b'",
    "a list": "UPDATE rows SET record = '[]' WHERE id = 'b'",
    "a reaction of bytes": "UPDATE rows SET reaction = x'ff00' WHERE id = 'b'",
    "a reaction that is no text": "UPDATE rows SET reaction = CAST(x'ff00' AS TEXT) WHERE id = 'b'",
    "a time before all": "UPDATE rows SET received_at = -1e30 WHERE id = 'b'",
    "a time after all": "UPDATE rows SET received_at = 1e300 WHERE id = 'b'",
    "a time in years": "UPDATE rows SET received_at = received_at + 4e8 WHERE id = 'b'",
    "a time of another day": "UPDATE rows SET received_at = received_at - 90000 WHERE id = 'b'",
    "a time that is no number": "UPDATE rows SET received_at = 'x' WHERE id = 'b'",
    "no time": "UPDATE rows SET received_at = NULL WHERE id = 'b'",
    "another reaction": "UPDATE rows SET reaction = 'love' WHERE id = 'b'",
    "a continuation": "UPDATE rows SET continued = 1 WHERE id = 'b'",
    "another version": "UPDATE rows SET record = replace(record, '\"m\"', '\"n\"') WHERE id = 'b'",
    "another time of serving": "UPDATE rows SET record = replace(record, '2026-', '2022-') WHERE id = 'b'",
    "another topic": "UPDATE rows SET record = replace(record, '\"other\"', '\"othes\"') WHERE id = 'b'",
}
"""What a disk may do to an open row."""


def change_database(folder: Path, *statements: str) -> None:
    """Run statements on the database of a store that is not open; each must change one row."""
    with sqlite3.connect(folder / ".log" / DATABASE_FILE) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount == 1, statement
    connection.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_named_and_the_others_are_written(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event("a"), make_served_event("b", "d"), make_served_event("c", "e")])
    store.close()
    change_database(tmp_path, DAMAGES[damage])
    store = open_store(tmp_path, clock)
    # Rows of the damaged row's conversation, and of all others, are still accepted and written.
    assert store.append_events([make_served_event("later", "d", 1), FeedbackEvent("c", "love")]) == ["stored"] * 2
    assert [store.flush_settled(all_rows=True) for _ in range(2)] == [3, 0]
    assert store.damaged_row_count == 1
    assert caplog.text.count(f"{DATABASE_FILE}: row b of rows is damaged; restore the file from a backup, or") == 1
    assert {row_id: row[0] for row_id, row in read_rows(tmp_path).items()} == {"a": None, "c": "love", "later": None}
    choice = store.append_events([PreferenceEvent("a", "b"), FeedbackEvent("a", "love")])
    if not any(word in damage for word in ("time", "reaction", "continuation", "version", "topic")):
        assert choice == ["unreadable", "late"]
    written = 1 + (choice[0] == "stored")
    store.close()
    # The next start looks at the row again: the operator may have restored it.
    store = open_store(tmp_path, clock)
    assert (store.damaged_row_count, store.flush_settled(all_rows=True), store.damaged_row_count) == (0, written, 1)
    store.close()
    change_database(tmp_path, "DELETE FROM rows WHERE id = 'b'")
    store = open_store(tmp_path, clock)
    assert (store.flush_settled(all_rows=True), store.damaged_row_count) == (0, 0)


OTHER_DAMAGES = {
    "no JSON": "'{'", "an empty text": "''", "bytes": "x'ff'", "another id": "replace(record, id, 'x')",
    "no UTF-8": "CAST(x'ff' || CAST(record AS BLOB) AS TEXT)", "another type": "'{\"id\": 1}'",
    "another text": "replace(replace(record, '\"love\"', '\"like\"'), 'Answer', 'Answes')",
    "another time": "record, received_at = received_at - 90000", "a late time": "record, received_at = 1e300",
}  # fmt: skip


@pytest.mark.parametrize("damage", OTHER_DAMAGES)
@pytest.mark.parametrize("table", ["late_reactions", "preferences"])
def test_a_damaged_reaction_or_choice_holds_up_no_other(tmp_path: Path, table: str, damage: str) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event(name) for name in "abcd"])
    store.flush_settled(all_rows=True)
    if table == "preferences":
        store.append_events([PreferenceEvent("a", "b"), PreferenceEvent("c", "d"), PreferenceEvent("a", "d")])
    else:
        store.append_events([FeedbackEvent(name, "love") for name in "abc"])
    store.close()
    change_database(tmp_path, f"UPDATE {table} SET record = {OTHER_DAMAGES[damage]} WHERE rowid = 2")
    store = open_store(tmp_path, clock)
    assert [store.flush_settled(all_rows=True) for _ in range(2)] == [2, 0] and store.damaged_row_count == 1
    if table == "late_reactions":
        assert read_late_reactions(tmp_path) == {"a": "love", "c": "love"}
    assert store.erase_users(["u"])["rows"] == 4
    store.close()
    with sqlite3.connect(tmp_path / ".log" / DATABASE_FILE) as connection:
        left = connection.execute("SELECT count(*) FROM preferences UNION ALL SELECT count(*) FROM rows").fetchall()
    connection.close()
    assert left == [(0,), (0,)]


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("a number", "a list", "an empty record")])
def test_a_damaged_row_is_erased_with_its_user(tmp_path: Path, damage: str) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event("a"), make_served_event("b", "d")])
    other = make_record("o").model_copy(update={"user_id": "other"})
    store.append_events([FeedbackEvent("o", None, other)])
    store.close()
    change_database(tmp_path, DAMAGES[damage])
    store = open_store(tmp_path, clock)
    store.flush_settled(all_rows=True)
    is_other_user = damage == "another user"  # the row names v now
    assert store.erase_users(["u"])["rows"] == 1 + (not is_other_user)
    assert (set(read_rows(tmp_path)), store.damaged_row_count) == ({"o"}, 0)


def test_no_changed_byte_of_the_database_is_read_as_truth(tmp_path: Path) -> None:
    """A flipped bit anywhere in the file is harmless, named as a damaged row, or refused; no row is lost silently."""
    clock, intact = FakeClock(), tmp_path / "intact"
    store = open_store(intact, clock)
    ids = [f"r{number}" for number in range(12)]
    store.append_events([FeedbackEvent(i, "love" if i < "r5" else None, make_record(i, f"c{i[1:]}")) for i in ids])
    store.close()
    database = (intact / ".log" / DATABASE_FILE).read_bytes()
    random_numbers, outcomes = random.Random(5), Counter[str]()
    for trial in range(25):
        folder, changed = tmp_path / str(trial), bytearray(database)
        used_positions = [position for position, byte in enumerate(database) if byte]
        changed[random_numbers.choice(used_positions)] ^= 1 << random_numbers.randrange(8)
        (folder / ".log").mkdir(parents=True)
        (folder / ".log" / DATABASE_FILE).write_bytes(changed)
        try:
            store = open_store(folder, clock)
            store.flush_settled(all_rows=True)
        except (ResourceError, DataError):
            outcomes["refused"] += 1
            continue
        finally:
            store.close()
        rows = {row_id: row[0] for row_id, row in read_rows(folder).items()}
        assert rows.items() <= {i: "love" if i < "r5" else None for i in ids}.items()
        assert len(rows) + store.damaged_row_count == len(ids)
        outcomes["damaged" if store.damaged_row_count else "harmless"] += 1
    assert outcomes["damaged"] >= 5, outcomes


def test_rows_of_a_release_without_checksums_are_written(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event(name) for name in "abcd"])
    store.flush_settled(all_rows=True)
    store.append_events([FeedbackEvent("a", "love"), PreferenceEvent("a", "b"), make_served_event("e")])
    store.close()
    with sqlite3.connect(tmp_path / ".log" / DATABASE_FILE) as connection:
        for table in ("rows", "late_reactions", "preferences"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
    connection.close()
    store = open_store(tmp_path, clock)
    assert store.append_events([FeedbackEvent("e", "like"), make_served_event("f", turn=1)]) == ["stored"] * 2
    assert (store.flush_settled(all_rows=True), store.damaged_row_count) == (4, 0)
    assert read_rows(tmp_path)["e"] == ("like", True) and read_late_reactions(tmp_path) == {"a": "love"}


REPEATED_CONTENT: list[tuple[dict[str, object], str]] = [
    ({}, "duplicate"), ({"reaction": "love"}, "duplicate"), ({"turn": 3, "topic": "news"}, "duplicate"),
    ({"response": "Another one."}, "conflict"), ({"user_id": "eve"}, "conflict"),
    ({"messages": [ChatMessage(role="user", content="Bye")]}, "conflict"), ({"conversation_id": "d"}, "conflict"),
]  # fmt: skip


@pytest.mark.parametrize("state", ["open", "settled", "merged", "database lost", "settled by the last release"])
def test_another_response_under_a_stored_id_is_a_conflict(tmp_path: Path, state: str) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    ids = [f"r{i}" for i in range(len(REPEATED_CONTENT))]
    store.append_events([FeedbackEvent(row_id, "love", make_record(row_id)) for row_id in ids])
    if state != "open":
        store.flush_settled(all_rows=True)
    if state == "merged":
        store.append_events([make_served_event("other")])
        store.flush_settled(all_rows=True)
        clock.now += 3 * 86_400
        assert store.merge_days() == 2
    elif state == "database lost":
        store.close()
        (tmp_path / ".log" / DATABASE_FILE).unlink()
        store = open_store(tmp_path, clock)
    elif state == "settled by the last release":
        store.close()
        with sqlite3.connect(tmp_path / ".log" / DATABASE_FILE) as connection:
            connection.execute("ALTER TABLE rows DROP COLUMN content")
        connection.close()
        store = open_store(tmp_path, clock)
    for row_id, (changes, outcome) in zip(ids, REPEATED_CONTENT, strict=True):
        record = make_record(row_id).model_copy(update=changes)
        expected = "duplicate" if state == "settled by the last release" else outcome  # it stored no hash
        events = [FeedbackEvent(row_id, reaction, record) for reaction in (None, "love")]
        assert store.append_events(events) == [expected] * 2, changes
        if expected == "conflict":  # a reaction to the other response must not count for this one
            assert store.append_events([FeedbackEvent(row_id, "dislike", record)]) == ["conflict"]
    assert store.append_events([FeedbackEvent("r0", "like")]) == ["stored" if state == "open" else "late"]
    store.flush_settled(all_rows=True)
    reactions = {row_id: row[0] for row_id, row in read_rows(tmp_path).items()} | read_late_reactions(tmp_path)
    assert {row_id: reactions[row_id] for row_id in ids} == dict.fromkeys(ids, "love") | {"r0": "like"}
