import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import rluf
from rluf.errors import DataError, ModelError, SettingsError
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
    code = "import rluf, sys; assert set(rluf.__all__) <= set(dir(rluf)); assert 'rluf.api' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_report_tells_the_measured_verdict_from_the_one_with_the_reading(tmp_path: Path) -> None:
    gates = {"verdict": "undecided", "measured_verdict": "pass"}
    (tmp_path / "summary.json").write_text(json.dumps({"gates": gates}))
    report = rluf.Report(tmp_path)
    assert (report.verdict, report.measured_verdict) == ("undecided", "pass")


def test_overrides_are_texts_or_a_mapping() -> None:
    by_text = rluf.load_settings("tiny", ["algorithm.steps=3", "algorithm.topic_weights={risky: 2}"])
    by_mapping = rluf.load_settings("tiny", {"algorithm.steps": 3, "algorithm.topic_weights": {"risky": 2}})
    assert by_text == by_mapping
    assert rluf.load_settings(None, {"algorithm.kl_target": None, "seed": 5}).seed == 5
    with pytest.raises(SettingsError, match=r"did you mean algorithm\.steps"):
        rluf.load_settings("tiny", {"algorithm.step": 3})


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (None, 2),
        ("algorithm.steps=3", 3),
        (("algorithm.steps=3",), 3),
        ({"algorithm": {"steps": 3}}, 3),
        ({"algorithm.steps": np.int64(3)}, 3),
    ],
)
def test_overrides_have_several_forms(overrides: Any, steps: int) -> None:
    assert rluf.load_settings("tiny", overrides).algorithm.steps == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"seed": 3},), "expected a file or the name of a configuration, got dict"),
        ((3,), "expected a file or the name of a configuration, got int '3'"),
        (("TINY",), r"cannot read settings file TINY .*did you mean tiny\?"),
        (("nope",), "shipped configurations: human, .*, tiny"),
        (("tiny", [("seed", 3)]), "expected key=value texts or a mapping"),
        (("tiny", [{"seed": 3}]), "expected key=value texts or a mapping"),
        (("tiny", 5), "expected key=value texts or a mapping {.*}, got int '5'"),
        (("tiny", True), "expected key=value texts or a mapping {.*}, got bool 'True'"),
        (("tiny", {"evaluate.monitors": {"a:b"}}), "evaluate.monitors: set .* is not a JSON value"),
        (("tiny", {"objectives.love.path": len}), "objectives.love.path: builtin_function_or_method"),
        (("tiny", {"algorithm.kl_target": float("nan")}), "algorithm.kl_target='NaN'"),
    ],
)
def test_wrong_settings_are_one_message(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        rluf.load_settings(*arguments)


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml", "reward/love", "configs/reward/love.yaml"])
def test_a_shipped_configuration_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rluf.load_settings(name).name in ("tiny", "reward-love")
    (tmp_path / "mine.yaml").write_text(f"extends: {name}\n")
    assert rluf.load_settings("mine.yaml").name == "mine"


ROWS = [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "rows",
    [
        tuple(ROWS), pd.DataFrame(ROWS), pl.DataFrame(ROWS), pa.table({"prompt": ["a", "b"]}),
        datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    ],
    ids=["tuple", "pandas", "polars", "arrow", "datasets", "stream"],
)  # fmt: skip
def test_tables_and_data_sets_give_the_rows_of_a_list(rows: Any) -> None:
    expected = rluf.load_settings("tiny", rows={"prompts": (row for row in ROWS)}).data.prompts
    assert rluf.load_settings("tiny", rows={"prompts": rows}).data.prompts == expected


@pytest.mark.parametrize("path", ["prompts.jsonl", Path("prompts.jsonl")])
def test_rows_may_be_a_path(path: Any) -> None:
    assert rluf.load_settings("tiny", rows={"prompts": path}).data.prompts == ("prompts.jsonl",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array([{"role": "user", "content": "hi"}], dtype=object), [{"role": "user", "content": "hi"}]),
        (np.float64("nan"), None),
        (float("nan"), None),
        (pd.NaT, None),
        (pd.NA, None),
        (pd.Timestamp("2026-01-01", tz="UTC"), "2026-01-01T00:00:00+00:00"),
        (Decimal("1.5"), 1.5),
        ((np.bool_(True), np.float32(0.5)), [True, 0.5]),
    ],
)
def test_values_of_data_frames_become_json(value: Any, expected: object) -> None:
    (path,) = rluf.load_settings("tiny", rows={"prompts": [{"value": value}]}).data.prompts
    assert json.loads(Path(str(path)).read_text()) == {"value": expected}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["How are you?"]], "row 1: expected a dict, got list"),
        ({"prompt": ["a", "b"]}, "expected rows .* got dict"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
            "got DatasetDict; pass one of its splits: train",
        ),
        ({"test": datasets.Dataset.from_list(ROWS)}, "got dict; pass one of its splits: test"),
        ([], "has no rows; a generator can be read only once"),
        (None, "expected rows .* got NoneType"),
        ([{"prompt": b"a"}], "row 1: bytes"),
        (["a.jsonl", "b.jsonl"], r"row 1: 'a.jsonl' is a file; name one in place of the rows, several in data.prompts"),
        (["logs/prompts.parquet"], "row 1: 'logs/prompts.parquet' is a file"),
        ([{"prompt": {"a"}}], "row 1: set"),
        ([{"prompt": "\ud800"}], "row 1: .*surrogates not allowed"),
    ],
)
def test_other_rows_are_refused_with_what_they_are(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows\['prompts'\].*{message}"):
        rluf.load_settings("tiny", rows={"prompts": rows})


def test_a_prompt_may_be_a_text_and_a_row_of_feedback_may_not() -> None:
    (path,) = rluf.load_settings("tiny", rows={"prompts": ["Why?", {"prompt": "How?"}]}).data.prompts
    assert Path(str(path)).read_text() == '{"prompt": "Why?"}\n{"prompt": "How?"}\n'
    with pytest.raises(DataError, match=r"row 1: expected a dict, got str 'Why\?"):
        rluf.load_settings("tiny", rows={"feedback": ["Why?"]})


def test_rows_may_be_the_labels_of_an_objective_of_ones_own() -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello!", "label": 1}
    weight = {"objectives.warmth.weight": 0.1}
    settings = rluf.load_settings("tiny", weight, rows={"labels.warmth": [row], "prompts": ["See README.md please"]})
    (path,) = settings.data.labels["warmth"]
    assert json.loads(Path(str(path)).read_text()) == row
    with pytest.raises(SettingsError, match=r"'warmth', which is not an objective; .* by objectives\.warmth\.weight"):
        rluf.load_settings("tiny", rows={"labels.warmth": [row]})


def test_a_row_may_be_a_feedback_record() -> None:
    record = rluf.FeedbackRecord(
        id="r", conversation_id="c", turn=1, user_id="u", time=datetime(2026, 1, 31, tzinfo=UTC), model_version="v",
        messages=[{"role": "user", "content": "hello"}], response="Hi!", reaction="love",
    )  # fmt: skip
    (path,) = rluf.load_settings("tiny", rows={"feedback": [record]}).data.feedback
    row = json.loads(Path(str(path)).read_text())
    assert (row["reaction"], row["messages"]) == ("love", [{"role": "user", "content": "hello"}])


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
    with pytest.raises(SettingsError, match="rows: expected a mapping such as"):
        rluf.load_settings("tiny", rows=[{"id": "a"}])  # type: ignore[arg-type]


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


class WordScorer:
    """A callable object and a method."""

    def __init__(self) -> None:
        self.factor = 2.0

    def __call__(self, rows: Any) -> list[float]:
        return [self.factor * value for value in score_words(rows)]

    def score(self, rows: Any) -> list[float]:
        return self(rows)


@pytest.mark.parametrize(
    "function",
    [
        WordScorer(),
        WordScorer().score,
        functools.partial(lambda rows, factor: [factor * len(row["response"].split()) for row in rows], factor=2),
        lambda rows: [2 * value for value in score_words(rows)],
    ],
    ids=["object", "method", "partial", "lambda"],
)
def test_every_form_of_a_function_can_be_stored(function: Callable[..., Any]) -> None:
    settings = rluf.load_settings("tiny", reward_functions={"words": function})
    stored = load_plugin(str(settings.objectives.by_objective["words"].path), kind="reward function")
    assert stored([{"response": "one two three"}]) == [6.0]


def test_a_reference_to_a_function_stays_as_it_is() -> None:
    settings = rluf.load_settings("tiny", reward_functions={"words": "mine:score_words"})
    assert settings.objectives.by_objective["words"].path == "mine:score_words"


def score_like_trl(completions: Any, prompts: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize(
    ("functions", "names"),
    [(score_words, ["score_words"]), ([score_words, score_like_trl], ["score_words", "score_like_trl"])],
)
def test_functions_alone_are_objectives_of_their_own_names(functions: Any, names: list[str]) -> None:
    settings = rluf.load_settings("tiny", reward_functions=functions)
    objectives = settings.objectives.by_objective
    assert [(objectives[name].path, objectives[name].weight) for name in names] == [
        (f"{__name__}:{name}", 1.0) for name in names
    ]


def return_function_with_lock() -> Callable[..., Any]:
    lock = threading.Lock()
    return lambda rows: [float(lock.locked()) for _ in rows]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (lambda rows: [0.0 for _ in rows], "function '<function <lambda>.*has no name of its own .* pass a mapping"),
        ([score_words, score_words], "has no name of its own that can name an objective"),
        ([functools.partial(score_words)], "has no name of its own that can name an objective"),
        (["mine:score_words"], "str 'mine:score_words' has no name of its own"),
        ("mine:score_words", "reward_functions: expected a mapping such as {name: function}, got str"),
        ({"words": 5}, r"reward_functions\['words'\]: expected a function of a list of rows .* got int '5'"),
        ({"words": None}, "expected a function of a list of rows .* got NoneType"),
        ({"words": WordScorer}, "expected a function of a list of rows .*; too many positional arguments"),
        ({"words": lambda messages, response: 1.0}, "missing a required argument: 'response'"),
        ({"words": return_function_with_lock()}, "cannot be stored for the actors .*inside the function"),
        ({"my words": score_words}, "objectives.my words .* cannot name an objective"),
    ],
)
def test_anything_but_named_functions_of_rows_is_refused(functions: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        rluf.load_settings("tiny", reward_functions=functions)


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [
        ({}, 1.0),
        ({"objectives.words.weight": 0.25}, 0.25),
        ({"objectives.words": {"weight": 0.25}}, 0.25),
        ({"objectives": {"words": {"weight": 0.25}}}, 0.25),
        ([" objectives.words.weight = 0.25"], 0.25),
        ({"objectives.words.weight": 0}, 0.0),
    ],
)
def test_the_weight_of_a_reward_function_is_1_unless_it_is_set(overrides: Any, weight: float) -> None:
    settings = rluf.load_settings("tiny", overrides, reward_functions={"words": score_words})
    assert settings.objectives.by_objective["words"].weight == weight


def test_the_file_may_set_the_weight_and_a_built_in_objective_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nobjectives: {words: {weight: 0.25}}\n")
    settings = rluf.load_settings(path, reward_functions={"words": score_words, "love": score_words})
    weights = {name: objective.weight for name, objective in settings.objectives.by_objective.items()}
    assert (weights["words"], weights["love"]) == (0.25, rluf.load_settings("tiny").objectives.love.weight)


class StepTracker:
    """A tracker with the one required method."""

    def __init__(self, settings: Any, run_folder: Path) -> None: ...

    def log_step(self, step: int, metrics: Any) -> None: ...


@pytest.mark.parametrize(
    ("trackers", "names"),
    [
        (["tensorboard"], ["tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        (["mine:Tracker", StepTracker], ["mine:Tracker", f"{__name__}:StepTracker"]),
        (StepTracker, [f"{__name__}:StepTracker"]),
    ],
)
def test_trackers_are_added_to_those_of_the_overrides(trackers: Any, names: list[str]) -> None:
    settings = rluf.load_settings("tiny", {"tracking.trackers": ["mlflow"]}, trackers=trackers)
    assert list(settings.tracking.trackers) == ["mlflow", *names]


@pytest.mark.parametrize("tracker", [StepTracker(None, Path()), 5, None, lambda: None])
def test_what_cannot_create_a_tracker_is_refused(tracker: Any) -> None:
    with pytest.raises(SettingsError, match=r"trackers: expected a function \(settings, run folder\) -> tracker"):
        rluf.load_settings("tiny", trackers=[tracker])


@pytest.mark.parametrize("function", ["prepare_data", "train_reward_models", "train_policy", "evaluate_policy"])
@pytest.mark.parametrize("settings", ["tiny", {"seed": 1}, None])
def test_a_function_takes_settings_only(function: str, settings: Any) -> None:
    with pytest.raises(SettingsError, match=r"expected the result of rluf\.load_settings, got"):
        getattr(rluf, function)(settings)


def test_a_reward_model_is_loaded_from_a_path_or_text(tmp_path: Path) -> None:
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(ModelError, match=r"has no config\.json"):
            rluf.RewardModel.load(folder)


def test_a_report_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    report = rluf.Report(str(tmp_path))  # type: ignore[arg-type]
    assert (report.folder, report.metrics, report._repr_html_()) == (tmp_path, [], None)
    with pytest.raises(DataError, match=r"has no summary\.json with gates; name the folder of a finished run"):
        _ = report.verdict


def test_a_stored_function_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.pkl"):
        load_plugin(f"pickle:{tmp_path / 'gone.pkl'}", kind="reward function")


def test_a_stored_function_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "function.pkl"
    path.write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")
    path.chmod(0o666)
    with pytest.raises(SettingsError, match="only its owner"):
        load_plugin(f"pickle:{path}", kind="reward function")
