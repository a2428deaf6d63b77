"""The feedback store: on disk before it answers, idempotent over restarts and crashes, read by rluf.prepare."""

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
from rluf.prepare.readers.files import read_batches
from rluf.prepare.readers.sources import resolve
from rluf.prepare.schema import ChatMessage, FeedbackRecord, arrow_schema
from rluf.prepare.validation import validate
from rluf.serve.store import Event, FeedbackStore

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def record(id_: str, conversation: str = "c", turn: int = 0) -> FeedbackRecord:
    return FeedbackRecord(
        id=id_,
        conversation_id=conversation,
        turn=turn,
        user_id="u",
        time=NOW,
        model_version="m",
        messages=[ChatMessage(role="user", content="Grüße 👋")],
        response=f"Answer {id_}",
        reaction=None,
    )


def served(id_: str, conversation: str = "c", turn: int = 0) -> Event:
    return Event(id_, None, record(id_, conversation, turn))


def opened(folder: Path, clock: Clock, settle_s: float = 60.0) -> FeedbackStore:
    store = FeedbackStore(str(folder), folder / ".log", settle_s=settle_s, clock=clock)
    store.start()
    return store


def rows(folder: Path) -> dict[str, tuple[str | None, bool | None]]:
    found = {}
    for file in sorted(folder.glob("*.parquet")):
        assert pq.read_schema(file).equals(arrow_schema(FeedbackRecord))
        for row in pq.read_table(file).to_pylist():
            assert row["id"] not in found
            found[row["id"]] = (row["reaction"], row["continued"])
    return found


def test_a_reaction_changes_its_row_until_it_settles(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    assert store.append([served("a"), served("b", turn=1), Event("a", "love")]) == ["stored"] * 3
    assert store.append([Event("a", "love"), Event("x", "love"), Event("b", "love"), Event("b", None)]) == [
        "duplicate",
        "unknown",
        "stored",
        "stored",
    ]
    assert store.rotate() == 0
    clock.now += 61
    assert store.rotate() == 2
    assert rows(tmp_path) == {"a": ("love", True), "b": (None, None)}
    assert store.append([Event("a", "love"), Event("a", None), served("b")]) == ["duplicate", "settled", "duplicate"]
    assert store.open_rows == 0


def test_rows_pass_the_checks_of_prepare_while_the_store_is_open(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock, settle_s=0)
    store.append([served("a"), served("b")])
    store.rotate()
    store.append([served("c")])
    (source,) = resolve([str(tmp_path)], "feedback")
    found = [validate(line.raw, FeedbackRecord, NOW) for lines in read_batches(source.location) for line in lines]
    assert found == [record("a").model_copy(update={"continued": None}), record("b")]


def test_a_store_by_url_holds_the_same_rows(tmp_path: Path) -> None:
    store = FeedbackStore((tmp_path / "out").as_uri(), tmp_path / "log", settle_s=0, clock=Clock())
    (tmp_path / "out").mkdir()
    store.start()
    store.append([served("a")])
    store.rotate()
    store.close()
    assert rows(tmp_path / "out") == {"a": (None, None)}
    again = FeedbackStore((tmp_path / "out").as_uri(), tmp_path / "log", settle_s=0, clock=Clock())
    again.start()
    assert again.append([served("a")]) == ["duplicate"]


def test_a_torn_last_line_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    store.append([served("a"), served("b", "d")])
    store.close()
    (file,) = (tmp_path / ".log").glob("*.wal")
    file.write_bytes(file.read_bytes()[:-7])
    again = opened(tmp_path, clock)
    assert again.open_rows == 1
    assert again.append([served("b", "d"), served("a")]) == ["stored", "duplicate"]


def test_a_crash_between_parquet_and_the_new_log_gives_no_row_twice(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    store.append([served("a"), Event("a", "love"), served("b", "d")])
    old = shutil.copytree(tmp_path / ".log", tmp_path / "kept")
    store.rotate(all_rows=True)
    store.close()
    shutil.rmtree(tmp_path / ".log")
    shutil.move(old, tmp_path / ".log")
    again = opened(tmp_path, clock)
    assert again.open_rows == 0
    assert again.append([Event("a", "love")]) == ["duplicate"]
    again.rotate(all_rows=True)
    assert rows(tmp_path) == {"a": ("love", None), "b": (None, None)}


STEP = st.one_of(
    st.tuples(st.just("serve"), st.integers(0, 5)),
    st.tuples(st.just("love"), st.integers(0, 5)),
    st.tuples(st.just("take back"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.integers(0, 90)),
    st.tuples(st.just("rotate"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(STEP, max_size=25))
def test_whatever_happens_no_acknowledged_row_is_lost_or_doubled(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, clock = tmp_path_factory.mktemp("store"), Clock()
    store = opened(folder, clock)
    acknowledged: dict[str, str | None] = {}
    for what, number in steps:
        if what == "wait":
            clock.now += number
        elif what == "rotate":
            store.rotate()
        elif what == "restart":
            store.close()
            store = opened(folder, clock)
        else:
            reaction = "love" if what == "love" else None
            event = served(f"r{number}", f"c{number}") if what == "serve" else Event(f"r{number}", reaction)
            if store.append([event]) == ["stored"]:
                acknowledged[event.id] = event.reaction
    store.rotate(all_rows=True)
    store.close()
    assert {id_: reaction for id_, (reaction, _) in rows(folder).items()} == acknowledged


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import served
from rluf.serve.store import FeedbackStore
store = FeedbackStore({folder!r}, Path({folder!r}) / ".log", settle_s=0.005)
store.start()
for number in range(100000):
    store.append([served(f"r{{number}}", f"c{{number}}")])
    sys.stdout.write(f"r{{number}}\\n")
    sys.stdout.flush()
    if number % 7 == 6:
        store.rotate()
"""


def test_a_killed_writer_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = {writer.stdout.readline().strip() for _ in range(40)}
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
    writer.wait()
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", settle_s=0)
    store.start()
    store.rotate(all_rows=True)
    found = set(rows(tmp_path))
    assert acknowledged <= found
    assert len(found) - len(acknowledged) <= 1  # written, but killed before it could say so


def test_places_that_cannot_be_used_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=r"serve\.feedback"):
        opened(tmp_path / "file", Clock())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        opened(tmp_path / "bad", Clock())
