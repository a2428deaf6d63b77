"""Feedback store: a SQLite database of what may still change, and Parquet files of what is settled, by day.

    date=2026-01-31/feedback-*.parquet              served responses (FeedbackRecord)
    _reactions/date=2026-01-31/reactions-*.parquet  changes of the reaction to a settled response (ReactionRecord)
    _preferences/date=.../preferences-*.parquet     choices between two responses (PreferenceRecord)

A row is on disk before it is acknowledged. When the reaction window is over, rows move to a Parquet file that appears
under its final name in one step; rluf.prepare reads these files, and joins the late reactions. Events are idempotent by
row id, and `start` reads the Parquet files that the database does not know, so a crash at any point is harmless. The
small files of a day are merged later. Days are those of arrival, in UTC. Where several clusters serve into one store,
each has a folder of this layout (rluf.serve.writers).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import operator
import sqlite3
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from rluf.errors import DataError, ResourceError
from rluf.prepare.erasure import USER_COLUMNS
from rluf.prepare.readers.feedback_folder import (
    PREFERENCES_FOLDER,
    REACTIONS_FOLDER,
    apply_reaction_events,
    is_in_hidden_folder,
)
from rluf.prepare.schema import (
    FeedbackRecord,
    LogRecord,
    PreferenceRecord,
    ReactionRecord,
    build_arrow_schema,
    build_records_table,
)
from rluf.serve.other_writers import OtherWriters
from rluf.serve.parquet_folder import ParquetFolder
from rluf.serve.store_database import (
    DATABASE_FILE,
    add_late_reactions,
    build_checksum,
    build_checksum_update,
    erase_from_database,
    find_choice_ids,
    list_open_rows,
    open_database,
)
from rluf.serve.store_events import (
    FeedbackEvent,
    PreferenceEvent,
    StoreEvent,
    StoreOutcome,
    build_preference_record,
    hash_content,
    hash_messages,
)

logger = logging.getLogger("rluf.serve")

WRITER_VARIABLE = "RLUF_FEEDBACK_WRITER"
"""Environment variable that names the writer of a cluster, where several clusters serve into one store."""
_CONTENT_FIELDS = ("user_id", "conversation_id", "messages", "response")
MAX_ROWS_PER_FILE = 20_000
"""Maximum number of settled rows per Parquet file, before the files of a day are merged."""
DAY_S = 86_400.0
CHOICE_AGE_S, CHOICE_WAIT_S = 2 * DAY_S, DAY_S
"""How old the responses of a choice may be that another cluster served, and how long the choice waits for them."""
MERGE_AGE = timedelta(days=2)
"""Age of a day whose files are merged: readers that started on the day itself have finished by then."""
REPLACES_KEY = b"rluf.replaces"
"""Metadata key of a merged file: JSON list of the names of the files whose rows it has."""
LOCK_TIMEOUT_S = 60.0
"""Seconds to wait until an earlier writer of the store has ended: a restarted replica overlaps with the old one."""


class FeedbackStore(ParquetFolder):
    """The only writer of a feedback store. Not thread-safe: the owner calls it from one thread at a time."""

    def __init__(
        self,
        root: str,
        log_folder: Path,
        *,
        reaction_window_s: float,
        clock: Callable[[], float] = time.time,
        has_other_writers: bool = False,
        lock_timeout_s: float | None = None,
    ) -> None:
        """`root` is a folder or URL for Parquet, `log_folder` a local folder for the database. Nothing is opened yet.

        `clock` returns seconds since 1970: the age of a row must survive restarts, which a monotonic clock does not.
        `has_other_writers`: clusters with other roots served the responses that this store does not know.
        `lock_timeout_s` (None: LOCK_TIMEOUT_S) is how long `start` waits for an earlier writer.
        """
        super().__init__(root)
        self.log_folder, self.reaction_window_s, self.clock = log_folder, reaction_window_s, clock
        self._has_other_writers, self._other_writers = has_other_writers, OtherWriters(root)
        self._lock_timeout_s = LOCK_TIMEOUT_S if lock_timeout_s is None else lock_timeout_s
        self._connection: sqlite3.Connection | None = None
        self._merged_until = ""
        self._damaged_rows: dict[str, set[int]] = defaultdict(set)  # row numbers by table

    def start(self) -> int:
        """Open the store, alone, and read the files that its database does not know; returns the number of open rows.

        Raises DataError when the store cannot be read, ResourceError when another writer has it or it is not a folder.
        """
        self._damaged_rows.clear()
        try:
            self.log_folder.mkdir(parents=True, exist_ok=True)
            self._open_root()
            if old_logs := sorted(self.log_folder.glob("*.wal")):
                raise DataError(
                    f"{old_logs[0]} has rows of an earlier release of rluf; let that release write them "
                    "(its service does when it stops after serve.reaction_window_s), or move the file away"
                )
            with contextlib.ExitStack() as stack:
                self._connection = connection = open_database(self.log_folder, self._lock_timeout_s)
                # A failed start must release the lock, or the next one would wait for it in vain.
                stack.callback(self.close)
                self._delete_partial_files()
                with connection:
                    # Not whether the database exists: an earlier start may have created it and failed on a file.
                    is_new = connection.execute("SELECT 1 FROM files").fetchone() is None
                    self._read_unknown_files(connection, is_new=is_new)
                (open_rows,) = connection.execute("SELECT count(*) FROM rows WHERE record IS NOT NULL").fetchone()
                stack.pop_all()
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(
                f"cannot open the feedback store {self.root} (log in {self.log_folder}): {error}; if it is locked, "
                f"stop the service that uses it (or set {WRITER_VARIABLE} to another name for each of several "
                "clusters); else set serve.feedback_path to a writable folder or URL"
            ) from error
        return int(open_rows)

    def append_events(self, events: Iterable[StoreEvent]) -> list[StoreOutcome]:
        """Write events to disk in one transaction with one fsync; returns an outcome per event.

        Raises OSError when the write fails; then none of the events is stored.
        """
        connection, now = self._require_open(), self.clock()
        try:
            with connection:
                return [
                    self._apply_event(connection, event, now)
                    if isinstance(event, FeedbackEvent)
                    else self._apply_preference(connection, event, now)
                    for event in events
                ]
        except sqlite3.Error as error:
            raise OSError(f"feedback store {self.root}: {error}") from error

    def flush_settled(self, *, all_rows: bool = False) -> int:
        """Write what is settled (or all) to Parquet; returns the number of rows, late reactions and preferences.

        What the disk changed stays in the database, is logged, and counts in `damaged_row_count`; raises DataError when
        the database cannot be read or written.
        """
        settled_before = math.inf if all_rows else self.clock() - self.reaction_window_s
        try:
            self._join_choices()
            count = self._flush_table("rows", "", settled_before, self._parse_settled_row)
            # A late reaction has settled when it arrives.
            count += self._flush_table("late_reactions", REACTIONS_FOLDER, math.inf, ReactionRecord.model_validate_json)
            parse_choice = PreferenceRecord.model_validate_json
            return count + self._flush_table("preferences", PREFERENCES_FOLDER, settled_before, parse_choice)
        except sqlite3.Error as error:
            raise DataError(
                f"{self.log_folder / DATABASE_FILE}: settled rows cannot be written: {error}; check the disk; a "
                "damaged file can be restored from a backup, or recovered with sqlite3 (.recover)"
            ) from error

    @property
    def damaged_row_count(self) -> int:
        """Rows, late reactions and choices since `start` that the disk changed, so that they cannot be written."""
        return sum(map(len, self._damaged_rows.values()))

    def _flush_table(
        self, table: str, folder: str, settled_before: float, parse_record: Callable[..., LogRecord]
    ) -> int:
        """Write the settled records of a table; returns their number."""
        connection, damaged_rows, count = self._require_open(), self._damaged_rows[table], 0
        columns = "id, record, content, reaction, continued" if table == "rows" else "record"
        is_damaged = f"(checksum IS NOT NULL AND checksum <> {build_checksum(table)})"
        is_complete = f"(rejected_id IS NULL OR {is_damaged})" if table == "preferences" else "1"
        query = (
            f"SELECT rowid, id, received_at, {is_damaged}, {columns} FROM {table} WHERE record IS NOT NULL "
            # A time that the disk moved to the future would keep its row from ever being looked at.
            f"AND (received_at <= :settled OR received_at IS NULL OR (received_at > :future AND {is_damaged})) "
            f"AND {is_complete} "
            "AND rowid NOT IN (SELECT value FROM json_each(:damaged)) ORDER BY received_at, rowid LIMIT :limit"
        )
        values_by_name = {"settled": settled_before, "future": self.clock() + DAY_S, "limit": MAX_ROWS_PER_FILE}
        while rows := connection.execute(
            query, values_by_name | {"damaged": json.dumps(sorted(damaged_rows))}
        ).fetchall():
            records, times = [], []
            for row_number, row_id, received_at, is_row_damaged, *values in rows:
                try:
                    record = parse_record(*values)
                    # Another id would be written again and again, since the row of this one stays open.
                    if is_row_damaged or record.id != row_id:  # type: ignore[attr-defined]
                        raise self._build_damage_error(row_id, table)
                    _format_day(received_at)
                except (DataError, ValueError, TypeError, OverflowError, OSError):
                    damaged_rows.add(row_number)
                    logger.error("feedback store %s: %s", self.root, self._build_damage_error(row_id, table))
                    continue
                records.append(record)
                times.append(received_at)
            if records:
                self._write_days(table, folder, records, times)
            count += len(records)
        return count

    def merge_days(self) -> int:
        """Merge the files of each day that is older than MERGE_AGE; returns the number of files that were replaced.

        Does nothing when it was called before on the same day, or when another writer has files here. A day with a
        file that cannot be read stays as it is, and is logged. A reader that
        opens a replaced file fails and can be run again; at no time does a row appear in no file.
        """
        last_day = _format_day((datetime.fromtimestamp(self.clock(), UTC) - MERGE_AGE).timestamp())
        if self._merged_until == last_day:
            return 0
        replaced_count = 0
        files = sorted(self._list_files())
        known_files = {path for (path,) in self._require_open().execute("SELECT path FROM files")}
        if unknown_files := [path for path in files if path not in known_files]:
            # Of two writers that merge the same files, each would write their rows.
            logger.error(
                "feedback store %s: files not merged: %s is of another writer; set %s to a name of its own for each "
                "cluster that serves into this store", self.root, unknown_files[0], WRITER_VARIABLE,
            )  # fmt: skip
            self._merged_until = last_day
            return 0
        for folder, paths in groupby(files, key=lambda path: path.rpartition("/")[0]):
            group = list(paths)
            _, separator, day = folder.rpartition("date=")
            if separator and day <= last_day and len(group) > 1:
                try:
                    self._merge_files(folder, group)
                    replaced_count += len(group)
                except DataError as error:
                    logger.error("feedback store %s: files of a day not merged: %s", self.root, error)
        self._merged_until = last_day
        return replaced_count

    def erase_users(self, id_forms: Sequence[str]) -> dict[str, int]:
        """Remove the rows of users from the files and the database, with their late reactions and choices.

        `id_forms` has every form of each user's id. Returns the number of removed rows by kind. The files are read
        back; raises DataError when a row of these users is left. Safe to repeat after a crash.
        """
        connection = self._require_open()
        ids_by_context = self.find_user_rows(id_forms)
        row_ids = {row_id for context_ids in ids_by_context.values() for row_id in context_ids}
        # The files of rows come last: they name the user, so after a crash a repetition finds all that is left.
        counts = self.erase_related(ids_by_context)
        erase_from_database(connection, row_ids, (), counts)
        counts["rows"] = len(row_ids)
        self._damaged_rows.clear()  # the rows have other numbers now
        row_files = [path for path in self._list_files() if not is_in_hidden_folder(path)]
        for path in row_files:
            self._remove_rows(path, "id", row_ids)
        for path in self._list_files():
            if not is_in_hidden_folder(path) and self._read_user_rows(path, id_forms, ["id"]):
                raise DataError(f"{self.root}/{path} still has rows of the erased users; check the disk and repeat")
        return counts

    def find_user_rows(self, id_forms: Sequence[str]) -> dict[str, set[str]]:
        """Ids of the rows that name one of the ids, by the hash of their messages."""
        ids_by_context: dict[str, set[str]] = defaultdict(set)
        for row in list_open_rows(self._require_open(), id_forms):
            ids_by_context[hash_messages(row["messages"])].add(row["id"])
        for path in self._list_files():
            if not is_in_hidden_folder(path):
                for row in self._read_user_rows(path, id_forms, ["id", "messages"]):
                    ids_by_context[hash_messages(row["messages"])].add(row["id"])
        return ids_by_context

    def erase_related(self, ids_by_context: Mapping[str, Iterable[str]]) -> dict[str, int]:
        """Remove the late reactions to rows of any writer, and the choices between them; returns their numbers."""
        connection, counts = self._require_open(), {"rows": 0, "reactions": 0, "preferences": 0}
        row_ids = {row_id for context_ids in ids_by_context.values() for row_id in context_ids}
        choice_ids = find_choice_ids(connection, ids_by_context)
        for path in self._list_files():
            if path.startswith(f"{REACTIONS_FOLDER}/"):
                counts["reactions"] += self._remove_rows(path, "response_id", row_ids)
            elif path.startswith(f"{PREFERENCES_FOLDER}/"):
                counts["preferences"] += self._remove_rows(path, "id", choice_ids)
        erase_from_database(connection, row_ids, choice_ids, counts, keeps_rows=True)
        return counts

    def find_user_ids(self, id_forms: Sequence[str]) -> set[str]:
        """Which of these ids a row names as its user, device or author (USER_COLUMNS)."""
        rows = list_open_rows(self._require_open(), id_forms)
        for path in self._list_files():
            if not is_in_hidden_folder(path):
                rows += self._read_user_rows(path, id_forms, sorted(USER_COLUMNS))
        return {row[name] for row in rows for name in USER_COLUMNS if row.get(name) is not None}.intersection(id_forms)

    def _read_user_rows(self, path: str, id_forms: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of a file that name one of the ids as user, device or author, with the `columns` that the file has."""
        # Files of an older release have no device and author.
        names = self._read_table(path, filters=pc.scalar(False)).column_names
        ids = pa.array(sorted(set(id_forms)), pa.string())
        conditions = [pc.field(name).isin(ids) for name in sorted(USER_COLUMNS.intersection(names))]
        is_users_row = functools.reduce(operator.or_, conditions, pc.scalar(False))
        return self._read_table(path, columns=[n for n in columns if n in names], filters=is_users_row).to_pylist()

    def _remove_rows(self, path: str, column: str, erased_ids: Iterable[str]) -> int:
        """Rewrite or delete a file without the rows whose `column` is one of the ids; returns their number."""
        table = self._read_table(path)
        remaining = table.filter(pc.invert(pc.is_in(table[column], pa.array(sorted(erased_ids), pa.string()))))
        if not remaining.num_rows:
            self._delete_files([path])
        elif remaining.num_rows < table.num_rows:
            self._write_parquet(path, [remaining])
        return int(table.num_rows - remaining.num_rows)

    def close(self) -> None:
        """Close the database, which releases its lock; open rows stay in it for the next start."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _require_open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ResourceError("the feedback store is closed; start it first")
        return self._connection

    def _apply_event(self, connection: sqlite3.Connection, event: FeedbackEvent, received_at: float) -> StoreOutcome:
        content = None if event.record is None else hash_content(event.record.model_dump())
        query = "SELECT reaction, record IS NOT NULL, coalesce(content, ?) FROM rows WHERE id = ?"
        stored = connection.execute(query, (content, event.id)).fetchone()
        if stored is None:
            record = event.record
            if record is None and self._has_other_writers and event.replaced_reactions:
                connection.execute("INSERT INTO rows (id, reaction) VALUES (?, ?)", (event.id, event.reaction))
                replaced_names = [name for name in event.replaced_reactions if name != event.reaction]
                add_late_reactions(connection, event, replaced_names, received_at)
                return "late"
            if record is None:
                return "unknown"
            # Only the same user continues: anybody may name another one's conversation. IS NOT NULL selects the index.
            connection.execute(
                f"UPDATE rows SET continued = 1, checksum = {build_checksum_update('rows', continued='1')} "
                "WHERE record IS NOT NULL AND conversation_id = ? AND turn < ? AND continued = 0 "
                "AND CASE WHEN json_valid(record) THEN json_extract(record, '$.user_id') END = ?",
                (record.conversation_id, record.turn, record.user_id),
            )
            new_checksum = build_checksum(
                "rows", id=":id", record=":record", reaction=":reaction", continued="0", received_at=":time"
            )
            connection.execute(
                "INSERT INTO rows (id, reaction, received_at, conversation_id, turn, record, content, checksum) "
                f"VALUES (:id, :reaction, :time, :conversation, :turn, :record, :content, {new_checksum})",
                {"id": event.id, "reaction": event.reaction, "time": received_at, "turn": record.turn,
                 "conversation": record.conversation_id, "record": record.model_dump_json(), "content": content},
            )  # fmt: skip
            return "stored"
        reaction, is_open, stored_content = stored
        if event.record is not None and content != stored_content:
            return "conflict"
        # A report of the response that arrives again, perhaps after a reaction, withdraws nothing.
        if reaction == event.reaction or (event.record is not None and event.reaction is None):
            return "duplicate"
        connection.execute(
            f"UPDATE rows SET reaction = :new, checksum = {build_checksum_update('rows', reaction=':new')} "
            "WHERE id = :id", {"new": event.reaction, "id": event.id},
        )  # fmt: skip
        if is_open:
            return "stored"
        add_late_reactions(connection, event, [reaction] if reaction is not None else [], received_at)
        return "late"

    def _apply_preference(
        self, connection: sqlite3.Connection, event: PreferenceEvent, received_at: float
    ) -> StoreOutcome:
        stored = connection.execute(
            "SELECT chosen_id, record IS NULL FROM preferences WHERE id = ?", (event.id,)
        ).fetchone()
        if stored is not None and stored[0] == event.chosen_id:
            return "duplicate"
        if stored is not None and stored[1]:
            return "settled"
        try:
            chosen, rejected = (self._find_record(connection, row) for row in (event.chosen_id, event.rejected_id))
        except (DataError, OSError, ValueError, OverflowError) as error:
            # The events of other requests, which share the transaction, must not fail with it.
            logger.error("feedback store %s: cannot look up the responses of a choice: %s", self.root, error)
            return "unreadable"
        record_json, rejected_id = "", None
        if chosen is not None and rejected is not None:
            record = build_preference_record(event.id, chosen, rejected)
            if record is None:
                return "mismatch"
            record_json = record.model_dump_json()
        elif self._has_other_writers:
            # Another cluster served a response: this store has no text of it, and its files may not have it yet.
            rejected_id = event.rejected_id
        else:
            return "unknown"
        changed = {"id": ":id", "record": ":record", "chosen_id": ":chosen", "rejected_id": ":rejected"}
        new_checksum = build_checksum("preferences", **changed, received_at=":time")
        # The window of a choice that changes is that of the first.
        kept_checksum = build_checksum("preferences", **changed, received_at="preferences.received_at")
        connection.execute(
            "INSERT INTO preferences (id, chosen_id, rejected_id, received_at, record, checksum) "
            f"VALUES (:id, :chosen, :rejected, :time, :record, {new_checksum}) ON CONFLICT (id) DO UPDATE SET "
            "chosen_id = excluded.chosen_id, rejected_id = excluded.rejected_id, record = excluded.record, "
            f"checksum = {kept_checksum}",
            {"id": event.id, "chosen": event.chosen_id, "rejected": rejected_id, "time": received_at,
             "record": record_json},
        )  # fmt: skip
        return "stored"

    def _join_choices(self) -> None:
        """Complete the choices whose responses other clusters served, once those have written them."""
        connection = self._require_open()
        choices = connection.execute(
            "SELECT id, chosen_id, rejected_id, received_at FROM preferences WHERE record IS NOT NULL "
            f"AND rejected_id IS NOT NULL AND checksum = {build_checksum('preferences')}"
        ).fetchall()
        first_time = min((received_at for *_, received_at in choices), default=self.clock()) - CHOICE_AGE_S
        wanted_ids = {row_id for _, *row_ids, _ in choices for row_id in row_ids}
        others_records = self._other_writers.find_records(wanted_ids, _format_day(first_time))
        for choice_id, chosen_id, rejected_id, received_at in choices:
            try:
                chosen, rejected = (
                    others_records.get(row_id) or self._find_record(connection, row_id)
                    for row_id in (chosen_id, rejected_id)
                )
            except (DataError, OSError, ValueError, OverflowError):
                continue  # perhaps it can be read later
            is_found = chosen is not None and rejected is not None
            record = build_preference_record(choice_id, chosen, rejected) if chosen and rejected else None
            if not is_found and received_at > self.clock() - CHOICE_WAIT_S:
                continue
            if record is None:
                problem = "the responses answer different messages" if is_found else "no writer has both responses"
                logger.warning("feedback store %s: choice %s not written: %s", self.root, choice_id, problem)
            record_json = None if record is None else record.model_dump_json()
            checksum = build_checksum("preferences", record=":record", rejected_id="NULL")
            with connection:
                connection.execute(
                    f"UPDATE preferences SET record = :record, rejected_id = NULL, checksum = {checksum} "
                    "WHERE id = :id", {"record": record_json, "id": choice_id},
                )  # fmt: skip

    def _find_record(self, connection: sqlite3.Connection, row_id: str) -> FeedbackRecord | None:
        """The record of a row, from the database or from the files of its day; None for an unknown row.

        Raises DataError, OSError or ValidationError when the row is in no readable file and a file cannot be read.
        """
        query = "SELECT record, content, received_at FROM rows WHERE id = ?"
        stored = connection.execute(query, (row_id,)).fetchone()
        if stored is None:
            return None
        record_json, content, received_at = stored
        if record_json is not None:
            return self._parse_open_row(row_id, record_json, content)
        day_folder = "" if received_at is None else f"date={_format_day(received_at)}/"
        first_error: DataError | OSError | ValidationError | None = None
        for path in self._list_files():
            if path.startswith(day_folder) and not is_in_hidden_folder(path):
                try:
                    (row, *_) = self._read_table(path, filters=[("id", "=", row_id)]).to_pylist() or [None]
                    if row is not None:
                        return FeedbackRecord.model_validate(row)
                except (DataError, OSError, ValidationError) as error:
                    first_error = first_error or error
        if first_error is not None:
            raise first_error
        return None

    def _parse_open_row(self, row_id: str, record_json: str, content: str | None) -> FeedbackRecord:
        """Record of an open row. Raises DataError when it is not what was acknowledged: the disk changed it."""
        with contextlib.suppress(ValueError):
            record = FeedbackRecord.model_validate_json(record_json)
            if record.id == row_id and content in (None, hash_content(record.model_dump())):
                return record
        raise self._build_damage_error(row_id, "rows")

    def _build_damage_error(self, row_id: object, table: str) -> DataError:
        row_name = ascii(row_id)[1:-1] if isinstance(row_id, str) else row_id
        return DataError(
            f"{self.log_folder / DATABASE_FILE}: row {row_name} of {table} is damaged; restore the file from a backup, "
            "or delete this row with sqlite3"
        )

    def _parse_settled_row(
        self, row_id: str, record_json: str, content: str | None, reaction: str | None, continued: int
    ) -> FeedbackRecord:
        record = self._parse_open_row(row_id, record_json, content)
        changes = {"reaction": reaction} | ({"continued": True} if continued else {})
        return FeedbackRecord.model_validate(record.model_dump() | changes)

    def _write_days(self, table: str, folder: str, records: Sequence[LogRecord], received_at: Sequence[float]) -> None:
        """Write records of one kind, ordered by time of arrival, to one file per day, and mark them in the database."""
        connection = self._require_open()
        timestamp = datetime.fromtimestamp(self.clock(), UTC).strftime("%Y%m%dT%H%M%S%f")
        prefix = folder.strip("_") or "feedback"
        for day, group in groupby(zip(received_at, records, strict=True), key=lambda pair: _format_day(pair[0])):
            day_records = [record for _, record in group]
            file_name = f"{prefix}-{timestamp}-{uuid.uuid4().hex[:8]}.parquet"
            path = "/".join(filter(None, (folder, f"date={day}", file_name)))
            record_type = type(day_records[0])
            # Parquet before the database: a crash in between leaves rows in both, and `start` then marks them.
            self._write_parquet(path, [build_records_table(day_records, record_type)])
            with connection:
                ids = [(record.id,) for record in day_records]  # type: ignore[attr-defined]
                mark = "DELETE FROM {}" if table == "late_reactions" else "UPDATE {} SET record = NULL"
                connection.executemany(f"{mark.format(table)} WHERE id = ?", ids)
                connection.execute("INSERT INTO files (path) VALUES (?)", (path,))

    def _merge_files(self, folder: str, paths: Sequence[str]) -> None:
        """Replace the files of a day by one, reading one at a time."""
        connection, names = self._require_open(), [path.rpartition("/")[2] for path in paths]
        record_types: dict[str, type[LogRecord]] = {
            REACTIONS_FOLDER: ReactionRecord,
            PREFERENCES_FOLDER: PreferenceRecord,
        }
        # Files of an older release lack newer columns.
        schema = build_arrow_schema(record_types.get(folder.partition("/")[0], FeedbackRecord))
        merged_path = f"{folder}/{names[0].partition('-')[0]}-merged-{uuid.uuid4().hex[:12]}.parquet"
        tables = (self._read_as(schema, path) for path in paths)
        self._write_parquet(merged_path, tables, {REPLACES_KEY: json.dumps(names).encode()})
        self._delete_files(paths)
        with connection:
            connection.execute("INSERT INTO files (path) VALUES (?)", (merged_path,))
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    def _read_unknown_files(self, connection: sqlite3.Connection, *, is_new: bool) -> None:
        """Mark the rows of files that the database does not know as settled: a crash came between file and database.

        With a new database these are all files; then the late reactions give the present reactions.
        """
        paths = self._list_files()
        late_events: list[dict[str, Any]] = []
        for path in paths:
            # A merge that a crash interrupted: the new file is complete, old ones may be left.
            if "-merged-" in path and not connection.execute("SELECT 1 FROM files WHERE path = ?", (path,)).fetchone():
                metadata = pq.read_schema(f"{self._base_path}/{path}", filesystem=self._filesystem).metadata or {}
                folder = path.rpartition("/")[0]
                replaced = {f"{folder}/{name}" for name in json.loads(metadata.get(REPLACES_KEY, b"[]"))}
                self._delete_files([other for other in paths if other in replaced])
                paths = [other for other in paths if other not in replaced]
        for path in paths:
            if connection.execute("INSERT INTO files (path) VALUES (?) ON CONFLICT DO NOTHING", (path,)).rowcount == 0:
                continue
            kind = path.partition("/")[0]
            if kind == REACTIONS_FOLDER:
                columns = ["id", "response_id", "time", "reaction", "retracted"]
                events = self._read_table(path, columns=columns).to_pylist()
                connection.executemany("DELETE FROM late_reactions WHERE id = ?", [(event["id"],) for event in events])
                late_events += events if is_new else []
            elif kind == PREFERENCES_FOLDER:
                ids = self._read_table(path, columns=["id"])["id"].to_pylist()
                connection.executemany(
                    "INSERT INTO preferences (id) VALUES (?) ON CONFLICT (id) DO UPDATE SET record = NULL",
                    [(row_id,) for row_id in ids],
                )
            else:
                table = self._read_table(path, columns=["id", "reaction", *_CONTENT_FIELDS])
                connection.executemany(
                    "INSERT INTO rows (id, reaction, content) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                    "record = NULL, reaction = CASE WHEN record IS NULL THEN reaction ELSE excluded.reaction END",
                    ((row["id"], row["reaction"], hash_content(row)) for row in table.to_pylist()),
                )
        # By time, since a late file of a merged day sorts before the merged one.
        late_events.sort(key=lambda event: event["time"])
        connection.executemany(
            "UPDATE rows SET reaction = ? WHERE id = ?",
            [(reaction, row_id) for row_id, reaction in apply_reaction_events(late_events).items()],
        )


def _format_day(seconds: float) -> str:
    """Day of a time in seconds since 1970, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
