"""Split the text of a rendered chat template into messages and response, for the routes of other systems' clients.

Those clients send one decoded text: a prompt in the chat format of their policy, and the response. It may be cut on the
left (a long prompt), on the right (a long response), and padded on both sides. Text that holds template markers after
the split is refused: scored as words, it would get a score that looks right and means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rluf.models.chat import CONTROL_STRING_PATTERN
from rluf.serve.api import ApiError
from rluf.types import Message, ScoringItem

MIN_OVERLAP_CHARS = 8
"""Minimum number of characters of its prompt that a text which is cut on the left must start with."""
MAX_HEADER_CHARS = 40
"""Maximum number of characters of a header that words make, with white space before it."""
_MARKER = (
    CONTROL_STRING_PATTERN.pattern
    + r"|<\|(?:turn|channel|tool|think)[a-z_]{0,40}>|<(?:turn|channel|tool)[a-z_]{0,40}\|>"
    r"|\[\|[a-z]{1,40}\|\]|<(?:reserved_|extra_id_)\d{1,10}>|<seed:\w{1,40}>|<(?:BOS|EOS|PAD|UNK)_TOKEN>|<PAD>|<eo[ahm]>|\[gMASK\]"
    r"|<SPECIAL_\d{1,10}>|<(?:beginning|end)_of_sentence>|<role>(?:SYSTEM|HUMAN|ASSISTANT)</role>|\]~!?b[\[\]]|\[e~\["
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT)\]"
)
_MARKER_PATTERN = re.compile(_MARKER)
_LEADING_MARKERS = re.compile(rf"(?:\s|{_MARKER})*+")
_LAST_MARKER = re.compile(rf"(?:{_MARKER})\Z")
MAX_MARKER_CHARS = 80
"""No marker is longer."""
_WRITTEN_TURNS = tuple(
    (re.compile(user_header, re.MULTILINE | re.DOTALL), re.compile(assistant_header, re.MULTILINE))
    for user_header, assistant_header in (
        (
            r"\bUSER:|(?:^[^\w\n]{0,8}|\A\s*+A (?:chat|conversation) between .*?\b)"
            r"(?:USER|HUMAN|User|Human)[^\w\n]{0,3}:",
            r"\b(?:ASSISTANT|Assistant|AI|GPT|Falcon)[^\w\n]{0,3}:",
        ),
        (r"^[ \t]*+(?:Instruct|\u95ee)[:\uff1a]", r"^[ \t]*+(?:Output|\u7b54)[:\uff1a]"),
        (r"^[ \t]*+### ?(?:Instruction|Human|User|Question|Prompt|Input)\b", r"### ?(?:Response|Assistant|Answer)\b"),
        (r"^[ \t]*+<(?:human|user|\u7528\u6237)>", r"<(?:bot|assistant|AI)>"),
        (r"\A\s*+(?:system[ \t\r]*+\n.*?\n[ \t]*+)?user[ \t\r]*+$", r"(?:assistant|model)[ \t\r]*+$"),
    )
)
"""Headers of a user's and the next assistant's turn that words mark, perhaps after a system message: Vicuna, Alpaca,
Anthropic's HH, Falcon, Phi-2, ChatGLM, and what is left of a format without its control tokens. Two patterns each, as
one with both would take quadratic time."""
_EMPTY_THINKING = re.compile(r"\A\s*+(?:(?:<think>\s*+)?+</think>\s*|<think>\s*+(?!.*</think>))", re.DOTALL)
"""Start of a response that chat templates write for models which may reason: a block without reasoning, or its tag."""
_STRIKETHROUGH = ("<s>", "</s>")
"""Control tokens of Mistral and Llama 2 that are HTML tags too: removed at the ends of a text, not refused inside."""


@dataclass(frozen=True)
class ChatFormat:
    """Markers of a chat template: the one that starts a turn of each role, and those that end a turn."""

    headers: Mapping[str, str]
    ends: tuple[str, ...]
    is_stripped: bool = False
    """Whether white space around a turn's text belongs to the template."""
    optional_start: str = ""
    """Pattern of what an assistant's header may end with."""

    @cached_property
    def header_pattern(self) -> re.Pattern[str]:
        """Pattern of any header, one group per role.

        Line breaks at its end may be missing in a cut text. Some tokenizers decode with spaces around control tokens.
        """
        patterns = []
        for role, header in self.headers.items():
            marker = header.rstrip("\n")
            words = [re.escape(word) for word in re.split(r"(?<=>)\b|\b(?=<)", marker)]
            line_breaks = f"(?:[ \\t]*\\r?\\n){{0,{len(header) - len(marker)}}}"
            optional_start = self.optional_start if role == "assistant" else ""
            patterns.append(f"(?P<{role}>{' *'.join(words)}{line_breaks}{optional_start})")
        return re.compile("|".join(patterns))


def _build_format(template: str, *ends: str, assistant: str = "assistant") -> ChatFormat:
    roles = {"system": "system", "user": "user", "assistant": assistant}
    return ChatFormat({role: template.format(name) for role, name in roles.items()}, ends)


CHAT_FORMATS: dict[str, ChatFormat] = {
    # Before chatml, whose headers are the start of these.
    "phi4": _build_format("<|im_start|>{}<|im_sep|>", "<|im_end|>"),
    "chatml": _build_format("<|im_start|>{}\n", "<|im_end|>"),
    "llama3": _build_format(
        "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"
    ),
    "llama4": _build_format("<|header_start|>{}<|header_end|>\n\n", "<|eot|>", "<|eom|>", "<|end_of_text|>"),
    "gemma": _build_format("<start_of_turn>{}\n", "<end_of_turn>", "<eos>", assistant="model"),
    "gemma4": _build_format("<|turn>{}\n", "<turn|>", "<eos>", assistant="model"),
    "mistral": ChatFormat(
        {"system": "[SYSTEM_PROMPT]", "user": "[INST]", "assistant": "[/INST]"},
        ("[/SYSTEM_PROMPT]", "</s>"),
        is_stripped=True,
    ),
    "phi": _build_format("<|{}|>\n", "<|end|>", "</s>", "<|endoftext|>"),
    "granite": _build_format("<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>"),
    "command": ChatFormat(
        {
            role: f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>"
            for role, name in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
        },
        ("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"),
        optional_start=r"(?:<\|START_THINKING\|>\s*<\|END_THINKING\|>)?(?:<\|START_RESPONSE\|>)?",
    ),
    "gpt-oss": ChatFormat(
        {
            **{role: f"<|start|>{role}<|message|>" for role in ("system", "developer", "user")},
            "assistant": "<|start|>assistant<|channel|>final<|message|>",
            "reasoning": "<|start|>assistant<|channel|>analysis<|message|>",
        },
        ("<|end|>", "<|return|>"),
    ),
    "kimi": ChatFormat(
        {role: f"<|im_{role}|>{role}<|im_middle|>" for role in ("system", "user", "assistant")}, ("<|im_end|>",)
    ),
    "openchat": ChatFormat(
        {role: f"GPT4 Correct {role.title()}:" for role in ("user", "assistant")},
        ("<|end_of_turn|>",),
        is_stripped=True,
    ),
    # The system message follows the first token without a header.
    "deepseek": ChatFormat(
        {
            role: f"<\uff5c{name}\uff5c>"
            for role, name in (("system", "begin\u2581of\u2581sentence"), ("user", "User"), ("assistant", "Assistant"))
        },
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    ),
}
"""Chat formats by name: Qwen, SmolLM and others (chatml), Llama 3 and 4, Gemma, Mistral and Llama 2, Phi, Zephyr and
Tulu (phi), Granite, Command R and A, gpt-oss, Kimi, OpenChat and Starling, DeepSeek."""


def build_custom_format(markers: Mapping[str, str]) -> ChatFormat | None:
    """The format of serve.chat_markers: keys user, assistant, end and optionally system; None if it is empty."""
    if not markers:
        return None
    headers = {role: marker for role, marker in markers.items() if role != "end"}
    return ChatFormat(headers, (markers["end"],), is_stripped=True)


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    start: int
    content_start: int
    end: int


def split_text(text: str, prompt: str = "", custom_format: ChatFormat | None = None) -> ScoringItem:
    """Split a text into messages and response; `prompt` is what it starts with, if the client says so.

    Text in no chat format is a response to the prompt as one user message. Raises ApiError 422 when the text cannot be
    split, or markers remain in it.
    """
    chat_format = _detect_format(prompt + "\n" + text, custom_format)
    if chat_format is None:
        if not text.startswith(prompt):
            text = _remove_first_markers(text)
        response = text[_find_overlap(text, prompt) :]
        # With a prompt, later words are the policy's own; a header that the prompt lacks starts the response.
        _check_no_written_turns(prompt or response, response[:MAX_HEADER_CHARS] if prompt else "")
        response = _remove_first_markers(_remove_last_markers(response))
        # Tokenizers join prompt and response with white space; a text without a prompt is scored as it is.
        return _check_item([Message(role="user", content=prompt)], response.strip() if prompt else response)
    turns = _find_turns(text, chat_format)
    # The first assistant turn that does not end within the prompt; the last one if the prompt is unknown or cut.
    prompt_end = len(prompt.rstrip()) if prompt and text.startswith(prompt) else None
    answers = [turn for turn in turns if turn.role == "assistant"]
    candidates = answers[-1:] if prompt_end is None else [turn for turn in answers if turn.content_start >= prompt_end]
    if prompt_end is not None and (start := _find_open_answer(prompt, chat_format)) is not None:
        candidates = [turn for turn in answers if turn.start == start]
    if candidates:
        answer = candidates[0]
        context, response = text[: answer.start], text[answer.content_start :]
    elif prompt and (overlap := _find_overlap(text, prompt)):
        context, response = prompt, text[overlap:]
    else:
        raise _build_error("it has no assistant turn")
    # A prompt of which the text has only the end tells more than that end.
    messages = _parse_context(prompt if prompt and prompt_end is None else context, chat_format)
    return _check_item(messages, _EMPTY_THINKING.sub("", _read_content(response, chat_format)))


def split_pair(query: str, response: str, custom_format: ChatFormat | None = None) -> ScoringItem:
    """Make an item of a prompt (a chat format, or one user message) and a response; see split_text."""
    if _detect_format(query, custom_format) is not None:
        return split_text(query + response, query, custom_format)
    if not query.strip():
        return split_text(response, "", custom_format)
    _check_no_written_turns(query)
    return _check_item([Message(role="user", content=query)], _remove_last_markers(response))


def _detect_format(text: str, custom_format: ChatFormat | None) -> ChatFormat | None:
    """The format with the most headers in the text; None if there is no header."""
    formats = [custom_format] if custom_format is not None else []
    counts = [(len(item.header_pattern.findall(text)), item) for item in (*formats, *CHAT_FORMATS.values())]
    best_count, best_format = max(counts, key=lambda pair: pair[0])
    return best_format if best_count else None


def _find_turns(text: str, chat_format: ChatFormat) -> list[_Turn]:
    matches = list(chat_format.header_pattern.finditer(text))
    ends = [*(match.start() for match in matches), len(text)][1:]
    return [
        _Turn(str(match.lastgroup), match.start(), match.end(), end) for match, end in zip(matches, ends, strict=True)
    ]


def _parse_context(context: str, chat_format: ChatFormat) -> list[Message]:
    """Messages of a prompt, up to its last user message. Raises ApiError 422 when there is none."""
    turns = _find_turns(context, chat_format)
    contents = [(turn.role, _read_turn(context, turn, chat_format)) for turn in turns]
    # gpt-oss: the developer's message is a system message; reasoning is not part of a message.
    messages = [
        Message(role="system" if role == "developer" else role, content=content)
        for role, content in contents
        if role != "reasoning"
    ]
    if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()  # the header that starts the response
    messages = [message for message in messages if message["role"] != "system" or message["content"]]
    # What is before the first header is the end of a turn that was cut. It is the user's if the response follows, and
    # unknown otherwise.
    fragment = context[: turns[0].start] if turns else context
    if not messages:
        fragment = _remove_partial_header(_strip_markers(fragment), chat_format)
        messages = [Message(role="user", content=_read_content(fragment, chat_format))]
    elif "system" not in chat_format.headers and "<s>" in fragment and (system_text := _strip_markers(fragment)):
        # After the first token of a text, which no cut precedes, it is a system message without a header.
        messages.insert(0, Message(role="system", content=system_text))
    messages = [turn for message in messages for turn in _split_llama2_system(message)]
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise _build_error("no user message precedes the response")
    return messages


def _read_turn(text: str, turn: _Turn, chat_format: ChatFormat) -> str:
    content = text[turn.content_start : turn.end]
    if not any(end in content for end in chat_format.ends):
        content = content.removesuffix("\n")  # Tulu and Falcon end a turn with a line break only
    content = _read_content(content, chat_format)
    return _EMPTY_THINKING.sub("", content) if turn.role == "assistant" else content


def _find_open_answer(prompt: str, chat_format: ChatFormat) -> int | None:
    """Start of the assistant turn that the response continues: a prompt may contain the first words of its answer."""
    turns = _find_turns(prompt, chat_format)
    content = prompt[turns[-1].content_start :] if turns and turns[-1].role == "assistant" else ""
    is_open = content.strip() and not any(end in content for end in chat_format.ends)
    return turns[-1].start if is_open else None


def _read_content(text: str, chat_format: ChatFormat) -> str:
    """Text of a turn without the marker that ends it and padding. Raises ApiError 422 for text after that marker."""
    positions = [position for end in chat_format.ends if (position := text.find(end)) >= 0]
    content = text[: min(positions)] if positions else _remove_last_markers(text)
    remainder = text[len(content) :]
    for end in chat_format.ends:
        remainder = remainder.replace(end, "")
    if _strip_markers(remainder):
        raise _build_error("text follows the end of a turn")
    return content.strip() if chat_format.is_stripped else content


def _remove_partial_header(fragment: str, chat_format: ChatFormat) -> str:
    """A cut turn without the rest of its own header: `er\\nHello` is `Hello`."""
    lengths = []
    for header in chat_format.headers.values():
        # One character is too little to be sure of a header that no line break ends.
        marker, line_end, first_length = (header, "", 2) if header[-1] != "\n" else (header.rstrip("\n"), "\n", 1)
        lengths += [n for n in range(first_length, len(marker)) if fragment.startswith(marker[-n:] + line_end)]
    return fragment[max(lengths) :].lstrip("\n") if lengths else fragment


def _split_llama2_system(message: Message) -> list[Message]:
    system_text, marker, user_text = message["content"].partition("<</SYS>>")
    if message["role"] != "user" or not marker:
        return [message]
    system_text = system_text.strip()
    # Without its start the system message was cut.
    is_complete = system_text.startswith("<<SYS>>")
    system = [Message(role="system", content=system_text.removeprefix("<<SYS>>").strip())] if is_complete else []
    return [*system, Message(role="user", content=user_text.lstrip())]


def _find_overlap(text: str, prompt: str) -> int:
    """Length of the longest end of `prompt` that `text` starts with. Raises ApiError 422 if it is too short."""
    if text.startswith(prompt):
        return len(prompt)
    # Prefix function of Knuth, Morris and Pratt over text + separator + prompt: linear in both.
    joined = [*text[: len(prompt)], "", *prompt]
    lengths, length = [0], 0
    for char in joined[1:]:
        while length and char != joined[length]:
            length = lengths[length - 1]
        length += char == joined[length]
        lengths.append(length)
    if lengths[-1] < MIN_OVERLAP_CHARS:
        raise _build_error("it does not start with its prompt")
    return lengths[-1]


def _find_last_content(text: str) -> int:
    """Index from which a text has only markers and white space. In linear time, unlike a pattern that ends in $."""
    end = len(text.rstrip())
    while (match := _LAST_MARKER.search(text, max(0, end - MAX_MARKER_CHARS), end)) is not None:
        end = match.start()
        while end and text[end - 1].isspace():
            end -= 1
    return end


def _remove_last_markers(text: str) -> str:
    """The text without the markers at its end; white space alone stays."""
    end = _find_last_content(text)
    return text[:end] if text[end:].strip() else text


def _remove_first_markers(text: str) -> str:
    """The text without the markers at its start; white space alone stays."""
    start = len(_LEADING_MARKERS.match(text)[0])  # type: ignore[index]  # it matches the empty text too
    return text[start:] if text[:start].strip() else text


def _strip_markers(text: str) -> str:
    """The text without markers and white space at both ends."""
    return _remove_first_markers(text[: _find_last_content(text)]).strip()


def _check_no_written_turns(context: str, next_words: str = "") -> None:
    text, longer_text = _strip_markers(context), _strip_markers(context + next_words)
    for user_header, assistant_header in _WRITTEN_TURNS:
        if (match := user_header.search(text)) is not None and assistant_header.search(longer_text, match.end()):
            raise _build_error("words mark its turns")


def _check_item(messages: Sequence[Message], response: str) -> ScoringItem:
    for text in (*(message["content"] for message in messages), response):
        for match in _MARKER_PATTERN.finditer(text):
            if match[0] not in _STRIKETHROUGH:
                raise _build_error(f"the template marker {match[0]!r} remains in it")
    return ScoringItem(list(messages), response)


def _build_error(problem: str) -> ApiError:
    hint = f"set serve.chat_markers if its chat format is not one of {', '.join(CHAT_FORMATS)}"
    message = f"a text cannot be split into messages and response: {problem}; send messages to /v1/score, or {hint}"
    return ApiError(422, "template", message)
