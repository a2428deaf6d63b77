import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rluf
from rluf.errors import DataError, SettingsError
from rluf.utils.event_loop import run_coroutine
from rluf.utils.plugins import load_plugin


def score_words(rows: Any) -> list[float]:
    return [float(len(row["response"].split())) for row in rows]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_CACHE", str(tmp_path / "cache"))


def test_every_public_name_can_be_imported() -> None:
    for name in rluf.__all__:
        assert getattr(rluf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'train_polcy'"):
        _ = rluf.train_polcy


def test_overrides_are_texts_or_a_mapping() -> None:
    by_text = rluf.load_settings("tiny", ["algorithm.steps=3", "algorithm.topic_weights={risky: 2}"])
    by_mapping = rluf.load_settings("tiny", {"algorithm.steps": 3, "algorithm.topic_weights": {"risky": 2}})
    assert by_text == by_mapping
    assert rluf.load_settings(None, {"algorithm.kl_target": None, "seed": 5}).seed == 5
    with pytest.raises(SettingsError, match=r"did you mean algorithm\.steps"):
        rluf.load_settings("tiny", {"algorithm.step": 3})


def test_rows_in_memory_become_a_file_that_equal_rows_share() -> None:
    rows = [{"id": "a", "time": np.datetime64("2026-01-01").astype(object), "turn": np.int64(0), "text": "caf\u00e9"}]
    paths = [rluf.load_settings("tiny", rows={"prompts": list(rows)}).data.prompts for _ in range(2)]
    assert paths[0] == paths[1]
    (path,) = paths[0]
    row = json.loads(Path(str(path)).read_text())
    assert row == {"id": "a", "time": "2026-01-01", "turn": 0, "text": "caf\u00e9"}


def test_a_row_that_is_not_json_is_named() -> None:
    with pytest.raises(DataError, match=r"rows\['prompts'\], row 2: object"):
        rluf.load_settings("tiny", rows={"prompts": [{"id": "a"}, {"id": object()}]})


def test_a_function_of_a_module_is_referenced_and_one_of_a_notebook_is_stored() -> None:
    factor = 2.0

    def score_doubled(rows: Any) -> list[float]:
        return [factor * value for value in score_words(rows)]

    settings = rluf.load_settings("tiny", reward_functions={"doubled": score_doubled})
    objective = settings.objectives.by_objective["doubled"]
    assert (objective.source, objective.weight) == ("function", 1.0)
    assert str(objective.path).startswith("pickle:")
    function = load_plugin(str(objective.path), kind="reward function")
    assert function([{"response": "one two three"}]) == [6.0]


def test_the_weight_of_a_reward_function_can_be_set() -> None:
    settings = rluf.load_settings(
        "tiny", {"objectives.words.weight": 0.25}, reward_functions={"words": lambda rows: [0.0 for _ in rows]}
    )
    assert settings.objectives.by_objective["words"].weight == 0.25


def test_a_stored_function_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.pkl"):
        load_plugin(f"pickle:{tmp_path / 'gone.pkl'}", kind="reward function")


def test_a_stored_function_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "function.pkl"
    path.write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")
    path.chmod(0o666)
    with pytest.raises(SettingsError, match="only its owner"):
        load_plugin(f"pickle:{path}", kind="reward function")


async def _return_thread_result() -> int:
    await asyncio.sleep(0)
    return 7


def test_a_coroutine_runs_with_and_without_a_running_loop() -> None:
    assert run_coroutine(_return_thread_result()) == 7

    async def run_cell() -> int:
        return run_coroutine(_return_thread_result())

    assert asyncio.run(run_cell()) == 7
