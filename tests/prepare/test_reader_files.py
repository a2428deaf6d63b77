"""Every format gives the same rows, wherever it lies."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.readers.files import partition_fields, read_batches
from rluf.prepare.readers.sources import resolve
from rluf.prepare.tables import read_table
from rluf.prepare.validate_pass import CheckTask, check

Maker = Callable[..., dict[str, Any]]


def objects(path: str) -> list[Any]:
    return [json.loads(line.raw) for batch in read_batches(path) for line in batch]


def test_all_formats_give_the_same_rows(tmp_path: Path, rows: dict[str, Maker]) -> None:
    every = [rows["feedback"](n, response=f'with "quotes",\nlines and ünicode {n}') for n in range(700)]
    text = "".join(json.dumps(row) + "\n" for row in every).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.jsonl.zst").write_bytes(pa.compress(text, "zstd", asbytes=True))
    table = pa.Table.from_pylist(every)
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(tmp_path / "e.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
        file.write_table(table)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, every[0])
    writer.writeheader()
    for row in every:
        plain = {name: "true" if value is True else value for name, value in row.items()}
        writer.writerow(plain | {"messages": json.dumps(row["messages"])})
    (tmp_path / "g.csv").write_text(sheet.getvalue(), encoding="utf-8")
    found = {file.name: objects(str(file)) for file in sorted(tmp_path.iterdir())}
    assert len(found) == 7
    assert all(read == every for read in found.values())


def test_a_saved_hugging_face_folder_is_read_without_its_notes(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"]})
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    found = resolve([str(tmp_path)], "feedback")
    assert [source.path.name for source in found] == ["data-00000-of-00001.arrow"]
    assert objects(found[0].location) == [{"id": "a"}, {"id": "b"}]


def test_memory_urls_go_through_fsspec() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("part=1/a.jsonl", "part=2/b.jsonl.gz"):
        body = b'{"id": "x"}\n{"id": "y"}\n'
        system.makedirs(f"/logs/{name.partition('/')[0]}", exist_ok=True)
        system.pipe_file(f"/logs/{name}", gzip.compress(body) if name.endswith("gz") else body)
    found = [source.location for source in resolve(["memory://logs"], "feedback")]
    assert [location.rpartition("/")[2] for location in found] == ["a.jsonl", "b.jsonl.gz"]
    assert all(objects(location) == [{"id": "x"}, {"id": "y"}] for location in found)
    assert len(resolve(["memory://logs/*/a.jsonl"], "feedback")) == 1
    system.rm("/logs", recursive=True)


def test_partitions_fill_fields_that_rows_lack(tmp_path: Path, rows: dict[str, Maker]) -> None:
    folder = tmp_path / "model_version=base%2F2" / "locale=de" / "shoe=43"
    folder.mkdir(parents=True)
    row = rows["feedback"](1)
    del row["model_version"]
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    assert partition_fields(str(folder / "log.jsonl"))["model_version"] == "base/2"
    task = CheckTask(
        work=str(tmp_path / "w"), kind="feedback", path=str(folder / "log.jsonl"), reader=None, order=0, stripe=0,
        stripes=1, buckets=1, now="2026-01-01T00:00:00+00:00", dev_share=0.1, test_share=0.1, seed=1, redact=(),
        columns={}, forgotten=(),
    )  # fmt: skip
    counts = {(tally.event, tally.reason): tally.rows for tally in check(task)["tallies"]}
    assert counts == {("in", ""): 1}
    table = read_table(next((tmp_path / "w" / "rows").rglob("*.arrow")), ["model_version", "locale"])
    assert table.to_pylist() == [{"model_version": "base/2", "locale": "en"}]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=40).filter(lambda raw: b"\n" not in raw), max_size=40),
    st.integers(1, 3),
    st.integers(1, 64),
)
def test_no_line_is_lost_however_bytes_come(tmp_path_factory: pytest.TempPathFactory, raws: list[bytes], stripes: int,
                                            chunk: int) -> None:  # fmt: skip
    from rluf.prepare.readers import files

    path = tmp_path_factory.mktemp("lines") / "log.jsonl"
    path.write_bytes(b"\n".join(raws))
    before = files._CHUNK
    files._CHUNK = chunk
    try:
        parts = [line for n in range(stripes) for batch in read_batches(str(path), n, stripes) for line in batch]
    finally:
        files._CHUNK = before
    expected = [
        (n, raw.removeprefix(b"\xef\xbb\xbf" if n == 1 else b"").rstrip(b"\r")) for n, raw in enumerate(raws, 1)
    ]
    assert sorted((line.number, line.raw) for line in parts) == [(n, raw) for n, raw in expected if raw.strip()]
    assert all(line.problem is None for line in parts)
