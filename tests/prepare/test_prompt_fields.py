"""Further fields of a prompt's row reach reward functions: from any shape of the log, redacted, typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rluf import api
from rluf.config.load import load_settings
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.objectives.reward_function import build_row
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.train.prompts import load_prompts
from rluf.types import ScoringItem

DATA_OFF = [f"data.{kind}=[]" for kind in ("feedback", "preferences", "safety")]
MESSAGES = [{"role": "user", "content": "What is 6 times 7?"}]


def prepare_prompts(tmp_path: Path, row: Mapping[str, Any], entry: str = "{path}") -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{**row, "id": f"p{index}", "split": ("train", "test")[index % 2]} for index in range(8)]
    # Every prompt has its own text: equal ones would be in one split only.
    texts = [json.dumps(line).replace("6 times", f"{index} times") for index, line in enumerate(rows)]
    path.write_text("".join(f"{text}\n" for text in texts))
    settings = load_settings(None, [*DATA_OFF, f"data.prompts={entry.format(path=path)}"]).settings
    build_data_set(settings, tmp_path / "data", lambda tasks: list(chain.from_iterable(map(run_task, tasks))))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"answer": "42"}, {"answer": "42"}),
        ({"answer": 42, "tests": ["a", 1.5, None], "meta": {"level": 3, "ok": True}},
         {"answer": 42, "tests": ["a", 1.5, None], "meta": {"level": 3, "ok": True}}),
        ({"contact": "write to jane@example.com", "card": 4111111111111111},
         {"contact": "write to <email>", "card": 4111111111111111}),
        ({}, None),
        ({"answer": "é \u2603"}, {"answer": "é \u2603"}),
        ({"long": "x" * 200_000}, None),
    ],
)  # fmt: skip
def test_fields_of_every_type_are_passed_on(
    fields: dict[str, Any], expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = prepare_prompts(tmp_path, {"messages": MESSAGES, "topic": "math", **fields})
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path))
    prompts = load_prompts(folder, "train", tokenizer, max_tokens=512)
    assert [prompt.fields for prompt in prompts] == [expected] * 4
    row = build_row(ScoringItem(prompts[0].messages, "42", False, prompts[0].id, prompts[0].topic, prompts[0].fields))
    assert {key: value for key, value in row.items() if key in fields} == (expected or {})
    assert (row["messages"], row["topic"], row["response"]) == (list(prompts[0].messages), "math", "42")


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ({"prompt": "What is 6 times 7?", "answer": "42"}, "{path}"),
        ({"prompt": MESSAGES, "answer": "42"}, "{path}"),
        ({"question": "What is 6 times 7?", "answer": "42"}, "{{path: {path}, columns: {{messages: question}}}}"),
    ],
    ids=["prompt text", "prompt messages", "columns"],
)
def test_fields_are_passed_on_from_every_shape_of_a_prompt(row: dict[str, Any], entry: str, tmp_path: Path) -> None:
    folder = prepare_prompts(tmp_path, row, entry)
    stored_rows = pq.read_table(folder / "prompts" / "train.parquet").to_pylist()
    assert len(stored_rows) == 4
    for stored_row in stored_rows:
        assert json.loads(stored_row["extra_fields"])["answer"] == "42"


@pytest.mark.parametrize("end", [[], [{"role": "assistant", "content": "42"}]], ids=["user", "assistant"])
def test_a_chat_without_id_and_split_is_a_prompt(
    end: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLUF_CACHE", str(tmp_path))
    questions = [f"What is {index} times 7?" for index in range(20)]
    rows = [{"messages": [{"role": "user", "content": question}, *end]} for question in questions]
    settings = api.load_settings(None, DATA_OFF, rows={"prompts": rows})
    build_data_set(settings, tmp_path / "data", lambda tasks: list(chain.from_iterable(map(run_task, tasks))))
    tables = [pq.read_table(path) for path in (tmp_path / "data").rglob("prompts/t*.parquet")]
    assert sorted(row["messages"][-1]["content"] for table in tables for row in table.to_pylist()) == sorted(questions)
