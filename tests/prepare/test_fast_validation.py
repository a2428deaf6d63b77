"""The quick way of checking rows never says otherwise than the slow one."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.fast_validation import check_rows, to_arrow
from rluf.prepare.schema import KINDS, Record, to_table
from rluf.prepare.validation import Bad, validate

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Maker = Callable[..., dict[str, Any]]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.0, 1.5, 10**30, "", " ", "x", "7", "x" * 33, "x" * 201, "\ud83d", "\x00", [], [1],
    {},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": "bot", "content": "x"}],
    [{"role": "assistant", "content": "x"}], [{"role": "user", "content": ""}], "2025-01-01T00:00:00Z", "2025-01-01",
    "2025-01-01T00:00:00", "2025-13-01T00:00:00Z", "2999-01-01T00:00:00Z", "1970-01-01T00:00:00Z", 1735689600,
    "2025-01-01 00:00:00+02:00", "love", "train", "dev", float("nan"), float("inf"),
]  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_same_fate_as_pydantic(kind: str, rows: dict[str, Maker]) -> None:
    record = KINDS[kind].record
    fields = [*record.model_fields, "unknown"]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.dictionaries(st.sampled_from(fields), st.sampled_from(ODD), max_size=2), min_size=1, max_size=4))
    def check(changes: list[dict[str, Any]]) -> None:
        raws = [json.dumps(rows[kind](n, **change)).encode() for n, change in enumerate(changes)]
        found = check_rows(raws, record, NOW)
        for raw, row in zip(raws, found, strict=True):
            slow = validate(raw, record, NOW)
            if isinstance(slow, Bad):
                assert row == slow
            else:
                assert to_arrow([row], record).equals(to_table([slow], record))

    check()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=30).filter(lambda raw: b"\n" not in raw and raw.strip()), max_size=5))
def test_any_bytes_among_good_rows(noise: list[bytes]) -> None:
    good = b'{"id": "a", "response_id": "b", "time": "2025-01-01T00:00:00Z", "reaction": "love"}'
    record = KINDS["reactions"].record
    found = check_rows([good, *noise, good], record, NOW)
    assert len(found) == len(noise) + 2
    assert not isinstance(found[0], Bad) and not isinstance(found[-1], Bad)
    assert found[1:-1] == [validate(raw, record, NOW) for raw in noise]


def test_long_chats_keep_their_messages(rows: dict[str, Maker]) -> None:
    chat = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"m{n}"} for n in range(7)]
    raws = [json.dumps(rows["feedback"](n, messages=chat[: 1 + 2 * n])).encode() for n in range(4)]
    record: type[Record] = KINDS["feedback"].record
    table: pa.Table = to_arrow(check_rows(raws, record, NOW), record)
    assert [len(messages) for messages in table["messages"].to_pylist()] == [1, 3, 5, 7]
    assert table["messages"].to_pylist()[3] == chat
