"""Rows of every kind for the tests of rluf.prepare."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]


def feedback_row(index: int, **changes: Any) -> Row:
    row: Row = {
        "id": f"f{index}",
        "conversation_id": f"c{index // 2}",
        "turn": index % 2,
        "user_id": f"u{index // 2 % 97}",
        "time": f"2025-03-{1 + index % 28:02d}T10:00:00Z",
        "model_version": "base-1",
        "messages": [{"role": "user", "content": f"tell me something about {index}"}],
        "response": f"something about {index}",
        "reaction": "love" if index % 11 == 0 else None,
        "continued": None,
        "returned": True,
        "topic": ("casual", "facts")[index % 2],
        "locale": "en",
        "interface": "app",
        "device": None,
        "author": None,
        "finish_reason": None,
    }
    return row | changes


def preference_row(index: int, **changes: Any) -> Row:
    row: Row = {
        "id": f"p{index}",
        "messages": [{"role": "user", "content": f"question {index % 40}"}],
        "chosen": f"good {index}",
        "rejected": f"bad {index}",
        "group": f"g{index % 40}",
        "topic": "facts",
        "chosen_finish_reason": None,
        "rejected_finish_reason": "length" if index % 3 == 0 else "stop",
    }
    return row | changes


def safety_row(index: int, **changes: Any) -> Row:
    row: Row = {
        "id": f"s{index}",
        "messages": [{"role": "user", "content": f"request {index % 40}"}],
        "response": f"answer {index}",
        "label": index % 2,
        "group": f"g{index % 40}",
        "topic": "risk",
        "finish_reason": None,
    }
    return row | changes


def prompt_row(index: int, **changes: Any) -> Row:
    row: Row = {
        "id": f"q{index}",
        "messages": [{"role": "user", "content": f"prompt {index}"}],
        "topic": "writing",
        "split": "test" if index % 4 == 0 else "train",
    }
    return row | changes


def reaction_row(index: int, **changes: Any) -> Row:
    row: Row = {
        "id": f"e{index}",
        "response_id": f"f{index}",
        "time": f"2025-03-{1 + index % 28:02d}T10:05:00Z",
        "reaction": "love",
        "retracted": False,
    }
    return row | changes


def write_jsonl(path: Path, rows: Iterable[Row | bytes]) -> Path:
    """Write rows as JSON lines (bytes unchanged); gzip if the name ends in .gz."""
    encoded_rows = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in encoded_rows)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.fixture
def rows() -> dict[str, Callable[..., Row]]:
    """Factories of valid rows by kind: rows["feedback"](index, field=value, ...)."""
    return {
        "feedback": feedback_row,
        "preferences": preference_row,
        "safety": safety_row,
        "prompts": prompt_row,
        "reactions": reaction_row,
    }


@pytest.fixture
def jsonl() -> Callable[[Path, Iterable[Row | bytes]], Path]:
    return write_jsonl


@pytest.fixture
def log(tmp_path: Path) -> dict[str, Path]:
    """A complete, valid log: one file per kind."""
    row_counts = {"feedback": 1100, "preferences": 300, "safety": 200, "prompts": 40}
    factories = {"feedback": feedback_row, "preferences": preference_row, "safety": safety_row, "prompts": prompt_row}
    files = {}
    for kind, row_count in row_counts.items():
        order = list(range(row_count))
        random.Random(7).shuffle(order)
        files[kind] = write_jsonl(tmp_path / f"{kind}.jsonl.gz", (factories[kind](index) for index in order))
    return files
