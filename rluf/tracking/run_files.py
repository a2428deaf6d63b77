"""Files of numbers and texts in a run folder: metrics.jsonl, samples.jsonl and whole JSON files.

JSON has no NaN: a number that is not finite is written as null, so that any reader can read the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from rluf.errors import DataError


class Answer(TypedDict):
    """One policy's response in a samples.jsonl row: text, calibrated score by objective, rule judges it fails."""

    text: str
    scores: dict[str, float]
    failed: list[str]


class DrawnRow(TypedDict):
    """One response that a training step drew. `reward` is combined, `kl` to the reference policy in nats (None where
    the step did not measure it), `failed` the rule judges that the response does not pass."""

    step: int
    version: int
    topic: str
    prompt: str
    response: str
    scores: dict[str, float]
    reward: float
    kl: float | None
    failed: list[str]


class SampleRow(TypedDict):
    """One prompt answered by both policies. `prompt` is the last user message."""

    prompt_id: str
    topic: str
    prompt: str
    base: Answer
    aligned: Answer


def jsonable(value: Any) -> Any:
    """`value` in plain JSON types: numpy scalars and arrays as numbers and lists, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence):
        return [jsonable(one) for one in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file whole or not at all (a temporary neighbour is renamed into place)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(json.dumps(jsonable(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    part.replace(path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    with part.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; an absent file is an empty one. DataError when the file is no JSON object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); restore the file or run again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a JSON object; restore the file or run again")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; an absent file has none.

    A last line without its end is what a killed run leaves: it is skipped. Any other bad line is a DataError.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not JSON ({error}); restore the file or run again") from error
    return rows


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


class JsonlMetrics:
    """Appends one JSON object a line and flushes it, so that a run can be watched, and read after it was killed."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; its folder is made if needed, the torn last line of a killed run is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _cut_torn_line(path)
        self._stream = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, such as {"step": 3, "love": 0.07, "kl": 0.01}."""
        self._stream.write(json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> JsonlMetrics:
        """Use as a context manager that closes the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()
