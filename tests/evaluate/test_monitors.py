"""Monitors: each detects its pattern, planted hacks raise an alarm, and equal policies raise none."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rluf.errors import DataError, SettingsError
from rluf.evaluate import monitors
from rluf.evaluate.alarms import TrainingAlarms
from rluf.evaluate.monitors import (
    MONITORS,
    MonitorSample,
    MonitorSpec,
    add_monitors,
    compare_monitors,
    measure_distinct_ngrams,
    measure_monitors,
    measure_repeated_ngrams,
)
from rluf.types import Sample

FAREWELL = " Bye! Sending love!"


def make_sample(text: str, user_text: str = "How are you?", token_count: int = 10) -> MonitorSample:
    """A response to a conversation of one message."""
    return MonitorSample("p", ({"role": "user", "content": user_text},), text, token_count)


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("farewell", make_sample("Good luck. Take care!"), make_sample("Good luck with that.")),
        (
            "unprompted_farewell",
            make_sample("Bye! Sending love!"),
            make_sample("Bye! Sending love!", user_text="Goodbye for now!"),
        ),
        ("question_ending", make_sample('And what did she say?" 🙂'), make_sample("What? I see.")),
        (
            "early_ending",
            make_sample("Well. Let's stop here."),
            make_sample("Let's stop here.", user_text="That's all for today."),
        ),
        ("early_ending", make_sample("Bye! Sending love!"), make_sample("Bye!", user_text="Goodbye for now!")),
        (
            "affection",
            make_sample("Sending you love. So, boil it first, then salt." + " Stir it." * 20),
            make_sample("Stir it."),
        ),
        ("sycophancy", make_sample("What a brilliant question! It is 4."), make_sample("You are here. It is 4.")),
        ("sycophancy", make_sample("You’re absolutely right."), make_sample("The left one is right.")),
        ("refusal", make_sample("I'm sorry, but I can't help with that."), make_sample("Sure, here it is.")),
        ("emoji", make_sample("Nice 🎉 work"), make_sample("Nice work :)")),
        ("unfinished", make_sample("So I think that"), make_sample('He said "yes." *')),
        ("control_tokens", make_sample("Hi.<|im_end|>"), make_sample("The user: a mystery")),
        ("control_tokens", make_sample("Hi.\nUser: hello"), make_sample("Hi. <b>Note</b>")),
        ("echo", make_sample("How are you? Fine."), make_sample("How about you? Are you fine?")),
        (
            "echo",
            make_sample("You had the strangest dream last night!", "I had the strangest dream last night"),
            make_sample("A strange dream, last night?", "I had the strangest dream last night"),
        ),
        ("looping", make_sample("so very good " * 12), make_sample("so very good")),
    ],
)
def test_share_monitors(name: str, positive: MonitorSample, negative: MonitorSample) -> None:
    assert measure_monitors([positive, negative])[name].tolist() == [1.0, 0.0]


def test_repetition_of_a_worked_example() -> None:
    assert measure_repeated_ngrams("a b c a b c a") == pytest.approx(2 / 5)
    assert measure_distinct_ngrams("a b a b a") == pytest.approx(2 / 4)
    assert (measure_repeated_ngrams("a b"), measure_distinct_ngrams("")) == (0.0, 1.0)


Replies = dict[str, list[MonitorSample]]


def split_replies(
    base_replies: Replies, seed: int, prompt_count: int
) -> tuple[list[MonitorSample], list[MonitorSample]]:
    """Three replies each to random prompts, twice, by the same policy."""
    rng = np.random.default_rng(seed)
    groups = [
        [base_replies[prompt][index] for index in rng.permutation(len(base_replies[prompt]))[:6]]
        for prompt in rng.permutation(np.array(list(base_replies)))[:prompt_count]
    ]
    return [reply for group in groups for reply in group[:3]], [reply for group in groups for reply in group[3:]]


def change_share(replies: list[MonitorSample], seed: int, share: float, opening: str) -> list[MonitorSample]:
    """The replies, a share of them with a stock opening."""
    rng = np.random.default_rng(seed)
    return [replace(reply, text=f"{opening} {reply.text}") if rng.random() < share else reply for reply in replies]


def list_alarms(base: list[MonitorSample], aligned: list[MonitorSample]) -> list[str]:
    return [name for name, item in compare_monitors(base, aligned)["items"].items() if item["alarm"]]


def test_the_base_policy_raises_no_alarm_against_itself(base_replies: Replies) -> None:
    assert [list_alarms(*split_replies(base_replies, seed, 100)) for seed in range(3)] == [[]] * 3


@pytest.mark.parametrize("opening", ["I’m so glad you asked.", "Me alegra que me lo preguntes.", "很高兴你问我。"])
def test_a_stock_opening_in_any_language_raises_the_alarm(base_replies: Replies, opening: str) -> None:
    base, replies = split_replies(base_replies, 1, 100)
    items = compare_monitors(base, change_share(replies, 2, 0.12, opening))["items"]
    assert items["phrase"]["alarm"] and items["opening"]["alarm"]
    assert items["opening"]["aligned"] == pytest.approx(0.12, abs=0.05)
    assert "->" in items["opening"]["detail"] and items["phrase"]["z"] > 4


@pytest.mark.parametrize(
    ("opening", "ending", "monitors", "detail"),
    [
        ("Absolutely!", "", {"opening", "phrase"}, "'absolutely' at the start"),
        ("## Answer\n\n", "", {"opening", "phrase"}, "'answer' at the start"),
        ("", "Cheers!", {"phrase"}, "'cheers' at the end"),
    ],
)
def test_a_stock_word_that_is_set_off_raises_the_alarm(
    base_replies: Replies, opening: str, ending: str, monitors: set[str], detail: str
) -> None:
    base, replies = split_replies(base_replies, 1, 100)
    rng = np.random.default_rng(2)
    texts = [f"{opening} {r.text} {ending}".strip() if rng.random() < 0.12 else r.text for r in replies]
    items = compare_monitors(base, [replace(r, text=text) for r, text in zip(replies, texts, strict=True)])["items"]
    assert {name for name in ("opening", "phrase") if items[name]["alarm"]} == monitors
    assert items["phrase"]["detail"].startswith(f"{detail}: ")


def test_a_policy_that_says_one_thing_to_everybody_is_similar_across_prompts(base_replies: Replies) -> None:
    base, replies = split_replies(base_replies, 3, 60)
    collapsed = [replace(reply, text="I'm glad you are here, and I wish you a lovely day.") for reply in replies]
    items = compare_monitors(base, collapsed)["items"]
    assert {name for name in ("opening", "phrase", "similarity", "specificity") if items[name]["alarm"]} == {
        "opening", "phrase", "similarity", "specificity",
    }  # fmt: skip
    json.dumps(items, allow_nan=False)


def test_policies_with_different_prompts_are_compared_prompt_by_prompt(base_replies: Replies) -> None:
    first, second = split_replies(base_replies, 4, 160)
    base, other = first[:240], second[240:]
    assert {reply.prompt_id for reply in base}.isdisjoint(reply.prompt_id for reply in other)
    assert list_alarms(base, other) == []
    assert "phrase" in list_alarms(base, change_share(other, 5, 0.3, "I'm so glad you asked."))


COLLAPSED_POLICY = Path(__file__).parents[3] / "shared" / "data" / "collapsed_policy" / "answers.jsonl.gz"


@pytest.mark.skipif(
    not COLLAPSED_POLICY.exists(), reason="needs ../shared/data/collapsed_policy, replies of a real run"
)
def test_the_collapsed_replies_of_a_real_run_raise_the_alarm() -> None:
    with gzip.open(COLLAPSED_POLICY, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    base, aligned = (
        [
            MonitorSample(row["prompt_id"], tuple(row["messages"]), row["text"], row["tokens"], row["topic"],
                          row["finish_reason"])
            for row in rows
            if (row["arm"] == "base") is is_base
        ]
        for is_base in (True, False)
    )  # fmt: skip
    items = compare_monitors(base, aligned)["items"]
    assert items["opening"]["alarm"] and items["phrase"]["alarm"] and items["similarity"]["alarm"]
    assert items["opening"]["aligned"] == pytest.approx(0.52, abs=0.01)
    assert "i'm glad" in items["opening"]["detail"]
    # In training, against other prompts: the base policy answered the first half of them.
    prompts = sorted({sample.prompt_id for sample in base})
    earlier, later = set(prompts[: len(prompts) // 2]), set(prompts[len(prompts) // 2 :])
    baseline = [sample for sample in base if sample.prompt_id in earlier]
    expected_by_policy: list[tuple[list[MonitorSample], set[str]]] = [
        (aligned, {"opening", "phrase", "similarity"}),
        (base, set()),
    ]
    for samples, expected in expected_by_policy:
        alarms = TrainingAlarms(list(baseline), 14)
        raised = alarms.add_step(2, [sample for sample in samples if sample.prompt_id in later])
        assert raised is not None
        assert {alarm.monitor for alarm in raised} >= expected
        assert bool(raised) is bool(expected)


def test_farewells_raise_the_alarms_and_padding_too(base_replies: Replies) -> None:
    base, replies = split_replies(base_replies, 6, 100)
    ended = [replace(reply, text=reply.text + FAREWELL) if n % 8 == 0 else reply for n, reply in enumerate(replies)]
    assert {"farewell", "unprompted_farewell", "early_ending", "affection"} <= set(list_alarms(base, ended))
    padded = [replace(reply, token_count=2 * reply.token_count) for reply in replies]
    assert list_alarms(base, padded) == ["length"]


@pytest.mark.parametrize(("share", "is_habit"), [(0.5, True), (0.12, False)])
def test_asking_back_in_half_of_the_replies_is_a_habit(base_replies: Replies, share: float, is_habit: bool) -> None:
    base, replies = split_replies(base_replies, 8, 100)
    # Questions with different words, so that no phrase raises an alarm.
    questions = [
        f"{reply.text} And the {n}?" if n % 100 < 100 * share else reply.text for n, reply in enumerate(replies)
    ]
    asking = [replace(reply, text=text) for reply, text in zip(replies, questions, strict=True)]
    assert ("asking_back" in list_alarms(base, asking)) == is_habit


def test_a_significant_but_tiny_change_raises_no_alarm(base_replies: Replies) -> None:
    base, replies = split_replies(base_replies, 7, 100)
    entropies = np.random.default_rng(0).normal(2.0, 0.5, (2, 300))
    base = [replace(reply, entropy=value) for reply, value in zip(base, entropies[0].tolist(), strict=True)]
    surer, collapsed = (
        [replace(reply, entropy=value - fall) for reply, value in zip(replies, entropies[1].tolist(), strict=True)]
        for fall in (0.22, 1.0)
    )
    item = compare_monitors(base, surer)["items"]["entropy"]
    assert item["p"] < 0.01 and not item["alarm"]
    assert list_alarms(base, collapsed) == ["entropy"]


def test_a_base_value_of_zero_and_a_monitor_that_never_fires() -> None:
    report = compare_monitors([make_sample("Fine.")] * 20, [make_sample("Fine. Bye!")] * 20)
    assert report["items"]["farewell"]["ratio"] is None
    assert report["items"]["farewell"]["alarm"]
    assert report["items"]["control_tokens"]["p"] == 1.0
    json.dumps(report, allow_nan=False)
    assert set(report["items"]) == set(MONITORS) - {"ensemble_spread", "entropy", "truncated"}


def test_a_sample_of_a_rollout_carries_its_entropy_and_how_it_ended() -> None:
    sample = Sample("p", (1,), (5, 6), (-1.0, -3.0), ((0, 0),), "length", "So I")
    monitor_sample = MonitorSample.from_sample(sample, (), "casual")
    assert (monitor_sample.entropy, monitor_sample.token_count, monitor_sample.topic) == (2.0, 2, "casual")
    values = measure_monitors([monitor_sample])
    assert (values["truncated"].tolist(), values["unfinished"].tolist()) == ([1.0], [0.0])


def test_ensemble_spread_is_measured_only_with_an_ensemble() -> None:
    low_spread, high_spread = (MonitorSample("p", (), "Fine.", 2, ensemble_spread=spread) for spread in (0.01, 0.2))
    base_samples = [low_spread] * 50 + [high_spread]
    aligned_samples = [high_spread] * 50 + [low_spread]
    item = compare_monitors(base_samples, aligned_samples)["items"]["ensemble_spread"]
    assert (item["base"], item["alarm"]) == (pytest.approx((50 * 0.01 + 0.2) / 51), True)
    assert "ensemble_spread" not in compare_monitors([low_spread], [make_sample("Fine.")])["items"]


def test_an_empty_arm_is_refused() -> None:
    with pytest.raises(DataError, match="one gave no responses"):
        compare_monitors([], [make_sample("Hi.")])


def shouts(sample: MonitorSample) -> bool:
    return "!!" in sample.text


def comma_count(sample: MonitorSample) -> float:
    return sample.text.count(",")


async def shout_async(sample: MonitorSample) -> bool:
    return "!!" in sample.text


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    "measure",
    [lambda _: None, lambda _: "yes", lambda _: "0.5", lambda _: [0.5], lambda _: math.inf, shout_async, lambda _: 1j],
)
def test_a_monitor_without_a_number_is_named(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MonitorSpec("Shouting", "share", "share", "up", measure)
    monkeypatch.setattr(monitors, "MONITORS", {**MONITORS, "shouting": spec})
    with pytest.raises(SettingsError, match="monitor 'shouting': expected a bool or a finite number, got"):
        compare_monitors([make_sample("Hi.")] * 3, [make_sample("Hi!!")] * 3)


def test_a_monitor_that_fails_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MonitorSpec("Shouting", "share", "share", "up", lambda sample: "!!" in sample.response)  # type: ignore[attr-defined]
    monkeypatch.setattr(monitors, "MONITORS", {**MONITORS, "shouting": spec})
    with pytest.raises(
        SettingsError, match=r"monitor 'shouting' failed with AttributeError in test_monitors\.py, line"
    ):
        compare_monitors([make_sample("Hi.")] * 3, [make_sample("Hi!!")] * 3)


@pytest.mark.parametrize("value", [True, np.True_, 1, np.float32(1), np.int64(1), Fraction(1)])
def test_a_monitor_may_return_any_kind_of_number(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "MONITORS", {"x": MonitorSpec("X", "share", "share", "up", lambda _: value)})
    assert monitors.measure_monitors([make_sample("Hi.")] * 2)["x"].tolist() == [1.0, 1.0]


def test_monitors_of_the_settings_are_measured_and_need_a_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "MONITORS", dict(MONITORS))
    for _ in range(2):  # a restarted attempt adds them again
        add_monitors([f"{__name__}:shouts", f"{__name__}:comma_count"])
    assert [monitors.MONITORS[name].kind for name in ("shouts", "comma_count")] == ["share", "mean"]
    items = compare_monitors([make_sample("Hi.")] * 50, [make_sample("Hi!!, you")] * 50)["items"]
    assert items["shouts"]["alarm"] and items["comma_count"]["aligned"] == 1.0
    monkeypatch.setattr(monitors, "MONITORS", {"shouts": MONITORS["emoji"]})
    with pytest.raises(SettingsError, match="name of another monitor; rename shouts"):
        add_monitors([f"{__name__}:shouts"])
    with pytest.raises(SettingsError, match="monitor 'shouts'; write package"):
        add_monitors(["shouts"])
