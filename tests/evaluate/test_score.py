"""rluf.evaluate score: parts, resuming, the actor pool against a single process, output and errors."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError, ModelError
from rluf.evaluate import __main__ as evaluate
from rluf.evaluate import score
from rluf.reward.calibration import Calibration
from tests.reward.test_model import write_checkpoint
from tests.shared_ray import SharedRay


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    return write_checkpoint(
        "tiny-encoder", folder / "cache", folder / "model", Calibration("love", "platt", max_tokens=64)
    )


def write_heldout_file(path: Path, row_count: int, *, is_pairwise: bool = False) -> Path:
    rng = random.Random(1)
    lines = []
    for number in range(row_count):
        row: dict[str, object] = {"id": f"r{number}", "group": f"g{number % 9}"}
        row["messages"] = [{"role": "user", "content": rng.choice(("Hi", "Grüße", "你好"))}]
        if is_pairwise:
            row |= {"chosen": "yes " * rng.randrange(6), "rejected": "no " * rng.randrange(6)}
        else:
            row |= {"response": "word " * rng.randrange(9), "label": rng.randrange(2)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n" + ("\n" if number == 3 else ""))
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_scores(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_ids(path: Path) -> list[str]:
    return [row["id"] for row in read_scores(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_parts_cover_every_row_once_in_order(tmp_path: Path, name: str) -> None:
    data_path = write_heldout_file(tmp_path / name, 23)
    parts = score.split_into_parts(data_path, 5)
    assert [part.row_count for part in parts] == [5, 5, 5, 5, 3]
    assert [row["id"] for part in parts for row in score.read_part(data_path, part)] == [f"r{i}" for i in range(23)]


def test_the_command_prints_figures_last_and_writes_one_score_per_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_pairwise, metric in ((False, "auroc"), (True, "pair_accuracy")):
        data_path = write_heldout_file(tmp_path / f"{metric}.jsonl.gz", 30, is_pairwise=is_pairwise)
        output_path = tmp_path / f"{metric}.scores.jsonl"
        exit_code = evaluate.main(
            ["score", "--model", str(model), "--data", str(data_path), "--output", str(output_path)]
        )
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert exit_code == 0
        assert result["n"] == 30
        assert result["clusters"] == 9
        assert set(result[metric]) == {"mean", "low", "high"}
        assert {"ece", "brier", "length_only_prefers"} < set(result)
        rows = read_scores(output_path)
        assert [row["id"] for row in rows] == [f"r{i}" for i in range(30)]
        assert all(0 < row["score"] < 1 for row in rows)


def test_an_interrupted_run_resumes_with_the_missing_parts(model: Path, tmp_path: Path) -> None:
    valid_path = write_heldout_file(tmp_path / "rows.jsonl", 30)
    full_run = score.score_file(model, valid_path, tmp_path / "full.jsonl", actor_count=0, part_rows=10)
    lines = valid_path.read_text(encoding="utf-8").splitlines(keepends=True)
    invalid_path = tmp_path / "bad.jsonl"
    invalid_path.write_text("".join([*lines[:26], "{}\n", *lines[27:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:27"):
        score.score_file(model, invalid_path, tmp_path / "out.jsonl", actor_count=0, part_rows=10)
    (interrupted_folder,) = tmp_path.glob(".out.jsonl-*")
    assert sorted(file.name for file in interrupted_folder.glob("*.jsonl")) == ["000000.jsonl", "000001.jsonl"]
    work_folder = score.prepare_work_folder(model, valid_path, tmp_path / "out.jsonl", 10)
    for file in interrupted_folder.glob("*.jsonl"):
        file.rename(work_folder / file.name)
    resumed = score.score_file(model, valid_path, tmp_path / "out.jsonl", actor_count=0, part_rows=10)
    assert (full_run["scored_now"], resumed["scored_now"]) == (30, 10)
    assert resumed["auroc"] == full_run["auroc"]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "full.jsonl").read_bytes()


def test_invalid_input_is_refused(model: Path, tmp_path: Path) -> None:
    data_path = write_heldout_file(tmp_path / "rows.jsonl", 3)
    with pytest.raises(ModelError, match=r"config\.json"):
        score.score_file(tmp_path, data_path, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        score.score_file(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        score.score_file(model, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "fake.jsonl.gz").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        score.score_file(model, tmp_path / "fake.jsonl.gz", tmp_path / "out.jsonl")


@pytest.mark.slow
def test_the_actor_pool_gives_the_scores_of_a_single_process(
    model: Path, tmp_path: Path, shared_ray: SharedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", shared_ray.address)
    data_path = write_heldout_file(tmp_path / "rows.jsonl.gz", 45)
    in_process = score.score_file(model, data_path, tmp_path / "in_process.jsonl", actor_count=0, part_rows=10)
    pool = score.score_file(model, data_path, tmp_path / "pool.jsonl", actor_count=2, part_rows=10)
    assert read_ids(tmp_path / "pool.jsonl") == read_ids(tmp_path / "in_process.jsonl")
    scores = [[row["score"] for row in read_scores(tmp_path / name)] for name in ("pool.jsonl", "in_process.jsonl")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # the number of threads changes the order of sums
    assert pool["n"] == in_process["n"] == 45
    lines = gzip.decompress(data_path.read_bytes()).decode().splitlines(keepends=True)
    invalid_path = tmp_path / "bad.jsonl"
    invalid_path.write_text("".join([*lines[:20], "no row\n", *lines[20:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:21"):
        score.score_file(model, invalid_path, tmp_path / "bad-scores.jsonl", actor_count=1, part_rows=10)
    shared_ray.check_idle()
