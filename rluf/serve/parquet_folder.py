"""Parquet files of a feedback store below a folder or URL; each appears in one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rluf.errors import DataError
from rluf.prepare.readers.feedback_folder import WRITER_PREFIX, is_in_hidden_folder
from rluf.utils.files import atomic_write, fsync_path


class ParquetFolder:
    """Parquet files below a root, by their path relative to it. `_open_root` comes before any other method."""

    _filesystem: Any
    _base_path: str

    def __init__(self, root: str) -> None:
        """`root` is a folder or URL; nothing is opened yet."""
        self.root = root

    def _write_parquet(
        self, path: str, tables: Iterable[pa.Table], metadata: Mapping[bytes, bytes] | None = None
    ) -> None:
        """Write a Parquet file that appears in one step: renamed into place, or uploaded whole to an object store."""
        target = f"{self._base_path}/{path}"

        def write_tables(where: Any) -> None:
            remaining_tables = iter(tables)
            first_table = next(remaining_tables)
            schema = first_table.schema.with_metadata({**(first_table.schema.metadata or {}), **(metadata or {})})
            with pq.ParquetWriter(where, schema) as writer:
                for table in chain([first_table], remaining_tables):
                    writer.write_table(table.replace_schema_metadata(schema.metadata))

        if isinstance(self._filesystem, fs.LocalFileSystem):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(target)) as partial_file:
                write_tables(partial_file)
                fsync_path(partial_file)
            fsync_path(Path(target).parent)
        else:
            with self._filesystem.open_output_stream(target) as stream:
                write_tables(stream)

    def _read_table(self, path: str, **options: Any) -> pa.Table:
        try:
            return pq.read_table(f"{self._base_path}/{path}", filesystem=self._filesystem, partitioning=None, **options)
        except (pa.ArrowException, KeyError) as error:
            raise DataError(
                f"{self._base_path}/{path} in the feedback store is not a feedback log: {error}; move it elsewhere"
            ) from error

    def _read_as(self, schema: pa.Schema, path: str) -> pa.Table:
        """A file's rows with the columns of `schema`, null where it lacks one. Raises DataError for further columns."""
        table = self._read_table(path)
        try:
            return pa.concat_tables([schema.empty_table(), table], promote_options="default").cast(schema)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(
                f"{self._base_path}/{path} in the feedback store has other columns than this release writes: {error}; "
                "move it elsewhere"
            ) from error

    def _list_files(self) -> list[str]:
        """Paths of all Parquet files under the root, those of reactions after those of rows, each in order of time."""
        selector = fs.FileSelector(self._base_path, allow_not_found=True, recursive=True)
        prefix = f"{self._base_path}/"
        paths = [info.path.removeprefix(prefix) for info in self._filesystem.get_file_info(selector)]
        files = [
            path
            for path in paths
            if path.endswith(".parquet") and not path.rpartition("/")[2].startswith(".")
            if not path.startswith(WRITER_PREFIX)
        ]
        return sorted(files, key=lambda path: (is_in_hidden_folder(path), path))

    def _delete_files(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._filesystem.delete_file(f"{self._base_path}/{path}")

    def _delete_partial_files(self) -> None:
        """Delete files that a killed process left half-written; call it as the only writer of this folder."""
        if not isinstance(self._filesystem, fs.LocalFileSystem):
            return
        root = Path(self._base_path)
        for path in root.rglob(".*.parquet.*.part"):  # names of atomic_write
            if not path.relative_to(root).parts[0].startswith(WRITER_PREFIX):
                path.unlink()

    def _open_root(self) -> None:
        if "://" in self.root:
            try:
                self._filesystem, self._base_path = fs.FileSystem.from_uri(self.root.rstrip("/"))
            except pa.ArrowException as error:
                raise DataError(f"serve.feedback_path={self.root} is not a writable URL: {error}") from error
            return
        folder = Path(self.root).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self._filesystem, self._base_path = fs.LocalFileSystem(), str(folder)
