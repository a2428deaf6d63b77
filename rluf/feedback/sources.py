"""Where raw rows come from: entries of `data.*` become files, and files become numbered lines.

Every line keeps its file and number, so that a quarantined row can be found again. A file may be local or a URL that
pyarrow knows (s3://, gs://, file://).
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.errors import DataError
from rluf.feedback.readers import READERS
from rluf.paths import sample_file

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz", ".parquet")
"""File names that are read; .json means one object a line too."""

MAX_LINE = 16 * 2**20
"""Longest line in bytes; of a longer one only this much is read and it is quarantined."""

STRIPE = 256
"""Consecutive lines that go to the same block."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, the kind of data in it, and the reader that adapts it (none: rows are our own records).

    `location` is a local path or a URL.
    """

    kind: str
    location: str
    reader: str | None

    @property
    def path(self) -> Path:
        """The location as a local path; only for files that are no URL."""
        return Path(self.location)


@dataclass(frozen=True, slots=True)
class Line:
    """One raw row: line number (from 1; row number in Parquet), its bytes, and what is wrong with it, if anything."""

    number: int
    raw: bytes
    problem: str | None = None


def _split_reader(entry: str, kind: str) -> tuple[str | None, str]:
    """Reader and path of an entry. Raises DataError for readers that do not exist or give another kind than asked."""
    name, colon, rest = entry.partition(":")
    if not colon or rest.startswith("//") or "/" in name or "\\" in name or "." in name:
        return None, entry
    if name not in READERS:
        known = [reader.name for reader in READERS.values() if kind in (reader.kind, "*")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"readers of data.{kind}: {', '.join(known)}, sample"
        raise DataError(f"data.{kind}: no reader is called {name!r} (entry {entry!r}); {hint}")
    if kind not in (READERS[name].kind, "*"):
        raise DataError(
            f"data.{kind}: reader {name} gives {READERS[name].kind} rows, not {kind} (entry {entry!r}); "
            f"move the entry to data.{READERS[name].kind}"
        )
    return name, rest


def _local(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if path.exists():
        return [str(path)]
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _remote(url: str) -> list[str]:
    """Files of a URL: one file, everything below a folder, or what a pattern matches (* also crosses folders)."""
    scheme = url.partition("://")[0]
    fixed = url
    while glob.has_magic(fixed):
        fixed = fixed.rpartition("/")[0]
    system, base = fs.FileSystem.from_uri(fixed)
    info = system.get_file_info(base)
    if info.type == fs.FileType.File:
        return [url]
    if info.type == fs.FileType.NotFound:
        return []
    files = [f.path for f in system.get_file_info(fs.FileSelector(base, recursive=True)) if f.type == fs.FileType.File]
    pattern = base + url[len(fixed) :]
    if pattern != base:
        files = [file for file in files if fnmatch.fnmatch(file, pattern)]
    return sorted(f"{scheme}://{file}" for file in files if file.endswith(SUFFIXES))


def resolve(entries: Sequence[str], kind: str = "*") -> list[Source]:
    """Files behind the entries of data.<kind>, in order: path, glob, folder, URL, sample:<kind>, or <reader>:<path>.

    Without a kind only the files are looked up, not whether a reader gives what is asked of it. Nothing is opened.
    Raises DataError that names the entry when nothing is there, the name of the file tells no format, or a reader is
    unknown or of another kind.
    """
    sources = []
    for entry in entries:
        if entry.startswith("sample:"):
            reader, paths = None, [str(sample_file(entry.removeprefix("sample:")))]
        else:
            reader, path = _split_reader(entry, kind)
            try:
                paths = _remote(path) if "://" in path else _local(path)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"data.{kind}: cannot look up {entry!r}: {error}") from error
        missing = [path for path in paths if "://" not in path and not Path(path).is_file()]
        if not paths or missing:
            where = missing[0] if missing else entry
            raise DataError(f"data.{kind}: no such file: {where!r} (from {entry!r}); check data.{kind} in the config")
        for path in paths:
            if not path.endswith(SUFFIXES):
                raise DataError(
                    f"data.{kind}: cannot tell the format of {path!r} by its name; use one of {', '.join(SUFFIXES)}"
                )
            sources.append(Source(kind, path, reader))
    return sources


def fingerprint(sources: Sequence[Source]) -> str:
    """SHA-256 that changes when the raw data does: over readers and bytes of local files, and over address, size and
    time of change of remote ones.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.kind} {source.reader} {source.path.name}\n".encode())
        if "://" in source.location:
            system, inner = fs.FileSystem.from_uri(source.location)
            info = system.get_file_info(inner)
            digest.update(f"{source.location} {info.size} {info.mtime_ns}\n".encode())
        else:
            with source.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return Path(path).open("rb")
    system, inner = fs.FileSystem.from_uri(path)
    return io.BufferedReader(cast(io.RawIOBase, system.open_input_file(inner)), 2**20)


def _text_lines(path: str) -> Iterator[Line]:
    number = 0
    with _open(path) as file:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.endswith(".gz") else file
        try:
            while data := stream.readline(MAX_LINE):
                number += 1
                whole = data.endswith(b"\n") or len(data) < MAX_LINE
                rest = b"" if whole else b" "
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_LINE)
                if number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                yield Line(number, data.rstrip(b"\r\n"), None if whole else "line too long")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield Line(number + 1, b"", "broken gzip file")


def _plain(value: object) -> str:
    """How a Parquet value that JSON lacks is written: times as ISO 8601, bytes as text."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _parquet_lines(path: str) -> Iterator[Line]:
    number = 0
    with _open(path) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(STRIPE):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(number, json.dumps(row, default=_plain).encode())
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s: unreadable after row %d: %s", path, number, error)
            yield Line(number + 1, b"", "broken Parquet file")


def read_lines(source: Source, stripe: int = 0, stripes: int = 1) -> Iterator[Line]:
    """Raw rows of a file, blank lines left out; of several stripes only the rows of one.

    Each stripe reads the file but checks only its own rows, so that one compressed file still keeps several cores
    busy. A file that breaks off gives the rows before the break and one line with the problem.
    """
    lines = _parquet_lines(source.location) if source.location.endswith(".parquet") else _text_lines(source.location)
    for line in lines:
        if (line.number - 1) // STRIPE % stripes == stripe and (line.problem or line.raw.strip()):
            yield line
