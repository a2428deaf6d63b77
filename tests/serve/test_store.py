"""The feedback store: on disk before it acknowledges, idempotent over restarts and crashes, read by rluf.prepare."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.prepare.readers.feedback_folder import list_row_files, read_late_reactions
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import resolve_all_sources, resolve_sources
from rluf.prepare.schema import (
    DATA_KINDS,
    SPLIT_NAMES,
    ChatMessage,
    FeedbackRecord,
    PreferenceRecord,
    build_arrow_schema,
    validate_json_row,
)
from rluf.serve.store import FeedbackStore
from rluf.serve.store_database import DATABASE_FILE
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent

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
    rows: dict[str, tuple[str | None, bool | None]] = {}
    for path in list_row_files(folder):
        assert path.parent.name.startswith("date=")
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
    assert store.append_events([FeedbackEvent("a", "love"), make_served_event("b")]) == ["duplicate", "duplicate"]
    assert store.flush_settled(all_rows=True) == 0


def read_all_files(folder: Path, subfolder: str) -> list[dict[str, object]]:
    files = sorted((folder / subfolder).rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], ["love"], "love"),
        (["love"], [None], None),
        (["love"], ["thumbs_down"], "thumbs_down"),
        ([], ["love", None], None),
        (["love"], [None, "love"], "love"),
        ([], ["like", "love", "love", "dislike"], "dislike"),
        (["like"], ["like"], "like"),
    ],
)
def test_a_reaction_after_its_row_settled_is_an_event_that_preparation_joins(
    tmp_path: Path, before: list[str | None], after: list[str | None], expected: str | None
) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    store.append_events([make_served_event("a"), *(FeedbackEvent("a", reaction) for reaction in before)])
    clock.now += 61
    assert store.flush_settled() == 1
    present = before[-1] if before else None
    for reaction in after:
        clock.now += 1
        expected_outcome = "duplicate" if reaction == present else "late"
        assert store.append_events([FeedbackEvent("a", reaction)]) == [expected_outcome]
        assert store.append_events([FeedbackEvent("a", reaction)]) == ["duplicate"]
        present = reaction
        store.close()
        store = open_store(tmp_path, clock)
    store.flush_settled()
    assert store.flush_settled() == 0
    row_reaction = before[-1] if before else None
    assert read_rows(tmp_path) == {"a": (row_reaction, None)}
    assert read_late_reactions(tmp_path).get("a", row_reaction) == expected
    kinds = [(source.kind_name, source.entry_index) for source in resolve_all_sources({"feedback": [str(tmp_path)]})]
    assert kinds == [("feedback", 0)] + [("reactions", 0)] * (after != before)


@pytest.mark.parametrize("entry", ["{root}", "{root}/date=*/*.parquet", "{root}/date=2026-01-31", "file://{root}"])
def test_late_reactions_are_found_from_every_entry_that_names_their_rows(tmp_path: Path, entry: str) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a"), make_served_event("b")])
    store.flush_settled()
    store.append_events([FeedbackEvent("a", "love"), PreferenceEvent("a", "b")])
    store.flush_settled()
    path = entry.format(root=tmp_path)
    sources = resolve_all_sources({"feedback": [path]})
    assert [source.kind_name for source in sources] == ["feedback", "reactions"]
    explicit = resolve_all_sources({"feedback": [path], "reactions": [f"{tmp_path}/_reactions"]})
    assert len([source for source in explicit if source.kind_name == "reactions"]) in (1, 2 * path.startswith("file"))


def test_a_new_database_learns_the_present_reactions_from_the_files(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a"), make_served_event("b")])
    store.flush_settled()
    store.append_events([FeedbackEvent("a", "love"), FeedbackEvent("b", "like"), FeedbackEvent("b", None)])
    store.flush_settled()
    store.close()
    shutil.rmtree(tmp_path / ".log")
    store = open_store(tmp_path, clock, reaction_window_s=0)
    assert store.append_events([FeedbackEvent("a", "love"), FeedbackEvent("b", None)]) == ["duplicate"] * 2
    assert store.append_events([FeedbackEvent("a", None), FeedbackEvent("b", "love")]) == ["late"] * 2


def test_a_start_that_failed_on_a_foreign_file_still_learns_the_present_reactions(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a")])
    store.flush_settled()
    store.append_events([FeedbackEvent("a", "love")])
    store.flush_settled()
    store.close()
    shutil.rmtree(tmp_path / ".log")
    foreign_file = tmp_path / "other.parquet"
    foreign_file.write_bytes(b"not Parquet")
    with pytest.raises(DataError, match=r"other\.parquet"):
        open_store(tmp_path, clock)
    foreign_file.unlink()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    # Without the late reaction the withdrawal would count as a duplicate and be lost.
    assert store.append_events([FeedbackEvent("a", None)]) == ["late"]


def test_reactions_that_arrive_after_the_merge_of_their_day_are_the_present_ones(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a")])
    store.flush_settled()
    for reaction in ("love", None):
        store.append_events([FeedbackEvent("a", reaction)])
        clock.now += 1
        store.flush_settled()
    # A service that stopped on that day writes the last reaction when it starts again.
    store.append_events([FeedbackEvent("a", "like")])
    clock.now += 2 * 86_400
    store.merge_days()
    store.flush_settled()
    store.close()
    shutil.rmtree(tmp_path / ".log")
    store = open_store(tmp_path, clock, reaction_window_s=0)
    assert store.append_events([FeedbackEvent("a", "like")]) == ["duplicate"]


@pytest.mark.parametrize("damage", ["columns", "bytes"])
def test_the_merge_names_a_file_that_it_cannot_read_and_merges_other_days(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    for name in "abcd":
        clock.now += 86_400 * (name == "c")
        store.append_events([make_served_event(name)])
        store.flush_settled()
    path = list_row_files(tmp_path)[0]
    table = pq.read_table(path, partitioning=None)
    if damage == "columns":
        pq.write_table(table.append_column("mood", [["calm"]]), path)
    else:
        path.write_bytes(path.read_bytes()[:-9])
    clock.now += 3 * 86_400
    assert [store.merge_days() for _ in range(2)] == [2, 0]
    assert caplog.text.count("files of a day not merged") == 1 and path.name in caplog.text
    files = list_row_files(tmp_path)
    assert len(files) == 3 and path in files
    pq.write_table(table, path)
    assert {row["id"] for file in files for row in pq.read_table(file, partitioning=None).to_pylist()} == set("abcd")


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_choice_between_two_responses_becomes_a_preference(tmp_path: Path, is_settled: bool) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock)
    other_turn = make_record("c").model_copy(update={"messages": [ChatMessage(role="user", content="Other")]})
    same_text = make_record("d").model_copy(update={"response": "Answer a"})
    store.append_events([
        make_served_event("a"), make_served_event("b"), FeedbackEvent("c", None, other_turn),
        FeedbackEvent("d", None, same_text),
    ])  # fmt: skip
    if is_settled:
        clock.now += 61
        store.flush_settled()
    assert store.append_events([
        PreferenceEvent("a", "b"), PreferenceEvent("a", "b"), PreferenceEvent("b", "a"), PreferenceEvent("a", "x"),
        PreferenceEvent("a", "c"), PreferenceEvent("d", "a"), PreferenceEvent("a", "a"),
    ]) == ["stored", "duplicate", "stored", "unknown", "mismatch", "mismatch", "mismatch"]  # fmt: skip
    clock.now += 61
    store.flush_settled()
    assert store.append_events([PreferenceEvent("b", "a"), PreferenceEvent("a", "b")]) == ["duplicate", "settled"]
    (row,) = read_all_files(tmp_path, "_preferences")
    assert (row["chosen"], row["rejected"]) == ("Answer b", "Answer a")
    (source,) = resolve_sources([str(tmp_path / "_preferences")], "preferences")
    (line,) = [line for lines in read_line_batches(source.location) for line in lines]
    assert isinstance(validate_json_row(line.raw, PreferenceRecord, NOW), PreferenceRecord)


def test_the_files_of_a_day_are_merged_two_days_later(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    for number in range(5):
        store.append_events([make_served_event(f"r{number}"), FeedbackEvent(f"r{number - 1}", "love")])
        clock.now += 60
        store.flush_settled()
    expected_rows, expected_reactions = read_rows(tmp_path), read_late_reactions(tmp_path)
    assert (len(expected_rows), len(expected_reactions)) == (5, 4)
    assert store.merge_days() == 0
    clock.now += 2 * 86_400
    unmerged_files = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert store.merge_days() == 9
    assert (store.merge_days(), len(list(tmp_path.rglob("*.parquet")))) == (0, 2)
    assert (read_rows(tmp_path), read_late_reactions(tmp_path)) == (expected_rows, expected_reactions)
    store.close()
    # A crash after the merged files were written: the old ones are still there, and the database does not know.
    for path, data in unmerged_files.items():
        path.write_bytes(data)
    with sqlite3.connect(tmp_path / ".log" / DATABASE_FILE) as connection:
        connection.execute("DELETE FROM files WHERE path LIKE '%merged%'")
    connection.close()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    assert (read_rows(tmp_path), len(list(tmp_path.rglob("*.parquet")))) == (expected_rows, 2)
    assert store.append_events([make_served_event("r0"), FeedbackEvent("r4", "love")]) == ["duplicate", "late"]


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


@pytest.mark.parametrize(("user", "is_continued"), [("same", True), ("eve", None)])
def test_only_the_same_user_continues_a_conversation(tmp_path: Path, user: str, is_continued: bool | None) -> None:
    store = FeedbackStore(str(tmp_path / "store"), tmp_path / "log", reaction_window_s=60)
    store.start()
    first = make_record("a").model_copy(update={"user_id": "same", "continued": None})
    later = make_record("b", turn=4).model_copy(update={"user_id": user})
    store.append_events([FeedbackEvent(row.id, None, row) for row in (first, later)])
    store.flush_settled(all_rows=True)
    assert read_rows(tmp_path / "store")["a"][1] is is_continued


def test_a_new_row_does_not_read_all_rows_of_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path, FakeClock())
    connection, statements = store._require_open(), list[str]()
    connection.set_trace_callback(statements.append)
    store.append_events([make_served_event("a", turn=1)])
    connection.set_trace_callback(None)
    updates = [statement for statement in statements if statement.startswith("UPDATE rows SET continued")]
    plans = [connection.execute(f"EXPLAIN QUERY PLAN {update}").fetchall() for update in updates]
    assert [row[-1] for row in plans[0]] == ["SEARCH rows USING INDEX open_by_conversation (conversation_id=?)"]


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


@hypothesis_settings(max_examples=30)
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
            if store.append_events([event])[0] in ("stored", "late"):
                acknowledged[event.id] = event.reaction
    store.flush_settled(all_rows=True)
    store.close()
    reactions = {response_id: reaction for response_id, (reaction, _) in read_rows(folder).items()}
    assert reactions | read_late_reactions(folder) == acknowledged


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


def test_preparation_labels_rows_by_their_late_reactions(tmp_path: Path) -> None:
    clock = FakeClock()
    store = open_store(tmp_path / "store", clock)
    events: list[FeedbackEvent] = []
    for number in range(300):
        record = make_record(f"r{number}", f"c{number}").model_copy(
            update={"user_id": f"u{number % 60}", "messages": [ChatMessage(role="user", content=f"question {number}")]}
        )
        events += [FeedbackEvent(record.id, None, record)] + [FeedbackEvent(record.id, "love")] * (number % 4 == 0)
    store.append_events(events)
    clock.now += 61
    store.flush_settled()
    # 0 withdraws, 1 and 2 arrive late, 4 changes its mind, 5 comes back after the attribution window of a week.
    store.append_events([FeedbackEvent("r0", None), FeedbackEvent("r1", "love"), FeedbackEvent("r2", "thumbs_down")])
    store.append_events([FeedbackEvent("r4", "thumbs_down")])
    clock.now += 8 * 86_400
    store.append_events([FeedbackEvent("r5", "love")])
    store.flush_settled()
    execute = lambda tasks: [result for task in tasks for result in run_task(task)]  # noqa: E731
    data_settings = Settings.model_validate({
        "data": {kind: [] for kind in DATA_KINDS} | {"feedback": [str(tmp_path / "store")]},
        "prepare": {"positive_share": 0.01, "labels": {"thumbs_down": "not_loved"}},
    })  # fmt: skip
    card = build_data_set(data_settings, tmp_path / "data", execute)
    tables = [pq.read_table(tmp_path / "data" / "love" / f"{split}.parquet") for split in SPLIT_NAMES]
    reactions = {row["id"]: row["reaction"] for table in tables for row in table.to_pylist()}
    assert [reactions[f"r{number}"] for number in (0, 1, 2, 4, 5, 8)] == [
        None, "love", "thumbs_down", "thumbs_down", None, "love",
    ]  # fmt: skip
    assert card["counts"]["reactions"]["dropped"]["outside the attribution window"] == 1
