"""The index of the second pass: columns come from the files each time, views take rows, and little stays in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rluf.prepare.workspace import BucketWriter, IndexTable, load_band_hashes, read_column, use_system_memory

START = datetime(2026, 1, 1, tzinfo=UTC)


def write_index(folder: Path, file_rows: tuple[int, ...], bucket_count: int) -> pa.Table:
    """Write an index of several files and return all of it, in the order of its batches."""
    tables, first_row = [], 0
    for file_index, row_count in enumerate(file_rows):
        rows = np.arange(first_row, first_row + row_count)
        table = pa.table({
            "row_key": pa.array(rows.astype(np.uint64)),
            "time": pa.array([START + timedelta(seconds=int(row)) for row in rows], pa.timestamp("us", "UTC")),
            "reaction_label": pa.array([None if row % 3 else int(row % 2) for row in rows], pa.int8()),
            "row_band_hashes": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(rows, 6).astype(np.uint64)), 6),
        })  # fmt: skip
        row_buckets = rows % bucket_count
        writer = BucketWriter([folder / "index" / "feedback" / f"{file_index:05d}.arrow"], bucket_count)
        writer.write(row_buckets, [table])
        writer.close()
        tables.append(table.take(pa.array(np.argsort(row_buckets, kind="stable"))))
        first_row += row_count
    return pa.concat_tables(tables)


@pytest.mark.parametrize(("file_rows", "bucket_count"), [((7,), 1), ((10, 1, 25), 4), ((300, 200), 7)])
def test_columns_rows_and_batches_are_those_of_the_files(
    tmp_path: Path, file_rows: tuple[int, ...], bucket_count: int
) -> None:
    table = write_index(tmp_path, file_rows, bucket_count)
    index = IndexTable(str(tmp_path), "feedback")
    assert index.num_rows == sum(file_rows) and [sum(rows) for rows in index.batch_rows] == list(file_rows)
    assert index.column_names == ["row_key", "time", "reaction_label"]
    row_key = table["row_key"].to_numpy()
    assert read_column(index, "row_key").tolist() == row_key.tolist()
    assert read_column(index, "time").tolist() == [int(START.timestamp() + row) * 10**6 for row in row_key.tolist()]
    labels = read_column(index, "reaction_label", -128)
    assert labels.tolist() == [-128 if row % 3 else row % 2 for row in row_key.tolist()]
    rows = np.flatnonzero(row_key % 2 == 0)
    band_hashes = load_band_hashes(str(tmp_path), "feedback", rows, [1, 4], "row_band_hashes")
    assert band_hashes.tolist() == [[row, row] for row in row_key[rows].tolist()]


def test_views_take_rows_and_share_the_columns_that_are_set(tmp_path: Path) -> None:
    write_index(tmp_path, (10, 5), 2)
    index = IndexTable(str(tmp_path), "feedback")
    view = index.take(np.array([0, 3, 14]))
    all_keys = read_column(index, "row_key")
    assert view.num_rows == 3 and read_column(view, "row_key").tolist() == all_keys[[0, 3, 14]].tolist()
    index.set_column("row_key", pa.array(all_keys + np.uint64(100)))
    assert read_column(view, "row_key").tolist() == (all_keys[[0, 3, 14]] + 100).tolist()
    assert index.num_rows == 15 and not IndexTable(str(tmp_path), "prompts").files


def test_a_column_that_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    write_index(tmp_path, (50_000,), 3)
    with use_system_memory():
        index = IndexTable(str(tmp_path), "feedback")
        bytes_before = pa.total_allocated_bytes()
        for name in index.column_names:
            assert len(index[name]) == 50_000
        assert pa.total_allocated_bytes() - bytes_before < 50_000
