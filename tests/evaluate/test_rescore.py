"""rluf.evaluate rescore: a run judged by a model that its training never used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rluf.errors import ModelError
from rluf.evaluate import __main__ as evaluate
from rluf.evaluate.rescore import RESULT_FILE
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.types import ALIGNED_ARM, ANSWERS_FILE, BASE_ARM, REPEAT_ARM, PolicyAnswer, ScoringItem
from rluf.utils.files import read_json, write_jsonl
from tests.reward.test_model import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rescore")
    return write_checkpoint(
        "tiny-encoder", folder / "cache", folder / "model", Calibration("love", "platt", max_tokens=64)
    )


def write_answers(run_folder: Path, *, arms: tuple[str, ...], scores: dict[str, float]) -> list[PolicyAnswer]:
    answers = [
        PolicyAnswer(
            arm, f"p{prompt}", "casual", ({"role": "user", "content": f"question {prompt}"},),
            f"{arm} {'word ' * sample}", "stop" if sample else "length", 3, scores,
        )
        for arm in arms for prompt in range(6) for sample in range(2)
    ]  # fmt: skip
    run_folder.mkdir(exist_ok=True)
    write_jsonl(run_folder / ANSWERS_FILE, [dataclasses.asdict(answer) for answer in answers])
    return answers


def test_means_and_comparisons_are_those_of_the_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_answers(tmp_path / "run", arms=(BASE_ARM, ALIGNED_ARM, REPEAT_ARM), scores={"love": 0.5})
    assert evaluate.main(["rescore", str(tmp_path / "run"), "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (result,) = json.loads(lines[-1])["models"]
    assert result == read_json(tmp_path / "run" / RESULT_FILE)["models"][0]
    assert set(result["comparisons"]) == {"aligned_vs_base", "repeat_vs_base"} and len(lines) == 3
    items = [ScoringItem(list(a.messages), a.text, a.finish_reason == "length") for a in answers]
    scores = np.array([score.value for score in RewardModel.load(model, batch_tokens=512).score(items, "love")])
    assert result["means"] == {
        arm: pytest.approx(scores[start : start + 12].mean(), abs=1e-6)
        for arm, start in ((BASE_ARM, 0), (ALIGNED_ARM, 12), (REPEAT_ARM, 24))
    }
    difference = result["comparisons"]["aligned_vs_base"]["difference"]
    assert difference["mean"] == pytest.approx(scores[12:24].mean() - scores[:12].mean(), abs=1e-6)
    assert difference["low"] < difference["mean"] < difference["high"]


def test_the_model_that_the_run_was_trained_on_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_answers(tmp_path / "run", arms=(BASE_ARM, ALIGNED_ARM), scores={})
    items = [ScoringItem(list(a.messages), a.text, a.finish_reason == "length") for a in answers]
    scores = RewardModel.load(model, batch_tokens=512).score(items, "love")
    rows = [
        dataclasses.asdict(answer) | {"scores": {"love": score.value}}
        for answer, score in zip(answers, scores, strict=True)
    ]
    write_jsonl(tmp_path / "run" / ANSWERS_FILE, rows)
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(["rescore", str(tmp_path / "run"), "--model", str(model)])
    assert exit_info.value.code == ModelError.exit_code
    assert "the run's own reward model" in capsys.readouterr().err
    assert not (tmp_path / "run" / RESULT_FILE).exists()


@pytest.mark.parametrize(("missing", "message"), [("answers", "has no answers.jsonl"), ("model", "has no config.json")])
def test_a_folder_without_answers_or_model_is_one_error(
    tmp_path: Path, model: Path, missing: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    if missing == "model":
        write_answers(tmp_path / "run", arms=(BASE_ARM, ALIGNED_ARM), scores={})
    folder = tmp_path if missing == "model" else model
    with pytest.raises(SystemExit):
        evaluate.main(["rescore", str(tmp_path / "run"), "--model", str(folder)])
    assert message in capsys.readouterr().err
