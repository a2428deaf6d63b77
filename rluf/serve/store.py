"""Feedback store: a write-ahead log of rows that may still change, and Parquet files of settled rows.

A row is on disk before it is acknowledged. When the reaction window is over, rows move to a Parquet file that appears
under its final name in one step; rluf.prepare reads these files. Events are idempotent by row id: replaying the log
over Parquet files that already have some of its rows changes nothing, so a crash at any point is harmless.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.errors import DataError, ResourceError
from rluf.prepare.schema import FeedbackRecord, records_to_table
from rluf.utils.files import fsync_path, try_lock

logger = logging.getLogger(__name__)

StoreOutcome = Literal["stored", "duplicate", "unknown", "settled"]
"""stored: on disk now; duplicate: on disk already; unknown: no such response; settled: too late for a change."""

MAX_ROWS_PER_FILE = 20_000
"""Maximum number of settled rows per Parquet file."""
LOCK_TIMEOUT_S = 60.0
"""Seconds to wait until an earlier writer of the store has ended: a restarted replica overlaps with the old one."""


@dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """A served response (`record` set, no reaction yet), a reaction (`record` None), or both.

    `received_at` is in seconds since 1970; the store sets it.
    """

    id: str
    reaction: str | None = None
    record: FeedbackRecord | None = None
    received_at: float = 0.0

    def to_json_line(self) -> str:
        """Serialize to one line of the write-ahead log."""
        row = None if self.record is None else self.record.model_dump(mode="json")
        return json.dumps({"id": self.id, "reaction": self.reaction, "record": row, "at": self.received_at}) + "\n"

    @classmethod
    def from_json_line(cls, line: bytes) -> FeedbackEvent:
        """Parse a line of `to_json_line`. Raises ValueError, KeyError or TypeError for an incomplete line."""
        row = json.loads(line)
        record = None if row["record"] is None else FeedbackRecord.model_validate_json(json.dumps(row["record"]))
        return cls(row["id"], row["reaction"], record, row["at"])


@dataclass(slots=True)
class _OpenRow:
    record: FeedbackRecord
    received_at: float
    continued: bool


class FeedbackStore:
    """The only writer of a feedback store. Not thread-safe: the owner calls it from one thread at a time."""

    def __init__(
        self, root: str, log_folder: Path, *, reaction_window_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`root` is a folder or URL for Parquet, `log_folder` a local folder for the log. Nothing is opened yet.

        `clock` returns seconds since 1970: the age of a row must survive restarts, which a monotonic clock does not.
        """
        self.root, self.log_folder, self.reaction_window_s, self.clock = root, log_folder, reaction_window_s, clock
        self._open_rows: dict[str, _OpenRow] = {}
        self._newest_open_response: dict[str, str] = {}  # conversation id -> response id
        self._settled_reactions: dict[str, str | None] = {}
        self._log_stream: io.FileIO | None = None
        self._lock_file: IO[str] | None = None
        self._log_bytes = 0
        self._log_number = 0

    def start(self) -> int:
        """Open the store: acquire its lock, read the settled rows, replay the log; returns the number of open rows.

        Raises DataError when the store cannot be read, ResourceError when another writer has it or it is not a folder.
        """
        try:
            self.log_folder.mkdir(parents=True, exist_ok=True)
            self._filesystem, self._base_path = self._resolve_root()
            self._acquire_lock()
            # Before the logs: a log may still have rows that a crash left behind after they went to Parquet.
            for response_id, reaction in self._read_stored_reactions():
                self._settled_reactions[response_id] = reaction
            for log_file in sorted(self.log_folder.glob("*.wal")):
                self._log_number = max(self._log_number, int(log_file.stem))
                self._replay_log(log_file)
            self._compact_log()
        except OSError as error:
            raise ResourceError(
                f"cannot open the feedback store {self.root} (log in {self.log_folder}): {error}; set "
                "serve.feedback_path to a writable folder or URL"
            ) from error
        return len(self._open_rows)

    def append_events(self, events: Iterable[FeedbackEvent]) -> list[StoreOutcome]:
        """Write events to disk with one write and one fsync, then apply them; returns an outcome per event.

        Raises OSError when the write fails; then none of the events is stored.
        """
        if self._log_stream is None:
            raise ResourceError("the feedback store is closed; start it first")
        now = self.clock()
        stamped_events = [FeedbackEvent(event.id, event.reaction, event.record, now) for event in events]
        # Events of one call may refer to each other, but none is applied before all are on disk.
        pending_reactions: dict[str, str | None] = {}
        outcomes = [self._decide_outcome(event, pending_reactions) for event in stamped_events]
        lines = "".join(
            event.to_json_line() for event, outcome in zip(stamped_events, outcomes, strict=True) if outcome == "stored"
        )
        if lines:
            self._append_to_log(lines.encode())
        for event, outcome in zip(stamped_events, outcomes, strict=True):
            if outcome == "stored":
                self._apply_event(event)
        return outcomes

    def flush_settled(self, *, all_rows: bool = False) -> int:
        """Write settled rows (or all) to one Parquet file and compact the log; returns the number of rows written."""
        settled_before = self.clock() - self.reaction_window_s
        settled_rows = [row for row in self._open_rows.values() if all_rows or row.received_at <= settled_before]
        if not settled_rows:
            return 0
        records = [self._final_record(row) for row in settled_rows[:MAX_ROWS_PER_FILE]]
        timestamp = datetime.fromtimestamp(self.clock(), UTC).strftime("%Y%m%dT%H%M%S%f")
        file_name = f"feedback-{timestamp}-{self._log_number:06d}.parquet"
        # Parquet before the log: a crash in between leaves rows in both, and `start` ignores the second copy.
        self._write_parquet(file_name, records_to_table(records, FeedbackRecord))
        for record in records:
            self._mark_settled(record)
        self._compact_log()
        return len(records)

    def close(self) -> None:
        """Close the log and release the lock; open rows stay in the log for the next start."""
        if self._log_stream is not None:
            self._log_stream.close()
            self._log_stream = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    @property
    def open_row_count(self) -> int:
        """Number of rows whose reaction may still change."""
        return len(self._open_rows)

    def _decide_outcome(self, event: FeedbackEvent, pending_reactions: dict[str, str | None]) -> StoreOutcome:
        """Decide an event's outcome from the rows and the reactions of earlier events of the same call."""
        if event.id in self._settled_reactions:
            return "duplicate" if self._settled_reactions[event.id] == event.reaction else "settled"
        is_known = event.id in self._open_rows or event.id in pending_reactions
        if not is_known and event.record is None:
            return "unknown"
        reaction = pending_reactions[event.id] if event.id in pending_reactions else self._open_reaction(event.id)
        pending_reactions[event.id] = event.reaction
        return "duplicate" if is_known and reaction == event.reaction else "stored"

    def _open_reaction(self, response_id: str) -> str | None:
        return self._open_rows[response_id].record.reaction if response_id in self._open_rows else None

    def _apply_event(self, event: FeedbackEvent) -> None:
        if event.id in self._settled_reactions:
            return
        row = self._open_rows.get(event.id)
        if row is not None:
            row.record = row.record.model_copy(update={"reaction": event.reaction})
        elif event.record is not None:
            record = event.record.model_copy(update={"reaction": event.reaction})
            previous_id = self._newest_open_response.get(record.conversation_id)
            if previous_id in self._open_rows and self._open_rows[previous_id].record.turn < record.turn:
                self._open_rows[previous_id].continued = True
            self._newest_open_response[record.conversation_id] = event.id
            self._open_rows[event.id] = _OpenRow(record, event.received_at, continued=False)

    def _final_record(self, open_row: _OpenRow) -> FeedbackRecord:
        """Return the row for Parquet, with `continued` set if a later turn of its conversation was served."""
        continued = True if open_row.continued else open_row.record.continued
        return open_row.record.model_copy(update={"continued": continued})

    def _mark_settled(self, record: FeedbackRecord) -> None:
        del self._open_rows[record.id]
        self._settled_reactions[record.id] = record.reaction
        if self._newest_open_response.get(record.conversation_id) == record.id:
            del self._newest_open_response[record.conversation_id]

    def _append_to_log(self, data: bytes) -> None:
        stream = self._log_stream
        if stream is None:
            raise ResourceError("the feedback store is closed; start it first")
        try:
            unwritten = memoryview(data)
            while unwritten:  # a raw FileIO may write less than it is given
                unwritten = unwritten[stream.write(unwritten) or 0 :]
            os.fsync(stream.fileno())
        except OSError:
            # Remove a partial line, or the next event would be appended to it and both would be lost.
            stream.truncate(self._log_bytes)
            stream.seek(self._log_bytes)
            raise
        self._log_bytes += len(data)

    def _replay_log(self, log_file: Path) -> None:
        for line_number, line in enumerate(log_file.read_bytes().splitlines(keepends=True), 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line is incomplete")
                self._apply_event(FeedbackEvent.from_json_line(line))
            except (ValueError, KeyError, TypeError) as error:
                # Only a crash during a write leaves such a line, and nothing is acknowledged before its fsync.
                logger.warning("%s line %d: skipped an unacknowledged event: %s", log_file.name, line_number, error)

    def _compact_log(self) -> None:
        """Start a new log with the open rows only, then delete the older ones."""
        old_files = sorted(self.log_folder.glob("*.wal"))
        self._log_number += 1
        log_file, partial_file = self.log_folder / f"{self._log_number:08d}.wal", self.log_folder / "next.part"
        lines = "".join(
            FeedbackEvent(response_id, row.record.reaction, row.record, row.received_at).to_json_line()
            for response_id, row in self._open_rows.items()
        )
        with partial_file.open("wb") as stream:
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())
        # Rename, fsync the folder, and only then delete: after a crash at any point at least one log is complete, and
        # replaying both is idempotent.
        partial_file.replace(log_file)
        fsync_path(self.log_folder)
        if self._log_stream is not None:
            self._log_stream.close()
        self._log_stream = io.FileIO(log_file, "r+")
        self._log_bytes = self._log_stream.seek(0, os.SEEK_END)
        for old_file in old_files:
            old_file.unlink()

    def _write_parquet(self, file_name: str, table: pa.Table) -> None:
        """Write a Parquet file that appears in one step: renamed into place, or uploaded whole to an object store."""
        target = f"{self._base_path}/{file_name}"
        if isinstance(self._filesystem, fs.LocalFileSystem):
            partial_file = Path(self._base_path) / f".{file_name}.part"
            pq.write_table(table, partial_file)
            fsync_path(partial_file)
            partial_file.replace(target)
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

    def _acquire_lock(self) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while (lock_file := try_lock(self.log_folder / "lock")) is None:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the feedback store {self.root} is locked by another process, waited {LOCK_TIMEOUT_S:g} s; stop "
                    "that process, or set serve.feedback_path to another store"
                )
            time.sleep(0.1)
        self._lock_file = lock_file
