"""Where raw rows come from: entries of `data.*` become files.

A file may be local or a URL that pyarrow knows (s3://, gs://, abfs://, file://) or fsspec (memory://, http://).
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from rluf.errors import DataError
from rluf.prepare.readers.datasets import READERS
from rluf.prepare.readers.files import filesystem
from rluf.prepare.readers.products import MAPS
from rluf.utils.paths import sample_file

SUFFIXES = (
    *(f"{name}{packed}" for name in (".jsonl", ".ndjson", ".json", ".csv") for packed in ("", ".gz", ".zst")),
    ".parquet",
    ".arrow",
)
"""File names that are read; .json means one object a line too, .arrow is what a saved Hugging Face data set holds."""

_NOTES = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "config.json")

_ROOTED = ("file", "memory")
"""Schemes whose paths start with a slash, where those of object stores start with a bucket."""


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


def _split_reader(entry: str, kind: str) -> tuple[str | None, str]:
    """Reader and path of an entry. Raises DataError for readers that do not exist or give another kind than asked."""
    name, colon, rest = entry.partition(":")
    if not colon or rest.startswith("//") or "/" in name or "\\" in name or "." in name:
        return None, entry
    readers = READERS | MAPS
    if name not in readers:
        known = [reader.name for reader in readers.values() if kind in (reader.kind, "*")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"readers of data.{kind}: {', '.join(known)}, sample"
        raise DataError(f"data.{kind}: no reader is called {name!r} (entry {entry!r}); {hint}")
    if kind not in (readers[name].kind, "*"):
        raise DataError(
            f"data.{kind}: reader {name} gives {readers[name].kind} rows, not {kind} (entry {entry!r}); "
            f"move the entry to data.{readers[name].kind}"
        )
    return name, rest


def _local(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.rglob("*") if file.is_file() and _is_data(str(file)))
    if path.exists():
        return [str(path)]
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())


def _is_data(path: str) -> bool:
    """Whether a file of a folder holds rows: by its ending, without the notes that Hugging Face keeps beside them."""
    return path.endswith(SUFFIXES) and path.rpartition("/")[2] not in _NOTES


def _remote(url: str) -> list[str]:
    """Files of a URL: one file, everything below a folder, or what a pattern matches (* also crosses folders)."""
    fixed = url
    while glob.has_magic(fixed):
        fixed = fixed.rpartition("/")[0]
    system, base = filesystem(fixed)
    info = system.get_file_info(base)
    if info.type == fs.FileType.File:
        return [url]
    if info.type == fs.FileType.NotFound:
        return []
    files = [f.path for f in system.get_file_info(fs.FileSelector(base, recursive=True)) if f.type == fs.FileType.File]
    pattern = base + url[len(fixed) :]
    if pattern != base:
        files = [file for file in files if fnmatch.fnmatch(file, pattern)]
    scheme = url.partition("://")[0]
    slash = "/" if scheme in _ROOTED else ""
    return sorted(f"{scheme}://{slash}{file.lstrip('/')}" for file in files if _is_data(file))


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
            system, inner = filesystem(source.location)
            info = system.get_file_info(inner)
            digest.update(f"{source.location} {info.size} {info.mtime_ns}\n".encode())
        else:
            with source.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
