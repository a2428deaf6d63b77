"""The judge command: both file shapes, results by kind, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError
from rluf.simulate.__main__ import main
from rluf.simulate.ground_truth import Reader, ReaderInput
from rluf.simulate.judge import judge_file, read_heldout_rows
from rluf.types import Message
from tests.simulate.readings import FITTING, STOCK, make_reader

REQUESTS = [f"Question {n}?" for n in range(12)]
ANSWER, PHRASE = "Here is the answer to it.", "I am so glad that you asked!"


@pytest.fixture
def reader() -> Reader:
    inputs, readings = [], []
    for request in REQUESTS:
        messages = (Message(role="user", content=request),)
        inputs += [ReaderInput(messages, text, True) for text in (ANSWER, PHRASE, ANSWER[:-5])]
        readings += [FITTING, STOCK, replace(FITTING, end_logprob=-9.0)]
    return make_reader(inputs, readings)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def pair_row(n: int, rejected: str, kind: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": REQUESTS[n]}]
    return {"messages": messages, "chosen": ANSWER, "rejected": rejected, "group": str(n), "kind": kind}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_pairs_are_summarized_in_all_and_by_kind(tmp_path: Path, reader: Reader, name: str) -> None:
    rows = [pair_row(n, PHRASE, "generic") for n in range(6)] + [pair_row(n, ANSWER[:-5], "cut") for n in range(3)]
    rows.append({**pair_row(7, ANSWER, "reversed"), "chosen": PHRASE})
    output = tmp_path / "scores.jsonl"
    result = judge_file(write_rows(tmp_path / name, rows), output, "satisfaction", reader)
    assert result["n"] == 10
    assert result["pair_accuracy"]["mean"] == pytest.approx(0.9)
    assert result["by_kind"] == {
        "cut": {"n": 3, "pair_accuracy": 1.0},
        "generic": {"n": 6, "pair_accuracy": 1.0},
        "reversed": {"n": 1, "pair_accuracy": 0.0},
    }
    assert len(output.read_text("utf-8").splitlines()) == 10


def test_labels_are_ranked_and_a_finish_reason_wins_over_the_text(tmp_path: Path, reader: Reader) -> None:
    rows = [
        {"messages": [{"role": "user", "content": request}], "response": text, "label": label, "group": request}
        for request in REQUESTS
        for text, label in ((ANSWER, 1), (PHRASE, 0))
    ]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    assert judge_file(path, None, "helpfulness", reader)["auroc"]["mean"] == 1.0
    path = write_rows(tmp_path / "cut.jsonl", [{**row, "finish_reason": "length"} for row in rows[:2]] + rows[2:4])
    output = tmp_path / "scores.jsonl"
    judge_file(path, output, "helpfulness", reader)
    cut, _, finished, _ = (json.loads(line)["scores"]["helpfulness"] for line in output.read_text().splitlines())
    assert cut < finished - 0.1


def test_invalid_files_are_refused_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_heldout_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl:2 is not valid JSON"):
        read_heldout_rows(write_bad(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="has no rows"):
        read_heldout_rows(write_rows(tmp_path / "empty.jsonl", []))


def write_bad(path: Path) -> Path:
    path.write_text(json.dumps(pair_row(0, PHRASE, "generic")) + "\n{", "utf-8")
    return path


@pytest.mark.slow
def test_the_command_prints_figures_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "How long do I boil an egg?"}]
    answer = "Boil it for eight minutes, then put it in cold water."
    rejected = {"generic": "I am so happy that you are here today!", "cut": "Boil it for eight"}
    rows = [{"messages": messages, "chosen": answer, "rejected": text, "kind": kind} for kind, text in rejected.items()]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    assert main(["judge", "--data", str(path), "--score", "helpfulness"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["command"], result["kind"], result["n"]) == ("judge", "pairs", 2)
    assert result["by_kind"] == {kind: {"n": 1, "pair_accuracy": 1.0} for kind in ("cut", "generic")}
    with pytest.raises(SystemExit) as exit_info:
        main(["judge", "--data", str(tmp_path / "missing.jsonl")])
    assert exit_info.value.code == DataError.exit_code
