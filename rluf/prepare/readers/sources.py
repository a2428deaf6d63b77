"""Entries of `data.*` become log files: paths, globs, folders and URLs, each with its reader and columns."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from rluf.config.data import DataSource
from rluf.config.objectives import LABELS_KEY_PREFIX
from rluf.errors import DataError
from rluf.models.hub import download_data_set, list_network_errors
from rluf.prepare.readers.datasets import DATASET_READERS, LogReader
from rluf.prepare.readers.feedback_folder import REACTIONS_FOLDER, is_in_hidden_folder
from rluf.prepare.readers.files import FORMAT_BY_SUFFIX, detect_format, resolve_filesystem
from rluf.prepare.readers.products import PRODUCT_READERS
from rluf.prepare.readers.tables import TableFolders, check_table
from rluf.prepare.readers.traces import TRACE_READERS
from rluf.prepare.schema import order_kinds
from rluf.utils.paths import find_sample_log
from rluf.utils.plugins import load_plugin

logger = logging.getLogger(__name__)

_METADATA_FILES = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "config.json")

HUB_PREFIXES = ("hub:", "hf://datasets/")
"""Prefixes of a data set on the Hugging Face hub."""

_ROOTED_SCHEMES = ("file", "memory")
"""Schemes whose paths start with a slash; those of object stores start with a bucket."""


@dataclass(frozen=True, slots=True)
class LogSource:
    """One file, the kind of data in it, and its entry in the config; entries of a kind are numbered.

    `location` is a local path or a URL.
    """

    kind_name: str
    location: str
    entry: DataSource
    entry_index: int = 0

    @property
    def local_path(self) -> Path:
        """The location as a local path; not for URLs."""
        return Path(self.location)


def resolve_sources(
    entries: Sequence[DataSource | str], kind_name: str = "*", table_folders: TableFolders | None = None
) -> list[LogSource]:
    """Files of the entries of data.<kind>, in order: path, glob, folder, URL or sample:<kind>, alone or in a mapping.

    Without a kind, files are looked up, but not whether a reader returns that kind. No file is opened. Raises DataError
    that names the entry if a file is missing, its name has no known format, a reader is unknown or of another kind, or
    a file belongs to a table (Delta, Iceberg, Hudi), whose own log says which of its rows exist. Tables have files only
    in `table_folders`; without these it is checked that they can be read.
    """
    sources = []
    for entry_index, path_or_entry in enumerate(entries):
        entry = DataSource(path=path_or_entry) if isinstance(path_or_entry, str) else path_or_entry
        path = entry.path
        if entry.reader is not None:
            find_reader(entry.reader, kind_name)
        if entry.source is not None:
            folder = (table_folders or {}).get((kind_name, entry_index))
            if folder is None:
                check_table(entry, kind_name)
            else:
                entry = entry.model_copy(update={"format": "parquet"})
                files = sorted(str(file) for file in Path(folder).glob("*.parquet"))
                sources += [LogSource(kind_name, file, entry, entry_index) for file in files]
            continue
        try:
            paths = _find_files(entry, kind_name)
        except (OSError, pa.ArrowException, *list_network_errors()) as error:
            first_line = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(f"data.{kind_name}: cannot look up {path!r}: {first_line}") from error
        missing_paths = [path for path in paths if "://" not in path and not Path(path).is_file()]
        if not paths or missing_paths:
            raise DataError(
                f"data.{kind_name}: no such file: {(missing_paths or [path])[0]!r} (from {path!r}); "
                f"check data.{kind_name} in the config"
            )
        _refuse_table_files(paths, kind_name)
        for file_path in paths:
            if entry.format is None and detect_format(file_path) is None:
                raise DataError(
                    f"data.{kind_name}: unknown format of {file_path!r}; expected a name that ends in one of "
                    f"{', '.join(FORMAT_BY_SUFFIX)} (plain, .gz, .zst or .bz2), or an entry with a format: "
                    f"{{path: {path}, format: jsonl}}"
                )
            sources.append(LogSource(kind_name, file_path, entry, entry_index))
    return sources


def resolve_all_sources(
    entries_by_kind: Mapping[str, Sequence[DataSource | str]], table_folders: TableFolders | None = None
) -> list[LogSource]:
    """Files of all kinds, in the order of kinds; with the late reactions of the feedback stores that rows come from."""
    sources = [
        source
        for kind in order_kinds(entries_by_kind)
        for source in resolve_sources(entries_by_kind[kind], kind, table_folders)
    ]
    reaction_entries = list(entries_by_kind.get("reactions", ()))
    entry_by_folder: dict[str, DataSource] = {}
    for source in sources:
        if source.kind_name == "feedback" and source.entry.reader is None:
            # A row's file is in the store's folder or in that of its day.
            parents = [source.location.rpartition("/")[0], *source.location.rsplit("/", 2)[:1]]
            for folder in dict.fromkeys(f"{parent}/{REACTIONS_FOLDER}" for parent in parents):
                entry_by_folder.setdefault(folder, source.entry)
    late_entries = [
        DataSource(path=folder, labels=entry.labels)
        for folder, entry in entry_by_folder.items()
        if folder not in {entry if isinstance(entry, str) else entry.path for entry in reaction_entries}
        and _is_folder(folder)
    ]
    if late_entries:
        sources = [source for source in sources if source.kind_name != "reactions"]
        sources += resolve_sources([*reaction_entries, *late_entries], "reactions", table_folders)
    return sources


def _is_folder(path: str) -> bool:
    if "://" not in path:
        return Path(path).is_dir()
    filesystem, root = resolve_filesystem(path)
    return bool(filesystem.get_file_info(root).type == fs.FileType.Directory)


def is_hub_data_set(entry: DataSource | str) -> bool:
    """Whether an entry is downloaded from the Hugging Face hub."""
    return (entry if isinstance(entry, str) else entry.path).startswith(HUB_PREFIXES)


_TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
"""Folders by which a table is recognized; an Iceberg table has metadata/*.metadata.json."""


_TABLE_ADVICE = {
    "Delta": "Write {{source: delta, path: {folder}}}, or ",
    "Iceberg": "Write {{source: iceberg, path: database.table, options: {{catalog_kwargs: ...}}}}, or ",
    "Hudi": "Please ",
}
"""How to read a table of a format; the sentence continues with an export."""


def _refuse_table_files(paths: Sequence[str], kind_name: str) -> None:
    """Raise DataError if a file is part of a table: files that the table's log has removed are still on the disk."""
    for folder in dict.fromkeys(parent for path in paths for parent in _list_parents(path)):
        format_name = _detect_table(folder)
        if format_name is not None:
            raise DataError(
                f"data.{kind_name}: {folder} is {'an' if format_name == 'Iceberg' else 'a'} {format_name} table, "
                "whose own log says which rows of its files still exist; read as loose files, deleted rows would come "
                f"back. {_TABLE_ADVICE[format_name].format(folder=folder)}export the table's present rows to a folder "
                "of Parquet files (SELECT * in the engine that writes it), and name that folder"
            )


def _list_parents(path: str) -> list[str]:
    """Folders above a file or URL, the root and the bucket excluded."""
    scheme, separator, rest = path.rpartition("://")
    # A link may lead into a table, or a table have links to its files.
    locations = [rest] if separator else [str(Path(path).absolute()), str(Path(path).resolve())]
    parents = dict.fromkeys(str(parent) for location in locations for parent in PurePosixPath(location).parents)
    return [scheme + separator + parent for parent in parents if parent not in ("/", ".")]


def _detect_table(folder: str) -> str | None:
    """Format of the table in a folder; None if it is an ordinary folder."""
    if "://" not in folder:
        path = Path(folder)
        names = [name for name in _TABLE_FORMATS if (path / name).is_dir()]
        has_metadata = any((path / "metadata").glob("*.metadata.json"))
    else:
        filesystem, root = resolve_filesystem(folder)
        infos = filesystem.get_file_info([f"{root}/{name}" for name in (*_TABLE_FORMATS, "metadata")])
        is_folder = [info.type == fs.FileType.Directory for info in infos]
        names = [name for name, exists in zip(_TABLE_FORMATS, is_folder, strict=False) if exists]
        metadata_files = filesystem.get_file_info(fs.FileSelector(f"{root}/metadata")) if is_folder[-1] else []
        has_metadata = any(info.path.endswith(".metadata.json") for info in metadata_files)
    return _TABLE_FORMATS[names[0]] if names else "Iceberg" if has_metadata else None


def find_reader(reader_name: str, kind_name: str = "*") -> LogReader:
    """The reader of a name, or of a function as package.module:function, which returns rows of the entry's own kind.

    Raises DataError for an unknown name or a reader of another kind, SettingsError if the function cannot be imported.
    """
    readers = DATASET_READERS | PRODUCT_READERS | TRACE_READERS
    # Readers of labeled rows serve every objective that is trained on labels.
    get_row_kind = "safety" if kind_name.startswith(LABELS_KEY_PREFIX) else kind_name
    if ":" in reader_name:
        signature = "a function (JSON object, reader options) -> rows"
        read_item = load_plugin(reader_name, kind="reader", known_names=readers, signature=signature, argument_count=2)
        return LogReader(reader_name, kind_name, read_item)
    if reader_name not in readers:
        known_names = [reader.name for reader in readers.values() if get_row_kind in (reader.kind_name, "*")]
        close_names = difflib.get_close_matches(reader_name, known_names, n=1)
        readers_hint = f"readers of data.{kind_name}: {', '.join(known_names)}, or package.module:function"
        hint = f"did you mean {close_names[0]}?" if close_names else readers_hint
        raise DataError(f"data.{kind_name}: no reader is called {reader_name!r}; {hint}")
    reader = readers[reader_name]
    if get_row_kind not in (reader.kind_name, "*"):
        raise DataError(
            f"data.{kind_name}: reader {reader_name} returns {reader.kind_name} rows, expected {get_row_kind}; "
            f"move the entry to data.{reader.kind_name}"
        )
    return reader


def has_single_messages(source: LogSource) -> bool:
    """Whether a row of a file is one message of a chat, and its reader wants the chat (see groups.py)."""
    return source.entry.reader is not None and bool(find_reader(source.entry.reader, source.kind_name).group_by)


def _find_files(entry: DataSource, kind_name: str) -> list[str]:
    if entry.path.startswith("sample:"):
        return [str(find_sample_log(entry.path.removeprefix("sample:")))]
    for prefix in HUB_PREFIXES:
        if entry.path.startswith(prefix):
            return _select_data_files(download_data_set(entry.path.removeprefix(prefix)), entry, kind_name)
    if "://" in entry.path:
        files = _find_remote_files(entry.path)
    else:
        path = Path(entry.path).expanduser()
        # An existing file comes before globbing: its name may contain brackets.
        if path.is_file():
            return [str(path)]
        if not path.is_dir():
            matches = [file for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
            return sorted(file for file in matches if not _is_hidden_match(file, str(path)))
        files = sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not is_in_hidden_folder(file.relative_to(path).as_posix())
        )
        _refuse_table_files([str(path / "any"), *files], kind_name)
    if files == [entry.path]:
        return files
    return _select_data_files(files, entry, kind_name)


def _is_hidden_match(file: str, pattern: str) -> bool:
    """Whether a wildcard of the pattern stands for a hidden folder, which the pattern does not name."""
    pattern_folders = [name for name in pattern.split("/")[:-1] if name.startswith(("_", "."))]
    prefix_length = next(i for i, name in enumerate(pattern.split("/")) if glob.has_magic(name))
    folders = file.split("/")[prefix_length:-1]
    return any(
        name.startswith(("_", ".")) and not any(fnmatch.fnmatch(name, folder) for folder in pattern_folders)
        for name in folders
    )


def _select_data_files(files: Sequence[str], entry: DataSource, kind_name: str) -> list[str]:
    """Files of a folder or pattern that have rows; names the others in a warning, except hidden and metadata files."""
    names = {file: file.rpartition("/")[2] for file in files}
    visible = [file for file, name in names.items() if not name.startswith((".", "_")) and name not in _METADATA_FILES]
    selected = [file for file in visible if entry.format is not None or detect_format(file) is not None]
    skipped = [file for file in visible if file not in set(selected)]
    if skipped:
        logger.warning(
            "data.%s: %s: skipped files of unknown format: count=%d first=%s; set the entry's format to read them",
            kind_name, entry.path, len(skipped), ", ".join(skipped[:3]),
        )  # fmt: skip
    return selected


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
        files = [file for file in files if fnmatch.fnmatch(file, pattern) and not _is_hidden_match(file, pattern)]
    else:
        files = [file for file in files if not is_in_hidden_folder(file.removeprefix(f"{root}/"))]
    scheme = url.partition("://")[0]
    slash = "/" if scheme in _ROOTED_SCHEMES else ""
    return sorted(f"{scheme}://{slash}{file.lstrip('/')}" for file in files)


def _get_function(reader_name: str) -> Callable[..., Any]:
    read_item = find_reader(reader_name).read_item
    return read_item if read_item is not None else find_reader


def fingerprint_sources(sources: Sequence[LogSource]) -> str:
    """SHA-256 that changes with the raw data: over readers and bytes of local files, and over URL, size and time of
    change of remote ones. Of a reader that is not built in, it includes the code.
    """
    digest = hashlib.sha256()
    for source in sources:
        reader_name = source.entry.reader
        digest.update(f"{source.kind_name} {reader_name} {source.local_path.name}\n".encode())
        if reader_name is not None and ":" in reader_name:
            digest.update(Path(inspect.getfile(_get_function(reader_name))).read_bytes())
        if "://" in source.location:
            filesystem, path = resolve_filesystem(source.location)
            info = filesystem.get_file_info(path)
            digest.update(f"{source.location} {info.size} {info.mtime_ns}\n".encode())
        else:
            with source.local_path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parse_partition_fields(path: str) -> Mapping[str, str]:
    """Fields in the names of Hive-style partition folders: .../model_version=v3/locale=en/part.jsonl."""
    pairs = (folder.partition("=") for folder in path.split("/")[:-1])
    return {name: unquote(value) for name, equals, value in pairs if equals and name.isidentifier()}
