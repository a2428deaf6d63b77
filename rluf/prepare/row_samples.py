"""Rows of a prepared data set to look at before training: some of each label, as they are in its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROWS_PER_LABEL = 20
"""Rows of each label that the page of the data card lists."""

_MAX_CHARS = 600
"""Characters of a text that the page has; the middle of a longer one is left out."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One training row in words: data, label, number of messages before the last one, last message, response."""

    output_name: str
    label: str
    earlier_messages: int
    prompt: str
    response: str


def sample_training_rows(data_folder: Path) -> list[SampleRow]:
    """ROWS_PER_LABEL training rows of each label and kind of data, read from the files of a data set.

    The rows of a file are in the order of a hash, so the first ones are a random sample.
    """
    samples: list[SampleRow] = []
    for path in sorted(data_folder.glob("*/train.parquet")):
        parquet_file = pq.ParquetFile(path)
        names = ("label", "messages", "response", "chosen", "rejected")
        columns = [name for name in names if name in parquet_file.schema_arrow.names]
        if "messages" not in columns or len(columns) < 2:
            continue
        label_counts: Counter[str] = Counter()
        for batch in parquet_file.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                for sample in _describe_row(path.parent.name, row):
                    if label_counts[sample.label] < ROWS_PER_LABEL:
                        label_counts[sample.label] += 1
                        samples.append(sample)
            if len(label_counts) > 1 and min(label_counts.values()) == ROWS_PER_LABEL:
                break
    return sorted(samples, key=lambda sample: (sample.output_name, sample.label))


def _describe_row(output_name: str, row: Mapping[str, Any]) -> list[SampleRow]:
    *earlier, last = row["messages"]
    if "chosen" in row:
        labels = [("chosen", row["chosen"]), ("rejected", row["rejected"])]
    else:
        labels = [(("loved" if row["label"] else "not loved") if output_name == "love" else f"label {row['label']}",
                   row["response"])]  # fmt: skip
    prompt_text = _shorten_text(last["content"])
    return [SampleRow(output_name, label, len(earlier), prompt_text, _shorten_text(text)) for label, text in labels]


def _shorten_text(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return text
    return f"{text[: _MAX_CHARS // 2]} [... {len(text) - _MAX_CHARS} characters ...] {text[-_MAX_CHARS // 2 :]}"
