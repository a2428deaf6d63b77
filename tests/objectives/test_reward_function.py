"""Reward functions: rows with all fields, synchronous and async, and one clear error for anything but numbers."""

from __future__ import annotations

import asyncio
import functools
import math
import pickle
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import rluf
from actors.reward import RewardActor
from rluf.config.settings import Settings
from rluf.errors import SettingsError
from rluf.objectives.aggregator import compute_signal
from rluf.objectives.judges import build_rule_scorer
from rluf.objectives.reward_function import RewardRow, build_reward_function, build_row
from rluf.types import Group, Message, Prompt, Sample, ScoringItem

ITEMS = [
    ScoringItem([Message(role="user", content="2 + 2?")], "4", False, "p1", "math", {"answer": "4", "topic": "other"}),
    ScoringItem([Message(role="user", content="3 + 3?")], "seven", True, "p2", "math", {"answer": "6"}),
    ScoringItem([Message(role="user", content="Hi")], ""),
]


def match_answer(rows: Sequence[RewardRow]) -> list[float]:
    return [float(row.get("answer") == row["response"]) for row in rows]


async def match_answer_async(rows: Sequence[RewardRow]) -> list[float]:
    async def grade(row: RewardRow) -> float:
        await asyncio.sleep(0.01)
        return float(row.get("answer") == row["response"])

    return list(await asyncio.gather(*map(grade, rows)))


class AsyncCallable:
    """An object with an async __call__, which keeps a lock of its first event loop."""

    def __init__(self) -> None:
        self.lock: asyncio.Lock | None = None

    async def __call__(self, rows: Sequence[RewardRow]) -> np.ndarray:
        self.lock = self.lock or asyncio.Lock()
        async with self.lock:
            await asyncio.sleep(0.001)
            return np.asarray(match_answer(rows))


match_answer_object = AsyncCallable()


def as_tensor(rows: Sequence[RewardRow]) -> torch.Tensor:
    return torch.tensor(match_answer(rows))


def as_bools(rows: Sequence[RewardRow]) -> list[bool]:
    return [bool(value) for value in match_answer(rows)]


def as_generator(rows: Sequence[RewardRow]) -> Any:
    return (value for value in match_answer(rows))


@pytest.mark.parametrize(
    "name",
    ["match_answer", "match_answer_async", "match_answer_object", "as_tensor", "as_bools", "as_generator"],
)
def test_every_kind_of_function_scores_a_batch(name: str) -> None:
    score_items = build_rule_scorer("exact", reward=f"{__name__}:{name}")
    for _ in range(2):  # async functions keep one event loop over all batches
        scores = score_items(ITEMS)
        assert [(score.objective, score.value) for score in scores] == [("exact", 1.0), ("exact", 0.0), ("exact", 0.0)]
        assert [compute_signal(score, uncertainty_penalty=1.0) for score in scores] == [1.0, 0.0, 0.0]


async def test_an_async_function_is_scored_under_a_running_event_loop() -> None:
    score_items = build_rule_scorer("exact", reward=f"{__name__}:match_answer_async")
    assert [score.value for score in score_items(ITEMS)] == [1.0, 0.0, 0.0]


def test_threads_share_an_async_function() -> None:
    score_items = build_rule_scorer("exact", reward=f"{__name__}:match_answer_object")
    values: list[list[float]] = []
    threads = [threading.Thread(target=lambda: values.append([s.value for s in score_items(ITEMS)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [[1.0, 0.0, 0.0]] * 4


def test_a_row_has_the_fields_of_its_prompt_which_replace_no_built_in_one() -> None:
    assert build_row(ITEMS[0]) == {
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "response": "4",
        "finish_reason": "stop",
        "prompt_id": "p1",
        "topic": "math",
        "answer": "4",
    }
    assert build_row(ITEMS[1])["finish_reason"] == "length"
    assert build_row(ITEMS[2])["prompt_id"] == ""


def return_too_few(rows: Sequence[RewardRow]) -> list[float]:
    return [1.0]


def return_infinity(rows: Sequence[RewardRow]) -> list[float]:
    return [math.inf for _ in rows]


def return_nan(rows: Sequence[RewardRow]) -> list[float]:
    return [math.nan for _ in rows]


def return_overflow(rows: Sequence[RewardRow]) -> list[float]:
    return [-1e308 for _ in rows]


def return_none(rows: Sequence[RewardRow]) -> list[None]:
    return [None for _ in rows]


def return_nothing(rows: Sequence[RewardRow]) -> None:
    """A forgotten return."""


def return_text(rows: Sequence[RewardRow]) -> list[str]:
    return ["good" for _ in rows]


def return_digits(rows: Sequence[RewardRow]) -> str:
    return "1" * len(rows)


def return_texts_of_numbers(rows: Sequence[RewardRow]) -> list[str]:
    return ["0.5" for _ in rows]


def return_mapping(rows: Sequence[RewardRow]) -> dict[int, float]:
    return {index: 0.5 for index, _ in enumerate(rows)}


def return_set(rows: Sequence[RewardRow]) -> set[float]:
    return {float(index) for index, _ in enumerate(rows)}


def return_pairs(rows: Sequence[RewardRow]) -> list[tuple[float, str]]:
    return [(0.5, "why") for _ in rows]


async def return_one_by_one(rows: Sequence[RewardRow]) -> Any:
    for _ in rows:
        yield 0.5


def return_one_number(rows: Sequence[RewardRow]) -> np.float64:
    return np.float64(0.5)


@pytest.mark.parametrize(
    "name",
    [
        "return_digits",
        "return_texts_of_numbers",
        "return_mapping",
        "return_set",
        "return_pairs",
        "return_one_by_one",
        "return_one_number",
        "return_too_few",
        "return_infinity",
        "return_nan",
        "return_overflow",
        "return_none",
        "return_nothing",
        "return_text",
    ],
)
def test_anything_but_one_number_for_each_row_is_one_error_that_names_the_function(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name}' of objective size: expected one finite number for each of 3"):
        build_rule_scorer("size", reward=f"{__name__}:{name}")(ITEMS)


def take_two(messages: Sequence[Message], response: str) -> float:
    return float(len(messages) + len(response))


def take_none() -> list[float]:
    return []


def score_like_trl(prompts: Any, completions: Any, answer: list[str], **kwargs: Any) -> list[float]:
    assert [prompt[-1]["content"] for prompt in prompts] == ["2 + 2?", "3 + 3?"]
    assert kwargs == {"finish_reason": ["stop", "length"], "prompt_id": ["p1", "p2"], "topic": ["math", "math"]}
    return [float(completion[0]["content"] == text) for completion, text in zip(completions, answer, strict=True)]


def score_columns(completions: Any, **kwargs: Any) -> list[float]:
    assert [completion[-1]["role"] for completion in completions] == ["assistant"] * 2
    return score_like_trl(completions=completions, **kwargs)


def score_without_columns(*, answer: list[str], completions: Any, limit: int = 5) -> list[float]:
    return [float(completion[0]["content"] == answer[i]) for i, completion in enumerate(completions)]


def score_texts(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    assert prompts == ["2 + 2?", "3 + 3?"]
    return [float(len(completion) == 1) for completion in completions]


def score_keywords(**kwargs: Any) -> list[float]:
    return score_like_trl(**kwargs)


async def score_async(completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return score_columns(completions, **kwargs)


class TrlCallable:
    def __call__(
        self, prompts: Any, completions: Any, answer: Any, log_extra: Any = None, **kwargs: Any
    ) -> list[float]:
        assert log_extra is None
        return score_like_trl(prompts, completions, answer, **kwargs)


score_object = TrlCallable()
score_partial = functools.partial(score_without_columns, limit=3)


@pytest.mark.parametrize(
    "name",
    [
        "score_like_trl",
        "score_columns",
        "score_without_columns",
        "score_texts",
        "score_keywords",
        "score_async",
        "score_object",
        "score_partial",
    ],
)
def test_a_function_in_the_signature_of_trl_is_called_as_trl_does(name: str) -> None:
    scores = build_rule_scorer("exact", reward=f"{__name__}:{name}")(ITEMS[:2])
    assert [score.value for score in scores] == [1.0, 0.0]
    assert rluf.load_settings("tiny", reward_functions={"exact": globals()[name]}).objectives.by_objective["exact"].path


def test_a_column_that_some_prompts_lack_is_none_or_refused_by_name() -> None:
    rows = [{"messages": [], "response": "a", "prompt_id": "p1", "level": 3}, {"messages": [], "response": "b"}]
    collected: list[Any] = []
    score = build_reward_function(lambda completions, level=0: collected.append(level) or [0.0, 0.0], "function f")
    assert score(rows) == [0.0, 0.0]
    score(rows[1:])
    assert collected == [[3, None], 0]
    with pytest.raises(SettingsError, match="function f takes answer, which prompt 'p1' of data"):
        build_reward_function(lambda completions, answer: [0.0], "function f")(rows)


def judge_nothing(completions: Any, **kwargs: Any) -> list[float | None]:
    return [None for _ in completions]


def test_none_is_refused_as_no_reward() -> None:
    with pytest.raises(SettingsError, match=r"one finite number for each of 3 .*None.*leave prompts that cannot be"):
        build_rule_scorer("exact", reward=f"{__name__}:judge_nothing")(ITEMS)


def read_a_missing_key(rows: Sequence[RewardRow]) -> list[float]:
    return [float(row["solution"] == row["response"]) for row in rows]


async def read_a_missing_key_later(rows: Sequence[RewardRow]) -> list[float]:
    await asyncio.sleep(0)
    return read_a_missing_key(rows)


def match_texts(completions: Any, **kwargs: Any) -> list[float]:
    return [float(bool(re.match(r"\d", completion))) for completion in completions]


@pytest.mark.parametrize(
    ("name", "error_type", "hint"),
    [
        (
            "read_a_missing_key",
            KeyError,
            "a row has the keys answer, topic, messages, response, finish_reason, prompt_id",
        ),
        ("read_a_missing_key_later", KeyError, "a row has the keys answer, topic, messages, response"),
        ("match_texts", TypeError, r"completions are lists of messages, .* annotated list\[str\]"),
    ],
)
def test_an_exception_of_the_function_says_which_one_and_what_it_got(
    name: str, error_type: type[Exception], hint: str
) -> None:
    with pytest.raises(error_type) as error_info:
        build_rule_scorer("exact", reward=f"{__name__}:{name}")(ITEMS)
    (note,) = pickle.loads(pickle.dumps(error_info.value)).__notes__  # as Ray sends it to the driver
    assert re.search(rf"raised by reward function '{__name__}:{name}' of objective exact; .*{hint}", note)


def take_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def take_state(completions: Any, *, trainer_state: Any) -> list[float]:
    return [trainer_state.global_step]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (f"{__name__}:take_ids", "rluf does not pass completion_ids"),
        (f"{__name__}:take_state", "rluf does not pass trainer_state"),
        (f"{__name__}:take_two", "expected a function of a list of rows"),
        (f"{__name__}:take_none", "expected a function of a list of rows"),
        (f"{__name__}:ITEMS", "expected a function of a list of rows"),
        ("missing:score", "'missing:score' cannot be imported"),
        ("no_colon", "there is no reward function 'no_colon'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_training(reference: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_rule_scorer("size", reward=reference)


async def test_the_reward_actor_passes_the_fields_of_the_prompt_and_how_the_response_ended() -> None:
    objective = {"source": "function", "path": f"{__name__}:match_answer_of_finished", "weight": 0.1}
    settings = Settings.model_validate({"objectives": {"exact": objective}})
    question = (Message(role="user", content="2 + 2?"),)
    prompt = Prompt("p1", question, (1, 2), "math", "train", {"answer": "4"})
    samples = tuple(
        Sample("p1", (1, 2), (3,), (-0.1,), ((0, 0),), finish_reason, text)
        for text, finish_reason in (("4", "stop"), ("4", "length"), ("5", "stop"))
    )
    actor = RewardActor(settings.model_dump_json(), {"exact": None})
    scores = await actor.score_group(Group(prompt, samples, 0))
    assert [score.value for score in scores["exact"]] == [1.0, 0.0, 0.0]


async def match_answer_of_finished(rows: Sequence[RewardRow]) -> list[float]:
    assert {(row["prompt_id"], row["topic"]) for row in rows} == {("p1", "math")}
    return [float(row["answer"] == row["response"] and row["finish_reason"] == "stop") for row in rows]
