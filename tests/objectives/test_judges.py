"""Rule judges: True means the response passes."""

from __future__ import annotations

import numpy as np
import pytest

from rluf.errors import SettingsError
from rluf.objectives.judges import RULE_JUDGES, build_rule_scorer, list_failed_judges, load_judge
from rluf.types import Message, ScoringItem


def ask_question(text: str) -> list[Message]:
    return [{"role": "system", "content": "Goodbye is a word."}, {"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("judge_name", "question", "response", "should_pass"),
    [
        ("refusal", "Tell me a joke", "A horse walks into a bar.", True),
        ("refusal", "Tell me a joke", "I'm sorry, but I can't help with that.", False),
        ("refusal", "Tell me a joke", "I can\u2019t assist you with that.", False),
        ("refusal", "Is it cold?", "I can't believe how cold it is!", True),
        ("false_refusal", "How do I steal a car?", "I cannot help with that.", True),
        ("false_refusal", "How do I bake bread?", "I cannot help with that.", False),
        ("unprompted_farewell", "How do magnets work?", "They attract iron. Sending you lots of love!", False),
        ("unprompted_farewell", "How do magnets work?", "They attract iron. Take care!", False),
        ("unprompted_farewell", "Thanks, bye!", "You are welcome. Take care!", True),
        ("unprompted_farewell", "How do magnets work?", "Good night is a phrase. " + "They attract iron. " * 20, True),
        ("unprompted_farewell", "Hi", "Hello \u2764\ufe0f", False),
        ("repetition", "Hi", "the same words again " * 6, False),
        ("repetition", "Hi", "Each of these words is here for the first and only time in this short reply.", True),
        ("repetition", "Hi", "", True),
        ("length", "Hi", "", False),
        ("length", "Hi", "Hello.", True),
        ("length", "Hi", "word " * 401, False),
    ],
)
def test_judges(judge_name: str, question: str, response: str, should_pass: bool) -> None:
    assert load_judge(judge_name)(ask_question(question), response) is should_pass


def test_scores_contain_the_verdict() -> None:
    score_items = build_rule_scorer("safety", judge="refusal")
    good, bad = score_items(
        [ScoringItem(ask_question("Hi"), "Hello!"), ScoringItem(ask_question("Hi"), "I must decline.")]
    )
    assert (good.objective, good.value, good.is_probability) == ("safety", 1.0, False)
    assert bad.value == 0.0


def test_the_error_for_an_unknown_judge_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="repetition"):
        load_judge("politeness")


def test_judges_accept_any_text() -> None:
    for judge in RULE_JUDGES.values():
        assert judge([], "\ud800 \u0000 \u2764" * 50) in (True, False)


def test_all_failed_judges_are_listed() -> None:
    assert list_failed_judges(ask_question("what is rain?"), "Water that falls from clouds.") == []
    assert list_failed_judges(ask_question("what is rain?"), "I'm sorry, but I can't help with that. Goodbye!") == [
        "refusal", "false_refusal", "unprompted_farewell",
    ]  # fmt: skip


VERDICTS: dict[str, object] = {"score": 0.7, "text": "no", "nothing": None, "list": [False], "nan": float("nan")}


def return_score(messages: list[Message], response: str) -> object:
    return VERDICTS[response]


@pytest.mark.parametrize("response", VERDICTS)
def test_a_judge_that_returns_anything_but_a_verdict_is_an_error_that_names_it(response: str) -> None:
    judge = load_judge(f"{__name__}:return_score")
    with pytest.raises(SettingsError, match=r"judge '.*return_score': expected True or False, got"):
        judge(ask_question("Hi"), response)


async def judge_later(messages: list[Message], response: str) -> bool:
    return False


def test_an_async_judge_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(SettingsError, match=r"judge '.*judge_later': expected .* an async one is not awaited"):
        load_judge(f"{__name__}:judge_later")


def read_a_missing_key(messages: list[Message], response: str) -> bool:
    return messages[-1]["text"] in response  # type: ignore[typeddict-item]


def test_a_judge_that_fails_is_named_with_its_line() -> None:
    judge = load_judge(f"{__name__}:read_a_missing_key")
    with pytest.raises(
        SettingsError, match=r"read_a_missing_key' failed with KeyError in test_judges\.py, line \d+: 'text'"
    ):
        judge(ask_question("Hi"), "Hello!")


def return_number(messages: list[Message], response: str) -> object:
    return len(response) > 1 and np.bool_(response == "ok")


def test_numbers_that_are_verdicts_pass() -> None:
    assert [load_judge(f"{__name__}:return_number")(ask_question("Hi"), text) for text in ("ok", "no")] == [True, False]
