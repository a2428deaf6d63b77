"""What is in a file: numbered raw rows, whatever the format, and what is wrong with them.

Every row keeps its number, so that a quarantined one can be found again. Rows come in batches, since millions pass.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

logger = logging.getLogger(__name__)

MAX_LINE = 16 * 2**20
"""Longest line in bytes; of a longer one only this much is read and it is quarantined."""

STRIPE = 256
"""Consecutive rows that go to the same task."""

_CHUNK = 2**20
_LONG = "line too long"


@dataclass(frozen=True, slots=True)
class Line:
    """One raw row: line number (from 1; row number in Parquet), its bytes, and what is wrong with it, if anything."""

    number: int
    raw: bytes
    problem: str | None = None


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """File system and inner path of a URL: pyarrow's own where it has one, fsspec's else (memory://, http://, ...).

    Raises pyarrow.ArrowInvalid for a scheme that neither knows.
    """
    try:
        return fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        from fsspec.core import url_to_fs

        try:
            system, inner = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise pa.ArrowInvalid(str(error)) from error
        return fs.PyFileSystem(fs.FSSpecHandler(system)), inner


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return Path(path).open("rb")
    system, inner = filesystem(path)
    return io.BufferedReader(cast(io.RawIOBase, system.open_input_file(inner)), _CHUNK)


def _unpacked(path: str, file: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.endswith(".zst"):
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(pa.PythonFile(file), "zstd")), _CHUNK)
    return file


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Bytes as they come, so that of a file that breaks off nothing before the break is lost."""
    read = getattr(stream, "read1", stream.read)
    while data := read(_CHUNK):
        yield data


def _pieces(path: str, stream: BinaryIO) -> Iterator[list[tuple[bytes, str | None]]]:
    """Lines of a stream with what is wrong with each, some at a time; what lies past MAX_LINE of a line is left out."""
    rest, cut, broken = b"", False, None
    try:
        for data in _chunks(stream):
            parts = (rest + data).split(b"\n")
            rest = parts.pop()
            found: list[tuple[bytes, str | None]] = [(part, None) for part in parts]
            if any(len(part) > MAX_LINE for part in parts):
                found = [(part[:MAX_LINE], _LONG if len(part) > MAX_LINE else None) for part in parts]
            if found and cut:
                found[0], cut = (found[0][0][:MAX_LINE], _LONG), False
            if len(rest) > MAX_LINE:
                rest, cut = rest[:MAX_LINE], True
            if found:
                yield found
    except (EOFError, zlib.error, gzip.BadGzipFile):
        broken = "broken gzip file"
    except OSError as error:
        if not path.endswith(".zst"):
            raise
        logger.warning("%s breaks off: %s", path, error)
        broken = "broken zstd file"
    if rest or broken:
        yield [(rest[:MAX_LINE], broken or (_LONG if cut else None))]


def _text_lines(path: str) -> Iterator[list[Line]]:
    number = 0
    with _open(path) as file:
        for piece in _pieces(path, _unpacked(path, file)):
            lines = []
            for data, problem in piece:
                number += 1
                if number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                lines.append(Line(number, data.rstrip(b"\r"), problem))
            yield lines


def _plain(value: object) -> str:
    """How a value that JSON lacks is written: times as ISO 8601, bytes as text."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _row_lines(start: int, rows: list[dict[str, Any]]) -> list[Line]:
    return [Line(start + n, json.dumps(row, default=_plain).encode()) for n, row in enumerate(rows, 1)]


def _batches(path: str, file: BinaryIO) -> Iterator[pa.RecordBatch]:
    if path.endswith(".parquet"):
        yield from pq.ParquetFile(file).iter_batches(STRIPE)
        return
    try:
        batches: Any = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        table = pa.ipc.open_file(file)
        batches = (table.get_batch(n) for n in range(table.num_record_batches))
    for batch in batches:
        for first in range(0, batch.num_rows, STRIPE):
            yield batch.slice(first, STRIPE)


def _arrow_lines(path: str) -> Iterator[list[Line]]:
    number = 0
    with _open(path) as file:
        try:
            for batch in _batches(path, file):
                yield _row_lines(number, batch.to_pylist())
                number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s: unreadable after row %d: %s", path, number, error)
            name = "Parquet" if path.endswith(".parquet") else "Arrow"
            yield [Line(number + 1, b"", f"broken {name} file")]


def _cell(text: str) -> Any:
    """What a CSV cell means: nothing, a number, true or false, JSON, else text."""
    if text == "":
        return None
    if text[0] in "[{" or text in ("true", "false", "null") or text.lstrip("-").isdecimal():
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


_TEXT_CELLS = frozenset(
    {"id", "conversation_id", "user_id", "response", "chosen", "rejected", "group", "model_version", "response_id"}
)
"""Columns that are text even where it looks like a number."""


def _csv_lines(path: str) -> Iterator[list[Line]]:
    """Rows of a CSV with a header; a row's number is the line that it ends on. Cells as `_cell` reads them."""
    number = 0
    with _open(path) as file:
        text = io.TextIOWrapper(_unpacked(path, file), "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text)
        try:
            header = next(reader, None)
            for cells in reader:
                number = reader.line_num
                if not cells:
                    continue
                raw = ",".join(cells).encode("utf-8", "surrogateescape")
                if header is None or len(cells) != len(header):
                    yield [Line(number, raw, "wrong number of cells")]
                elif not _is_utf8(raw):
                    yield [Line(number, raw, "not UTF-8")]
                else:
                    pairs = zip(header, cells, strict=True)
                    row = {name: (text if name in _TEXT_CELLS else _cell(text)) for name, text in pairs}
                    yield [Line(number, json.dumps(row).encode())]
        except csv.Error:
            yield [Line(reader.line_num, b"", "broken CSV")]
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield [Line(number + 1, b"", "broken gzip file")]
        except OSError:
            if not path.endswith(".zst"):
                raise
            yield [Line(number + 1, b"", "broken zstd file")]


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def partition_fields(path: str) -> Mapping[str, str]:
    """Fields that the folders name, as Hive does: .../model_version=v3/locale=en/part.jsonl."""
    pairs = (part.partition("=") for part in path.split("/")[:-1])
    return {name: unquote(value) for name, equals, value in pairs if equals and name.isidentifier()}


def read_batches(path: str, stripe: int = 0, stripes: int = 1) -> Iterator[list[Line]]:
    """Raw rows of a file, blank lines left out, some at a time; of several stripes only the rows of one.

    Each stripe reads the file but checks only its own rows, so that one compressed file still keeps several cores
    busy. A file that breaks off gives the rows before the break and one line with the problem.
    """
    packed = path.removesuffix(".gz").removesuffix(".zst")
    if packed.endswith((".parquet", ".arrow")):
        batches = _arrow_lines(path)
    else:
        batches = _csv_lines(path) if packed.endswith(".csv") else _text_lines(path)
    for lines in batches:
        mine = [
            line
            for line in lines
            if (line.number - 1) // STRIPE % stripes == stripe and (line.problem or line.raw.strip())
        ]
        if mine:
            yield mine
