"""The feedback store: a row is on disk before it is acknowledged, and becomes Parquet that rluf.prepare reads.

Rows wait in a write-ahead log while their reaction may still change. Once settled they are written as a whole Parquet
file under its final name in one step, so a reader never sees half a row. Every event is idempotent by the row's id: the
log can be replayed over Parquet files that already hold some of it, which is what makes a crash at any point harmless.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.errors import DataError, ResourceError
from rluf.prepare.schema import FeedbackRecord, to_table
from rluf.utils.files import fsync_path

logger = logging.getLogger(__name__)

Outcome = Literal["stored", "duplicate", "unknown", "settled"]
"""stored: on disk now; duplicate: it already was; unknown: no such response; settled: too late to change it."""

ROTATE_ROWS = 20_000
"""Settled rows in one Parquet file at most."""
LOCK_S = 60.0
"""Seconds to wait for an earlier writer of the same store to end."""


@dataclass(frozen=True, slots=True)
class Event:
    """A response that was served (`record`, reaction none), or a reaction to one (`record` none)."""

    id: str
    reaction: str | None = None
    record: FeedbackRecord | None = None
    at: float = 0.0

    def line(self) -> str:
        """One line of the write-ahead log."""
        row = None if self.record is None else self.record.model_dump(mode="json")
        return json.dumps({"id": self.id, "reaction": self.reaction, "record": row, "at": self.at}) + "\n"

    @classmethod
    def parse(cls, line: bytes) -> Event:
        """The inverse of `line`. Raises ValueError or KeyError on a line that was not written whole."""
        row = json.loads(line)
        record = None if row["record"] is None else FeedbackRecord.model_validate_json(json.dumps(row["record"]))
        return cls(row["id"], row["reaction"], record, row["at"])


@dataclass(slots=True)
class _Open:
    record: FeedbackRecord
    at: float
    continued: bool


class FeedbackStore:
    """One writer of one store. Not thread-safe: its owner calls it from one thread at a time."""

    def __init__(self, root: str, log: Path, *, settle_s: float, clock: Callable[[], float] = time.time) -> None:
        """`root` is a folder or URL for Parquet, `log` a local folder for the write-ahead log; nothing is touched yet.

        `clock` gives seconds since 1970.
        """
        self.root, self.log, self.settle_s, self.clock = root, log, settle_s, clock
        self._open: dict[str, _Open] = {}
        self._latest: dict[str, str] = {}  # conversation -> its newest open response
        self._done: dict[str, str | None] = {}
        self._stream: io.FileIO | None = None
        self._lock: io.TextIOWrapper | None = None
        self._written = 0
        self._number = 0

    def start(self) -> int:
        """Take the store over: wait for its lock, read what is there, replay the log; returns the rows still open.

        Raises DataError when the store cannot be read, ResourceError when another writer keeps it or it is no folder.
        """
        try:
            self.log.mkdir(parents=True, exist_ok=True)
            self._filesystem, self._base = self._resolve()
            self._take_lock()
            for id_, reaction in self._stored():
                self._done[id_] = reaction
            for file in sorted(self.log.glob("*.wal")):
                self._number = max(self._number, int(file.stem))
                self._replay(file)
            self._compact()
        except OSError as error:
            raise ResourceError(
                f"cannot open the feedback store {self.root} (log in {self.log}): {error}; set serve.feedback to a "
                "place that can be written"
            ) from error
        return len(self._open)

    def append(self, events: Iterable[Event]) -> list[Outcome]:
        """Put events on disk (one write, one fsync for all), then apply them; returns what became of each.

        Raises OSError when the disk refuses; nothing of the call is then kept.
        """
        if self._stream is None:
            raise ResourceError("the feedback store is closed; start it first")
        now = self.clock()
        stamped = [Event(e.id, e.reaction, e.record, now) for e in events]
        fresh: dict[str, str | None] = {}  # reactions of this very call, before they are applied
        outcomes = [self._judge(event, fresh) for event in stamped]
        lines = "".join(e.line() for e, o in zip(stamped, outcomes, strict=True) if o == "stored")
        if lines:
            self._write(lines.encode())
        for event, outcome in zip(stamped, outcomes, strict=True):
            if outcome == "stored":
                self._apply(event)
        return outcomes

    def rotate(self, *, all_rows: bool = False) -> int:
        """Write settled rows (or all) to one Parquet file and shorten the log; returns the rows written."""
        due = self.clock() - self.settle_s
        settled = [id_ for id_, row in self._open.items() if all_rows or row.at <= due][:ROTATE_ROWS]
        if not settled:
            return 0
        rows = [self._final(self._open[id_]) for id_ in settled]
        stamp = datetime.fromtimestamp(self.clock(), UTC).strftime("%Y%m%dT%H%M%S%f")
        self._put(f"feedback-{stamp}-{self._number:06d}.parquet", to_table(rows, FeedbackRecord))
        for row in rows:
            self._forget(row)
        self._compact()
        return len(rows)

    def close(self) -> None:
        """Let go of the log and the lock; open rows stay in the log for the next start."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def open_rows(self) -> int:
        """Rows whose reaction may still change."""
        return len(self._open)

    def _judge(self, event: Event, fresh: dict[str, str | None]) -> Outcome:
        """What an event would do now, given the reactions that earlier events of the same call bring."""
        if event.id in self._done:
            return "duplicate" if self._done[event.id] == event.reaction else "settled"
        known = event.id in self._open or event.id in fresh
        if not known and event.record is None:
            return "unknown"
        present = fresh[event.id] if event.id in fresh else self._reaction(event.id)
        fresh[event.id] = event.reaction
        return "duplicate" if known and present == event.reaction else "stored"

    def _reaction(self, id_: str) -> str | None:
        return self._open[id_].record.reaction if id_ in self._open else None

    def _apply(self, event: Event) -> None:
        if event.id in self._done:
            return
        row = self._open.get(event.id)
        if row is not None:
            row.record = row.record.model_copy(update={"reaction": event.reaction})
        elif event.record is not None:
            record = event.record.model_copy(update={"reaction": event.reaction})
            earlier = self._latest.get(record.conversation_id)
            if earlier in self._open and self._open[earlier].record.turn < record.turn:
                self._open[earlier].continued = True
            self._latest[record.conversation_id] = event.id
            self._open[event.id] = _Open(record, event.at, continued=False)

    def _final(self, row: _Open) -> FeedbackRecord:
        """The row as it goes to Parquet: `continued` is true when a later turn of its conversation came."""
        continued = True if row.continued else row.record.continued
        return row.record.model_copy(update={"continued": continued})

    def _forget(self, record: FeedbackRecord) -> None:
        del self._open[record.id]
        self._done[record.id] = record.reaction
        if self._latest.get(record.conversation_id) == record.id:
            del self._latest[record.conversation_id]

    def _write(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            raise ResourceError("the feedback store is closed; start it first")
        try:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) or 0 :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(self._written)
            stream.seek(self._written)
            raise
        self._written += len(data)

    def _replay(self, file: Path) -> None:
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line breaks off")
                self._apply(Event.parse(line))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s line %d is left out, it was never acknowledged: %s", file.name, number, error)

    def _compact(self) -> None:
        """Start a new log that holds the open rows only, then drop the older ones."""
        old = sorted(self.log.glob("*.wal"))
        self._number += 1
        path, part = self.log / f"{self._number:08d}.wal", self.log / "next.part"
        text = "".join(Event(id_, r.record.reaction, r.record, r.at).line() for id_, r in self._open.items())
        with part.open("wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        fsync_path(self.log)
        if self._stream is not None:
            self._stream.close()
        self._stream = io.FileIO(path, "r+")
        self._written = self._stream.seek(0, os.SEEK_END)
        for file in old:
            file.unlink()

    def _put(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file that shows up whole: renamed into place, or put at once on an object store."""
        target = f"{self._base}/{name}"
        if isinstance(self._filesystem, fs.LocalFileSystem):
            part = Path(self._base) / f".{name}.part"
            pq.write_table(table, part)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(target)
            fsync_path(Path(self._base))
        else:
            pq.write_table(table, target, filesystem=self._filesystem)

    def _stored(self) -> Iterator[tuple[str, str | None]]:
        """Id and reaction of every row that is in Parquet already."""
        selector = fs.FileSelector(self._base, allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            if info.path.endswith(".parquet"):
                try:
                    table = pq.read_table(info.path, columns=["id", "reaction"], filesystem=self._filesystem)
                except pa.ArrowException as error:
                    raise DataError(f"{info.path} in the feedback store is no feedback log: {error}") from error
                yield from zip(table["id"].to_pylist(), table["reaction"].to_pylist(), strict=True)

    def _resolve(self) -> tuple[Any, str]:
        if "://" in self.root:
            try:
                return fs.FileSystem.from_uri(self.root.rstrip("/"))
            except pa.ArrowException as error:
                raise DataError(f"serve.feedback={self.root} is no URL that can be written: {error}") from error
        folder = Path(self.root).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return fs.LocalFileSystem(), str(folder)

    def _take_lock(self) -> None:
        self._lock = (self.log / "lock").open("a")
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ResourceError(
                        f"another process has written to the feedback store {self.root} for {LOCK_S:g} s; end it, or "
                        "set serve.feedback to a store of its own"
                    ) from None
                time.sleep(0.1)
