"""What reactions mean: names in any spelling, numbers by rule, contradictions; nothing becomes a label silently."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rluf.config.data import PrepareSettings
from rluf.errors import DataError, SettingsError
from rluf.prepare.joins import choose_active_reactions
from rluf.prepare.labels import IGNORED, LOVED, NOT_LOVED, UNKNOWN, LabelRules, check_reactions, choose_reaction

NO_RULES = LabelRules({})
STARS = {">=4": "loved", "<=2": "not_loved", "3": "ignored"}


@pytest.mark.parametrize(
    "name",
    ["love", "Love", "LOVE", "loved", "heart", ":heart:", "❤️", "❤", "💜", "👍", "👍🏽", "+1", ":+1::skin-tone-3",
     "thumbsup", "thumbsUp", "thumbs-up", "THUMBS_UP", "Thumbs Up", "liked", "favorite", "great", "yes", "helpful",
     "up", "1", "true", "True"],
)  # fmt: skip
def test_names_that_mean_love(name: str) -> None:
    assert NO_RULES.find_code(name) == LOVED


@pytest.mark.parametrize(
    "name", ["thumbs_down", "thumbsDown", ":thumbs-down:", "👎🏿", "-1", "dislike", "NO", "false", "💔"]
)
def test_names_that_mean_no_love(name: str) -> None:
    assert NO_RULES.find_code(name) == NOT_LOVED


@pytest.mark.parametrize("name", ["eyes", "laugh", "2", "0.34", "5", "4.5", "10", "★★★", "1.0000001", "-2"])
def test_other_names_have_no_meaning_of_their_own(name: str) -> None:
    assert NO_RULES.find_code(name) == UNKNOWN


@pytest.mark.parametrize(
    ("rules", "expected"),
    [(STARS, [NOT_LOVED, NOT_LOVED, IGNORED, LOVED, LOVED]),
     ({">3": "loved"}, [NOT_LOVED, NOT_LOVED, NOT_LOVED, LOVED, LOVED]),
     ({"5": "loved", "1..4": "not_loved"}, [NOT_LOVED] * 4 + [LOVED]),
     ({"<= 2": "loved", "> 2": "not_loved"}, [LOVED, LOVED, NOT_LOVED, NOT_LOVED, NOT_LOVED]),
     ({">=4": "loved", "1": "not_loved"}, [NOT_LOVED, UNKNOWN, UNKNOWN, LOVED, LOVED])],
)  # fmt: skip
def test_numbers_have_the_label_of_their_rule(rules: dict[str, str], expected: list[int]) -> None:
    assert [LabelRules(rules).find_code(str(number)) for number in range(1, 6)] == expected


def test_rules_come_before_the_default_list() -> None:
    rules = LabelRules({"like": "not_loved", "🔖": "ignored", "Claps": "loved"})
    names = ("LIKE", "🔖", ":claps:", "love")
    assert [rules.find_code(name) for name in names] == [NOT_LOVED, IGNORED, LOVED, LOVED]
    assert not LabelRules({"0": "loved"}).is_no_reaction("0") and NO_RULES.is_no_reaction("false")


@pytest.mark.parametrize(
    ("rules", "words"),
    [({">=four": "loved"}, "not a range"), ({"5..1": "loved"}, "empty range"),
     ({">=3": "loved", "<=3": "not_loved"}, "overlap at 3"), ({"Up": "loved", ":up:": "ignored"}, "two labels")],
)  # fmt: skip
def test_rules_that_contradict_themselves_are_refused(rules: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        LabelRules(rules)


def test_settings_take_yaml_keys_and_spellings() -> None:
    labels = PrepareSettings.model_validate({"labels": {5: "loved", True: "not loved", ">=4.5": "loved"}}).labels
    assert labels == {"5": "loved", "true": "not_loved", ">=4.5": "loved"}


@pytest.mark.parametrize(
    ("counts", "rules", "words"),
    [({"1": 50, "2": 30, "5": 60}, {}, "the reactions are numbers"),
     ({"0.34": 10, "love": 500}, {}, "the reactions are numbers"),
     ({"heart": 60, "laugh": 40}, {}, "'laugh' 40"),
     ({"1": 9, "3": 1, "5": 90}, {">=4": "loved", "<=2": "not_loved"}, "'3' 1")],
)  # fmt: skip
def test_reactions_without_a_label_stop_the_job(counts: dict[str, int], rules: dict[str, str], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        check_reactions(Counter(counts), LabelRules(rules), "data.feedback", is_rating=False)
    assert "prepare.labels" in str(error.value)


def test_thumbs_pass_and_ratings_of_ones_alone_do_not() -> None:
    for counts in ({"1": 5, "-1": 2}, {"1": 5, "0": 9}, {"love": 995, "haha": 5}, {"true": 3, "false": 4}):
        check_reactions(Counter(counts), NO_RULES, "data.feedback", is_rating="0" in counts)
    for options in ({"is_rating": True}, {"is_rating": False, "has_ratings": True}):
        with pytest.raises(DataError, match="numbers"):
            check_reactions(Counter({"1": 50}), NO_RULES, "data.feedback", **options)
    check_reactions(Counter({"1": 50}), LabelRules(STARS), "data.feedback", is_rating=True, has_ratings=True)


def test_several_reactions_of_a_row() -> None:
    names = ["love", "bookmark", "thumbs_down", "eyes"]
    rules = LabelRules({"bookmark": "ignored", "eyes": "ignored"})
    assert choose_reaction(names, rules, "latest") == "thumbs_down"
    assert choose_reaction(names, rules, "loved") == "love"
    assert choose_reaction(["eyes"], rules, "latest") == "eyes"


def test_the_latest_reaction_counts_unless_a_rule_says_otherwise() -> None:
    rows = np.array([0, 0, 1, 1, 2, 2, 4])
    times = np.array([1, 2, 5, 4, 1, 9, 3])
    labels = np.array([LOVED, NOT_LOVED, LOVED, NOT_LOVED, LOVED, IGNORED, IGNORED])
    chosen, is_contradictory = choose_active_reactions(rows, times, labels, 5, "latest")
    assert chosen.tolist() == [1, 2, 4, -1, 6]
    assert is_contradictory.tolist() == [True, True, False, False, False]
    assert choose_active_reactions(rows, times, labels, 5, "loved")[0].tolist() == [0, 2, 4, -1, 6]
    assert choose_active_reactions(rows, times, labels, 5, "not_loved")[0].tolist() == [1, 3, 4, -1, 6]
