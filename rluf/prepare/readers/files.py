"""Log files become numbered raw rows, whatever their format and compression.

A file may be local or a URL that pyarrow knows (s3://, gs://, abfs://, file://) or fsspec (memory://, http://). Each
row has its number, so that a quarantined one can be located. Rows are read in batches, since logs have millions.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

logger = logging.getLogger(__name__)

FORMAT_BY_SUFFIX = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
"""Formats by the suffix of a file's name. A .json file has one object per line, or is one array of objects."""

_COMPRESSION_NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2"}

MAX_LINE_BYTES = 16 * 2**20
"""Longest line in bytes. A longer one is cut there and quarantined; so is a longer cell of a CSV."""

STRIPE_ROWS = 256
"""Consecutive rows that go to the same task."""

_CHUNK_BYTES = 2**20
_LINE_TOO_LONG = "line too long"

BROKEN_FILE_REASONS = frozenset(
    f"broken {name} file" for name in ("gzip", "zstd", "bzip2", "Parquet", "Arrow", "CSV", "JSON")
)
"""Problems that end a file early: how many rows are missing after it is unknown."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """One raw row: line number (from 1; in Parquet the row number), its bytes, and the problem with it, if any."""

    line_number: int
    raw: bytes
    problem: str | None = None


def resolve_filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """File system and path in it of a URL: pyarrow's if it has one, else fsspec's (memory://, http://, ...).

    Raises pyarrow.ArrowInvalid for a scheme that neither supports.
    """
    try:
        return fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        from fsspec.core import url_to_fs

        try:
            filesystem, path = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise pa.ArrowInvalid(str(error)) from error
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def detect_format(path: str) -> str | None:
    """Format of a file by the suffix of its name, in any case; None for an unknown suffix."""
    base_name = path.lower()
    for suffix in _COMPRESSION_NAMES:
        base_name = base_name.removesuffix(suffix)
    return FORMAT_BY_SUFFIX.get(Path(base_name).suffix)


def read_line_batches(
    path: str, stripe_index: int = 0, stripe_count: int = 1, *, format_name: str | None = None
) -> Iterator[list[RawLine]]:
    """Raw rows of a file in batches, without blank lines; only the rows of one stripe if there are several.

    Each stripe reads the whole file but validates only its own rows, so that one compressed file still uses several
    cores. A truncated file yields the rows before the end and one line with the problem. The format follows from the
    file's name, unless `format_name` is given. The cells of a CSV are text, or null where empty.
    """
    format_name = format_name or detect_format(path) or "jsonl"
    if format_name in ("parquet", "arrow"):
        batches = _read_arrow_lines(path, format_name)
    else:
        batches = _read_text_lines(path) if format_name == "jsonl" else _read_csv_lines(path, format_name)
    for lines in batches:
        stripe_lines = [
            line
            for line in lines
            if (line.line_number - 1) // STRIPE_ROWS % stripe_count == stripe_index
            and (line.problem or line.raw.strip())
        ]
        if stripe_lines:
            yield stripe_lines


def _open_binary(path: str) -> BinaryIO:
    if "://" not in path:
        return Path(path).open("rb")
    filesystem, inner_path = resolve_filesystem(path)
    return io.BufferedReader(cast(io.RawIOBase, filesystem.open_input_file(inner_path)), _CHUNK_BYTES)


def _get_compression(path: str) -> str | None:
    return _COMPRESSION_NAMES.get(Path(path.lower()).suffix)


def _decompress_stream(path: str, file: BinaryIO) -> BinaryIO:
    compression = _get_compression(path)
    if compression and not cast(io.BufferedReader, file).peek(1):
        raise EOFError("the file is empty")  # compressed, even no data takes some bytes
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if compression == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if compression == "zstd":
        zstd_stream = pa.CompressedInputStream(pa.PythonFile(file), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, zstd_stream), _CHUNK_BYTES)
    return file


def _describe_broken_file(path: str, error: Exception) -> str:
    """Reason for a file whose compressed data is invalid or ends early; raises `error` if it is an I/O error."""
    compression = _get_compression(path)
    # Decoders raise OSError for invalid data; for a file that is not compressed it is a real I/O error.
    if compression is None or (isinstance(error, OSError) and error.errno is not None):
        raise error
    logger.warning("%s: truncated or corrupt %s file: %s", path, compression, error)
    return f"broken {compression} file"


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # read1 returns what is decoded so far; read would lose it when a truncated file raises.
    read = getattr(stream, "read1", stream.read)
    while data := read(_CHUNK_BYTES):
        yield data


def _split_lines(path: str, chunks: Iterable[bytes]) -> Iterator[list[tuple[bytes, str | None]]]:
    """Batches of lines with the problem of each, if any; lines are cut at MAX_LINE_BYTES."""
    # `rest` is the unfinished last line; `is_cut` says that bytes of it were already discarded.
    rest, is_cut, file_problem = b"", False, None
    try:
        for data in chunks:
            raw_lines = (rest + data).split(b"\n")
            rest = raw_lines.pop()
            lines: list[tuple[bytes, str | None]] = [(raw, None) for raw in raw_lines]
            if any(len(raw) > MAX_LINE_BYTES for raw in raw_lines):
                lines = [(raw[:MAX_LINE_BYTES], _LINE_TOO_LONG if raw[MAX_LINE_BYTES:] else None) for raw in raw_lines]
            if lines and is_cut:
                lines[0], is_cut = (lines[0][0][:MAX_LINE_BYTES], _LINE_TOO_LONG), False
            if len(rest) > MAX_LINE_BYTES:
                rest, is_cut = rest[:MAX_LINE_BYTES], True
            if lines:
                yield lines
    except (EOFError, zlib.error, OSError) as error:
        file_problem = _describe_broken_file(path, error)
    if rest or file_problem:
        end_problem = _LINE_TOO_LONG if is_cut else "broken JSON file" if _is_cut_object(rest) else None
        yield [(rest[:MAX_LINE_BYTES], file_problem or end_problem)]


def _is_cut_object(line: bytes) -> bool:
    """Whether the last line of a file, without a line break, is only the beginning of an object."""
    try:
        if line.lstrip().startswith(b"{"):
            json.loads(line)
    except json.JSONDecodeError as error:
        # The parser read to the end of the text, or of a string that has none.
        return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    except (UnicodeDecodeError, RecursionError):
        return False
    return False


def _read_text_lines(path: str) -> Iterator[list[RawLine]]:
    with _open_binary(path) as file:
        try:
            chunks = _read_chunks(_decompress_stream(path, file))
            first_chunk = next(chunks, b"")
            # A first chunk that is an empty array says nothing yet about a file that goes further.
            if first_chunk.removeprefix(codecs.BOM_UTF8).strip() == b"[]":
                first_chunk += next(chunks, b"")
        except (EOFError, zlib.error, OSError) as error:
            yield [RawLine(1, b"", _describe_broken_file(path, error))]
            return
        chunks = chain([first_chunk], chunks)
        first_text = first_chunk.removeprefix(codecs.BOM_UTF8).lstrip()
        if first_text.rstrip() == b"[]":
            return
        # A line that is a complete array is a bad row of a file of lines; an array of objects spans the file.
        first_line, _, second_line = first_text.partition(b"\n")
        # Objects may also be printed over several lines, or separated by commas.
        is_array = first_text.startswith(b"[") and first_text[1:].lstrip().startswith(b"{")
        is_printed = first_line.rstrip() == b"{" and second_line.lstrip().startswith(b'"')
        is_comma_separated = re.match(rb"\{.*\}\s*,\s*$", first_line) is not None
        if is_array or is_printed or is_comma_separated or _has_several_objects(first_line):
            yield from _read_json_objects(path, chunks)
            return
        line_number = 0
        for batch in _split_lines(path, chunks):
            lines = []
            for data, problem in batch:
                line_number += 1
                if line_number == 1:
                    data = data.removeprefix(codecs.BOM_UTF8)  # byte order mark of Windows editors
                lines.append(RawLine(line_number, data.rstrip(b"\r"), problem))
            yield lines


def _has_several_objects(line: bytes) -> bool:
    """Whether a line has one object after the other, without line breaks, as Amazon Data Firehose writes them."""
    if not re.search(rb"\}[ \t\r]*\{", line):
        return False
    text = line.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


def _read_json_objects(path: str, chunks: Iterable[bytes]) -> Iterator[list[RawLine]]:
    """Objects of a file that is one JSON array, or has one object after the other; their number is the line number."""
    decoder, text_decoder = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, row_count, file_problem, is_closed, is_array = "", 0, "broken JSON file", False, None
    try:
        for data in chunks:
            text = (text + text_decoder.decode(data)).lstrip()
            if is_array is None and text:
                is_array = text.startswith("[")
            text = text.lstrip("[, \t\r\n" if not row_count else ", \t\r\n")
            lines = []
            while text and not is_closed:
                try:
                    _, end = decoder.raw_decode(text)
                except (ValueError, RecursionError):
                    is_closed = text.startswith("]")
                    break
                row_count += 1
                lines.append(RawLine(row_count, text[:end].encode("utf-8", "surrogateescape").replace(b"\n", b" ")))
                text = text[end:].lstrip(", \t\r\n")
            yield lines
            if len(text) > MAX_LINE_BYTES:
                break
    except (EOFError, zlib.error, OSError) as error:
        file_problem = _describe_broken_file(path, error)
    if text.strip() != ("]" if is_array else ""):
        raw = text[:MAX_LINE_BYTES].encode("utf-8", "surrogateescape")
        yield [RawLine(row_count + 1, raw, file_problem)]


def _to_json_value(value: object) -> str:
    """JSON form of an Arrow value that JSON has no type for: times as ISO 8601, bytes as text, UUID or hex digits."""
    if isinstance(value, datetime):
        return value.isoformat()
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()


def _encode_rows(row_offset: int, rows: list[dict[str, Any]]) -> list[RawLine]:
    return [
        RawLine(row_number, json.dumps(row, default=_to_json_value).encode())
        for row_number, row in enumerate(rows, row_offset + 1)
    ]


def _read_record_batches(format_name: str, file: BinaryIO) -> Iterator[pa.RecordBatch]:
    if format_name == "parquet":
        yield from pq.ParquetFile(file).iter_batches(STRIPE_ROWS)
        return
    # Hugging Face saves the stream format, Arrow's own tools the file format; both are called .arrow.
    try:
        batches: Any = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        arrow_file = pa.ipc.open_file(file)
        batches = (arrow_file.get_batch(index) for index in range(arrow_file.num_record_batches))
    for batch in batches:
        for first_row in range(0, batch.num_rows, STRIPE_ROWS):
            yield batch.slice(first_row, STRIPE_ROWS)


def _read_arrow_lines(path: str, format_name: str) -> Iterator[list[RawLine]]:
    row_count = 0
    with _open_binary(path) as file:
        try:
            for batch in _read_record_batches(format_name, file):
                yield _encode_rows(row_count, batch.to_pylist(maps_as_pydicts="lossy"))
                row_count += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s: unreadable after row %d: %s", path, row_count, error)
            yield [RawLine(row_count + 1, b"", f"broken {format_name.title()} file")]


def _open_text(path: str, file: BinaryIO) -> io.TextIOWrapper:
    """The text of a CSV; spreadsheets write UTF-16, too."""
    stream = _decompress_stream(path, file)
    start = stream.peek(2)[:2] if hasattr(stream, "peek") else b""
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    # surrogateescape carries invalid bytes through the parser, so that only their row is rejected.
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")


def _record_lines(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    for line in lines:
        record.append(line)
        yield line


def _read_csv_lines(path: str, format_name: str) -> Iterator[list[RawLine]]:
    """Rows of a CSV with a header. A row may span lines; its number is that of its last line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    line_number = 0
    with _open_binary(path) as file:
        try:
            text = _open_text(path, file)
            header_line = text.readline()
            # Excel may begin a file with the delimiter that it uses: sep=;
            separator_line = re.fullmatch(r"\s*sep=(.)\s*", header_line, re.IGNORECASE)
            header_line = text.readline() if separator_line else header_line
            # Spreadsheets of many countries write semicolons. No field name of a log has any of these in it.
            delimiter = "\t" if format_name == "tsv" else max(",;\t|", key=header_line.count)
            row_lines: list[str] = []
            reader = csv.reader(_record_lines(chain([header_line], text), row_lines), delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            names = [name for name in header if name]
            header_problem = "two columns have one name" if len(set(names)) < len(names) else None
            while True:
                row_lines.clear()
                try:
                    cells = next(reader, None)
                except csv.Error:
                    yield [RawLine(reader.line_num, b"", _LINE_TOO_LONG)]
                    continue
                if cells is None:
                    break
                line_number = reader.line_num
                if cells:
                    yield _build_csv_rows(header, cells, row_lines, delimiter, line_number, header_problem)
        except UnicodeError:
            yield [RawLine(line_number + 1, b"", "not UTF-8")]
        except (EOFError, zlib.error, OSError) as error:
            yield [RawLine(line_number + 1, b"", _describe_broken_file(path, error))]


def _build_csv_rows(
    header: Sequence[str], cells: Sequence[str], row_lines: Sequence[str], delimiter: str, line_number: int,
    problem: str | None,
) -> list[RawLine]:  # fmt: skip
    """The row of some lines of a CSV; a row for each of the lines if a quote that is not closed joined them."""
    raw = delimiter.join(cells).encode("utf-8", "surrogateescape")
    is_last = not row_lines[-1].endswith(("\n", "\r"))
    if is_last and "".join(row_lines).count('"') % 2:
        problem = "broken CSV file"
    elif len(cells) != len(header):
        problem = "broken CSV file" if is_last and len(cells) < len(header) else "wrong number of cells"
    elif not _is_utf8(raw):
        problem = "not UTF-8"
    elif _has_escaped_quotes(row_lines, delimiter):
        problem = 'quotes in cells are written \\" and not ""'
    if problem == "wrong number of cells":
        first_line = line_number - len(row_lines) + 1
        raw_lines = [line.rstrip("\r\n").encode("utf-8", "surrogateescape") for line in row_lines]
        return [RawLine(first_line + i, raw_line, problem) for i, raw_line in enumerate(raw_lines) if raw_line]
    if problem is not None:
        return [RawLine(line_number, raw, problem)]
    row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    return [RawLine(line_number, json.dumps(row).encode())]


def _has_escaped_quotes(row_lines: Sequence[str], delimiter: str) -> bool:
    """Whether a quoted cell has quotes after backslashes (MySQL, Redshift), which would end it and mangle its text."""
    if not any('\\"' in line for line in row_lines):
        return False
    try:
        next(csv.reader(row_lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return True
    return False


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
