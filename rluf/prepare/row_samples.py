"""Rows of a prepared data set to look at before training: some of each label and entry, cut as a model would read them.

Which rows is on the card as hashes of their ids; the texts come from the files. So an erasure removes them here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rluf.prepare.schema import BYTES_PER_TOKEN, find_data_kind
from rluf.prepare.splits import ROW_KEY_SALT
from rluf.utils.hashing import hash64

_MAX_BYTES = 2000
"""Bytes of a row that the page shows, where its reward model would read more."""

_PROMPT_SHARE = 0.25
"""Share of a row that its context keeps (rluf.reward.text.MIN_PROMPT_SHARE)."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One training row in words: data, entry of the config, label, context and response as far as they are read."""

    output_name: str
    source: str
    label: str
    prompt: str
    response: str


def sample_training_rows(data_folder: Path, card: Mapping[str, Any]) -> list[SampleRow]:
    """The training rows that the card names as samples, read from the files of the data set."""
    samples: list[SampleRow] = []
    lengths = {find_data_kind(kind).output_name: length for kind, length in card.get("lengths", {}).items()}
    for output_name, keys_by_source in card.get("samples", {}).items():
        source_by_key = {key: source for source, keys in keys_by_source.items() for key in keys}
        token_limit = lengths.get(output_name, {}).get("max_tokens", _MAX_BYTES)
        byte_limit = min(BYTES_PER_TOKEN * token_limit, _MAX_BYTES)
        parquet_file = pq.ParquetFile(data_folder / output_name / "train.parquet")
        names = ("id", "label", "messages", "response", "chosen", "rejected")
        columns = [name for name in names if name in parquet_file.schema_arrow.names]
        for batch in parquet_file.iter_batches(1024, columns=columns):
            if not source_by_key:
                break
            for index, row_id in enumerate(batch["id"].to_pylist()):
                source = source_by_key.pop(hash64(row_id, ROW_KEY_SALT), None)
                if source is not None:
                    samples += _describe_row(output_name, source, batch.slice(index, 1).to_pylist()[0], byte_limit)
    return sorted(samples, key=lambda sample: (sample.output_name, sample.source, sample.label))


def _describe_row(output_name: str, source: str, row: Mapping[str, Any], byte_limit: int) -> list[SampleRow]:
    if "chosen" in row:
        labels = [("chosen", row["chosen"]), ("rejected", row["rejected"])]
    else:
        labels = [(("loved" if row["label"] else "not loved") if output_name == "love" else f"label {row['label']}",
                   row["response"])]  # fmt: skip
    *earlier, last = row["messages"]
    context = "\n".join([*(f"{message['role']}: {message['content']}" for message in earlier), last["content"]])
    return [SampleRow(output_name, source, label, *shorten_row(context, text, byte_limit)) for label, text in labels]


def shorten_row(context: str, response: str, byte_limit: int) -> tuple[str, str]:
    """Context and response as far as a reward model reads them, estimated by bytes: start and middle are left out.

    The context loses its start, down to a quarter of the limit, then the response its middle.
    """
    context_bytes, response_bytes = context.encode("utf-8", "replace"), response.encode("utf-8", "replace")
    context_minimum = min(len(context_bytes), int(_PROMPT_SHARE * byte_limit))
    response_limit = byte_limit - context_minimum
    if len(response_bytes) > response_limit:
        start, end = response_bytes[: response_limit // 2], response_bytes[-(response_limit - response_limit // 2) :]
        cut_text = f" [... {len(response_bytes) - response_limit} bytes ...] "
        response = start.decode("utf-8", "ignore") + cut_text + end.decode("utf-8", "ignore")
    context_limit = max(byte_limit - len(response_bytes), context_minimum)
    if len(context_bytes) > context_limit:
        context_end = context_bytes[len(context_bytes) - context_limit :].decode("utf-8", "ignore")
        context = f"[... {len(context_bytes) - context_limit} bytes ...] {context_end}"
    return context, response
