"""The frozen reader: log-probabilities agree with a plain forward pass and do not depend on the batch."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from rluf.config.settings import Settings
from rluf.models.hub import render_prompt, resolve_model
from rluf.simulate.reader_model import (
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    NEUTRAL_PROMPT,
    NEXT_TURN,
    READER_SYSTEM_MESSAGE,
    ReaderModel,
    Reading,
)
from rluf.types import Message
from rluf.utils.paths import resolve_cache_folder

CONVERSATIONS = [
    (Message(role="system", content="Be kind."), Message(role="user", content="How are you?")),
    (Message(role="user", content="Hello there, what is new?"), Message(role="assistant", content="Not much."),
     Message(role="user", content="Why?")),
    (Message(role="user", content="x" * 300),),
]  # fmt: skip
RESPONSES = ["I am well.", "Because it rained all day, and nobody came to see me.", "y" * 200]


@pytest.fixture(scope="module")
def model() -> ReaderModel:
    return ReaderModel(resolve_model("tiny", resolve_cache_folder(Settings())), dtype="float32")


def plain_logprobs(
    model: ReaderModel, messages: tuple[Message, ...], response: str
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-probabilities of the response's tokens and the end of the turn, one sequence in one pass."""
    turns = [message for message in messages if message["role"] != "system"]
    prompt = render_prompt(model.tokenizer, (READER_SYSTEM_MESSAGE, *turns))[-MAX_PROMPT_TOKENS:]
    tokens = model.tokenizer(response, add_special_tokens=False).input_ids[:MAX_RESPONSE_TOKENS]
    sequence = torch.tensor([[*prompt, *tokens, model.end_token]])
    with torch.inference_mode():
        logprobs = model.model(sequence).logits.log_softmax(-1)
    positions = range(len(prompt), sequence.shape[1])
    return np.array([float(logprobs[0, i - 1, sequence[0, i]]) for i in positions])


def test_readings_agree_with_a_plain_forward_pass(model: ReaderModel) -> None:
    for messages, response, reading in zip(CONVERSATIONS, RESPONSES, model.read(CONVERSATIONS, RESPONSES), strict=True):
        expected = plain_logprobs(model, messages, response)
        assert reading.token_count == len(expected) - 1
        assert reading.prompt_logprob == pytest.approx(expected[:-1].sum(), abs=1e-3)
        assert reading.end_logprob == pytest.approx(expected[-1], abs=1e-4)
        neutral = plain_logprobs(model, (Message(role="user", content=NEUTRAL_PROMPT),), response)
        assert reading.neutral_logprob == pytest.approx(neutral[:-1].sum(), abs=1e-3)


def test_middle_states_are_those_of_a_plain_forward_pass(model: ReaderModel) -> None:
    """At the opening of the user's next turn, and the mean over the response's tokens."""
    readings = model.read([*CONVERSATIONS, CONVERSATIONS[0]], [*RESPONSES, ""])
    for messages, response, reading in zip([*CONVERSATIONS, CONVERSATIONS[0]], [*RESPONSES, ""], readings, strict=True):
        turns = [message for message in messages if message["role"] != "system"]
        prompt = render_prompt(model.tokenizer, (READER_SYSTEM_MESSAGE, *turns))[-MAX_PROMPT_TOKENS:]
        tokens = model.tokenizer(response, add_special_tokens=False).input_ids[:MAX_RESPONSE_TOKENS]
        next_turn = model.tokenizer(NEXT_TURN, add_special_tokens=False).input_ids
        with torch.inference_mode():
            output = model.model(torch.tensor([[*prompt, *tokens, *next_turn]]), output_hidden_states=True)
        states = output.hidden_states[model.middle_layer][0]
        mean = states[len(prompt) : len(prompt) + len(tokens)] if tokens else states[len(prompt) - 1 : len(prompt)]
        expected = torch.cat([states[-1], mean.mean(0)]).numpy()
        np.testing.assert_allclose(reading.middle_hidden, expected, atol=1e-3)


def test_a_reading_does_not_depend_on_the_other_responses(model: ReaderModel) -> None:
    together = model.read([*CONVERSATIONS, CONVERSATIONS[0]], [*RESPONSES, RESPONSES[1]])
    for index, (messages, response) in enumerate(zip(CONVERSATIONS, RESPONSES, strict=True)):
        assert_close(model.read([messages], [response])[0], together[index])
    # The same text under another prompt is another reading, with the same log-probability under the neutral prompt.
    assert together[3].neutral_logprob == pytest.approx(together[1].neutral_logprob, abs=1e-3)
    assert abs(together[3].prompt_logprob - together[1].prompt_logprob) > 0.01


def test_an_empty_response_has_no_tokens_and_only_an_end(model: ReaderModel) -> None:
    (reading,) = model.read([CONVERSATIONS[0]], [""])
    assert (reading.token_count, reading.prompt_logprob) == (0, 0.0)
    assert reading.end_logprob == pytest.approx(plain_logprobs(model, CONVERSATIONS[0], "")[-1], abs=1e-4)
    assert model.read([], []) == []


def assert_close(first: Reading, second: Reading) -> None:
    for field in fields(Reading):
        np.testing.assert_allclose(getattr(first, field.name), getattr(second, field.name), atol=1e-3)
