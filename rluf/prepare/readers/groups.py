"""Logs with a row for each message become logs with a row for each chat, in files of the working folder.

A reader sees one row at a time, and the context of a message is in other rows. The rows are written to buckets by the
hash of their chat, and grouped bucket by bucket, so that only one bucket is in memory.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from rluf.errors import DataError
from rluf.prepare.readers.columns import get_by_path
from rluf.prepare.readers.files import BROKEN_FILE_REASONS, read_line_batches
from rluf.prepare.readers.sources import LogSource, find_reader, has_single_messages
from rluf.utils.hashing import hash64

logger = logging.getLogger(__name__)

_MAX_BUCKETS = 64
"""Files that are open at once; a bucket of a log of 64 GB has 1 GB."""

_BUCKET_BYTES = 16 * 2**20
"""Bytes of the log's files per bucket, which may be compressed."""


def group_messages(sources: Sequence[LogSource], folder: Path) -> list[LogSource]:
    """The sources, with those whose reader groups messages replaced by files of chats in `folder`.

    A row of these files is {"messages": [...]} with the rows of one chat in the order of the log. Rows without the path
    that the reader groups by, and broken ones, are rows of their own, which the reader rejects. Raises DataError for a
    file that ends early: which chats miss messages is unknown.
    """
    grouped: dict[tuple[str, int], list[LogSource]] = defaultdict(list)
    for source in sources:
        if has_single_messages(source):
            grouped[source.kind_name, source.entry_index].append(source)
    result, replaced = [], set[tuple[str, int]]()
    for source in sources:
        key = source.kind_name, source.entry_index
        if key not in grouped:
            result.append(source)
        elif key not in replaced:
            replaced.add(key)
            files = _group_entry(grouped[key], folder / f"{source.kind_name.replace('.', '-')}-{source.entry_index}")
            entry = source.entry.model_copy(update={"format": "jsonl"})
            result += [replace(source, location=str(file), entry=entry) for file in files]
    return result


def _group_entry(sources: Sequence[LogSource], folder: Path) -> list[Path]:
    """Files of the chats of one entry; those that a killed job has finished are not written again."""
    if not folder.is_dir():
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        reader = find_reader(str(sources[0].entry.reader), sources[0].kind_name)
        message_count = _write_buckets(sources, reader.group_by, partial_folder)
        chat_count = sum(_group_bucket(path) for path in sorted(partial_folder.glob("*.bucket")))
        logger.info(
            "data.%s: %s: grouped messages=%d chats=%d", sources[0].kind_name, sources[0].entry.path, message_count,
            chat_count,
        )  # fmt: skip
        partial_folder.rename(folder)
    return sorted(folder.glob("*.jsonl"))


def _count_buckets(sources: Sequence[LogSource]) -> int:
    if any("://" in source.location for source in sources):
        return _MAX_BUCKETS
    return min(_MAX_BUCKETS, 1 + sum(source.local_path.stat().st_size for source in sources) // _BUCKET_BYTES)


def _write_buckets(sources: Sequence[LogSource], group_by: str, folder: Path) -> int:
    """Write each row to the bucket of its chat, as the chat's id, a tab and the row; returns the number of rows."""
    row_count, bucket_count = 0, _count_buckets(sources)
    with ExitStack() as stack:
        files: dict[int, BinaryIO] = {}
        for source in sources:
            for lines in read_line_batches(source.location, format_name=source.entry.format):
                for line in lines:
                    if line.problem in BROKEN_FILE_REASONS:
                        raise DataError(
                            f"data.{source.kind_name}: {line.problem} at {source.location}:{line.line_number}; which "
                            "chats miss messages is unknown. Copy the file again"
                        )
                    row_count += 1
                    chat_id = _find_chat_id(line.raw, group_by) or f"{source.location}:{line.line_number}"
                    bucket = hash64(chat_id, "rluf-chat") % bucket_count
                    if bucket not in files:
                        files[bucket] = stack.enter_context((folder / f"{bucket:02d}.bucket").open("wb"))
                    raw = b" ".join(line.raw.splitlines())
                    files[bucket].write(json.dumps(chat_id).encode() + b"\t" + raw + b"\n")
    return row_count


def _find_chat_id(raw: bytes, group_by: str) -> str | None:
    try:
        value = get_by_path(json.loads(raw), group_by)
    except (ValueError, RecursionError):
        return None
    return None if value is None else json.dumps(value)


def _group_bucket(path: Path) -> int:
    """Replace a bucket by a file of its chats, in the order of their first rows; returns the number of chats."""
    rows_by_chat: dict[bytes, list[bytes]] = defaultdict(list)
    with path.open("rb") as bucket_file:
        for line in bucket_file:
            chat_id, _, raw = line.rstrip(b"\n").partition(b"\t")
            rows_by_chat[chat_id].append(raw)
    with path.with_suffix(".jsonl").open("wb") as chat_file:
        for rows in rows_by_chat.values():
            chat_file.write(b'{"messages": [' + b", ".join(rows) + b"]}\n")
    path.unlink()
    return len(rows_by_chat)
