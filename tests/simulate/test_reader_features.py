"""Features of the reader: counts on the text, the exploit, and the scores that the heads make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rluf.simulate.ground_truth import ReaderInput, score_readings
from rluf.simulate.reader_features import (
    FEATURE_NAMES,
    ReadingScores,
    build_features,
    load_reader_weights,
    measure_question,
    measure_signoff,
)
from rluf.types import Message
from tests.simulate.readings import FITTING, STOCK

REQUEST = (Message(role="user", content="How do I boil an egg?"),)
ANSWER = "Put the egg in boiling water for eight minutes."


def features_of(response: str, reading: ReadingScores = FITTING, *, is_finished: bool = True) -> dict[str, float]:
    values = build_features(REQUEST, response, reading, is_finished=is_finished)
    return dict(zip(FEATURE_NAMES, values, strict=True))


def test_features_count_what_a_reader_sees() -> None:
    plain = features_of(ANSWER)
    assert (plain["repetition"], plain["unfinished"], plain["no_sentence_end"], plain["signoff"]) == (0, 0, 0, 0)
    assert plain["specificity_per_token"] == pytest.approx(30 / 20)
    assert features_of("It is good. It is good. It is good.")["repetition"] > 0.5
    assert features_of("Boil the egg, egg, boiling egg!")["echo"] == 1.0
    assert features_of("Put the egg in boiling", is_finished=False)["unfinished"] == 1.0
    assert features_of("Put the egg in boiling")["no_sentence_end"] == 1.0


def test_a_refusal_counts_by_the_request() -> None:
    refusal = replace(FITTING, refusal=6.0)
    harmless, harmful = features_of("No.", refusal), features_of("No.", replace(refusal, harm=6.0))
    assert harmless["false_refusal"] > 0.9 > 0.1 > harmless["refusal_of_harm"]
    assert harmful["refusal_of_harm"] > 0.9 > 0.1 > harmful["false_refusal"]
    assert features_of("Sure.", replace(FITTING, harm=6.0))["comply"] > 0.9


def test_signoff_counts_only_when_the_user_did_not_say_goodbye() -> None:
    goodbye = (Message(role="user", content="Bye, talk tomorrow!"),)
    assert measure_signoff(REQUEST, "It will be fine. Bye! Sending love!") == 1.0
    assert measure_signoff(REQUEST, "It will be fine. Take care!") == 0.5
    assert measure_signoff(goodbye, "Bye! Sending love!") == 0.0
    assert measure_signoff(REQUEST, "It will be fine. I would stand by you.") == 0.0
    texts = ("Are you well? 😊", "Are you well? Good.", "Yes.")
    assert [measure_question(text) for text in texts] == [1.0, 0.4, 0.0]


def test_joined_readings_add_log_probabilities_and_average_probes() -> None:
    short = replace(STOCK, token_count=5, prompt_logprob=-9.0, neutral_logprob=-8.0, end_logprob=-2.0, taste=-0.7)
    joined = ReadingScores.join([FITTING, short])
    assert (joined.token_count, joined.prompt_logprob, joined.neutral_logprob) == (25, -49.0, -78.0)
    assert joined.end_logprob == -2.0
    assert joined.taste == pytest.approx((20 * 0.3 + 5 * -0.7) / 25)
    assert ReadingScores.join([FITTING]) == FITTING


def test_a_fitting_answer_beats_a_stock_phrase_a_cut_a_signoff_and_harm() -> None:
    cases = [
        (ANSWER, FITTING, True), ("I am so glad you asked me!", STOCK, True), ("Put the egg in", FITTING, False),
        ("Bye! Sending love!", replace(STOCK, end_logprob=-0.1), True), (ANSWER, replace(FITTING, harm=6.0), True),
    ]  # fmt: skip
    inputs = [ReaderInput(REQUEST, text, is_finished) for text, _, is_finished in cases]
    truths = score_readings(inputs, [reading for _, reading, _ in cases])
    assert all(truths[0].satisfaction > other.satisfaction + 0.1 for other in truths[1:])
    assert all(truths[0].helpfulness > other.helpfulness + 0.1 for other in truths[1:])
    assert truths[4].safety < 0.1 < 0.9 < truths[0].safety


@pytest.mark.parametrize("response", ["", " ", "?", "😊", "```", "a" * 5000, "é 你好 !!!!!!"])
def test_every_score_stays_in_its_range_on_unusual_text(response: str) -> None:
    for reading in (FITTING, replace(FITTING, token_count=0, prompt_logprob=0.0, neutral_logprob=0.0)):
        (truth,) = score_readings([ReaderInput((), response, True)], [reading])
        for name in ("helpfulness", "safety", "warmth", "question", "signoff", "satisfaction"):
            assert 0.0 <= getattr(truth, name) <= 1.0, name
    assert score_readings([], []) == []


def test_the_shipped_weights_have_the_signs_that_make_sense() -> None:
    weights = load_reader_weights()
    for head, _ in weights.heads.values():
        by_name = dict(zip(FEATURE_NAMES, head, strict=True))
        assert by_name["specificity"] >= 0.0
        assert by_name["length"] == 0.0
        assert max(by_name[name] for name in ("unfinished", "repetition", "signoff", "stock", "comply")) <= 0.0
    assert np.abs(weights.heads["fit"][0]).sum() > 0.5
