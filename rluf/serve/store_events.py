"""Events of a feedback store: served responses, reactions and choices, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rluf.prepare.schema import FeedbackRecord, PreferenceRecord
from rluf.utils.hashing import hash_parts

StoreOutcome = Literal["stored", "late", "duplicate", "unknown", "conflict", "settled", "mismatch", "unreadable"]
"""stored: on disk now; late: on disk now, as a change of a settled row; duplicate: on disk already; unknown: no such
response; conflict: the row with this id is of another response, user or conversation; settled: too late for another
choice; mismatch: no choice, since the two responses answer different messages or are equal; unreadable: the file with a
response of the choice cannot be read."""


@dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """A served response (`record` set, no reaction yet), a reaction (`record` None), or both.

    `replaced_reactions` is set for a response that the service has certainly served: if this store has no row of it,
    another writer has, and the reaction replaces whichever of these that row has.
    """

    id: str
    reaction: str | None = None
    record: FeedbackRecord | None = None
    replaced_reactions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceEvent:
    """A choice between two served responses to one conversation; of two choices between them the later counts."""

    chosen_id: str
    rejected_id: str

    @property
    def id(self) -> str:
        """The same id whichever of the two was chosen."""
        return "preference-" + hash_parts(*sorted((self.chosen_id, self.rejected_id)))


StoreEvent = FeedbackEvent | PreferenceEvent


def hash_content(row: Mapping[str, Any]) -> str:
    """Hash of what makes a row another response: two reports of one response agree in it."""
    return hash_parts(row["user_id"], row["conversation_id"], hash_messages(row["messages"]), row["response"])


def hash_messages(messages: Iterable[Mapping[str, str]]) -> str:
    """Hash of a context: equal for responses to the same messages."""
    return hash_parts(*(text for message in messages for text in (message["role"], message["content"])))


def build_preference_record(
    choice_id: str, chosen: FeedbackRecord, rejected: FeedbackRecord
) -> PreferenceRecord | None:
    """The record of a choice between two responses; None if they answer different messages, or are equal."""
    if chosen.messages != rejected.messages or chosen.response == rejected.response:
        return None
    return PreferenceRecord(
        id=choice_id, messages=chosen.messages, chosen=chosen.response, rejected=rejected.response,
        group=hash_messages([message.model_dump() for message in chosen.messages]),
        topic=chosen.topic, chosen_finish_reason=chosen.finish_reason, rejected_finish_reason=rejected.finish_reason,
    )  # fmt: skip
