"""SQLite database of a feedback store: open rows, late reactions and choices, and the ids of what is settled."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from rluf.prepare.erasure import USER_COLUMNS
from rluf.prepare.schema import FeedbackRecord, ReactionRecord
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent

DATABASE_FILE = "open_rows.sqlite3"

# A settled row keeps its id, its present reaction and the hash of its content (hash_content; null for rows of earlier
# releases); its record is then in a Parquet file only. `files` are those that the database knows, by their path under
# the root. `checksum` covers what an open row has (build_checksum; null for rows of earlier releases), since SQLite has
# none of its own. `rejected_id` is set while another writer has a response of a choice, and `record` is then empty.
_CREATE_TABLES = """
CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, reaction TEXT, received_at REAL, conversation_id TEXT,
                                 turn INTEGER, continued INTEGER NOT NULL DEFAULT 0, record TEXT, content TEXT,
                                 checksum INTEGER);
CREATE INDEX IF NOT EXISTS open_by_time ON rows (received_at) WHERE record IS NOT NULL;
CREATE INDEX IF NOT EXISTS open_by_conversation ON rows (conversation_id) WHERE record IS NOT NULL;
CREATE TABLE IF NOT EXISTS late_reactions (id TEXT PRIMARY KEY, received_at REAL NOT NULL, record TEXT NOT NULL,
                                           checksum INTEGER);
CREATE TABLE IF NOT EXISTS preferences (id TEXT PRIMARY KEY, chosen_id TEXT, received_at REAL, record TEXT,
                                        checksum INTEGER, rejected_id TEXT);
CREATE INDEX IF NOT EXISTS open_preferences ON preferences (received_at) WHERE record IS NOT NULL;
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY);
"""


CHECKSUM_COLUMNS = {
    "rows": ("id", "record", "reaction", "continued", "received_at"),
    "late_reactions": ("id", "record", "received_at"),
    "preferences": ("id", "record", "chosen_id", "received_at", "rejected_id"),
}
"""Columns under the checksum by table: what an open row writes to Parquet, and when."""


def open_database(log_folder: Path, lock_timeout_s: float) -> sqlite3.Connection:
    """Open the database in a folder as its only writer; raises sqlite3.Error when another one has it."""
    # The owner may call from several threads, one at a time.
    connection = sqlite3.connect(log_folder / DATABASE_FILE, timeout=lock_timeout_s, check_same_thread=False)
    # The exclusive lock makes this the only writer until it closes or dies; FULL syncs the log at each commit.
    connection.executescript(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _CREATE_TABLES
    )
    # A changed byte must not keep the other rows from being read.
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    connection.create_function("checksum_of", -1, _hash_values, deterministic=True)
    new_columns = [("rows", "content TEXT"), *((table, "checksum INTEGER") for table in CHECKSUM_COLUMNS)]
    for table, column in (*new_columns, ("preferences", "rejected_id TEXT")):
        names = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if column.partition(" ")[0] not in names:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    return connection


def build_checksum(table: str, **changed: str) -> str:
    """SQL expression of a row's checksum, in which the `changed` columns have the values of other expressions."""
    # As bytes: a text that the disk changed may be no UTF-8, which SQLite's functions in Python refuse.
    values = (f"CAST({changed.get(column, column)} AS BLOB)" for column in CHECKSUM_COLUMNS[table])
    return f"checksum_of({', '.join(values)})"


def build_checksum_update(table: str, **changed: str) -> str:
    """SQL expression of the checksum after a change of some columns: a row that is damaged already stays so."""
    return f"CASE WHEN checksum = {build_checksum(table)} THEN {build_checksum(table, **changed)} ELSE checksum END"


def _hash_values(*values: bytes | None) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        digest.update(b"-" if value is None else b"%d:%b" % (len(value), value))
    return int.from_bytes(digest.digest(), signed=True)


def add_late_reactions(
    connection: sqlite3.Connection, event: FeedbackEvent, replaced_names: Sequence[str], received_at: float
) -> None:
    """Store a reaction to a settled row; the reactions that it replaces are withdrawn."""
    for name, is_retracted in (*((name, True) for name in replaced_names), (event.reaction, False)):
        if name is not None:
            late_reaction = ReactionRecord(
                id=uuid.uuid4().hex, response_id=event.id, time=datetime.fromtimestamp(received_at, UTC),
                reaction=name, retracted=is_retracted,
            )  # fmt: skip
            connection.execute(
                "INSERT INTO late_reactions (id, received_at, record, checksum) VALUES (:id, :time, :record, "
                f"{build_checksum('late_reactions', id=':id', received_at=':time', record=':record')})",
                {"id": late_reaction.id, "time": received_at, "record": late_reaction.model_dump_json()},
            )


def list_open_rows(connection: sqlite3.Connection, id_forms: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the database that name one of the ids as user, device or author; damaged ones in any field."""
    # As in a record, where quotes and backslashes are escaped.
    form_by_text = {json.dumps(form, ensure_ascii=False)[1:-1]: form for form in id_forms}
    fields = " OR ".join(
        f"json_extract(record, '$.{name}') IN (SELECT value FROM json_each(?1))" for name in sorted(USER_COLUMNS)
    )
    query = (
        "SELECT id, record FROM rows WHERE record IS NOT NULL AND CASE WHEN json_valid(record) THEN "
        f"{fields} ELSE EXISTS (SELECT 1 FROM json_each(?2) WHERE instr(record, value)) END"
    )
    rows = []
    for row_id, record_json in connection.execute(query, (json.dumps(list(id_forms)), json.dumps(list(form_by_text)))):
        try:
            rows.append(FeedbackRecord.model_validate_json(record_json).model_dump() | {"id": row_id})
        except ValueError:
            user_id = next((form for text, form in form_by_text.items() if text in str(record_json)), None)
            rows.append({"id": row_id, "messages": [], "user_id": user_id})
    return rows


def find_choice_ids(connection: sqlite3.Connection, ids_by_context: Mapping[str, Iterable[str]]) -> set[str]:
    """Ids of the stored choices between responses to the same messages."""
    known_ids = {choice_id for (choice_id,) in connection.execute("SELECT id FROM preferences")}
    if not known_ids:
        return set()
    # Most pairs have no choice, and a user with many rows has too many pairs for memory.
    pairs = chain.from_iterable(combinations(context_ids, 2) for context_ids in ids_by_context.values())
    return known_ids.intersection(PreferenceEvent(*pair).id for pair in pairs)


def erase_from_database(
    connection: sqlite3.Connection,
    row_ids: Iterable[str],
    choice_ids: Iterable[str],
    counts: dict[str, int],
    *,
    keeps_rows: bool = False,
) -> None:
    """Delete rows with their late reactions and choices; adds those that no file had to `counts`.

    With `keeps_rows` only what is known of other writers' rows is deleted with them.
    """
    # Deleted pages are overwritten, then the file is rebuilt without them.
    connection.execute("PRAGMA secure_delete = ON")
    with connection:
        by_row, by_choice = ([(row_id,) for row_id in sorted(ids)] for ids in (row_ids, choice_ids))
        is_others_row = " AND record IS NULL AND received_at IS NULL" if keeps_rows else ""
        connection.executemany(f"DELETE FROM rows WHERE id = ?{is_others_row}", by_row)
        # What had settled was counted in its files.
        for kind, statement, ids in (
            (
                "reactions",
                "DELETE FROM late_reactions WHERE CASE WHEN json_valid(record) THEN "
                "json_extract(record, '$.response_id') = ?1 ELSE instr(record, ?1) END",
                by_row,
            ),
            ("preferences", "DELETE FROM preferences WHERE id = ? AND record IS NOT NULL", by_choice),
        ):
            counts[kind] += max(connection.executemany(statement, ids).rowcount, 0)
        connection.executemany("DELETE FROM preferences WHERE id = ?", by_choice)
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
