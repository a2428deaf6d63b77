"""Entries of `data.*` that are tables: a query or a name, read with Ray Data into Parquet files that are then removed.

Only the rows that exist now are read, as the table's own log or database says. The files lie next to the data set while
it is prepared, since they hold the raw log.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rluf.config.data import SECRET_OPTION_PATTERN, DataSource
from rluf.errors import DataError
from rluf.prepare.workspace import remove_stale_folders

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

TableFolders = Mapping[tuple[str, int], str]
"""Folder with the rows of a table, by kind of data and index of its entry."""


def _read_sql(query: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    arguments = dict(options)
    driver = importlib.import_module(str(arguments.pop("driver")))
    return ray.data.read_sql(query, partial(driver.connect, **arguments), override_num_blocks=1)


def _read_mongo(collection: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    database, _, name = collection.partition(".")
    return ray.data.read_mongo(database=database, collection=name, **options)


def _read_bigquery(table_or_query: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    key = "query" if " " in table_or_query else "dataset"
    return ray.data.read_bigquery(**{key: table_or_query}, **options)


def _read_snowflake(query: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    return ray.data.read_snowflake(query, dict(options))


def _read_delta(path: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    return ray.data.read_delta(path, **options)


def _read_iceberg(table_name: str, options: Mapping[str, Any]) -> ray.data.Dataset:
    import ray.data

    return ray.data.read_iceberg(table_identifier=table_name, **options)


@dataclass(frozen=True, slots=True)
class _TableReader:
    """A source of tables: how it is read, the option that it cannot do without, and its modules by package."""

    read: Callable[[str, Mapping[str, Any]], ray.data.Dataset]
    required_option: str | None
    modules: Mapping[str, str]


_READERS = {
    "sql": _TableReader(_read_sql, "driver", {}),
    "mongo": _TableReader(_read_mongo, "uri", {"pymongoarrow": "pymongoarrow"}),
    "bigquery": _TableReader(
        _read_bigquery, "project_id",
        {"google.cloud.bigquery": "google-cloud-bigquery",
         "google.cloud.bigquery_storage": "google-cloud-bigquery-storage"},
    ),
    "snowflake": _TableReader(_read_snowflake, "account", {"snowflake.connector": "snowflake-connector-python"}),
    "delta": _TableReader(_read_delta, None, {"deltalake": "deltalake"}),
    "iceberg": _TableReader(_read_iceberg, "catalog_kwargs", {"pyiceberg": "pyiceberg"}),
}  # fmt: skip


def check_table(entry: DataSource, kind_name: str) -> None:
    """Raise DataError if a table cannot be read: an option or a package is missing, or a password is in the config."""
    name = f"data.{kind_name}: source {entry.source}"
    reader = _READERS[str(entry.source)]
    if reader.required_option is not None and reader.required_option not in entry.options:
        raise DataError(f"{name} needs options.{reader.required_option}; docs/data.md shows an entry of each source")
    for option, value in entry.options.items():
        if isinstance(value, str) and SECRET_OPTION_PATTERN.search(option) and not value.startswith("$"):
            raise DataError(
                f"{name}: options.{option} looks like a secret, and settings are written to the run folder; export it "
                f"as a variable, and write options.{option}=$NAME"
            )
    modules = dict(reader.modules)
    if entry.source == "sql":
        modules[str(entry.options["driver"])] = str(entry.options["driver"])
    missing = [package for module, package in modules.items() if not _has_module(module)]
    if missing:
        raise DataError(f"{name} needs {' and '.join(missing)}; install it: pip install {' '.join(missing)}")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def export_tables(
    entries_by_kind: Mapping[str, Sequence[DataSource | str]], parent_folder: Path
) -> Iterator[TableFolders]:
    """Export all tables of the entries to folders in `parent_folder`, which are removed when the block ends.

    Ray must be initialized if there is one. Raises DataError for a table that cannot be read or has no rows.
    """
    tables = [
        (kind_name, index, entry)
        for kind_name, entries in entries_by_kind.items()
        for index, entry in enumerate(entries)
        if isinstance(entry, DataSource) and entry.source is not None
    ]
    if not tables:
        yield {}
        return
    # By the pattern of abandoned working folders: those of a killed job are removed with them.
    remove_stale_folders(parent_folder)
    root = parent_folder / f".prepare-tables-{uuid.uuid4().hex[:8]}"
    try:
        folders = {}
        for kind_name, index, entry in tables:
            check_table(entry, kind_name)
            folder = root / f"{kind_name.replace('.', '-')}-{index}"
            folder.mkdir(parents=True)
            row_count = _export_table(entry, kind_name, folder)
            logger.info("data.%s: %s %s: read rows=%d", kind_name, entry.source, entry.path, row_count)
            folders[kind_name, index] = str(folder)
        yield folders
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _export_table(entry: DataSource, kind_name: str, folder: Path) -> int:
    """Write the rows of a table as numbered Parquet files; returns their number."""
    from ray.exceptions import RayError

    reader = _READERS[str(entry.source)]
    options = _expand_variables(entry.options)
    errors: tuple[type[BaseException], ...] = (
        RayError, ImportError, OSError, ValueError, TypeError, LookupError, RuntimeError, pa.ArrowException
    )  # fmt: skip
    if entry.source == "sql":
        errors = (*errors, importlib.import_module(str(entry.options["driver"])).Error)
    row_count = 0
    try:
        batches = reader.read(entry.path, options).iter_batches(batch_size=None, batch_format="pyarrow")
        for number, table in enumerate(batches):
            for column in table.schema:
                if isinstance(column.type, pa.BaseExtensionType):
                    raise DataError(
                        f"data.{kind_name}: column {column.name!r} of {entry.path!r} has values of several types; cast "
                        "it to text in the query"
                    )
            pq.write_table(table, folder / f"part-{number:05d}.parquet")
            row_count += table.num_rows
    except errors as error:
        reason = _describe_cause(error)
        raise DataError(f"data.{kind_name}: cannot read {entry.source} {entry.path!r}: {reason}") from error
    if not row_count:
        raise DataError(f"data.{kind_name}: {entry.source} {entry.path!r} has no rows; check the query or the name")
    return row_count


def _describe_cause(error: BaseException) -> str:
    """One line of the error that a driver raised. Ray wraps it, and adds lines on retries to its text."""
    cause = getattr(error, "cause", None)
    text = str(cause).strip().partition("\n")[0] if cause is not None else str(error).strip().rpartition("\n")[2]
    return text or type(cause or error).__name__


def _expand_variables(value: Any) -> Any:
    """The value with $NAME replaced by the environment's value, at any depth."""
    if isinstance(value, str):
        return os.path.expandvars(value)
    if isinstance(value, Mapping):
        return {key: _expand_variables(item) for key, item in value.items()}
    return [_expand_variables(item) for item in value] if isinstance(value, (list, tuple)) else value
