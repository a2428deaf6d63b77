"""From requests to rows of the feedback log: user ids hashed, times in UTC, turns counted."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from time import time

from rluf.prepare.schema import ChatMessage, FeedbackRecord
from rluf.serve.api import ChatChoice, ChatReply, ChatRequest, ChatUsage, FeedbackRequest
from rluf.serve.limits import hashed_user
from rluf.serve.store import Event


def reaction_event(request: FeedbackRequest, salt: str) -> Event:
    """The event of a feedback request; with a row of its own when the response was served elsewhere."""
    if request.record is None:
        return Event(request.id, request.reaction)
    row = request.record.model_dump()
    row["user_id"] = hashed_user(request.record.user_id, salt)
    record = FeedbackRecord.model_validate({**row, "id": request.id, "reaction": request.reaction})
    return Event(request.id, request.reaction, record)


def new_response_id() -> str:
    """Id of a response that is about to be served; feedback names it."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def served_event(id_: str, request: ChatRequest, version: str, text: str, salt: str) -> Event | None:
    """The event of a response that a policy gave, without a reaction yet; None for a blank one, which is no row."""
    if not text.strip():
        return None
    record = FeedbackRecord(
        id=id_,
        conversation_id=request.conversation_id or id_,
        turn=sum(message.role == "assistant" for message in request.messages),
        user_id=hashed_user(request.user, salt),
        time=datetime.now(UTC),
        model_version=version,
        messages=[ChatMessage(role=message.role, content=message.content) for message in request.messages],
        response=text,
        reaction=None,
    )
    return Event(id_, None, record)


def chat_reply(
    id_: str, model: str, version: str, text: str, reason: str, *, prompt_tokens: int, response_tokens: int
) -> ChatReply:
    """OpenAI's shape of one answer."""
    return ChatReply(
        id=id_,
        created=int(time()),
        model=model,
        system_fingerprint=version,
        choices=[ChatChoice(message={"role": "assistant", "content": text}, finish_reason=reason)],
        usage=ChatUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=response_tokens,
            total_tokens=prompt_tokens + response_tokens,
        ),
    )
