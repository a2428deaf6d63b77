"""Feedback store: a SQLite database of rows that may still change, and Parquet files of settled rows.

A row is on disk before it is acknowledged. When the reaction window is over, rows move to a Parquet file that appears
under its final name in one step; rluf.prepare reads these files. Events are idempotent by row id, and `start` marks the
rows that Parquet files already have as settled, so a crash at any point is harmless.
"""

from __future__ import annotations

import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.errors import DataError, ResourceError
from rluf.prepare.schema import FeedbackRecord, records_to_table
from rluf.utils.files import atomic_write, fsync_path

StoreOutcome = Literal["stored", "duplicate", "unknown", "settled"]
"""stored: on disk now; duplicate: on disk already; unknown: no such response; settled: too late for a change."""

DATABASE_FILE = "open_rows.sqlite3"
MAX_ROWS_PER_FILE = 20_000
"""Maximum number of settled rows per Parquet file."""
LOCK_TIMEOUT_S = 60.0
"""Seconds to wait until an earlier writer of the store has ended: a restarted replica overlaps with the old one."""
# A settled row keeps its id and reaction; its record is then in a Parquet file only.
_CREATE_TABLES = """
CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, reaction TEXT, received_at REAL, conversation_id TEXT,
                                 turn INTEGER, continued INTEGER NOT NULL DEFAULT 0, record TEXT);
CREATE INDEX IF NOT EXISTS open_by_time ON rows (received_at) WHERE record IS NOT NULL;
CREATE INDEX IF NOT EXISTS open_by_conversation ON rows (conversation_id) WHERE record IS NOT NULL;
"""


@dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """A served response (`record` set, no reaction yet), a reaction (`record` None), or both."""

    id: str
    reaction: str | None = None
    record: FeedbackRecord | None = None


class FeedbackStore:
    """The only writer of a feedback store. Not thread-safe: the owner calls it from one thread at a time."""

    def __init__(
        self, root: str, log_folder: Path, *, reaction_window_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`root` is a folder or URL for Parquet, `log_folder` a local folder for the database. Nothing is opened yet.

        `clock` returns seconds since 1970: the age of a row must survive restarts, which a monotonic clock does not.
        """
        self.root, self.log_folder, self.reaction_window_s, self.clock = root, log_folder, reaction_window_s, clock
        self._connection: sqlite3.Connection | None = None

    def start(self) -> int:
        """Open the store, alone, and read the ids of settled rows; returns the number of open rows.

        Raises DataError when the store cannot be read, ResourceError when another writer has it or it is not a folder.
        """
        try:
            self.log_folder.mkdir(parents=True, exist_ok=True)
            self._filesystem, self._base_path = self._resolve_root()
            if old_logs := sorted(self.log_folder.glob("*.wal")):
                raise DataError(
                    f"{old_logs[0]} has rows of an earlier release of rluf; let that release write them "
                    "(its service does when it stops after serve.reaction_window_s), or move the file away"
                )
            self._connection = connection = self._open_database()
            # A crash may have left rows open after they went to Parquet.
            with connection:
                connection.executemany(
                    "INSERT INTO rows (id, reaction) VALUES (?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET reaction = excluded.reaction, record = NULL",
                    self._read_stored_reactions(),
                )
            (open_rows,) = connection.execute("SELECT count(*) FROM rows WHERE record IS NOT NULL").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(
                f"cannot open the feedback store {self.root} (log in {self.log_folder}): {error}; set "
                "serve.feedback_path to a writable folder or URL that no other process has open"
            ) from error
        return int(open_rows)

    def append_events(self, events: Iterable[FeedbackEvent]) -> list[StoreOutcome]:
        """Write events to disk in one transaction with one fsync; returns an outcome per event.

        Raises OSError when the write fails; then none of the events is stored.
        """
        connection, now = self._require_open(), self.clock()
        try:
            with connection:
                return [self._apply_event(connection, event, now) for event in events]
        except sqlite3.Error as error:
            raise OSError(f"feedback store {self.root}: {error}") from error

    def flush_settled(self, *, all_rows: bool = False) -> int:
        """Write settled rows (or all) to one Parquet file; returns the number of rows written."""
        connection = self._require_open()
        settled_before = math.inf if all_rows else self.clock() - self.reaction_window_s
        rows = connection.execute(
            "SELECT record, reaction, continued FROM rows WHERE record IS NOT NULL AND received_at <= ? "
            "ORDER BY rowid LIMIT ?",
            (settled_before, MAX_ROWS_PER_FILE),
        ).fetchall()
        if not rows:
            return 0
        records = []
        for record_json, reaction, continued in rows:
            changes = {"reaction": reaction} | ({"continued": True} if continued else {})
            records.append(FeedbackRecord.model_validate_json(record_json).model_copy(update=changes))
        timestamp = datetime.fromtimestamp(self.clock(), UTC).strftime("%Y%m%dT%H%M%S%f")
        file_name = f"feedback-{timestamp}-{uuid.uuid4().hex[:8]}.parquet"
        # Parquet before the database: a crash in between leaves rows in both, and `start` then marks them as settled.
        self._write_parquet(file_name, records_to_table(records, FeedbackRecord))
        with connection:
            connection.executemany("UPDATE rows SET record = NULL WHERE id = ?", [(record.id,) for record in records])
        return len(records)

    def close(self) -> None:
        """Close the database, which releases its lock; open rows stay in it for the next start."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _require_open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ResourceError("the feedback store is closed; start it first")
        return self._connection

    def _open_database(self) -> sqlite3.Connection:
        # The owner may call from several threads, one at a time.
        connection = sqlite3.connect(self.log_folder / DATABASE_FILE, timeout=LOCK_TIMEOUT_S, check_same_thread=False)
        # The exclusive lock makes this the only writer until it closes or dies; FULL syncs the log at each commit.
        connection.executescript(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _CREATE_TABLES
        )
        return connection

    @staticmethod
    def _apply_event(connection: sqlite3.Connection, event: FeedbackEvent, received_at: float) -> StoreOutcome:
        stored = connection.execute("SELECT reaction, record IS NULL FROM rows WHERE id = ?", (event.id,)).fetchone()
        if stored is None:
            record = event.record
            if record is None:
                return "unknown"
            connection.execute(
                "UPDATE rows SET continued = 1 WHERE conversation_id = ? AND turn < ? AND record IS NOT NULL",
                (record.conversation_id, record.turn),
            )
            connection.execute(
                "INSERT INTO rows (id, reaction, received_at, conversation_id, turn, record) VALUES (?, ?, ?, ?, ?, ?)",
                (event.id, event.reaction, received_at, record.conversation_id, record.turn, record.model_dump_json()),
            )
            return "stored"
        reaction, is_settled = stored
        if reaction == event.reaction:
            return "duplicate"
        if is_settled:
            return "settled"
        connection.execute("UPDATE rows SET reaction = ? WHERE id = ?", (event.reaction, event.id))
        return "stored"

    def _write_parquet(self, file_name: str, table: pa.Table) -> None:
        """Write a Parquet file that appears in one step: renamed into place, or uploaded whole to an object store."""
        target = f"{self._base_path}/{file_name}"
        if isinstance(self._filesystem, fs.LocalFileSystem):
            with atomic_write(Path(target)) as partial_file:
                pq.write_table(table, partial_file)
                fsync_path(partial_file)
            fsync_path(Path(self._base_path))
        else:
            pq.write_table(table, target, filesystem=self._filesystem)

    def _read_stored_reactions(self) -> Iterator[tuple[str, str | None]]:
        """Yield id and reaction of every row that is in Parquet already."""
        selector = fs.FileSelector(self._base_path, allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            if info.path.endswith(".parquet"):
                try:
                    table = pq.read_table(info.path, columns=["id", "reaction"], filesystem=self._filesystem)
                except pa.ArrowException as error:
                    raise DataError(
                        f"{info.path} in the feedback store is not a feedback log: {error}; move it elsewhere"
                    ) from error
                yield from zip(table["id"].to_pylist(), table["reaction"].to_pylist(), strict=True)

    def _resolve_root(self) -> tuple[Any, str]:
        if "://" in self.root:
            try:
                return fs.FileSystem.from_uri(self.root.rstrip("/"))
            except pa.ArrowException as error:
                raise DataError(f"serve.feedback_path={self.root} is not a writable URL: {error}") from error
        folder = Path(self.root).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return fs.LocalFileSystem(), str(folder)
