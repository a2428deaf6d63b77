"""What a policy's replica reports of a sampled response, over an engine that samples a fixed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from rluf.backends.vllm.engine import Generation, RolloutEngine
from rluf.config.settings import Settings
from rluf.serve.api import ChatSampling
from rluf.serve.policy_deployment import PolicyDeployment
from rluf.types import Message


class FixedEngine:
    """An engine whose responses are always the same three tokens; the tokenizer too."""

    async def generate(self, *_: Any, max_tokens: int | None = None) -> tuple[Generation]:
        return (Generation((1, 2, 3), (-0.5, -1.0, -0.25), (), "length", ""),)

    def decode(self, token_ids: Sequence[int], **_: bool) -> str:
        return "Hello, friend!"


@pytest.mark.parametrize(
    ("sampling", "temperature", "logprob"),
    [
        (None, 0.6, -1.75), (ChatSampling(0.8), 0.8, -1.75), (ChatSampling(stop=("!",)), 0.6, None),
        (ChatSampling(stop=("?",)), 0.6, -1.75), (ChatSampling(0.0), 0.0, None), (ChatSampling(0), 0, None),
    ],
)  # fmt: skip
async def test_the_log_probability_is_that_of_the_sampling_distribution_or_none(
    sampling: ChatSampling | None, temperature: float, logprob: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, engine = PolicyDeployment(Settings().model_dump_json()), FixedEngine()
    policy._engine, policy._tokenizer = cast(RolloutEngine, engine), cast(Any, engine)
    policy._chats_allowed.set()
    monkeypatch.setattr("rluf.models.hub.render_prompt", lambda *_: [7, 8])
    completion = await policy.complete_chat([Message(role="user", content="Hi")], 1, sampling)
    assert (completion.temperature, completion.response_logprob) == (temperature, logprob)
    assert (completion.prompt_tokens, completion.response_tokens) == (2, 3)
