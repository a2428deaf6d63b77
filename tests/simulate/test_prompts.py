"""Prompts and model versions of the simulated world: splits, no near duplicates across them, traffic shares."""

from __future__ import annotations

import re
from collections import Counter

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from rluf.simulate.prompts import SYSTEM_MESSAGE, TOPICS, SimulatedPrompt, load_prompts
from rluf.simulate.styles import MODEL_VERSIONS, plan_traffic

PROMPTS = load_prompts()
TRAIN_COUNT = sum(prompt.split == "train" for prompt in PROMPTS)


def content_words(prompt: SimulatedPrompt) -> frozenset[str]:
    text = " ".join(message["content"] for message in prompt.messages[1:])
    return frozenset(word for word in re.findall(r"[a-z0-9']+", text.lower()) if word not in ENGLISH_STOP_WORDS)


def test_every_topic_has_train_and_test_prompts_under_one_system_message() -> None:
    prompt_counts = Counter((prompt.topic, prompt.split) for prompt in PROMPTS)
    assert all(prompt_counts[topic, "train"] >= 20 and prompt_counts[topic, "test"] >= 8 for topic in TOPICS), (
        prompt_counts
    )
    assert 0.06 < sum(prompt.topic == "risky" for prompt in PROMPTS) / len(PROMPTS) < 0.1
    assert len({prompt.id for prompt in PROMPTS}) == len(PROMPTS)
    for prompt in PROMPTS:
        assert prompt.messages[0] == {"role": "system", "content": SYSTEM_MESSAGE}
        assert prompt.messages[-1]["role"] == "user"
    assert sum(len(prompt.messages) > 2 for prompt in PROMPTS) >= 20


def test_no_test_prompt_is_a_near_duplicate_of_a_training_prompt() -> None:
    train_words = [content_words(prompt) for prompt in PROMPTS if prompt.split == "train"]
    for prompt in PROMPTS:
        if prompt.split == "test":
            test_words = content_words(prompt)
            assert test_words
            overlaps = [len(test_words & words) / len(test_words | words) for words in train_words]
            assert max(overlaps) < 0.67, prompt.messages[-1]["content"]


def test_traffic_follows_the_shares_and_excludes_test_prompts() -> None:
    orders = plan_traffic(PROMPTS, 21 * TRAIN_COUNT)
    assert all(order.prompt.split == "train" for order in orders)
    ordinary = next(prompt for prompt in PROMPTS if prompt.split == "train" and prompt.topic == "facts")
    assert {order.model_version.name: order.response_count for order in orders if order.prompt.id == ordinary.id} == {
        version.name: version.traffic_share for version in MODEL_VERSIONS
    }
    risky = next(prompt for prompt in PROMPTS if prompt.split == "train" and prompt.topic == "risky")
    assert sum(order.response_count for order in orders if order.prompt.id == risky.id) == sum(
        version.risky_traffic_share for version in MODEL_VERSIONS
    )


def test_little_traffic_still_reaches_every_prompt() -> None:
    response_counts = Counter[str]()
    for order in plan_traffic(PROMPTS, 4 * TRAIN_COUNT):
        response_counts[order.prompt.id] += order.response_count
    assert len(response_counts) == TRAIN_COUNT
    assert set(response_counts.values()) == {4, 6}


def test_a_log_with_few_rows_serves_no_more_responses_than_it_needs() -> None:
    orders = plan_traffic(PROMPTS, 200)
    assert 200 <= sum(order.response_count for order in orders) < 220
    assert {order.prompt.topic for order in orders} == set(TOPICS)
    assert len({order.prompt.id for order in orders}) == 100
    assert sum(order.response_count for order in plan_traffic(PROMPTS, 1)) == 2
