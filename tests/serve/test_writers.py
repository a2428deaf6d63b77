"""Several clusters that serve into one feedback store, and choices that cannot be looked up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError, SettingsError
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.prepare.readers.feedback_folder import list_row_files, read_late_reactions
from rluf.prepare.readers.sources import resolve_all_sources, resolve_sources
from rluf.prepare.schema import DATA_KINDS, SPLIT_NAMES, ChatMessage, FeedbackRecord, build_records_table
from rluf.serve import __main__ as serve_command
from rluf.serve.api import FeedbackRequest, build_reaction_event
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent
from rluf.serve.writers import (
    flush_stopped_writers,
    list_writer_names,
    mark_alive,
    read_writer_name,
    resolve_writer_folders,
)
from rluf.utils.hashing import create_response_id
from tests.serve.test_store import FakeClock, make_record, make_served_event, open_store

ROOT = Path(__file__).parents[2]
SALT = b"salt"
REACTIONS = ("love", "like", "dislike")


def open_writer(root: Path, name: str, clock: FakeClock, reaction_window_s: float = 60.0) -> FeedbackStore:
    writer_root, log_folder = resolve_writer_folders(str(root), root / ".log", name)
    store = FeedbackStore(
        writer_root, log_folder, reaction_window_s=reaction_window_s, clock=clock, has_other_writers=bool(name)
    )
    store.start()
    mark_alive(log_folder)
    return store


def make_reaction(response_id: str, reaction: str | None) -> FeedbackEvent:
    return build_reaction_event(FeedbackRequest(id=response_id, reaction=reaction, user="u"), SALT, REACTIONS)


def read_reactions(root: Path) -> dict[str, str | None]:
    rows = [row for file in list_row_files(root) for row in pq.read_table(file, partitioning=None).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["reaction"] for row in rows} | read_late_reactions(root)


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize(
    ("at_first", "at_second", "expected"),
    [
        ([], ["love"], "love"),
        (["love"], ["dislike"], "dislike"),
        (["love"], [None], None),
        ([], [None], None),
        (["like"], ["love", None], None),
        (["love"], ["love"], "love"),
        (["dislike"], [None, "like", "love"], "love"),
    ],
)
def test_a_reaction_that_reaches_the_next_cluster_counts(
    tmp_path: Path, is_settled: bool, at_first: list[str], at_second: list[str | None], expected: str | None
) -> None:
    clock = FakeClock()
    response_id = create_response_id("u", SALT)
    first = open_writer(tmp_path, "old", clock)
    first.append_events([make_served_event(response_id), *(make_reaction(response_id, name) for name in at_first)])
    if is_settled:
        clock.now += 61
        first.flush_settled()
    second = open_writer(tmp_path, "new", clock)
    for reaction in at_second:
        clock.now += 1
        assert second.append_events([make_reaction(response_id, reaction)]) == ["late"]
        assert second.append_events([make_reaction(response_id, reaction)]) == ["duplicate"]
    clock.now += 61
    for store in (first, second):
        store.flush_settled()
        store.close()
    assert read_reactions(tmp_path) == {response_id: expected}
    # Ids of other systems have no signature, so that a report must describe the response.
    second = open_writer(tmp_path, "new", clock)
    assert second.append_events([FeedbackEvent("other", "love")]) == ["unknown"]
    assert open_writer(tmp_path / "alone", "", clock).append_events([make_reaction(response_id, "love")]) == ["unknown"]


def test_preparation_and_analysis_join_the_folders_of_all_writers(tmp_path: Path) -> None:
    clock, root = FakeClock(), tmp_path / "store"
    stores = [open_writer(root, name, clock) for name in ("", "old", "new")]
    ids = [create_response_id("u", SALT) for _ in range(180)]
    for number, response_id in enumerate(ids):
        record = make_record(response_id, f"c{number}").model_copy(
            update={"user_id": f"u{number % 60}", "messages": [ChatMessage(role="user", content=f"question {number}")]}
        )
        stores[number % 3].append_events([FeedbackEvent(response_id, "love" if number % 4 == 0 else None, record)])
    clock.now += 61
    for store in stores:
        store.flush_settled()
    # Row 1 is of the first named writer, row 5 of the second; each reaction reaches the other one.
    stores[2].append_events([make_reaction(ids[1], "love"), make_reaction(ids[4], None)])
    stores[1].append_events([make_reaction(ids[5], "dislike"), PreferenceEvent(ids[1], ids[4])])
    for store in stores:
        store.flush_settled()
    entries = {kind: [] for kind in DATA_KINDS} | {"feedback": [str(root)]}
    kinds = [source.kind_name for source in resolve_all_sources(entries)]
    assert kinds == ["feedback"] * 3 + ["reactions"] * 2
    execute = lambda tasks: [result for task in tasks for result in run_task(task)]  # noqa: E731
    settings = Settings.model_validate({
        "data": entries, "prepare": {"positive_share": 0.01, "labels": {"dislike": "not_loved"}},
    })  # fmt: skip
    build_data_set(settings, tmp_path / "data", execute)
    tables = [pq.read_table(tmp_path / "data" / "love" / f"{split}.parquet") for split in SPLIT_NAMES]
    reactions = {row["id"]: row["reaction"] for table in tables for row in table.to_pylist()}
    expected = {1: "love", 4: None, 5: "dislike", 8: "love", 2: None}
    assert {number: reactions[ids[number]] for number in expected} == expected
    assert {number: read_reactions(root)[ids[number]] for number in expected} == expected


WRITER_PROGRAM = """
import sys
from pathlib import Path
from rluf.prepare.schema import FeedbackRecord
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import FeedbackEvent
from rluf.serve.writers import mark_alive, resolve_writer_folders
writer_root, log_folder = resolve_writer_folders({root!r}, Path({root!r}) / ".log", {name!r})
store = FeedbackStore(writer_root, log_folder, reaction_window_s=0.005, has_other_writers=True)
store.start()
mark_alive(log_folder)
template = FeedbackRecord.model_validate_json({record!r})
for number in range(100000):
    response_id = f"{name}-{{number}}"
    record = template.model_copy(update={{"id": response_id, "conversation_id": response_id}})
    store.append_events([FeedbackEvent(response_id, None, record)])
    sys.stdout.write(response_id + "\\n")
    sys.stdout.flush()
    if number % 7 == 6:
        store.flush_settled()
    if number % 50 == 6:
        store._merged_until = ""
        store.merge_days()
"""


def test_two_processes_write_one_store_and_a_third_writes_what_they_left_open(tmp_path: Path) -> None:
    record = make_record("x").model_dump_json()
    programs = [WRITER_PROGRAM.format(root=str(tmp_path), name=name, record=record) for name in ("blue", "green")]
    writers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for program in programs
    ]
    acknowledged: set[str] = set()
    for writer in writers:
        assert writer.stdout is not None
        acknowledged |= {writer.stdout.readline().strip() for _ in range(30)}
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.stdout is not None
        acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        writer.wait()
    clock = FakeClock()
    open_writer(tmp_path, "third", clock)
    settle = lambda stale_s: flush_stopped_writers(  # noqa: E731
        str(tmp_path), tmp_path / ".log", "third", reaction_window_s=0, stale_s=stale_s
    )
    assert settle(600) == 0  # the two may still run, on a volume that does not carry their locks
    settle(-1)
    stored_ids = set(read_reactions(tmp_path))
    assert acknowledged <= stored_ids
    assert len(stored_ids) - len(acknowledged) <= 2  # written, but killed before the acknowledgment
    assert settle(-1) == 0


def test_the_rows_of_a_running_writer_are_left_to_it(tmp_path: Path) -> None:
    clock = FakeClock()
    first, _ = open_writer(tmp_path, "old", clock, 0), open_writer(tmp_path, "new", clock, 0)
    first.append_events([make_served_event("a")])
    # Its lock alone says that it runs, even with an old sign of life.
    assert flush_stopped_writers(str(tmp_path), tmp_path / ".log", "new", reaction_window_s=0, stale_s=-1) == 0
    assert first.flush_settled() == 1


def test_writers_that_share_a_url_without_names_do_not_merge_each_others_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, root = FakeClock(), f"file://{tmp_path}/log"
    stores = [FeedbackStore(root, tmp_path / f"db{i}", reaction_window_s=0, clock=clock) for i in range(2)]
    for number in range(6):
        for i, store in enumerate(stores):
            if not number:
                store.start()
            store.append_events([make_served_event(f"w{i}-{number}", f"w{i}-{number}")])
            store.flush_settled()
    clock.now += 3 * 86_400
    assert [store.merge_days() for store in stores] == [0, 0]
    assert "of another writer" in caplog.text and "RLUF_FEEDBACK_WRITER" in caplog.text
    assert len(read_reactions(tmp_path / "log")) == 12


@pytest.mark.parametrize("is_running", [False, True])
def test_an_erasure_covers_all_writers_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    monkeypatch.setattr("rluf.serve.store.LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    clock, root = FakeClock(), tmp_path / "log"
    stores = {name: open_writer(root, name, clock, 0) for name in ("", "new", "old")}
    for name, store in stores.items():
        users = ("ann", "eve")
        records = [make_record(f"{user}{name}", user).model_copy(update={"user_id": user}) for user in users]
        store.append_events([FeedbackEvent(record.id, None, record) for record in records])
        if name:
            store.flush_settled()
        if not (is_running and name == "old"):
            store.close()
    arguments = [f"serve.feedback_path={root}", "--forget", "ann"]
    if is_running:
        with pytest.raises(SystemExit):
            serve_command.main(arguments)
        stores["old"].close()
    else:
        assert serve_command.main(arguments) == 0
    open_writer(root, "", clock, 0).flush_settled()
    remaining = {name for name in read_reactions(root) if name.startswith("ann")}
    assert remaining == ({"ann", "annnew", "annold"} if is_running else set())


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "_x", "a b", "x" * 64, "é"])
def test_a_writers_name_that_is_no_folder_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("RLUF_FEEDBACK_WRITER", name)
    with pytest.raises(SettingsError, match="RLUF_FEEDBACK_WRITER"):
        read_writer_name()


def test_writers_of_a_url_have_names_and_databases_of_their_own(tmp_path: Path) -> None:
    root = f"file://{tmp_path}/log"
    assert resolve_writer_folders(root, tmp_path / "db", "") == (root, tmp_path / "db")
    assert resolve_writer_folders(root + "/", tmp_path / "db", "x") == (
        f"{root}/writer=x",
        tmp_path / "db" / "writer=x",
    )
    store = FeedbackStore(*resolve_writer_folders(root, tmp_path / "db", "x"), reaction_window_s=0, clock=FakeClock())
    store.start()
    store.append_events([make_served_event("a")])
    store.flush_settled()
    assert list_writer_names(root) == ["", "x"]
    assert list(read_reactions(tmp_path / "log")) == ["a"]


def test_two_services_on_one_folder_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rluf.serve.store.LOCK_TIMEOUT_S", 0.1)
    store = open_writer(tmp_path, "blue", FakeClock())
    with pytest.raises(ResourceError, match=r"locked.*RLUF_FEEDBACK_WRITER"):
        open_writer(tmp_path, "blue", FakeClock())
    store.close()


@pytest.mark.parametrize(
    "entry",
    ["{root}/**/*.parquet", "{root}/*/*/*.parquet", "file://{root}/*.parquet", "{root}", "{parent}/**/*.parquet"],
)
def test_a_pattern_over_a_store_reads_no_reaction_or_choice_as_a_row(tmp_path: Path, entry: str) -> None:
    clock, root = FakeClock(), tmp_path / "logs" / "store"
    for name in ("", "blue"):
        store = open_writer(root, name, clock, 0)
        store.append_events([make_served_event(f"a{name}"), make_served_event(f"b{name}")])
        store.flush_settled()
        store.append_events([FeedbackEvent(f"a{name}", "love"), PreferenceEvent(f"a{name}", f"b{name}")])
        store.flush_settled()
        store.close()
    files = [source.location for source in resolve_sources([entry.format(root=root, parent=root.parent)], "feedback")]
    assert files and not [file for file in files if "/_" in file]
    # A folder that the pattern names is read.
    for pattern in ("_preferences/**/*.parquet", "**/_preferences/*/*.parquet", "_pref*/*/*.parquet"):
        named = [source.location for source in resolve_sources([f"{root}/{pattern}"], "preferences")]
        assert named and all("/_preferences/" in file for file in named)
    with pytest.raises(DataError, match="no such file"):
        resolve_sources([f"{root}/*/_reaction/*.parquet"], "reactions")


def read_choices(root: Path) -> dict[str, str]:
    rows = [row for file in root.rglob("_preferences/*/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["chosen"]: row["rejected"] for row in rows}


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("servers", [("old", "old"), ("old", "new"), ("new", "old"), ("", "old"), ("old", "third")])
def test_a_choice_between_the_responses_of_other_clusters_is_joined(
    tmp_path: Path, servers: tuple[str, str], is_settled: bool
) -> None:
    clock = FakeClock()
    stores = {name: open_writer(tmp_path, name, clock) for name in ("", "old", "new", "third")}
    ids = [create_response_id("u", SALT) for _ in servers]
    for response_id, name in zip(ids, servers, strict=True):
        stores[name].append_events([make_served_event(response_id)])
    if is_settled:
        clock.now += 61
        for store in stores.values():
            store.flush_settled()
        stores["new"].append_events([make_reaction(ids[0], "love")])  # a row without text, if the other one served it
    # The other way round first: of two choices the later counts.
    events = [PreferenceEvent(ids[1], ids[0]), PreferenceEvent(*ids), PreferenceEvent(*ids)]
    assert stores["new"].append_events(events) == ["stored", "stored", "duplicate"]
    for _ in range(3):  # the order of the writers must not matter, nor a restart
        clock.now += 61
        for store in stores.values():
            store.flush_settled()
        stores["new"].close()
        stores["new"] = open_writer(tmp_path, "new", clock)
    assert read_choices(tmp_path) == {f"Answer {ids[0]}": f"Answer {ids[1]}"}
    assert stores["new"].append_events([PreferenceEvent(*ids), PreferenceEvent(*ids[::-1])]) == ["duplicate", "settled"]
    assert all(store.damaged_row_count == 0 for store in stores.values())
    # The only writer of a store knows that there is no such response.
    assert open_store(tmp_path / "alone", clock).append_events([PreferenceEvent(*ids)]) == ["unknown"]


def test_a_choice_that_cannot_be_joined_is_given_up_after_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    stores = {name: open_writer(tmp_path, name, clock) for name in ("old", "new")}
    other_question = make_record("b").model_copy(update={"messages": [ChatMessage(role="user", content="Else?")]})
    stores["old"].append_events([make_served_event("a"), FeedbackEvent("b", None, other_question)])
    events = [PreferenceEvent("a", "b"), PreferenceEvent("a", "gone"), PreferenceEvent("x", "y")]
    assert stores["new"].append_events(events) == ["stored"] * 3
    for _ in range(25):
        for store in stores.values():
            store.flush_settled()
        clock.now += 3600.0
    assert caplog.text.count("the responses answer different messages") == 1
    assert caplog.text.count("no writer has both responses") == 2
    assert read_choices(tmp_path) == {} and stores["new"].append_events(events) == ["duplicate"] * 3


def test_reactions_and_choices_with_another_writer_are_erased_with_their_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    clock, root = FakeClock(), tmp_path / "log"
    stores = {name: open_writer(root, name, clock, 0) for name in ("old", "new")}
    ids = {user: [create_response_id(user, SALT) for _ in range(2)] for user in ("ann", "eve")}
    for user, (first, second) in ids.items():
        for name, response_id in (("old", first), ("new", second)):
            record = make_record(response_id).model_copy(update={"user_id": user})
            stores[name].append_events([FeedbackEvent(response_id, None, record)])
        reaction = FeedbackEvent(first, "love", replaced_reactions=REACTIONS)
        stores["new"].append_events([reaction, PreferenceEvent(first, second)])
    clock.now += 61
    for store in (*stores.values(), *stores.values()):
        store.flush_settled()
    # Open in the database of the other writer.
    stores["old"].append_events([FeedbackEvent(ids["ann"][1], "like", replaced_reactions=REACTIONS)])
    for store in stores.values():
        store.close()
    assert len(read_choices(root)) == 2 and len(read_late_reactions(root)) == 2
    assert serve_command.main([f"serve.feedback_path={root}", "--forget", "ann"]) == 0
    for name in stores:
        open_writer(root, name, clock, 0).flush_settled()
    assert read_choices(root) == {f"Answer {ids['eve'][0]}": f"Answer {ids['eve'][1]}"}
    assert read_reactions(root) == {ids["eve"][0]: "love", ids["eve"][1]: None}
    left = b"".join(file.read_bytes() for file in root.rglob("*") if file.is_file())
    assert not [response_id for response_id in ids["ann"] if response_id.encode() in left]


@pytest.mark.parametrize("damage", ["corrupt", "no id", "no messages", "wrong type", "empty"])
def test_a_choice_that_cannot_be_looked_up_fails_alone(tmp_path: Path, damage: str) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.append_events([make_served_event("a"), make_served_event("b")])
    store.flush_settled()
    (file,) = list_row_files(tmp_path)
    table = pq.read_table(file, partitioning=None)
    if damage == "corrupt":
        file.write_bytes(b"not Parquet")
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        name = "messages" if damage == "no messages" else "id"
        column = pa.array([[1], [2]]) if damage == "wrong type" else pa.nulls(2, table.schema.field(name).type)
        if damage == "no id":
            table = table.drop_columns(["id"])
        else:
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, file)
    events = [FeedbackEvent("a", "love"), PreferenceEvent("a", "b"), make_served_event("c"), PreferenceEvent("c", "x")]
    assert store.append_events(events) == ["late", "unreadable", "stored", "unknown"]
    # Where another file of the day has the rows, the damaged one does not matter.
    copy = build_records_table([make_record("a"), make_record("b")], FeedbackRecord)
    pq.write_table(copy, file.with_name("z-copy.parquet"))
    assert store.append_events([PreferenceEvent("a", "b")]) == ["stored"]
