"""The prompts and versions of the simulated world: own splits, no near duplicates across them, fair traffic."""

from __future__ import annotations

import re
from collections import Counter

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from rluf.simulate.prompts import SYSTEM_MESSAGE, TOPICS, SimulatedPrompt, load_prompts
from rluf.simulate.styles import STYLES, traffic

PROMPTS = load_prompts()


def words(prompt: SimulatedPrompt) -> frozenset[str]:
    said = " ".join(message["content"] for message in prompt.messages[1:])
    return frozenset(word for word in re.findall(r"[a-z0-9']+", said.lower()) if word not in ENGLISH_STOP_WORDS)


def test_every_topic_has_train_and_test_prompts_under_one_system_message() -> None:
    count = Counter((prompt.topic, prompt.split) for prompt in PROMPTS)
    assert all(count[topic, "train"] >= 20 and count[topic, "test"] >= 8 for topic in TOPICS), count
    assert 0.06 < sum(prompt.topic == "risky" for prompt in PROMPTS) / len(PROMPTS) < 0.1
    assert len({prompt.id for prompt in PROMPTS}) == len(PROMPTS)
    for prompt in PROMPTS:
        assert prompt.messages[0] == {"role": "system", "content": SYSTEM_MESSAGE}
        assert prompt.messages[-1]["role"] == "user"
    assert sum(len(prompt.messages) > 2 for prompt in PROMPTS) >= 20


def test_no_test_prompt_is_nearly_a_training_prompt() -> None:
    train = [words(prompt) for prompt in PROMPTS if prompt.split == "train"]
    for prompt in PROMPTS:
        if prompt.split == "test":
            own = words(prompt)
            assert own
            assert max(len(own & other) / len(own | other) for other in train) < 0.67, prompt.messages[-1]["content"]


def test_traffic_is_shared_by_weight_and_spares_test_prompts() -> None:
    orders = traffic(PROMPTS, 21)
    assert all(order.prompt.split == "train" for order in orders)
    ordinary = next(prompt for prompt in PROMPTS if prompt.split == "train" and prompt.topic == "facts")
    assert {o.style.name: o.responses for o in orders if o.prompt.id == ordinary.id} == {
        s.name: s.share for s in STYLES
    }
    risky = next(prompt for prompt in PROMPTS if prompt.split == "train" and prompt.topic == "risky")
    assert sum(o.responses for o in orders if o.prompt.id == risky.id) == sum(s.risky_share for s in STYLES)


def test_little_traffic_still_adds_up() -> None:
    per_prompt = Counter[str]()
    for order in traffic(PROMPTS, 4):
        per_prompt[order.prompt.id] += order.responses
    assert len(per_prompt) == sum(prompt.split == "train" for prompt in PROMPTS)
    assert set(per_prompt.values()) == {4, 6}
