"""The user's next message: users thank or ask more after a response that satisfied them, else rephrase or complain."""

from __future__ import annotations

from collections.abc import Sequence

from rluf.types import Message

FOLLOW_UPS = ("leaves", "thanks", "asks_more", "rephrases", "complains")
"""What a user does after a response; the index is SimulatedReactions.follow_up."""
_FOLLOW_UP_TEXTS = {
    "thanks": ("Thank you, that helps.", "Thanks! I like that.", "Good, that is what I needed. Thank you."),
    "asks_more": ("Can you tell me more about that?", "And what would you do first?", "Why do you think so?",
                  "Can you give me an example?"),
    "rephrases": ("That is not what I meant. {request}", "Let me say it again. {request}", "I said: {request}"),
    "complains": ("That does not answer me.", "What are you talking about?", "You did not read what I wrote."),
}  # fmt: skip


def build_second_turn(messages: Sequence[Message], response: str, follow_up: int, variant: int) -> tuple[Message, ...]:
    """Conversation after the user's next message, of kind FOLLOW_UPS[follow_up]; `variant` selects the wording.

    A rephrased request repeats the user's last message, so that the second response can be judged by it.
    """
    texts = _FOLLOW_UP_TEXTS[FOLLOW_UPS[follow_up]]
    text = texts[variant % len(texts)].format(request=messages[-1]["content"])
    return (*messages, Message(role="assistant", content=response), Message(role="user", content=text))
