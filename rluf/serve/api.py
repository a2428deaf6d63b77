"""HTTP API version 1: requests, replies, errors, and rows of the feedback log. Server and client share the models.

A reply is what the service sends back; a response is a text that a policy generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from rluf.config.objectives import OBJECTIVE_NAME_PATTERN, PRIMARY_OBJECTIVE
from rluf.errors import RlufError
from rluf.prepare.schema import MAX_MESSAGES, MAX_TEXT_CHARS, FeedbackRecord
from rluf.prepare.schema import ChatMessage as LoggedMessage
from rluf.serve.client_fields import NEUTRAL_CHAT_VALUES, drop_neutral_fields
from rluf.serve.store_events import FeedbackEvent, PreferenceEvent
from rluf.types import Message, Score, ScoringItem
from rluf.utils.hashing import hash_user_id, is_response_of_user, is_signed_response_id

MAX_ITEMS_PER_REQUEST = 256
"""Maximum number of responses in one request."""
MAX_CLOCK_ERROR = timedelta(days=1)
"""How far the time of a record may be in the future."""


class ApiError(RlufError):
    """Error response: HTTP status, machine-readable type, one-sentence message, optional seconds until a retry."""

    def __init__(self, status: int, error_type: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message, self.retry_after_s = status, error_type, message, retry_after_s

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, str, str, float | None]]:
        # The default would call ApiError(message) in the process that unpickles it, which lacks two arguments.
        return ApiError, (self.status, self.error_type, self.message, self.retry_after_s)

    @property
    def body(self) -> dict[str, object]:
        """JSON body of the response."""
        return {"error": {"message": self.message, "type": self.error_type, "code": self.status}}

    @property
    def headers(self) -> dict[str, str]:
        """Response headers: Retry-After in whole seconds, at least 1, if a retry helps; what 401 and 408 need."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 408:
            headers["Connection"] = "close"  # the rest of the request would be read as the next one
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def _check_unicode(text: str) -> str:
    """Reject lone surrogates: half of a UTF-16 pair can be neither encoded nor stored."""
    # isascii() is a constant-time flag in CPython and covers most requests; the scan is linear in the text.
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text contains a lone surrogate; send valid Unicode")
    return text


MessageText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_check_unicode)]
NonEmptyText = Annotated[MessageText, StringConstraints(min_length=1)]
IdentifierText = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=r"\S"), AfterValidator(_check_unicode)
]
TopicText = Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_check_unicode)]
ReactionText = Annotated[str, StringConstraints(min_length=1, max_length=32), AfterValidator(_check_unicode)]
LocaleText = Annotated[str, StringConstraints(min_length=1, max_length=35), AfterValidator(_check_unicode)]
ObjectiveName = Annotated[str, StringConstraints(pattern=rf"^{OBJECTIVE_NAME_PATTERN.pattern}$")]
"""Name of an objective; which ones are served depends on serve.objectives."""


class RequestModel(BaseModel):
    """Base class of requests. Unknown fields are rejected so that a misspelled field is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ResponseModel(BaseModel):
    """Base class of responses. Unknown fields are ignored so that an older client can read a newer server."""

    model_config = ConfigDict(frozen=True)


class ChatMessage(RequestModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: MessageText


MessageList = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


def _check_last_message(messages: list[ChatMessage]) -> list[ChatMessage]:
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise ValueError("messages must end with a user message that is not empty")
    return messages


Conversation = Annotated[MessageList, AfterValidator(_check_last_message)]


def to_messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """Convert request messages to the library's Message type, which reward models and policies take."""
    return tuple(Message(role=message.role, content=message.content) for message in messages)


FinishReason = Literal["stop", "length"]
"""Why a response ended: by itself, or at the token limit. Reward models read the difference."""


class ScoreRoute(NamedTuple):
    """Which model version scores an item: `assignment_key` decides between live and candidate, `version` overrides it.

    The key is the user, else the conversation; without either the live version scores. `version` is "live",
    "candidate", or the version that /v1/models lists.
    """

    assignment_key: str | None = None
    version: str | None = None


class RoutedRequest(RequestModel):
    """Fields of a score request that select the model version; see ScoreRoute."""

    user: IdentifierText | None = None
    conversation_id: IdentifierText | None = None
    model_version: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    def to_route(self) -> ScoreRoute:
        """Convert to the gateway's type."""
        return build_score_route(self.user, self.conversation_id, self.model_version)


def build_score_route(user: str | None, conversation_id: str | None, version: str | None) -> ScoreRoute:
    """Build the route of an item: sticky by user, else by conversation."""
    # Different first letters, since a user and a conversation may have one id.
    key = f"u{user}" if user else f"c{conversation_id}" if conversation_id else None
    return ScoreRoute(key, version)


class ScoreRequest(RoutedRequest):
    """A conversation that ends with a user message, and one response to it."""

    messages: Conversation
    response: MessageText
    finish_reason: FinishReason = "stop"

    def to_item(self) -> ScoringItem:
        """Convert to the library's type, which reward models take."""
        return ScoringItem(to_messages(self.messages), self.response, self.finish_reason == "length")


class ScoreBatchRequest(RequestModel):
    """Several conversations with one response each, scored together in one request."""

    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]


class RankRequest(RoutedRequest):
    """Responses to one conversation, to be ordered by one objective; `finish_reasons` are one per response, or none."""

    messages: Conversation
    responses: Annotated[list[MessageText], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]
    finish_reasons: Annotated[list[FinishReason], Field(max_length=MAX_ITEMS_PER_REQUEST)] = []
    objective: ObjectiveName = PRIMARY_OBJECTIVE

    @model_validator(mode="after")
    def _check_finish_reasons(self) -> RankRequest:
        if self.finish_reasons and len(self.finish_reasons) != len(self.responses):
            raise ValueError(
                f"expected one finish_reason per response, got {len(self.finish_reasons)} for {len(self.responses)}"
            )
        return self

    def to_items(self) -> list[ScoringItem]:
        """Convert to the library's type, which reward models take."""
        messages, finish_reasons = to_messages(self.messages), self.finish_reasons or ["stop"] * len(self.responses)
        return [
            ScoringItem(messages, response, finish_reason == "length")
            for response, finish_reason in zip(self.responses, finish_reasons, strict=True)
        ]


class ObjectiveScore(ResponseModel):
    """Score of one objective; `is_probability` and `exact_logit` are those of rluf.types.Score.

    `value` is calibrated, or that of a judge or function, `logit` its log-odds, `raw` the logit before calibration, and
    `spread` and `logit_spread` the standard deviations of ensemble members. `truncated`: longer than the model reads.
    """

    value: float
    logit: float
    raw: float
    spread: float
    logit_spread: float = 0.0
    truncated: bool = False
    is_probability: bool = True
    exact_logit: float | None = None


class ScoreReply(ResponseModel):
    """Scores by objective, and the version of the reward models that produced them."""

    model_version: str
    scores: dict[str, ObjectiveScore]


class ScoreBatchReply(ResponseModel):
    """One reply per item, in request order."""

    results: list[ScoreReply]


class RankedResponse(ResponseModel):
    """Index of a response in the request, and its scores."""

    index: int
    scores: dict[str, ObjectiveScore]


class RankReply(ResponseModel):
    """Responses from best to worst by the objective; `best` is the request index of the top one."""

    model_version: str
    objective: str
    best: int
    ranking: list[RankedResponse]


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text is blank")
    return text


class FeedbackContext(RequestModel):
    """A response served by another system: every field of a feedback row except its id and the reaction.

    The service hashes `user_id` before it stores the row; `time` is when the response was served.
    """

    conversation_id: IdentifierText
    turn: int = Field(strict=True, ge=0, le=1_000_000)
    user_id: IdentifierText
    time: Annotated[AwareDatetime, Field(ge=datetime(2000, 1, 1, tzinfo=UTC))]
    model_version: IdentifierText
    messages: Conversation
    response: Annotated[NonEmptyText, AfterValidator(_check_not_blank)]
    finish_reason: FinishReason | None = None
    continued: bool | None = None
    returned: bool | None = None
    topic: TopicText = "other"
    locale: LocaleText = "und"
    interface: LocaleText = "und"
    device: IdentifierText | None = None
    author: IdentifierText | None = None
    arm: IdentifierText | None = None
    temperature: float | None = Field(strict=True, default=None, ge=0, allow_inf_nan=False)
    response_tokens: int | None = Field(strict=True, default=None, ge=0, le=1_000_000_000)
    response_logprob: float | None = Field(strict=True, default=None, le=0, allow_inf_nan=False)

    @field_validator("time")
    @classmethod
    def _check_time(cls, time: datetime) -> datetime:
        if time > datetime.now(UTC) + MAX_CLOCK_ERROR:
            raise ValueError("it is in the future; check the clock of the system that served the response")
        return time


class FeedbackRequest(RequestModel):
    """A user's reaction to the response `id`; null withdraws a reaction, or with `record` reports that there was none.

    For a response from this service, `user` must be that of the chat request; any other response is described by
    `record`, whose `user_id` a `user` must equal. Repeating a request changes nothing.
    """

    id: IdentifierText
    reaction: ReactionText | None
    user: IdentifierText | None = None
    record: FeedbackContext | None = None


class PreferenceRequest(RequestModel):
    """A choice between two responses that this service gave to one conversation; `user` is that of both requests."""

    chosen_id: IdentifierText
    rejected_id: IdentifierText
    user: IdentifierText | None = None


class FeedbackReply(ResponseModel):
    """`status` is "stored" (on disk now) or "duplicate" (it was on disk already)."""

    id: str
    status: Literal["stored", "duplicate"]


class ModelInfo(ResponseModel):
    """A served model in OpenAI's format, extended by its kind, role, version and share of the traffic.

    `objectives` has, for each objective, the expected mean value (from the reward card) and the maximum token count.
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


class ModelsReply(ResponseModel):
    """All served models."""

    object: str = "list"
    data: list[ModelInfo]


class ErrorDetail(ResponseModel):
    """One-sentence `message`, machine-readable `type`, and the HTTP status as `code`."""

    message: str
    type: str
    code: int


class ErrorReply(ResponseModel):
    """Body of every response that is not 2xx."""

    error: ErrorDetail


def _read_client_message(message: Any) -> Any:
    """Accept OpenAI's list of text parts as a content, the role developer as system, and fields that are empty."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None and value != []}
    content = message.get("content")
    if isinstance(content, list):
        texts = [entry.get("text") if isinstance(entry, dict) else None for entry in content]
        if not all(
            isinstance(text, str) and entry == {"type": "text", "text": text}
            for entry, text in zip(content, texts, strict=True)
        ):
            raise ValueError("only parts of type text are supported")
        message = message | {"content": "".join(map(str, texts))}
    return message | {"role": "system"} if message.get("role") == "developer" else message


ClientMessage = Annotated[ChatMessage, BeforeValidator(_read_client_message)]
"""A message as OpenAI's clients send it."""
ChatConversation = Annotated[
    list[ClientMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_last_message)
]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_check_unicode)]
MIN_TEMPERATURE = 0.01
"""vLLM reads a lower temperature than this as this one, except 0."""


def _check_temperature(temperature: float) -> float:
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"expected 0, or at least {MIN_TEMPERATURE:g}")
    return temperature


class StreamOptions(RequestModel):
    """OpenAI's options of a streamed completion."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(RequestModel):
    """OpenAI's chat completion request. What would change the reply is honored or refused, never ignored.

    `user` identifies the user (hashed before it is stored); `conversation_id` joins the turns of one conversation.
    `interface`, `device` and `author` (the user who made the persona) are stored with the row; see FeedbackRecord.
    Without `temperature` and `max_tokens` the policy samples with its rollout.* settings; `max_tokens` can only lower
    rollout.max_response_tokens. A stream is the complete reply in one chunk. With `store` false no row is written, and
    there is nothing to react to. `metadata` does nothing here.
    """

    model: Annotated[str, StringConstraints(max_length=200)] = ""
    messages: ChatConversation
    user: IdentifierText | None = None
    conversation_id: IdentifierText | None = None
    interface: LocaleText = "und"
    device: IdentifierText | None = None
    author: IdentifierText | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2), AfterValidator(_check_temperature)] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(strict=True, max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    top_p: Annotated[float, Field(strict=True, ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(strict=True, ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(strict=True, ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_client_fields(cls, values: Any) -> Any:
        values = drop_neutral_fields(values, NEUTRAL_CHAT_VALUES)
        if isinstance(values, dict) and "safety_identifier" in values:  # OpenAI's later name of `user`
            user = values.pop("safety_identifier")
            if values.setdefault("user", user) != user:
                raise ValueError("user and safety_identifier differ; send one of them")
        return values

    def to_sampling(self) -> ChatSampling:
        """Convert the sampling fields to the policy's type."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return ChatSampling(self.temperature, min(limits, default=None), stops)


class ChatSampling(NamedTuple):
    """Sampling of one response; None stands for the policy's rollout.* setting. The text ends before a stop string."""

    temperature: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


class ChatChoice(ResponseModel):
    """One chat response and why it ended."""

    index: int = 0
    message: dict[str, Any]
    finish_reason: str


class ChatUsage(ResponseModel):
    """Token counts of prompt and response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(ResponseModel):
    """OpenAI's chat completion; `id` is the response id to send feedback for."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """Scores of one item by objective, and the version of the reward models that produced them."""

    model_version: str
    scores: Mapping[str, Score]


def build_reaction_event(request: FeedbackRequest, salt: bytes, reactions: Sequence[str] = ()) -> FeedbackEvent:
    """Convert a feedback request to a store event, with a full row when another system served the response.

    `reactions` are those that the service accepts. Raises ApiError 403 for a response that was served to another user,
    422 for a request that names two users.
    """
    is_own = is_signed_response_id(request.id)
    if is_own:
        record_user = None if request.record is None else request.record.user_id
        check_response_user(request.id, request.user or record_user, salt)
    if request.record is None:
        if is_own:
            return FeedbackEvent(request.id, request.reaction, replaced_reactions=tuple(reactions))
        return FeedbackEvent(request.id, request.reaction)
    if request.user not in (None, request.record.user_id):
        raise ApiError(422, "invalid", "user and record.user_id differ; send one of them")
    row = request.record.model_dump()
    row["user_id"] = hash_user_id(request.record.user_id, salt)
    row |= {name: _hash_id(row[name], salt) for name in ("device", "author")}
    record = FeedbackRecord.model_validate({**row, "id": request.id, "reaction": request.reaction})
    return FeedbackEvent(request.id, request.reaction, record)


def build_preference_event(request: PreferenceRequest, salt: bytes) -> PreferenceEvent:
    """Convert a choice to a store event.

    Raises ApiError 403 for a response that was served to another user, 404 for one that was not served here.
    """
    for response_id in (request.chosen_id, request.rejected_id):
        if not is_signed_response_id(response_id):
            raise ApiError(404, "unknown", "no response with that id was served here")
        check_response_user(response_id, request.user, salt)
    return PreferenceEvent(request.chosen_id, request.rejected_id)


def _hash_id(value: str | None, salt: bytes) -> str | None:
    """Id of a device or author as the log has it: hashed like users, so that an author can equal a user."""
    return None if value is None else hash_user_id(value, salt)


def check_response_user(response_id: str, user: str | None, salt: bytes) -> None:
    """Raise ApiError 403 when a response with a signed id was served to another user."""
    if not is_response_of_user(response_id, user, salt):
        raise ApiError(403, "user", "the response was served to another user; send the `user` of its chat request")


class ServedResponse(NamedTuple):
    """A response of a policy as the log stores it; see FeedbackRecord for the fields."""

    policy_version: str
    text: str
    finish_reason: str
    arm: str | None = None
    temperature: float | None = None
    response_tokens: int | None = None
    response_logprob: float | None = None


def build_served_event(
    response_id: str, request: ChatRequest, response: ServedResponse, salt: bytes
) -> FeedbackEvent | None:
    """Build the store event of a response without a reaction; None for a blank one, which the log rejects.

    None too for a request with `store` false. A request without a user is one of a visitor, who is another one in each
    conversation.
    """
    if request.store is False or not response.text.strip():
        return None
    conversation_id = request.conversation_id or response_id
    user = request.user or f"visitor of {conversation_id}"
    record = FeedbackRecord(
        id=response_id, conversation_id=conversation_id,
        turn=sum(message.role == "assistant" for message in request.messages), user_id=hash_user_id(user, salt),
        interface=request.interface, device=_hash_id(request.device, salt), author=_hash_id(request.author, salt),
        time=datetime.now(UTC), model_version=response.policy_version,
        messages=[LoggedMessage(role=message.role, content=message.content) for message in request.messages],
        response=response.text, finish_reason="length" if response.finish_reason == "length" else "stop", reaction=None,
        arm=response.arm, temperature=response.temperature, response_tokens=response.response_tokens,
        response_logprob=response.response_logprob,
    )  # fmt: skip
    return FeedbackEvent(response_id, None, record)


def build_chat_reply(
    response_id: str,
    policy_name: str,
    policy_version: str,
    response_text: str,
    finish_reason: str,
    *,
    prompt_tokens: int,
    response_tokens: int,
) -> ChatReply:
    """Build OpenAI's chat completion of one response."""
    token_count = prompt_tokens + response_tokens
    return ChatReply(
        id=response_id,
        created=int(datetime.now(UTC).timestamp()),
        model=policy_name,
        system_fingerprint=policy_version,
        choices=[ChatChoice(message={"role": "assistant", "content": response_text}, finish_reason=finish_reason)],
        usage=ChatUsage(prompt_tokens=prompt_tokens, completion_tokens=response_tokens, total_tokens=token_count),
    )
