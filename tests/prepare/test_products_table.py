"""Exports of products are read with a short entry and every label right; docs/data.md says what is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import DataSource
from rluf.prepare.labels import LOVED, NOT_LOVED, LabelRules
from rluf.prepare.readers.groups import group_messages
from rluf.prepare.readers.sources import LogSource
from rluf.prepare.validate_pass import ValidateTask, validate_rows
from rluf.prepare.workspace import read_table
from tests.prepare.product_samples import SAMPLES, ProductSample

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
TABLE_HEADER = "| export | entry in | in addition to the path | left out or assumed, and counted |\n|---|---|---|---|\n"


def read_sample(sample: ProductSample, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any]]:
    """Result of the first pass on a sample, its rows, and their label codes."""
    source = LogSource(sample.kind, str(sample.write(folder)), DataSource(path="x", **sample.entry))
    sources = group_messages([source], folder / "grouped")
    task = ValidateTask(
        work_folder=str(folder / "work"), kind_name=sample.kind, entry=sources[0].entry.model_dump(mode="json"),
        sources=[(index, source.location) for index, source in enumerate(sources)], stripe_index=0, stripe_count=1,
        bucket_count=1,
        current_time="2026-06-01T00:00:00+00:00", dev_share=0.1, test_share=0.1, seed=1, redact_kinds=(),
        labels=sample.entry.get("labels", {}), contradictions="latest", erasure_marks=(),
    )  # fmt: skip
    result = validate_rows(task)
    index = read_table(next((folder / "work" / "index").rglob("*.arrow")))
    row_files = list((folder / "work" / "rows").rglob("*.arrow"))
    rows = read_table(row_files[0]).to_pylist() if row_files else []
    return result, rows, index["reaction_label"].to_pylist() if "reaction_label" in index.column_names else []


def summarize_rows(sample: ProductSample, result: dict[str, Any], rows: list[Any], labels: list[Any]) -> dict[str, Any]:
    """What the rows mean, in the form of `ProductSample.expected`."""
    if sample.kind == "reactions":
        return dict(result["reactions"])
    if sample.kind == "preferences":
        return {row["chosen"]: row["rejected"] for row in rows}
    if sample.kind == "safety":
        return {row["response"]: row["label"] for row in rows}
    if sample.kind == "prompts":
        return {row["messages"][-1]["content"]: None for row in rows}
    key = "response" if "KTO" in sample.name else "id"
    return {row[key]: label for row, label in zip(rows, labels, strict=True)}


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.name for sample in SAMPLES])
def test_every_row_of_an_export_is_read_with_its_label_or_counted(sample: ProductSample, tmp_path: Path) -> None:
    result, rows, labels = read_sample(sample, tmp_path)
    counts: dict[str, Counter[str]] = {"in": Counter(), "dropped": Counter(), "quarantined": Counter()}
    for row_count in result["row_counts"]:
        counts[row_count.outcome][row_count.reason] += row_count.rows
    assert counts["quarantined"] == {} and counts["dropped"] == sample.dropped
    assert summarize_rows(sample, result, rows, labels) == sample.expected
    assert sum(counts["in"].values()) == len(sample.expected) + sum(sample.dropped.values())
    assert sample.response is None or sample.response in {row["response"] for row in rows}
    # A line of YAML for each column and each other key of the entry, its path included.
    assert 1 + len(sample.entry.get("columns", [])) + len(sample.entry.keys() - {"columns"}) <= 8
    assert all(code in (LOVED, NOT_LOVED, None) for code in labels)
    rules = LabelRules(sample.entry.get("labels", {}))
    assert all(rules.find_code(name) in (LOVED, NOT_LOVED) for name in result["reactions"])


def test_the_rated_message_and_its_thread_are_read(tmp_path: Path) -> None:
    rows = {row["id"]: row for row in read_sample(SAMPLES[0], tmp_path)[1]}
    assert rows["fb1"]["response"] == "assistant 0" and len(rows["fb1"]["messages"]) == 1
    assert rows["fb2"]["response"] == "assistant 1" and len(rows["fb2"]["messages"]) == 3
    (tmp_path / "other").mkdir()
    (librechat,) = (sample for sample in SAMPLES if sample.name == "LibreChat conversation export")
    threads = {row["id"]: row["messages"] for row in read_sample(librechat, tmp_path / "other")[1]}
    assert [message["content"] for message in threads["m4"]] == ["text of m1", "text of m2b", "text of m3"]


def test_the_docs_have_the_table_of_products(tmp_path: Path) -> None:
    lines = []
    for number, sample in enumerate(SAMPLES):
        folder = tmp_path / str(number)
        folder.mkdir()
        result, _, _ = read_sample(sample, folder)
        entry = ", ".join(f"{key}: {value}" if isinstance(value, str) else key for key, value in sample.entry.items())
        losses = [note for note in result["notes"] if not note.startswith("derived field")]
        losses += [row_count.reason for row_count in result["row_counts"] if row_count.outcome == "dropped"]
        lines.append(
            f"| {sample.name} | `{sample.kind}` | {entry or 'nothing'} | {', '.join(sorted(losses)) or '-'} |\n"
        )
    table = TABLE_HEADER + "".join(lines)
    assert table in DOCS.read_text(encoding="utf-8"), f"docs/data.md has another table; write this one:\n{table}"
