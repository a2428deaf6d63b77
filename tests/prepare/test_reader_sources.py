"""Entries become files, files become numbered lines, and what is broken is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.errors import DataError
from rluf.prepare.readers import files, sources
from rluf.prepare.readers.files import read_batches
from rluf.prepare.readers.sources import Source, resolve

Rows = dict[str, Callable[..., dict[str, Any]]]


def lines(path: Path, stripe: int = 0, stripes: int = 1) -> list[tuple[int, bytes, str | None]]:
    return [(x.number, x.raw, x.problem) for batch in read_batches(str(path), stripe, stripes) for x in batch]


def test_path_glob_folder_and_url_find_the_same_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    every = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert [s.location for s in resolve(every, "feedback")] == every
    assert [s.location for s in resolve([str(tmp_path)], "feedback")] == every
    assert [s.location for s in resolve([f"{tmp_path}/*.jsonl*"], "feedback")] == every[:2]
    assert [s.location for s in resolve([f"file://{tmp_path}"], "feedback")] == [f"file://{path}" for path in every]
    assert [s.location for s in resolve([f"file://{tmp_path}/*.gz"], "feedback")] == [f"file://{every[1]}"]


def test_reader_entries(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl.gz"
    file.touch()
    assert resolve([f"convai2:{file}"], "feedback") == [Source("feedback", str(file), "convai2")]


def test_fingerprint_follows_content_and_reader(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"{}")
    entries = [[str(file)], [f"convai2:{file}"], [f"file://{file}"]]
    before = [sources.fingerprint(resolve(entry, "feedback")) for entry in entries]
    assert len(set(before)) == 3
    assert before == [sources.fingerprint(resolve(entry, "feedback")) for entry in entries]
    file.write_bytes(b"{ }")
    assert not set(before) & {sources.fingerprint(resolve(entry, "feedback")) for entry in entries}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nowhere/log.jsonl", ["nowhere/log.jsonl", "data.feedback"]),
        ("nowhere/*.jsonl", ["nowhere/*.jsonl", "data.feedback"]),
        ("file:///nowhere/log.jsonl", ["file:///nowhere/log.jsonl"]),
        ("conva2:log.jsonl", ["'conva2'", "did you mean convai2?"]),
        ("pandalm:log.jsonl", ["pandalm gives preferences rows", "data.preferences"]),
        ("ftp9://host/log.jsonl", ["ftp9://host/log.jsonl"]),
        ("sample:hearts", ["sample:hearts", "feedback"]),
    ],
)
def test_bad_entries_are_named(entry: str, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        resolve([entry], "feedback")
    assert all(word in str(error.value) for word in words)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.xlsx").touch()
    with pytest.raises(DataError, match=r"log\.xlsx.*\.jsonl"):
        resolve([str(tmp_path / "log.xlsx")], "feedback")


def test_lines_keep_their_numbers_whatever_the_endings(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"\xef\xbb\xbf{1}\r\n\n  \n{2}\n{3}")
    assert lines(file) == [(1, b"{1}", None), (4, b"{2}", None), (5, b"{3}", None)]


def test_stripes_share_out_every_line_once(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % i for i in range(2000))))
    parts = [lines(file, stripe, 3) for stripe in range(3)]
    assert sorted(line for part in parts for line in part) == lines(file)
    assert min(len(part) for part in parts) > 400


def test_truncated_gzip_gives_its_rows_and_one_problem(tmp_path: Path) -> None:
    import random

    maker = random.Random(3)
    body = gzip.compress(b"".join(b"%030x\n" % maker.getrandbits(120) for _ in range(3000)))
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(body[: len(body) // 2])
    found = lines(file)
    assert 1000 < len(found) < 2000
    assert (found[-1][0], found[-1][2]) == (len(found), "broken gzip file")
    assert all(problem is None for _, _, problem in found[:-1])
    assert sum(line[2] is not None for stripe in range(2) for line in lines(file, stripe, 2)) == 1


def test_text_named_gz_is_one_problem(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(b'{"id": 1}\n')
    assert lines(file) == [(1, b"", "broken gzip file")]


def test_a_line_without_end_is_cut_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 100)
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"x" * 950 + b"\n{2}\n")
    assert lines(file) == [(1, b"x" * 100, "line too long"), (2, b"{2}", None)]


def test_parquet_rows_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    when = datetime(2025, 1, 1, tzinfo=UTC)
    pq.write_table(pa.table({"id": ["a", "b"], "time": [when, when], "turn": [1, None]}), file)
    found = lines(file)
    assert [number for number, _, _ in found] == [1, 2]
    assert json.loads(found[1][1]) == {"id": "b", "time": "2025-01-01T00:00:00+00:00", "turn": None}
    file.write_bytes(b"PAR1 and then nothing")
    assert lines(file) == [(1, b"", "broken Parquet file")]
