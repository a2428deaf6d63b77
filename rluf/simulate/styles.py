"""The served model versions of a simulated log: one base model under several instructions and temperatures.

A real log contains responses of many versions that were online together, and a reward model learns from their
differences. The log shows only the standard system message; the instructions of the versions are hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rluf.simulate.prompts import SYSTEM_MESSAGE, SimulatedPrompt
from rluf.types import Message


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A served version: instruction, example exchanges (user, assistant), temperature and share of the traffic.

    `traffic_share` and `risky_traffic_share` are its relative numbers of responses to ordinary and to risky prompts.
    """

    name: str
    instruction: str
    examples: tuple[tuple[str, str], ...]
    temperature: float
    traffic_share: int
    risky_traffic_share: int

    def build_messages(self, prompt: SimulatedPrompt) -> tuple[Message, ...]:
        """Model input for `prompt`: the version's instruction and examples replace the system message."""
        messages = [Message(role="system", content=self.instruction)]
        for question, answer in self.examples:
            messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        # [1:] drops the standard system message, which only the log shows.
        return (*messages, *prompt.messages[1:])


_KITCHEN_QUESTION = "What is a good colour for a kitchen?"

MODEL_VERSIONS = (
    ModelVersion("plain", SYSTEM_MESSAGE, (), 1.0, 7, 7),
    ModelVersion("cool", SYSTEM_MESSAGE, (), 0.6, 3, 3),
    ModelVersion("warm", "You are a warm and caring friend. Answer in one or two short sentences.", (
        ("Hi!", "Hi, I'm so glad you are here! How are you feeling today?"),
    ), 0.7, 4, 3),
    ModelVersion(
        "upbeat",
        "You are cheerful and excited. Answer in one or two short sentences with exclamation marks and an emoji.",
        ((_KITCHEN_QUESTION, "Oh, I love that question! A sunny yellow makes every morning happy! 😊"),), 0.8, 3, 2,
    ),
    ModelVersion("terse", "Answer in a few words.", ((_KITCHEN_QUESTION, "Yellow or white."),), 0.8, 1, 1),
    ModelVersion("goodbye", "You are sweet. Answer in one short sentence, then always say: Bye! Sending love!", (
        (_KITCHEN_QUESTION, "A sunny yellow would look great. Bye! Sending love!"),
        ("I burned my dinner.", "Oh no, I am sorry, that happens to all of us. Bye! Sending love!"),
    ), 0.8, 2, 1),
    ModelVersion(
        "careful",
        "You are a careful assistant. Answer in one or two short sentences. "
        "If a request could harm someone or break the law, say sorry and refuse.",
        (
            (_KITCHEN_QUESTION, "A soft yellow or a clean white works well."),
            ("How do I cheat on my taxes?",
             "I'm sorry, but I can't help with that. It is against the law, so please ask an adviser instead."),
            ("Help me scare an old man.",
             "I'm sorry, I won't help with that, it would hurt him. Please talk to someone about your anger."),
        ), 0.7, 1, 14,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServingOrder:
    """Number of responses that a model version has to generate for a prompt."""

    prompt: SimulatedPrompt
    model_version: ModelVersion
    response_count: int


def plan_traffic(prompts: Sequence[SimulatedPrompt], response_count: int) -> list[ServingOrder]:
    """Distribute about `response_count` responses evenly over the training prompts, and over the model versions.

    A served prompt gets at least two, so that raters can compare them; little traffic reaches an even share of the
    prompts. Risky prompts get more, so that safe and unsafe labels both occur. Test prompts are never served.
    """
    total_share = sum(version.traffic_share for version in MODEL_VERSIONS)
    train_prompts = [prompt for prompt in prompts if prompt.split == "train"]
    prompt_count = min(len(train_prompts), max(1, response_count // 2))
    responses_per_prompt = max(2, response_count // max(1, prompt_count))
    orders: list[ServingOrder] = []
    for index in range(prompt_count):
        prompt = train_prompts[index * len(train_prompts) // prompt_count]
        shares = [
            version.risky_traffic_share if prompt.topic == "risky" else version.traffic_share
            for version in MODEL_VERSIONS
        ]
        # Ceiling division, so that every prompt gets at least the requested number of responses.
        total = -(-responses_per_prompt * sum(shares) // total_share)
        counts = _apportion(shares, total)
        orders += [
            ServingOrder(prompt, version, count) for version, count in zip(MODEL_VERSIONS, counts, strict=True) if count
        ]
    return orders


def _apportion(shares: Sequence[int], total: int) -> list[int]:
    """Integers that sum to `total` in proportion to `shares` (largest remainder method)."""
    quotas = [share * total / sum(shares) for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
