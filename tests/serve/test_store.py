"""The feedback store: on disk before it acknowledges, idempotent over restarts and crashes, read by rluf.prepare."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.errors import DataError, ResourceError
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import resolve_sources
from rluf.prepare.schema import ChatMessage, FeedbackRecord, build_arrow_schema, validate_json_row
from rluf.serve.store import DATABASE_FILE, FeedbackEvent, FeedbackStore

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


class FakeClock:
    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def make_record(response_id: str, conversation_id: str = "c", turn: int = 0) -> FeedbackRecord:
    return FeedbackRecord(
        id=response_id,
        conversation_id=conversation_id,
        turn=turn,
        user_id="u",
        time=NOW,
        model_version="m",
        messages=[ChatMessage(role="user", content="Grüße 👋")],
        response=f"Answer {response_id}",
        reaction=None,
    )


def make_served_event(response_id: str, conversation_id: str = "c", turn: int = 0) -> FeedbackEvent:
    return FeedbackEvent(response_id, None, make_record(response_id, conversation_id, turn))


def open_store(folder: Path, clock: FakeClock, reaction_window_s: float = 60.0) -> FeedbackStore:
    store = FeedbackStore(str(folder), folder / ".log", reaction_window_s=reaction_window_s, clock=clock)
    store.start()
    return store


def read_rows(folder: Path) -> dict[str, tuple[str | None, bool | None]]:
    rows = {}
    for path in sorted(folder.glob("*.parquet")):
        assert pq.read_schema(path).equals(build_arrow_schema(FeedbackRecord))
        for row in pq.read_table(path).to_pylist():
            assert row["id"] not in rows
            rows[row["id"]] = (row["reaction"], row["continued"])
    return rows


def test_a_reaction_changes_its_row_until_it_settles(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    assert (
        store.append_events([make_served_event("a"), make_served_event("b", turn=1), FeedbackEvent("a", "love")])
        == ["stored"] * 3
    )
    assert store.append_events(
        [FeedbackEvent("a", "love"), FeedbackEvent("x", "love"), FeedbackEvent("b", "love"), FeedbackEvent("b", None)]
    ) == [
        "duplicate",
        "unknown",
        "stored",
        "stored",
    ]
    assert store.flush_settled() == 0
    clock.now += 61
    assert store.flush_settled() == 2
    assert read_rows(tmp_path) == {"a": ("love", True), "b": (None, None)}
    assert store.append_events([FeedbackEvent("a", "love"), FeedbackEvent("a", None), make_served_event("b")]) == [
        "duplicate",
        "settled",
        "duplicate",
    ]
    assert store.flush_settled(all_rows=True) == 0


def test_rows_pass_the_validation_of_prepare_while_the_store_is_open(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a"), make_served_event("b")])
    store.flush_settled()
    store.append_events([make_served_event("c")])
    (source,) = resolve_sources([str(tmp_path)], "feedback")
    validated_records = [
        validate_json_row(line.raw, FeedbackRecord, NOW)
        for lines in read_line_batches(source.location)
        for line in lines
    ]
    assert validated_records == [make_record("a").model_copy(update={"continued": None}), make_record("b")]


def test_a_store_by_url_has_the_same_rows(tmp_path: Path) -> None:
    store = FeedbackStore((tmp_path / "out").as_uri(), tmp_path / "log", reaction_window_s=0, clock=FakeClock())
    (tmp_path / "out").mkdir()
    store.start()
    store.append_events([make_served_event("a")])
    store.flush_settled()
    store.close()
    assert read_rows(tmp_path / "out") == {"a": (None, None)}
    reopened_store = FeedbackStore(
        (tmp_path / "out").as_uri(), tmp_path / "log", reaction_window_s=0, clock=FakeClock()
    )
    reopened_store.start()
    assert reopened_store.append_events([make_served_event("a")]) == ["duplicate"]


def test_a_torn_write_loses_only_the_event_that_was_not_acknowledged(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event("a")])
    store.append_events([make_served_event("b", "d")])
    shutil.copytree(tmp_path / ".log", tmp_path / "copy" / ".log")
    log_file = tmp_path / "copy" / ".log" / f"{DATABASE_FILE}-wal"
    log_file.write_bytes(log_file.read_bytes()[:-7])
    reopened_store = FeedbackStore(
        str(tmp_path / "copy"), tmp_path / "copy" / ".log", reaction_window_s=60, clock=clock
    )
    assert reopened_store.start() == 1
    assert reopened_store.append_events([make_served_event("b", "d"), make_served_event("a")]) == [
        "stored",
        "duplicate",
    ]


def test_a_failed_write_stores_none_of_its_events(tmp_path: Path) -> None:
    store = open_store(tmp_path, FakeClock())
    assert store.append_events([make_served_event("a")]) == ["stored"]
    connection = store._connection
    assert connection is not None
    (page_count,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {page_count}")
    long_record = make_record("c", "e").model_copy(update={"response": "word " * 10_000})
    with pytest.raises(OSError, match="full"):
        store.append_events([FeedbackEvent("a", "love"), FeedbackEvent("c", None, long_record)])
    connection.execute("PRAGMA max_page_count = 1000000")
    assert store.append_events([FeedbackEvent("a", None), FeedbackEvent("c", "love")]) == ["duplicate", "unknown"]


def test_a_store_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.serve.store.LOCK_TIMEOUT_S", 0.2)
    store = open_store(tmp_path, FakeClock())
    with pytest.raises(ResourceError, match="locked"):
        open_store(tmp_path, FakeClock())
    store.append_events([make_served_event("a")])
    store.close()
    assert open_store(tmp_path, FakeClock()).append_events([make_served_event("a")]) == ["duplicate"]


def test_a_later_turn_marks_the_earlier_ones_as_continued(tmp_path: Path) -> None:
    store = open_store(tmp_path, FakeClock())
    store.append_events([make_served_event("a", turn=0), make_served_event("b", turn=2), make_served_event("c", "d")])
    store.append_events([make_served_event("late", turn=1)])
    store.flush_settled(all_rows=True)
    assert read_rows(tmp_path) == {"a": (None, True), "b": (None, None), "c": (None, None), "late": (None, None)}


def test_a_crash_between_parquet_and_the_new_log_duplicates_no_row(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event("a"), FeedbackEvent("a", "love"), make_served_event("b", "d")])
    old_log = shutil.copytree(tmp_path / ".log", tmp_path / "log-copy")
    store.flush_settled(all_rows=True)
    store.close()
    shutil.rmtree(tmp_path / ".log")
    shutil.move(old_log, tmp_path / ".log")
    reopened_store = FeedbackStore(str(tmp_path), tmp_path / ".log", reaction_window_s=60, clock=clock)
    assert reopened_store.start() == 0
    assert reopened_store.append_events([FeedbackEvent("a", "love")]) == ["duplicate"]
    reopened_store.flush_settled(all_rows=True)
    assert read_rows(tmp_path) == {"a": ("love", None), "b": (None, None)}


ACTIONS = st.one_of(
    st.tuples(st.just("serve"), st.integers(0, 5)),
    st.tuples(st.just("love"), st.integers(0, 5)),
    st.tuples(st.just("withdraw"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.integers(0, 90)),
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(ACTIONS, max_size=25))
def test_no_acknowledged_row_is_lost_or_duplicated(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, clock = tmp_path_factory.mktemp("store"), FakeClock()
    store = open_store(folder, clock)
    acknowledged: dict[str, str | None] = {}
    for action, number in steps:
        if action == "wait":
            clock.now += number
        elif action == "flush":
            store.flush_settled()
        elif action == "restart":
            store.close()
            store = open_store(folder, clock)
        else:
            reaction = "love" if action == "love" else None
            event = (
                make_served_event(f"r{number}", f"c{number}")
                if action == "serve"
                else FeedbackEvent(f"r{number}", reaction)
            )
            if store.append_events([event]) == ["stored"]:
                acknowledged[event.id] = event.reaction
    store.flush_settled(all_rows=True)
    store.close()
    assert {response_id: reaction for response_id, (reaction, _) in read_rows(folder).items()} == acknowledged


WRITER_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import make_served_event
from rluf.serve.store import FeedbackStore
store = FeedbackStore({folder!r}, Path({folder!r}) / ".log", reaction_window_s=0.005)
store.start()
for number in range(100000):
    store.append_events([make_served_event(f"r{{number}}", f"c{{number}}")])
    sys.stdout.write(f"r{{number}}\\n")
    sys.stdout.flush()
    if number % 7 == 6:
        store.flush_settled()
"""


def test_a_killed_writer_loses_no_acknowledged_row(tmp_path: Path) -> None:
    program = WRITER_PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = {writer.stdout.readline().strip() for _ in range(40)}
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
    writer.wait()
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", reaction_window_s=0)
    store.start()
    store.flush_settled(all_rows=True)
    stored_ids = set(read_rows(tmp_path))
    assert acknowledged <= stored_ids
    assert len(stored_ids) - len(acknowledged) <= 1  # written, but killed before the acknowledgment


def test_unusable_folders_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=r"serve\.feedback"):
        open_store(tmp_path / "file", FakeClock())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        open_store(tmp_path / "bad", FakeClock())
    (tmp_path / "old" / ".log").mkdir(parents=True)
    (tmp_path / "old" / ".log" / "00000003.wal").write_text("{}")
    with pytest.raises(DataError, match=r"00000003\.wal has rows of an earlier release"):
        open_store(tmp_path / "old", FakeClock())
