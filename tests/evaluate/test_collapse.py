"""Signs of collapse: tokens of several scripts, recurring phrases, and similarity by worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from rluf.evaluate.collapse import (
    find_recurring_phrases,
    list_opening,
    list_phrases,
    measure_similarity,
    measure_specificity,
    split_tokens,
)


def test_tokens_of_several_scripts() -> None:
    assert split_tokens("I’m GLAD, that's it!") == ("i'm", "glad", "that's", "it")
    assert split_tokens("Olá, você — 好问题。💕") == ("olá", "você", "好", "问", "题", "💕")
    assert split_tokens("...") == ()


def test_openings_and_endings_are_phrases() -> None:
    assert list_phrases("Take care!") == ["^ take care", "take care $"]
    assert list_opening("I’m glad you asked") == ["i'm glad"]
    assert list_opening("Yes.") == []


@pytest.mark.parametrize(
    ("text", "opening", "phrase"),
    [
        ("Absolutely! The bus leaves at nine.", "absolutely", "^ absolutely"),
        ("ABSOLUTELY - it does.", "absolutely", "^ absolutely"),
        ("## Answer\n\nTake the bus.", "answer", "^ answer"),
        ("🌸 , take the bus", "🌸", "^ 🌸"),
        ("The bus leaves at nine. Cheers!", None, "cheers $"),
        ("The bus leaves at nine, my dear", None, "my dear $"),
    ],
)
def test_a_word_that_is_set_off_is_a_phrase(text: str, opening: str | None, phrase: str) -> None:
    assert list_opening(text)[1:] == ([opening] if opening else [])
    assert phrase in list_phrases(text)
    assert list_opening("The bus leaves at nine.") == ["the bus"]


def test_a_phrase_must_recur_under_different_prompts() -> None:
    texts = [f"So glad about number {n}" for n in range(8)] + ["Same words here again"] * 8
    prompts = np.array([*range(8), *[8] * 8])
    table = find_recurring_phrases(texts, prompts, list_phrases)
    # The three runs "^ so glad", "so glad about" and "glad about number" occur in the same replies: one column.
    assert table.phrases == ("^ so glad",)
    assert table.values[:, 0].tolist() == [1.0] * 8 + [0.0] * 8
    assert find_recurring_phrases(["", "."], np.array([0, 1]), list_opening).values.shape == (2, 0)


def test_similarity_and_specificity_of_worked_examples() -> None:
    prompts = np.array([0, 0, 1, 2])
    similarity = measure_similarity(["red cat", "red cat", "red cat", "blue dog"], prompts)
    assert similarity[2] > similarity[0] > similarity[3]
    specificity = measure_specificity(["a cat", "a dog"], ["my cat", "my dog"], np.array([0, 1]))
    assert specificity[0] == pytest.approx(specificity[1]) and specificity[0] > 0.1
    assert measure_specificity(["a dog", "a cat"], ["my cat", "my dog"], np.array([0, 1]))[0] < -0.1
    assert np.isnan(measure_similarity(["one", "two"], np.array([0, 0]))).all()
    assert np.isnan(measure_specificity(["one", "two"], ["hi", "hi"], np.array([0, 0]))).all()
    assert np.isfinite(measure_similarity(["", "."], np.array([0, 1]))).all()
