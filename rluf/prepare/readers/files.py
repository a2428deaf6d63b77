"""Log files: entries of `data.*` become files, and files become numbered raw rows, whatever the format.

A file may be local or a URL that pyarrow knows (s3://, gs://, abfs://, file://) or fsspec (memory://, http://). Each
row has its number, so that a quarantined one can be located. Rows are read in batches, since logs have millions.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import glob
import gzip
import hashlib
import inspect
import io
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.config.data import DataSource
from rluf.config.objectives import LABELS_KEY_PREFIX
from rluf.errors import DataError
from rluf.prepare.readers.datasets import DATASET_READERS, LogReader
from rluf.prepare.readers.products import PRODUCT_READERS
from rluf.utils.paths import find_sample_log
from rluf.utils.plugins import load_plugin

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (
    *(f"{name}{suffix}" for name in (".jsonl", ".ndjson", ".json", ".csv") for suffix in ("", ".gz", ".zst")),
    ".parquet",
    ".arrow",
)
"""File names that are read. A .json file also has one object per line; Hugging Face saves data sets as .arrow."""

MAX_LINE_BYTES = 16 * 2**20
"""Longest line in bytes. A longer one is cut there and quarantined."""

STRIPE_ROWS = 256
"""Consecutive rows that go to the same task."""

_CHUNK_BYTES = 2**20
_LINE_TOO_LONG = "line too long"

_METADATA_FILES = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "config.json")

_ROOTED_SCHEMES = ("file", "memory")
"""Schemes whose paths start with a slash; those of object stores start with a bucket."""

_TEXT_COLUMNS = frozenset(
    {"id", "conversation_id", "user_id", "response", "chosen", "rejected", "group", "model_version", "response_id"}
)
"""CSV columns that are text even if a cell looks like a number."""


@dataclass(frozen=True, slots=True)
class LogSource:
    """One file, the kind of data in it, and the reader that adapts it (None: the rows have rluf's schema).

    `location` is a local path or a URL.
    """

    kind_name: str
    location: str
    reader_name: str | None

    @property
    def local_path(self) -> Path:
        """The location as a local path; not for URLs."""
        return Path(self.location)


@dataclass(frozen=True, slots=True)
class RawLine:
    """One raw row: line number (from 1; in Parquet the row number), its bytes, and the problem with it, if any."""

    line_number: int
    raw: bytes
    problem: str | None = None


def resolve_sources(entries: Sequence[DataSource | str], kind_name: str = "*") -> list[LogSource]:
    """Files of the entries of data.<kind>, in order: path, glob, folder, URL, sample:<kind>, or a reader and a path.

    Without a kind, files are looked up, but not whether a reader returns that kind. No file is opened. Raises DataError
    that names the entry if a file is missing, its name has no known format, or a reader is unknown or of another kind.
    """
    sources = []
    for entry in entries:
        reader_name, path = (None, entry) if isinstance(entry, str) else (entry.reader, entry.path)
        if reader_name is not None:
            find_reader(reader_name, kind_name)
        try:
            paths = _find_files(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"data.{kind_name}: cannot look up {path!r}: {error}") from error
        missing_paths = [path for path in paths if "://" not in path and not Path(path).is_file()]
        if not paths or missing_paths:
            raise DataError(
                f"data.{kind_name}: no such file: {(missing_paths or [path])[0]!r} (from {path!r}); "
                f"check data.{kind_name} in the config"
            )
        for file_path in paths:
            if not file_path.endswith(DATA_SUFFIXES):
                raise DataError(
                    f"data.{kind_name}: unknown format of {file_path!r}; expected a name that ends in one of "
                    f"{', '.join(DATA_SUFFIXES)}"
                )
            sources.append(LogSource(kind_name, file_path, reader_name))
    return sources


def find_reader(reader_name: str, kind_name: str = "*") -> LogReader:
    """The reader of a name, or of a function as package.module:function, which returns rows of the entry's own kind.

    Raises DataError for an unknown name or a reader of another kind, SettingsError if the function cannot be imported.
    """
    readers = DATASET_READERS | PRODUCT_READERS
    # Readers of labeled rows serve every objective that is trained on labels.
    row_kind = "safety" if kind_name.startswith(LABELS_KEY_PREFIX) else kind_name
    if ":" in reader_name:
        read_item = load_plugin(reader_name, kind="reader", known_names=readers)
        return LogReader(reader_name, kind_name, read_item)
    if reader_name not in readers:
        known_names = [reader.name for reader in readers.values() if row_kind in (reader.kind_name, "*")]
        close_names = difflib.get_close_matches(reader_name, known_names, n=1)
        readers_hint = f"readers of data.{kind_name}: {', '.join(known_names)}, or package.module:function"
        hint = f"did you mean {close_names[0]}?" if close_names else readers_hint
        raise DataError(f"data.{kind_name}: no reader is called {reader_name!r}; {hint}")
    reader = readers[reader_name]
    if row_kind not in (reader.kind_name, "*"):
        raise DataError(
            f"data.{kind_name}: reader {reader_name} returns {reader.kind_name} rows, expected {row_kind}; "
            f"move the entry to data.{reader.kind_name}"
        )
    return reader


def _find_files(path: str) -> list[str]:
    if path.startswith("sample:"):
        return [str(find_sample_log(path.removeprefix("sample:")))]
    return _find_remote_files(path) if "://" in path else _find_local_files(path)


def _find_local_files(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file() and _is_data_file(str(file)))
    # An existing file comes before globbing: its name may contain brackets.
    if path.exists():
        return [str(path)]
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _is_data_file(path: str) -> bool:
    """Whether a file of a folder has rows: by its suffix, except for the metadata files of Hugging Face data sets."""
    return path.endswith(DATA_SUFFIXES) and path.rpartition("/")[2] not in _METADATA_FILES


def _find_remote_files(url: str) -> list[str]:
    """Files of a URL: one file, everything below a folder, or matches of a pattern (* also matches across folders)."""
    prefix = url
    while glob.has_magic(prefix):
        prefix = prefix.rpartition("/")[0]
    filesystem, root = resolve_filesystem(prefix)
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.File:
        return [url]
    if info.type == fs.FileType.NotFound:
        return []
    entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    files = [entry.path for entry in entries if entry.type == fs.FileType.File]
    pattern = root + url[len(prefix) :]
    if pattern != root:
        files = [file for file in files if fnmatch.fnmatch(file, pattern)]
    scheme = url.partition("://")[0]
    slash = "/" if scheme in _ROOTED_SCHEMES else ""
    return sorted(f"{scheme}://{slash}{file.lstrip('/')}" for file in files if _is_data_file(file))


def fingerprint_sources(sources: Sequence[LogSource]) -> str:
    """SHA-256 that changes with the raw data: over readers and bytes of local files, and over URL, size and time of
    change of remote ones. Of a reader that is not built in, it includes the code.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.kind_name} {source.reader_name} {source.local_path.name}\n".encode())
        if source.reader_name is not None and ":" in source.reader_name:
            digest.update(Path(inspect.getfile(find_reader(source.reader_name).read_item)).read_bytes())
        if "://" in source.location:
            filesystem, path = resolve_filesystem(source.location)
            info = filesystem.get_file_info(path)
            digest.update(f"{source.location} {info.size} {info.mtime_ns}\n".encode())
        else:
            with source.local_path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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


def read_line_batches(path: str, stripe_index: int = 0, stripe_count: int = 1) -> Iterator[list[RawLine]]:
    """Raw rows of a file in batches, without blank lines; only the rows of one stripe if there are several.

    Each stripe reads the whole file but validates only its own rows, so that one compressed file still uses several
    cores. A truncated file yields the rows before the end and one line with the problem.
    """
    base_path = path.removesuffix(".gz").removesuffix(".zst")
    if base_path.endswith((".parquet", ".arrow")):
        batches = _read_arrow_lines(path)
    else:
        batches = _read_csv_lines(path) if base_path.endswith(".csv") else _read_text_lines(path)
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


def _decompress_stream(path: str, file: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.endswith(".zst"):
        zstd_stream = pa.CompressedInputStream(pa.PythonFile(file), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, zstd_stream), _CHUNK_BYTES)
    return file


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # read1 returns what is decoded so far; read would lose it when a truncated file raises.
    read = getattr(stream, "read1", stream.read)
    while data := read(_CHUNK_BYTES):
        yield data


def _split_lines(path: str, stream: BinaryIO) -> Iterator[list[tuple[bytes, str | None]]]:
    """Batches of lines of a stream with the problem of each, if any; lines are cut at MAX_LINE_BYTES."""
    # `rest` is the unfinished last line; `is_cut` says that bytes of it were already discarded.
    rest, is_cut, file_problem = b"", False, None
    try:
        for data in _read_chunks(stream):
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
    except (EOFError, zlib.error, gzip.BadGzipFile):
        file_problem = "broken gzip file"
    except OSError as error:
        # Arrow raises OSError for broken zstd data; for other files it is a real I/O error.
        if not path.endswith(".zst"):
            raise
        logger.warning("%s: truncated or corrupt zstd file: %s", path, error)
        file_problem = "broken zstd file"
    if rest or file_problem:
        yield [(rest[:MAX_LINE_BYTES], file_problem or (_LINE_TOO_LONG if is_cut else None))]


def _read_text_lines(path: str) -> Iterator[list[RawLine]]:
    line_number = 0
    with _open_binary(path) as file:
        for batch in _split_lines(path, _decompress_stream(path, file)):
            lines = []
            for data, problem in batch:
                line_number += 1
                if line_number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")  # byte order mark of Windows editors
                lines.append(RawLine(line_number, data.rstrip(b"\r"), problem))
            yield lines


def _to_json_value(value: object) -> str:
    """JSON form of an Arrow value that JSON has no type for: times as ISO 8601, bytes as text."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _encode_rows(row_offset: int, rows: list[dict[str, Any]]) -> list[RawLine]:
    return [
        RawLine(row_number, json.dumps(row, default=_to_json_value).encode())
        for row_number, row in enumerate(rows, row_offset + 1)
    ]


def _read_record_batches(path: str, file: BinaryIO) -> Iterator[pa.RecordBatch]:
    if path.endswith(".parquet"):
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


def _read_arrow_lines(path: str) -> Iterator[list[RawLine]]:
    row_count = 0
    with _open_binary(path) as file:
        try:
            for batch in _read_record_batches(path, file):
                yield _encode_rows(row_count, batch.to_pylist())
                row_count += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s: unreadable after row %d: %s", path, row_count, error)
            format_name = "Parquet" if path.endswith(".parquet") else "Arrow"
            yield [RawLine(row_count + 1, b"", f"broken {format_name} file")]


def _parse_cell(cell_text: str) -> Any:
    """Value of a CSV cell: None if empty; a whole number, a boolean or JSON where it is one; else text."""
    if cell_text == "":
        return None
    if cell_text[0] in "[{" or cell_text in ("true", "false", "null") or cell_text.lstrip("-").isdecimal():
        try:
            return json.loads(cell_text)
        except ValueError:
            return cell_text
    return cell_text


def _read_csv_lines(path: str) -> Iterator[list[RawLine]]:
    """Rows of a CSV with a header. A row may span lines; its number is that of its last line."""
    line_number = 0
    with _open_binary(path) as file:
        # surrogateescape carries invalid bytes through the parser, so that only their row is rejected.
        text = io.TextIOWrapper(_decompress_stream(path, file), "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text)
        try:
            header = next(reader, None)
            for cells in reader:
                line_number = reader.line_num
                if not cells:
                    continue
                raw = ",".join(cells).encode("utf-8", "surrogateescape")
                if header is None or len(cells) != len(header):
                    yield [RawLine(line_number, raw, "wrong number of cells")]
                elif not _is_utf8(raw):
                    yield [RawLine(line_number, raw, "not UTF-8")]
                else:
                    pairs = zip(header, cells, strict=True)
                    row = {name: (cell if name in _TEXT_COLUMNS else _parse_cell(cell)) for name, cell in pairs}
                    yield [RawLine(line_number, json.dumps(row).encode())]
        except csv.Error:
            yield [RawLine(reader.line_num, b"", "broken CSV")]
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield [RawLine(line_number + 1, b"", "broken gzip file")]
        except OSError:
            if not path.endswith(".zst"):
                raise
            yield [RawLine(line_number + 1, b"", "broken zstd file")]


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def parse_partition_fields(path: str) -> Mapping[str, str]:
    """Fields in the names of Hive-style partition folders: .../model_version=v3/locale=en/part.jsonl."""
    pairs = (folder.partition("=") for folder in path.split("/")[:-1])
    return {name: unquote(value) for name, equals, value in pairs if equals and name.isidentifier()}
