"""Entries become files and files become numbered rows, equal in every format; broken input is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rluf.config.data import DataSource
from rluf.errors import DataError, SettingsError
from rluf.prepare.labels import LabelRules
from rluf.prepare.readers import files
from rluf.prepare.readers.columns import NOTES_KEY, build_converter
from rluf.prepare.readers.datasets import ReaderItems, ReaderOptions, SkippedRow
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import (
    LogSource,
    find_reader,
    fingerprint_sources,
    parse_partition_fields,
    resolve_sources,
)
from rluf.prepare.readers.times import normalize_time
from rluf.prepare.validate_pass import ValidateTask, validate_rows
from rluf.prepare.workspace import read_table

RowFactory = Callable[..., dict[str, Any]]


def convert_row(kind_name: str, row: dict[str, Any], **entry: Any) -> Any:
    """A raw row in rluf's schema, without its notes."""
    source = DataSource(path="log.jsonl", **entry)
    converter = build_converter(kind_name, source, {}, LabelRules(source.labels), "latest", 0.2)
    item = converter.read_row(row)
    return item if isinstance(item, SkippedRow) else {name: item[name] for name in item if name != NOTES_KEY}


def read_objects(path: str) -> list[Any]:
    return [json.loads(line.raw) for batch in read_line_batches(path) for line in batch]


def read_lines(path: Path, stripe_index: int = 0, stripe_count: int = 1) -> list[tuple[int, bytes, str | None]]:
    batches = read_line_batches(str(path), stripe_index, stripe_count)
    return [(line.line_number, line.raw, line.problem) for batch in batches for line in batch]


def test_path_glob_folder_and_url_resolve_to_the_same_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert [source.location for source in resolve_sources(paths, "feedback")] == paths
    assert [source.location for source in resolve_sources([str(tmp_path)], "feedback")] == paths
    assert [source.location for source in resolve_sources([f"{tmp_path}/*.jsonl*"], "feedback")] == paths[:2]
    assert [source.location for source in resolve_sources([f"file://{tmp_path}"], "feedback")] == [
        f"file://{path}" for path in paths
    ]
    assert [source.location for source in resolve_sources([f"file://{tmp_path}/*.gz"], "feedback")] == [
        f"file://{paths[1]}"
    ]


def test_entries_with_a_reader(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl.gz"
    file.touch()
    entry = DataSource(reader="convai2", path=str(file))
    assert resolve_sources([entry], "feedback") == [LogSource("feedback", str(file), entry)]


def test_the_fingerprint_depends_on_content_and_reader(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"{}")
    entries = [[str(file)], [DataSource(reader="convai2", path=str(file))], [f"file://{file}"]]
    old_fingerprints = [fingerprint_sources(resolve_sources(entry, "feedback")) for entry in entries]
    assert len(set(old_fingerprints)) == 3
    assert old_fingerprints == [fingerprint_sources(resolve_sources(entry, "feedback")) for entry in entries]
    file.write_bytes(b"{ }")
    assert not set(old_fingerprints) & {fingerprint_sources(resolve_sources(entry, "feedback")) for entry in entries}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nowhere/log.jsonl", ["nowhere/log.jsonl", "data.feedback"]),
        ("nowhere/*.jsonl", ["nowhere/*.jsonl", "data.feedback"]),
        ("file:///nowhere/log.jsonl", ["file:///nowhere/log.jsonl"]),
        (DataSource(reader="conva2", path="log.jsonl"), ["'conva2'", "did you mean convai2?"]),
        (DataSource(reader="pandalm", path="log.jsonl"), ["pandalm returns preferences rows", "data.preferences"]),
        ("ftp9://host/log.jsonl", ["ftp9://host/log.jsonl"]),
        ("sample:hearts", ["sample:hearts", "feedback"]),
    ],
)
def test_wrong_entries_are_named(entry: DataSource | str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        resolve_sources([entry], "feedback")
    assert all(word in str(error.value) for word in words)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.xlsx").touch()
    with pytest.raises(DataError, match=r"log\.xlsx.*\.jsonl"):
        resolve_sources([str(tmp_path / "log.xlsx")], "feedback")


def test_lines_have_their_numbers_for_any_line_ending(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"\xef\xbb\xbf{1}\r\n\n  \n{2}\n{3}")
    assert read_lines(file) == [(1, b"{1}", None), (4, b"{2}", None), (5, b"{3}", None)]


def test_each_line_is_in_one_stripe(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % i for i in range(2000))))
    stripes = [read_lines(file, stripe_index, 3) for stripe_index in range(3)]
    assert sorted(line for stripe_lines in stripes for line in stripe_lines) == read_lines(file)
    assert min(map(len, stripes)) > 400


def test_a_truncated_gzip_yields_its_rows_and_one_problem(tmp_path: Path) -> None:
    rng = random.Random(3)
    gzip_bytes = gzip.compress(b"".join(b"%030x\n" % rng.getrandbits(120) for _ in range(3000)))
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(gzip_bytes[: len(gzip_bytes) // 2])
    lines = read_lines(file)
    assert 1000 < len(lines) < 2000
    assert (lines[-1][0], lines[-1][2]) == (len(lines), "broken gzip file")
    assert all(problem is None for _, _, problem in lines[:-1])
    assert sum(line[2] is not None for stripe_index in range(2) for line in read_lines(file, stripe_index, 2)) == 1


def test_plain_text_named_gz_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(b'{"id": 1}\n')
    assert read_lines(file) == [(1, b"", "broken gzip file")]


def split_words(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    return [{"id": word} for word in row["words"].split()]


def test_a_reader_may_be_a_function_of_another_package(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    reader_name = f"{__name__}:split_words"
    (source,) = resolve_sources([DataSource(reader=reader_name, path=str(tmp_path / "log.jsonl"))], "feedback")
    assert source.entry.reader == reader_name
    read_item = find_reader(reader_name).read_item
    assert read_item is not None and read_item({"words": "a b"}, ReaderOptions(0.1)) == [{"id": "a"}, {"id": "b"}]
    with pytest.raises(SettingsError, match="cannot be imported"):
        find_reader("nowhere:read")


def test_an_endless_line_is_cut_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"x" * 950 + b"\n{2}\n")
    assert read_lines(file) == [(1, b"x" * 100, "line too long"), (2, b"{2}", None)]


def test_parquet_rows_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    served_at = datetime(2025, 1, 1, tzinfo=UTC)
    pq.write_table(pa.table({"id": ["a", "b"], "time": [served_at, served_at], "turn": [1, None]}), file)
    lines = read_lines(file)
    assert [number for number, _, _ in lines] == [1, 2]
    assert json.loads(lines[1][1]) == {"id": "b", "time": "2025-01-01T00:00:00+00:00", "turn": None}
    file.write_bytes(b"PAR1 and then nothing")
    assert read_lines(file) == [(1, b"", "broken Parquet file")]


def test_all_formats_yield_the_same_rows(tmp_path: Path, rows: dict[str, RowFactory]) -> None:
    expected_rows = [rows["feedback"](n, response=f'with "quotes",\nlines and ünicode {n}') for n in range(700)]
    jsonl_bytes = "".join(json.dumps(row) + "\n" for row in expected_rows).encode()
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes))
    (tmp_path / "c.jsonl.zst").write_bytes(pa.compress(jsonl_bytes, "zstd", asbytes=True))
    table = pa.Table.from_pylist(expected_rows)
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(tmp_path / "e.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
        file.write_table(table)
    csv_text = io.StringIO()
    writer = csv.DictWriter(csv_text, expected_rows[0])
    writer.writeheader()
    for row in expected_rows:
        writer.writerow(row | {"messages": json.dumps(row["messages"])})
    (tmp_path / "g.csv").write_text(csv_text.getvalue(), encoding="utf-8")
    rows_by_file = {file.name: read_objects(str(file)) for file in sorted(tmp_path.iterdir())}
    assert len(rows_by_file) == 7
    csv_rows = rows_by_file.pop("g.csv")
    assert all(file_rows == expected_rows for file_rows in rows_by_file.values())
    # Cells are text; the converter gives them the types of the record.
    expected = [
        {name: normalize_time(value) if name == "time" else value for name, value in row.items() if value is not None}
        for row in expected_rows
    ]
    assert [convert_row("feedback", row) for row in csv_rows] == expected


def test_a_saved_hugging_face_folder_is_read_without_its_metadata(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"]})
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    sources = resolve_sources([str(tmp_path)], "feedback")
    assert [source.local_path.name for source in sources] == ["data-00000-of-00001.arrow"]
    assert read_objects(sources[0].location) == [{"id": "a"}, {"id": "b"}]


def test_memory_urls_are_read_by_fsspec() -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for name in ("part=1/a.jsonl", "part=2/b.jsonl.gz"):
        body = b'{"id": "x"}\n{"id": "y"}\n'
        filesystem.makedirs(f"/logs/{name.partition('/')[0]}", exist_ok=True)
        filesystem.pipe_file(f"/logs/{name}", gzip.compress(body) if name.endswith("gz") else body)
    locations = [source.location for source in resolve_sources(["memory://logs"], "feedback")]
    assert [location.rpartition("/")[2] for location in locations] == ["a.jsonl", "b.jsonl.gz"]
    assert all(read_objects(location) == [{"id": "x"}, {"id": "y"}] for location in locations)
    assert len(resolve_sources(["memory://logs/*/a.jsonl"], "feedback")) == 1
    filesystem.rm("/logs", recursive=True)


def test_partition_folders_fill_missing_fields(tmp_path: Path, rows: dict[str, RowFactory]) -> None:
    folder = tmp_path / "model_version=base%2F2" / "locale=de" / "shoe=43"
    folder.mkdir(parents=True)
    row = rows["feedback"](1)
    del row["model_version"]
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    assert parse_partition_fields(str(folder / "log.jsonl"))["model_version"] == "base/2"
    task = ValidateTask(
        work_folder=str(tmp_path / "w"),
        kind_name="feedback",
        sources=[(0, str(folder / "log.jsonl"))],
        entry={"path": str(folder)},
        stripe_index=0,
        stripe_count=1,
        bucket_count=1,
        current_time="2026-01-01T00:00:00+00:00",
        dev_share=0.1,
        test_share=0.1,
        seed=1,
        redact_kinds=(),
        labels={},
        contradictions="latest",
        erasure_marks=(),
    )
    row_counts = validate_rows(task)["row_counts"]
    counts = {(row_count.outcome, row_count.reason): row_count.rows for row_count in row_counts}
    assert counts == {("in", ""): 1}
    table = read_table(next((tmp_path / "w" / "rows").rglob("*.arrow")), ["model_version", "locale"])
    assert table.to_pylist() == [{"model_version": "base/2", "locale": "en"}]


@settings(max_examples=60)
@given(
    st.lists(st.binary(max_size=40).filter(lambda raw: b"\n" not in raw), max_size=40),
    st.integers(1, 3),
    st.integers(1, 64),
)
@example([b"{"], 1, 1)
@example([b"{}", b'{"a": 1'], 2, 3)
@example([b"[]", b"{}"], 1, 2)
def test_no_line_is_lost_for_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, raw_lines: list[bytes], stripe_count: int, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log.jsonl"
    path.write_bytes(b"\n".join(raw_lines))
    # An empty array is an export without rows, not a line.
    assume(path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip() != b"[]")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(files, "_CHUNK_BYTES", chunk_bytes)
        stripes = [read_lines(path, stripe_index, stripe_count) for stripe_index in range(stripe_count)]
    expected = [
        (line_number, raw.removeprefix(b"\xef\xbb\xbf" if line_number == 1 else b"").rstrip(b"\r"))
        for line_number, raw in enumerate(raw_lines, 1)
    ]
    lines = sorted((line for stripe_lines in stripes for line in stripe_lines), key=itemgetter(0))
    assert [line[:2] for line in lines] == [line for line in expected if line[1].strip()]
    # Only the last line, which has no line break, may be reported as the beginning of an object.
    assert {problem for number, _, problem in lines if number < len(raw_lines)} <= {None}
