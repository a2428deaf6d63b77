"""rluf.evaluate score: parts, resuming, the pool of actors against the process itself, and what the user reads."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError, ModelError
from rluf.evaluate import __main__ as evaluate
from rluf.evaluate import score as scoring
from rluf.reward.calibration import Calibration
from tests.reward.test_model import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    return checkpoint("tiny-encoder", folder / "cache", folder / "model", Calibration("love", "platt", max_tokens=64))


def _file(path: Path, count: int, *, pairs: bool = False) -> Path:
    rng = random.Random(1)
    lines = []
    for number in range(count):
        row: dict[str, object] = {"id": f"r{number}", "group": f"g{number % 9}"}
        row["messages"] = [{"role": "user", "content": rng.choice(("Hi", "Grüße", "你好"))}]
        if pairs:
            row |= {"chosen": "yes " * rng.randrange(6), "rejected": "no " * rng.randrange(6)}
        else:
            row |= {"response": "word " * rng.randrange(9), "label": rng.randrange(2)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n" + ("\n" if number == 3 else ""))
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as out:
        out.write("".join(lines))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _ids(path: Path) -> list[str]:
    return [row["id"] for row in _rows(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_parts_cover_every_row_once_in_order(tmp_path: Path, name: str) -> None:
    data = _file(tmp_path / name, 23)
    parts = scoring.cut(data, 5)
    assert [part.rows for part in parts] == [5, 5, 5, 5, 3]
    assert [row["id"] for part in parts for row in scoring.read_part(data, part)] == [f"r{i}" for i in range(23)]


def test_the_command_prints_figures_last_and_writes_a_score_a_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pairs, figure in ((False, "auroc"), (True, "pair_accuracy")):
        data = _file(tmp_path / f"{figure}.jsonl.gz", 30, pairs=pairs)
        output = tmp_path / f"{figure}.scores.jsonl"
        code = evaluate.main(["score", "--model", str(model), "--data", str(data), "--output", str(output)])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert code == 0
        assert told["n"] == 30
        assert told["clusters"] == 9
        assert set(told[figure]) == {"mean", "low", "high"}
        assert {"ece", "brier", "length_floor_prefers"} < set(told)
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [row["id"] for row in rows] == [f"r{i}" for i in range(30)]
        assert all(0 < row["score"] < 1 for row in rows)


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    good = _file(tmp_path / "rows.jsonl", 30)
    whole = scoring.score(model, good, tmp_path / "whole.jsonl", actors=0, part_rows=10)
    lines = good.read_text(encoding="utf-8").splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join([*lines[:26], "{}\n", *lines[27:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:27"):
        scoring.score(model, bad, tmp_path / "out.jsonl", actors=0, part_rows=10)
    (kept,) = tmp_path.glob(".out.jsonl-*")
    assert sorted(file.name for file in kept.glob("*.jsonl")) == ["000000.jsonl", "000001.jsonl"]
    again = scoring.work_folder(model, good, tmp_path / "out.jsonl", 10)
    for file in kept.glob("*.jsonl"):
        file.rename(again / file.name)
    resumed = scoring.score(model, good, tmp_path / "out.jsonl", actors=0, part_rows=10)
    assert (whole["scored_now"], resumed["scored_now"]) == (30, 10)
    assert resumed["auroc"] == whole["auroc"]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_bad_input_is_named(model: Path, tmp_path: Path) -> None:
    data = _file(tmp_path / "rows.jsonl", 3)
    with pytest.raises(ModelError, match=r"config\.json"):
        scoring.score(tmp_path, data, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        scoring.score(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        scoring.score(model, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "fake.jsonl.gz").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        scoring.score(model, tmp_path / "fake.jsonl.gz", tmp_path / "out.jsonl")


@pytest.mark.slow
def test_a_pool_of_actors_scores_as_this_process_does(model: Path, tmp_path: Path) -> None:
    data = _file(tmp_path / "rows.jsonl.gz", 45)
    here = scoring.score(model, data, tmp_path / "here.jsonl", actors=0, part_rows=10)
    pool = scoring.score(model, data, tmp_path / "pool.jsonl", actors=2, part_rows=10)
    assert _ids(tmp_path / "pool.jsonl") == _ids(tmp_path / "here.jsonl")
    scores = [[row["score"] for row in _rows(tmp_path / name)] for name in ("pool.jsonl", "here.jsonl")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # other threads add in another order
    assert pool["n"] == here["n"] == 45
    lines = gzip.decompress(data.read_bytes()).decode().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join([*lines[:20], "no row\n", *lines[20:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:21"):
        scoring.score(model, bad, tmp_path / "bad-scores.jsonl", actors=1, part_rows=10)
