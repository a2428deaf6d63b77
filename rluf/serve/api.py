"""Requests and responses of the HTTP API, version 1. Both server and client are typed by them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from rluf.prepare.schema import MAX_MESSAGES, MAX_TEXT
from rluf.types import Message

MAX_ITEMS = 256
"""Most responses in one request."""


def _unicode(text: str) -> str:
    """Half of a UTF-16 pair is no text: it can be neither encoded nor stored."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text holds a lone surrogate; send valid Unicode")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_TEXT), AfterValidator(_unicode)]
Filled = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT), AfterValidator(_unicode)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_unicode)]
Topic = Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_unicode)]
Reaction = Annotated[str, StringConstraints(min_length=1, max_length=32), AfterValidator(_unicode)]
Locale = Annotated[str, StringConstraints(min_length=1, max_length=35), AfterValidator(_unicode)]
Objective = Literal["love", "helpfulness", "safety"]


class Body(BaseModel):
    """Base of requests: what is not known is refused, so that a misspelt field is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Reply(BaseModel):
    """Base of responses. A client of today reads a server of tomorrow: fields it does not know are left out."""

    model_config = ConfigDict(frozen=True)


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


def _ends_with_user(messages: list[ChatMessage]) -> list[ChatMessage]:
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise ValueError("messages must end with a user message that is not empty")
    return messages


Conversation = Annotated[Messages, AfterValidator(_ends_with_user)]


def plain(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """Messages as the reward models take them."""
    return tuple(Message(role=message.role, content=message.content) for message in messages)


class ScoreRequest(Body):
    """A conversation that ends with the user, and one response to it."""

    messages: Conversation
    response: Text


class ScoreBatchRequest(Body):
    """Several conversations with one response each, scored together."""

    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=MAX_ITEMS)]


class RankRequest(Body):
    """Responses to one conversation, of which the best is sought."""

    messages: Conversation
    responses: Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]
    objective: Objective = "love"


class ObjectiveScore(Reply):
    """One objective's opinion: `value` is the calibrated probability, `logit` its log-odds, `raw` the model's own logit
    before calibration, `spread` the standard deviation over an ensemble (0 for one model)."""

    value: float
    logit: float
    raw: float
    spread: float


class ScoreReply(Reply):
    """Scores by objective, and the version of the reward models that gave them."""

    model_version: str
    scores: dict[str, ObjectiveScore]


class ScoreBatchReply(Reply):
    """One reply for each item, in order."""

    results: list[ScoreReply]


class Ranked(Reply):
    """A response's place in the request, and its scores."""

    index: int
    scores: dict[str, ObjectiveScore]


class RankReply(Reply):
    """Responses from best to worst by the objective; `best` is the index of the first."""

    model_version: str
    objective: str
    best: int
    ranking: list[Ranked]


class FeedbackContext(Body):
    """What was served elsewhere: everything of a feedback row but its id and the reaction.

    `user_id` is hashed here before it is stored; `time` is when the response was served.
    """

    conversation_id: Name
    turn: int = Field(ge=0, le=1_000_000)
    user_id: Name
    time: Annotated[AwareDatetime, Field(ge=datetime(2000, 1, 1, tzinfo=UTC), le=datetime(2200, 1, 1, tzinfo=UTC))]
    model_version: Name
    messages: Conversation
    response: Annotated[Filled, AfterValidator(lambda text: _not_blank(text))]
    continued: bool | None = None
    returned: bool | None = None
    topic: Topic = "other"
    locale: Locale = "und"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text is blank")
    return text


class FeedbackRequest(Body):
    """A user's reaction to the response `id`; null takes a reaction back, or says that there was none.

    For a response that this service gave, id and reaction are enough; for others `record` says what was served.
    Sending the same again changes nothing.
    """

    id: Name
    reaction: Reaction | None
    record: FeedbackContext | None = None


class FeedbackReply(Reply):
    """`status` is stored (on disk now) or duplicate (it already was)."""

    id: str
    status: Literal["stored", "duplicate"]


class ModelInfo(Reply):
    """A served model in OpenAI's shape, with what it is: kind reward or policy, its role, version, share of traffic.

    `objectives` holds for each objective the expected mean value (from the reward card) and the tokens it reads.
    """

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "rluf"
    kind: Literal["reward", "policy"]
    role: str
    version: str
    share: float
    objectives: dict[str, dict[str, Any]] = {}


class ModelsReply(Reply):
    """All served models."""

    object: str = "list"
    data: list[ModelInfo]


class ErrorDetail(Reply):
    """What is wrong, in one sentence; `type` is a fixed word, `code` the HTTP status."""

    message: str
    type: str
    code: int


class ErrorReply(Reply):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class ChatRequest(BaseModel):
    """OpenAI's chat completion request; sampling settings are the policy's own (rollout.*), so others are left out.

    `user` names who chats (it is hashed before it is stored), `conversation_id` joins the turns of one conversation.
    """

    model_config = ConfigDict(frozen=True)

    model: Annotated[str, StringConstraints(max_length=200)] = ""
    messages: Conversation
    user: Name = "anonymous"
    conversation_id: Name | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: Literal[False] = False


class ChatChoice(Reply):
    """One answer."""

    index: int = 0
    message: dict[str, Any]
    finish_reason: str


class ChatUsage(Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(Reply):
    """OpenAI's chat completion; `id` is the response id that feedback names."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage
