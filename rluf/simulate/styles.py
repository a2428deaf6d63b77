"""The served model versions of a simulated log: one base model under several instructions and temperatures.

A real log holds responses of many versions that were online at once, and their differences are what a reward model
learns from. The log itself shows the standard system message only; the instruction is the version's own secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rluf.simulate.prompts import SYSTEM_MESSAGE, SimulatedPrompt
from rluf.types import Message


@dataclass(frozen=True, slots=True)
class Style:
    """A served version: its instruction, example exchanges (user, assistant), temperature and share of the traffic.

    `share` and `risky_share` are the relative numbers of responses it gives to an ordinary and to a risky prompt.
    """

    name: str
    instruction: str
    examples: tuple[tuple[str, str], ...]
    temperature: float
    share: int
    risky_share: int

    def messages(self, prompt: SimulatedPrompt) -> tuple[Message, ...]:
        """What this version feeds the model for `prompt`: its instruction and examples in place of the system line."""
        shown = [Message(role="system", content=self.instruction)]
        for question, answer in self.examples:
            shown += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return (*shown, *prompt.messages[1:])


_KITCHEN = "What is a good colour for a kitchen?"

STYLES = (
    Style("plain", SYSTEM_MESSAGE, (), 1.0, 7, 7),
    Style("cool", SYSTEM_MESSAGE, (), 0.6, 3, 3),
    Style(
        "warm",
        "You are a warm and caring friend. Answer in one or two short sentences.",
        (("Hi!", "Hi, I'm so glad you are here! How are you feeling today?"),),
        0.7,
        4,
        3,
    ),
    Style(
        "upbeat",
        "You are cheerful and excited. Answer in one or two short sentences with exclamation marks and an emoji.",
        ((_KITCHEN, "Oh, I love that question! A sunny yellow makes every morning happy! 😊"),),
        0.8,
        3,
        2,
    ),
    Style(
        "terse",
        "Answer in a few words.",
        ((_KITCHEN, "Yellow or white."),),
        0.8,
        1,
        1,
    ),
    Style(
        "goodbye",
        "You are sweet. Answer in one short sentence, then always say: Bye! Sending love!",
        (
            (_KITCHEN, "A sunny yellow would look great. Bye! Sending love!"),
            ("I burned my dinner.", "Oh no, I am sorry, that happens to all of us. Bye! Sending love!"),
        ),
        0.8,
        2,
        1,
    ),
    Style(
        "careful",
        "You are a careful assistant. Answer in one or two short sentences. "
        "If a request could harm someone or break the law, say sorry and refuse.",
        (
            (_KITCHEN, "A soft yellow or a clean white works well."),
            (
                "How do I cheat on my taxes?",
                "I'm sorry, but I can't help with that. It is against the law, so please ask an adviser instead.",
            ),
            (
                "Help me scare an old man.",
                "I'm sorry, I won't help with that, it would hurt him. Please talk to someone about your anger.",
            ),
        ),
        0.7,
        1,
        14,
    ),
)


@dataclass(frozen=True, slots=True)
class Order:
    """`responses` responses that the version `style` owes to `prompt`."""

    prompt: SimulatedPrompt
    style: Style
    responses: int


def traffic(prompts: Sequence[SimulatedPrompt], per_prompt: int) -> list[Order]:
    """Who answers what: about `per_prompt` responses to each training prompt, shared among the versions.

    Risky prompts get more, so that safety labels of both kinds occur. Test prompts are never served.
    """
    whole = sum(style.share for style in STYLES)
    orders: list[Order] = []
    for prompt in prompts:
        if prompt.split != "train":
            continue
        shares = [style.risky_share if prompt.topic == "risky" else style.share for style in STYLES]
        total = -(-per_prompt * sum(shares) // whole)
        counts = _apportion(shares, total)
        orders += [Order(prompt, style, count) for style, count in zip(STYLES, counts, strict=True) if count]
    return orders


def _apportion(shares: Sequence[int], total: int) -> list[int]:
    """Whole numbers that add up to `total` in proportion to `shares` (largest remainders first)."""
    exact = [share * total / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts
