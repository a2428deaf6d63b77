"""One definition yields the pydantic model and the Arrow schema, and rows survive the round trip."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.schema import (
    DATA_KINDS,
    FeedbackRecord,
    LogRecord,
    RejectedRow,
    build_arrow_schema,
    build_records_table,
    validate_json_row,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)

letters = st.characters(codec="utf-8")
texts = st.text(letters, min_size=1, max_size=40).filter(str.strip)
names = st.text(letters, min_size=1, max_size=20)
messages = st.builds(
    lambda context, last_text: [*context, {"role": "user", "content": last_text}],
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=3
    ),
    texts,
)
times = st.datetimes(datetime(2000, 1, 1), datetime(2025, 12, 31), timezones=st.just(UTC))
finish_reasons = st.sampled_from(["stop", "length", None])
common = {"id": names, "messages": messages, "topic": names}
rows: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "feedback": st.fixed_dictionaries(
        common
        | {
            "conversation_id": names,
            "turn": st.integers(0, 1_000_000),
            "user_id": names,
            "time": times,
            "model_version": names,
            "response": texts,
            "reaction": st.none() | names,
            "continued": st.none() | st.booleans(),
            "returned": st.none() | st.booleans(),
            "locale": names,
            "interface": names,
            "device": st.none() | names,
            "author": st.none() | names,
            "finish_reason": finish_reasons,
        }
    ),
    "preferences": st.fixed_dictionaries(
        common | {"chosen": texts, "rejected": texts, "group": names, "rejected_finish_reason": finish_reasons}
    ).filter(lambda row: row["chosen"] != row["rejected"]),
    "safety": st.fixed_dictionaries(
        common | {"response": texts, "label": st.sampled_from([0, 1]), "group": names, "finish_reason": finish_reasons}
    ),
    "prompts": st.fixed_dictionaries(common | {"split": st.sampled_from(["train", "test"])}),
    "reactions": st.fixed_dictionaries(
        {"id": names, "response_id": names, "time": times, "reaction": names, "retracted": st.booleans()}
    ),
}


@pytest.mark.parametrize("kind", list(DATA_KINDS))
def test_round_trip_json_record_parquet(kind: str) -> None:
    record_type = DATA_KINDS[kind].record_type

    @settings(max_examples=40)
    @given(st.lists(rows[kind], min_size=1, max_size=3))
    def compare(raw_rows: list[dict[str, Any]]) -> None:
        records = [record_type.model_validate(row) for row in raw_rows]
        assert [validate_json_row(record.model_dump_json().encode(), record_type, NOW) for record in records] == records
        file = io.BytesIO()
        pq.write_table(build_records_table(records, record_type), file)
        assert [record_type.model_validate(row) for row in pq.read_table(file).to_pylist()] == records

    compare()


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_rejected_with_a_reason(raw: bytes) -> None:
    for kind in DATA_KINDS.values():
        result = validate_json_row(raw, kind.record_type, NOW)
        assert isinstance(result, RejectedRow) and result.reason


def test_arrow_schema_follows_the_model() -> None:
    schema = build_arrow_schema(FeedbackRecord)
    assert schema.names == list(FeedbackRecord.model_fields)
    assert schema.field("time").type == pa.timestamp("us", tz="UTC")
    assert schema.field("reaction").nullable and not schema.field("response").nullable
    assert schema.field("messages").type.value_type.field("role").type == pa.string()


def test_output_columns_are_fields_of_the_record() -> None:
    for kind in DATA_KINDS.values():
        assert {*kind.output_columns, kind.split_key} <= set(kind.record_type.model_fields)


def test_unknown_fields_are_ignored() -> None:
    record = LogRecord.model_validate({"shoe_size": 43})
    assert not hasattr(record, "shoe_size")
