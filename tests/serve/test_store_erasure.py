"""Erasure of users from the feedback store: every row that names them goes, and the ids without a row are listed."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rluf.prepare.schema import ChatMessage, FeedbackRecord
from rluf.serve.__main__ import main
from rluf.serve.api import ChatRequest, ServedResponse, build_served_event
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent
from rluf.utils.hashing import hash_user_id
from tests.serve.test_store import FakeClock, make_record, open_store, read_all_files, read_rows

SALT = b"pepper"


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("user_count", [1, 2])
def test_an_erased_user_is_gone_from_files_and_database(tmp_path: Path, is_settled: bool, user_count: int) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0 if is_settled else 60)
    users = ["ann@example.org", "bob@example.org"][:user_count]
    for user in [*users, "eve"]:
        records = [make_record(f"{user}-{i}", f"c-{user}").model_copy(update={"user_id": user}) for i in range(3)]
        store.append_events([FeedbackEvent(record.id, None, record) for record in records])
        if is_settled:
            store.flush_settled()
        store.append_events([FeedbackEvent(f"{user}-0", "love"), PreferenceEvent(f"{user}-0", f"{user}-1")])
        if is_settled:
            store.flush_settled()
            store.append_events([FeedbackEvent(f"{user}-1", "like"), PreferenceEvent(f"{user}-1", f"{user}-2")])
    counts = store.erase_users(users)
    expected = {"rows": 3, "reactions": 2 * is_settled, "preferences": 1 + is_settled}
    assert counts == {name: user_count * count for name, count in expected.items()}
    assert store.append_events([FeedbackEvent(f"{users[0]}-0", "love")]) == ["unknown"]
    store.flush_settled(all_rows=True)
    assert set(read_rows(tmp_path)) == {"eve-0", "eve-1", "eve-2"}
    assert len(read_all_files(tmp_path, "_preferences")) == 1 + is_settled
    store.close()
    data = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"eve-0" in data
    assert not any(user.encode() in data for user in users)
    assert open_store(tmp_path, clock).erase_users(users) == {"rows": 0, "reactions": 0, "preferences": 0}


@pytest.mark.parametrize("write_count", range(5))
def test_an_erasure_that_a_crash_interrupted_is_completed_by_a_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_count: int
) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    for user in ("ann@example.org", "eve"):
        records = [make_record(f"{user}-{i}", f"c-{user}").model_copy(update={"user_id": user}) for i in range(3)]
        store.append_events([FeedbackEvent(record.id, None, record) for record in records])
    store.flush_settled()
    for user in ("ann@example.org", "eve"):
        store.append_events([FeedbackEvent(f"{user}-0", "love"), PreferenceEvent(f"{user}-0", f"{user}-1")])
    store.flush_settled()
    writes_left, write_parquet = write_count, store._write_parquet

    def crash_after_some_writes(*arguments: Any) -> None:
        nonlocal writes_left
        if writes_left == 0:
            raise KeyboardInterrupt
        writes_left -= 1
        write_parquet(*arguments)

    monkeypatch.setattr(store, "_write_parquet", crash_after_some_writes)
    with contextlib.suppress(KeyboardInterrupt):
        store.erase_users(["ann@example.org"])
    assert (writes_left == 0) == (write_count < 4)
    store.close()
    store = open_store(tmp_path, clock, reaction_window_s=0)
    store.erase_users(["ann@example.org"])
    assert store.append_events([FeedbackEvent("ann@example.org-0", "love")]) == ["unknown"]
    store.close()
    assert not any(b"ann@example.org" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(read_rows(tmp_path)) == 3 and len(read_all_files(tmp_path, "_preferences")) == 1


def test_the_erasure_of_a_user_with_many_rows_does_not_list_all_pairs(tmp_path: Path) -> None:
    store = open_store(tmp_path, FakeClock())
    records = [
        make_record(f"r{i}").model_copy(update={"messages": [ChatMessage(role="user", content=f"Say {i // 2}")]})
        for i in range(1000)
    ]
    store.append_events([FeedbackEvent(record.id, None, record) for record in records])
    store.append_events([PreferenceEvent("r0", "r1"), PreferenceEvent("r7", "r6")])
    tracemalloc.start()
    assert store.erase_users(["u"]) == {"rows": 1000, "reactions": 0, "preferences": 2}
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The ids of all pairs need 80 MB.
    assert peak_bytes < 20e6


def write_log(folder: Path, records: list[FeedbackRecord], is_settled: bool) -> None:
    store = open_store(folder, FakeClock(), reaction_window_s=0 if is_settled else 60)
    store.append_events([FeedbackEvent(record.id, None, record) for record in records])
    store.flush_settled()
    store.close()


@pytest.mark.parametrize("is_settled", [False, True])
def test_the_service_erases_users_who_made_a_persona_or_share_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_settled: bool
) -> None:
    monkeypatch.setenv("RLUF_USER_SALT", SALT.decode())
    fields = [
        {}, {"user_id": "ann"}, {"author": "ann"}, {"device": "phone-7"}, {"author": "anna", "device": "phone-70"},
        {"user_id": "ann", "author": "ann", "device": "phone-7"},
    ]  # fmt: skip
    records = [
        make_record(f"r{i}", f"c{i}").model_copy(
            update={name: hash_user_id(value, SALT) for name, value in row_fields.items()}
        )
        for i, row_fields in enumerate(fields)
    ]
    write_log(tmp_path / "log", records, is_settled)
    assert main([f"serve.feedback_path={tmp_path / 'log'}", "--forget", "ann", "--forget", "phone-7"]) == 0
    store = open_store(tmp_path / "log", FakeClock(), reaction_window_s=0)
    store.flush_settled()
    assert set(read_rows(tmp_path / "log")) == {"r0", "r4"}


def test_files_of_a_release_without_device_and_author_are_erased_too(tmp_path: Path) -> None:
    write_log(tmp_path, [make_record("a"), make_record("b", "d").model_copy(update={"user_id": "eve"})], True)
    (file,) = tmp_path.rglob("*.parquet")
    pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["device", "author", "arm"]), file)
    store = open_store(tmp_path, FakeClock())
    assert store.find_user_ids(["u", "stranger"]) == {"u"}
    assert store.erase_users(["u", "stranger"])["rows"] == 1


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize(
    ("users", "unknown_users"),
    [
        (["ann"], []),
        (["ann", "an"], ["an"]),
        (["an", "ann", "nobody@example.org", "eve"], ["an", "nobody@example.org"]),
        (["ann", "ann", "Ann"], ["Ann"]),
        (["no", "nil"], ["no", "nil"]),
    ],
)
def test_the_service_lists_the_users_without_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    is_settled: bool, users: list[str], unknown_users: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RLUF_USER_SALT", SALT.decode())
    records = [
        make_record(user, user).model_copy(update={"user_id": hash_user_id(user, SALT)}) for user in ("ann", "eve")
    ]
    write_log(tmp_path / "log", records, is_settled)
    arguments = [f"serve.feedback_path={tmp_path / 'log'}", *(word for user in users for word in ("--forget", user))]
    if unknown_users:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 3
        message = capsys.readouterr().err
        assert ", ".join(unknown_users) in message
        assert f"{len(unknown_users)} of {len(set(users))} users" in message
    else:
        assert main(arguments) == 0
    store = open_store(tmp_path / "log", FakeClock(), reaction_window_s=0)
    store.flush_settled()
    assert set(read_rows(tmp_path / "log")) == {"ann", "eve"} - set(users)


def test_rows_from_before_the_operator_set_a_salt_are_erased_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local service creates a salt; when it becomes public, the environment gives another one."""
    salts = {"file": b"0123456789abcdef0123456789abcdef", "variable": SALT}
    records = [
        make_record(f"{user}-{name}", user + name).model_copy(update={"user_id": hash_user_id(user, salt)})
        for name, salt in salts.items()
        for user in ("ann", "eve")
    ]
    write_log(tmp_path / "log", records, is_settled=True)
    (tmp_path / "log" / ".log" / "salt").write_bytes(salts["file"])
    monkeypatch.setenv("RLUF_USER_SALT", SALT.decode())
    assert main([f"serve.feedback_path={tmp_path / 'log'}", "--forget", "ann"]) == 0
    assert set(read_rows(tmp_path / "log")) == {"eve-file", "eve-variable"}


@pytest.mark.parametrize("conversation_id", ["c-7", None])
def test_a_visitor_is_erased_by_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversation_id: str | None
) -> None:
    monkeypatch.setenv("RLUF_USER_SALT", SALT.decode())
    store = open_store(tmp_path / "log", FakeClock(), reaction_window_s=0)
    response = ServedResponse("policy-1", "Hello!", "stop")
    for response_id, conversation in (("mine", conversation_id), ("other", "c-8")):
        body = {"messages": [{"role": "user", "content": "Hi"}], "conversation_id": conversation}
        event = build_served_event(response_id, ChatRequest.model_validate(body), response, SALT)
        assert event is not None
        store.append_events([event])
    store.flush_settled()
    store.close()
    assert main([f"serve.feedback_path={tmp_path / 'log'}", "--forget", f"visitor of {conversation_id or 'mine'}"]) == 0
    assert set(read_rows(tmp_path / "log")) == {"other"}
