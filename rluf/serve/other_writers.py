"""Rows of the other writers of a feedback store: a user may choose between the responses of two clusters."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection

import pyarrow.compute as pc
from pyarrow import fs
from pydantic import ValidationError

from rluf.errors import DataError
from rluf.prepare.readers.feedback_folder import WRITER_PREFIX, is_in_hidden_folder
from rluf.prepare.schema import FeedbackRecord
from rluf.serve.parquet_folder import ParquetFolder

logger = logging.getLogger("rluf.serve")


class OtherWriters(ParquetFolder):
    """Finds settled rows in the folders of all other writers. Reads each file once for an id."""

    def __init__(self, writer_root: str) -> None:
        """`writer_root` is the folder or URL of this process's writer; a store with one writer has no others."""
        root, _, self._own_name = writer_root.rstrip("/").rpartition("/")
        super().__init__(root)
        self._searched_ids: defaultdict[str, set[str]] = defaultdict(set)  # by file
        self._found_records: dict[str, FeedbackRecord] = {}

    def find_records(self, ids: Collection[str], first_day: str) -> dict[str, FeedbackRecord]:
        """The records of those `ids` that another writer has written since `first_day` (YYYY-MM-DD)."""
        wanted_ids = set(ids)
        if not self._own_name.startswith(WRITER_PREFIX) or not wanted_ids:
            self._searched_ids.clear()
            self._found_records.clear()
            return {}
        self._open_root()
        for path in self._list_others_files(first_day):
            new_ids = wanted_ids - self._searched_ids[path] - self._found_records.keys()
            if not new_ids:
                continue
            try:
                rows = self._read_table(path, filters=pc.field("id").isin(sorted(new_ids))).to_pylist()
                records = [FeedbackRecord.model_validate(row) for row in rows]
            except (DataError, OSError, ValidationError) as error:
                # Perhaps the other writer has merged the file meanwhile; the next call looks again.
                logger.warning("feedback store %s: %s not searched for a choice: %s", self.root, path, error)
                continue
            self._searched_ids[path] |= new_ids
            self._found_records |= {record.id: record for record in records}
        return {row_id: record for row_id, record in self._found_records.items() if row_id in wanted_ids}

    def _list_others_files(self, first_day: str) -> list[str]:
        selector = fs.FileSelector(self._base_path, allow_not_found=True, recursive=True)
        paths = [info.path.removeprefix(f"{self._base_path}/") for info in self._filesystem.get_file_info(selector)]
        return sorted(
            path
            for path in paths
            if path.endswith(".parquet") and not path.rpartition("/")[2].startswith(".")
            if not path.startswith(f"{self._own_name}/") and not is_in_hidden_folder(path)
            if path.rpartition("date=")[2][:10] >= first_day
        )
