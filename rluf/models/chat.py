"""Encode text of users and policies so that it never becomes a control token of the model.

A tokenizer turns the string of a control token, such as <|im_end|>, into the token wherever it occurs. A message could
so end its own turn and forge the next one. Here each part of a message that would become a control token is enclosed
in two marks before the chat template is applied, and encoded as ordinary characters afterwards. Text without such
parts is encoded exactly as transformers encodes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rluf.errors import ModelError
from rluf.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LITERAL_START, LITERAL_END = "\ufdd0", "\ufdd1"
"""Marks around a part that must be encoded as plain characters: Unicode noncharacters, which are removed from text."""
_REMOVE_MARKS = str.maketrans("", "", LITERAL_START + LITERAL_END)
_LITERAL_PATTERN = re.compile(f"{LITERAL_START}([^{LITERAL_START}{LITERAL_END}]*){LITERAL_END}")

CONTROL_STRING_PATTERN = re.compile(
    r"<[|\uff5c][^\s<>]{1,64}?[|\uff5c]>|</?s>|<</?SYS>>|\[/?INST\]|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]"
    r"|<(?:bos|eos|pad|unk|mask|(?:start|end)_of_(?:turn|utterance|text|role|image))>"
)
"""Strings that are control tokens in common chat formats, whatever the tokenizer."""


class RejectedConversationError(ModelError):
    """The chat template refused a conversation; the message has the template's own reason."""


def remove_control_strings(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """`text` without control strings of common formats and without special tokens of `tokenizer`."""
    pattern = _build_removal_pattern(tokenizer)
    # Repeated, since the text on both sides of a removed string may form another one.
    while (shorter_text := pattern.sub("", text)) != text:
        text = shorter_text
    return text


def list_control_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokens that structure a conversation: special tokens, and markup that the chat template writes.

    Qwen's <tool_call>, for example, is an added token of the template, but not marked as special.
    """
    return _list_control_ids(tokenizer, str(tokenizer.chat_template or ""))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, none of which is a control id."""
    rows: list[list[int]] = _tokenize(tokenizer, texts)["input_ids"] if texts else []
    control_ids = list_control_ids(tokenizer)
    suspicious = [i for i, row in enumerate(rows) if not control_ids.isdisjoint(row)]
    marked_texts = mark_control_strings(tokenizer, [[texts[i]] for i in suspicious])
    for i, (marked_text,) in zip(suspicious, marked_texts, strict=True):
        rows[i] = encode_marked_texts(tokenizer, [marked_text])[0][0]
    return rows


def render_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids [P] of the chat template applied to `messages`, including the generation prompt.

    Raises ModelError if the tokenizer has no chat template, RejectedConversationError if it rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
            "or add chat_template.jinja to its folder"
        )
    (contents,) = mark_control_strings(tokenizer, [[message["content"] for message in messages]])
    roles = [message["role"] for message in messages]
    prompt_text = apply_chat_template(tokenizer, roles, contents, add_generation_prompt=True)
    # The template has written the special tokens already; adding them again would double the BOS token.
    return tuple(encode_marked_texts(tokenizer, [prompt_text])[0][0])


def apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, roles: Sequence[str], contents: Sequence[str], **options: Any
) -> str:
    """Text of the chat template. Raises RejectedConversationError with the reason if it rejects the messages."""
    from jinja2 import TemplateError

    # Templates may read any key of a message, so only the two known ones are passed on.
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        # A template is a program: besides its own refusals it may fail on a conversation that it does not expect.
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise RejectedConversationError(
            f"the chat template of {tokenizer.name_or_path} rejected the messages: {error}"
        ) from error


def check_rendered_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ModelError if the chat template leaves out a message, or puts messages in another order."""
    contents = ["zq question", "zq reply", "zq thanks"]
    for count in (1, 3):
        try:
            text = apply_chat_template(tokenizer, ["user", "assistant", "user"][:count], contents[:count])
        except RejectedConversationError:  # such as a template of single questions
            continue
        # Some templates change the case.
        positions = [text.lower().find(content) for content in contents[:count]]
        if -1 in positions or positions != sorted(positions):
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path} leaves out messages or changes their order: "
                f"{contents[:count]} became {text[:200]!r}; correct chat_template.jinja (contents are texts, not lists)"
            )


def mark_control_strings(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[str]]) -> list[list[str]]:
    """The contents of each conversation, with marks around the parts that would become control tokens."""
    cleaned = [[content.translate(_REMOVE_MARKS) for content in contents] for contents in conversations]
    # The joined contents are checked too: a template may put two contents together without text between them.
    candidates = {text for contents in cleaned for text in (*contents, "".join(contents))}
    suspicious = set(_find_control_spans(tokenizer, sorted(candidates)))
    if not suspicious:
        return cleaned
    spans_by_text = _find_control_spans(tokenizer, sorted(suspicious), with_offsets=True)
    marked_conversations = []
    for contents in cleaned:
        marked = [_mark_spans(text, spans_by_text.get(text, [])) for text in contents]
        if "".join(contents) in suspicious:
            marked = [f"{text}{LITERAL_START}{LITERAL_END}" for text in marked]
        marked_conversations.append(marked)
    return marked_conversations


def encode_marked_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each text, and where in the text without marks each token starts (characters)."""
    rows: list[tuple[list[int], list[int]]] = [([], []) for _ in texts]
    plain = [i for i, text in enumerate(texts) if LITERAL_START not in text and LITERAL_END not in text]
    if plain:
        encodings = _tokenize(tokenizer, [texts[i] for i in plain], return_offsets_mapping=True)
        for i, token_ids, offsets in zip(plain, encodings["input_ids"], encodings["offset_mapping"], strict=True):
            rows[i] = (token_ids, [start for start, _ in offsets])
    for i in set(range(len(texts))).difference(plain):
        offset = 0
        for text, is_literal in _split_at_marks(texts[i]):
            encode = _encode_literal if is_literal else _encode_segment
            token_ids, starts = encode(tokenizer, text, is_continued=offset > 0)
            rows[i][0].extend(token_ids)
            rows[i][1].extend(offset + start for start in starts)
            offset += len(text)
    return rows


def remove_marks(text: str) -> str:
    """`text` without the marks around literal parts."""
    return text.translate(_REMOVE_MARKS)


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], **options: Any) -> Any:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)


@lru_cache(maxsize=16)
def _list_control_ids(tokenizer: PreTrainedTokenizerFast, template: str) -> frozenset[int]:
    added_tokens = tokenizer.added_tokens_decoder.items()
    markup_ids = {
        token_id
        for token_id, token in added_tokens
        # Some vocabularies add runs of blanks or line breaks, which are ordinary text.
        if token.special or (not token.content.isspace() and (token.content in template or _is_control_string(token)))
    }
    return frozenset(markup_ids.union(tokenizer.all_special_ids))


def _is_control_string(token: Any) -> bool:
    return CONTROL_STRING_PATTERN.fullmatch(token.content) is not None


@lru_cache(maxsize=16)
def _build_removal_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    special_strings = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special_strings.update(tokenizer.all_special_tokens)
    alternatives = [re.escape(text) for text in sorted(special_strings, key=len, reverse=True) if len(text) > 1]
    return re.compile("|".join([*alternatives, CONTROL_STRING_PATTERN.pattern]))


def _find_control_spans(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, with_offsets: bool = False
) -> Mapping[str, list[tuple[int, int]]]:
    """Character spans that the tokenizer turns into control tokens, by text; only texts with such spans.

    Found in the tokenizer's result and not by comparing strings, since a tokenizer may normalize text first.
    """
    if not texts:
        return {}
    control_ids = list_control_ids(tokenizer)
    encodings = _tokenize(tokenizer, texts, return_offsets_mapping=with_offsets)
    spans_by_text = {}
    for index, (text, token_ids) in enumerate(zip(texts, encodings["input_ids"], strict=True)):
        if control_ids.isdisjoint(token_ids):
            continue
        offsets = encodings["offset_mapping"][index] if with_offsets else [(0, len(text))] * len(token_ids)
        pairs = zip(token_ids, offsets, strict=True)
        spans = [span for token_id, span in pairs if token_id in control_ids and not _is_unknown(tokenizer, token_id)]
        if tokenizer.unk_token is not None:
            # An unknown character gives the unknown token by right; only its written-out name is a control string.
            spans += [match.span() for match in re.finditer(re.escape(str(tokenizer.unk_token)), text)]
        if spans:
            spans_by_text[text] = sorted(spans)
    return spans_by_text


def _is_unknown(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bool:
    return token_id == tokenizer.unk_token_id


def _mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    segments, position = [], 0
    for start, end in spans:
        if start < position:
            continue
        segments += [text[position:start], LITERAL_START, text[start:end], LITERAL_END]
        position = end
    return "".join([*segments, text[position:]])


def _split_at_marks(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a marked text, and whether each is literal. A mark whose partner the template removed is dropped."""
    for index, segment in enumerate(_LITERAL_PATTERN.split(text)):
        if segment := remove_marks(segment):
            yield segment, index % 2 == 1


@lru_cache(maxsize=16)
def _has_blank_prefix(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts a blank in front of a text, as those of SentencePiece do."""
    alone, behind = _tokenize(tokenizer, ["x", f"{LITERAL_START}x"])["input_ids"]
    return bool(behind[-len(alone) :] != alone)


def _encode_segment(
    tokenizer: PreTrainedTokenizerFast, text: str, *, is_continued: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and starts of a text; `is_continued`: it stands within a longer one, so that no blank is put in front."""
    guard = LITERAL_START if is_continued and _has_blank_prefix(tokenizer) else ""
    encoding = tokenizer(guard + text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    tokens = [(token_id, start - len(guard)) for token_id, (start, _) in pairs if start >= len(guard)]
    return [token_id for token_id, _ in tokens], [start for _, start in tokens]


def _encode_literal(
    tokenizer: PreTrainedTokenizerFast, text: str, *, is_continued: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a control string as characters: cut after the first one, or after each, so that no segment is a token."""
    token_ids, starts = _encode_segments(tokenizer, [text[:1], text[1:]], is_continued)
    control_ids = list_control_ids(tokenizer)
    if not control_ids.isdisjoint(token_ids):
        token_ids, starts = _encode_segments(tokenizer, list(text), is_continued)
    # What is left are control tokens of one character, which cannot be written in another way.
    allowed = [i for i, token_id in enumerate(token_ids) if token_id not in control_ids]
    return [token_ids[i] for i in allowed], [starts[i] for i in allowed]


def _encode_segments(
    tokenizer: PreTrainedTokenizerFast, segments: Sequence[str], is_continued: bool
) -> tuple[list[int], list[int]]:
    """Ids of consecutive segments of a text, each encoded by itself, and where each token starts in the text."""
    token_ids: list[int] = []
    starts: list[int] = []
    offset = 0
    for segment in filter(None, segments):
        segment_ids, segment_starts = _encode_segment(tokenizer, segment, is_continued=is_continued or offset > 0)
        token_ids += segment_ids
        starts += [offset + start for start in segment_starts]
        offset += len(segment)
    return token_ids, starts
