"""Encode a conversation and a response as the token ids that a classifier reads.

Encoders (tokenizers with CLS and SEP tokens) read a text pair: context | response. Decoders read the chat template
rendered up to the end of the response, so that the last token attends to everything.

A response that was cut at the token limit lacks the marker that ends a finished one: the template's end of turn, or an
encoder's last SEP. Only models that saw cut responses in training read the difference (`mark_truncated`).

A row longer than `max_tokens` loses the oldest text of the conversation first, down to MIN_PROMPT_SHARE of the tokens,
and then the middle of the response. Decoders lose text in blocks, see DROPPED_BLOCK_SHARE.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.errors import ModelError
from rluf.models.chat import (
    RejectedConversationError,
    apply_chat_template,
    check_rendered_texts,
    encode_marked_texts,
    encode_texts,
    mark_control_strings,
    remove_control_strings,
    remove_marks,
)
from rluf.models.turn_end import RESPONSE_MARKER
from rluf.types import Message, ScoringItem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

NEXT_TURN_MARKER = "\u2063next\u2063"
"""Placeholder content of the user's next message when a chat template is rendered; the text is cut before it."""

EMPTY_CONVERSATION: Sequence[Message] = ({"role": "user", "content": ""},)
"""Conversation in front of a response that is read without its context."""

MIN_PROMPT_SHARE = 0.25
"""Share of `max_tokens` that the conversation keeps, if it is as long, however long the response is."""

DROPPED_BLOCK_SHARE = 0.25
"""Share of `max_tokens` that a decoder's conversation loses at once. Neighboring messages of a long conversation then
start at the same token and share a pass; with windows of their own, each would need one."""

SCORING_BATCH_TOKENS = 8192
"""Padded tokens that a reward actor or a service scores at once: bounds memory, and the wait of the next request."""


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """Token ids [T] of one item; `response_start` is where the response's segment starts (T for decoders)."""

    token_ids: tuple[int, ...]
    response_start: int
    member_encodings: tuple[EncodedItem, ...] = ()
    """Encodings of the same item for members 1 and up of an ensemble, if their encoders differ from the first's."""
    response_span: tuple[int, int] = field(default=(0, 0), compare=False)
    """Start and end of the response's tokens; (0, 0) if the encoder was not asked to locate them."""
    # Not compared: rows of equal ids are the same input, whatever was left out of them.
    dropped_prompt_tokens: int = field(default=0, compare=False)
    """Tokens of the conversation that did not fit into `max_tokens`."""
    dropped_response_tokens: int = field(default=0, compare=False)
    """Tokens of the response that did not fit."""
    rejection: str = field(default="", compare=False)
    """Why the chat template rejected the conversation, which was then read with merged turns; empty if it did not."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _RenderedChat:
    """A conversation and response as marked text, from the `messages` that the template accepted."""

    text: str
    messages: Sequence[Message]
    rejection: str = ""


class TextEncoder:
    """Encodes items as at most `max_tokens` token ids, identically for training and scoring."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        *,
        read_at_next_turn: bool = False,
        response_only: bool = False,
        mark_truncated: bool = False,
        locate_responses: bool = False,
        embedding_rows: int | None = None,
    ) -> None:
        """Set up the text format for the backbone's `tokenizer`.

        `read_at_next_turn` ends a decoder's text with the header of the user's next message. `response_only`
        replaces each conversation by an empty user message. `mark_truncated` leaves out the end marker of cut
        responses; without it they are encoded like finished ones. `locate_responses` finds the response's tokens in a
        decoder's rows, for heads that read them. The model has `embedding_rows` token ids, by default all. Raises
        ModelError when the tokenizer has neither CLS and SEP nor a chat template, or when it has CLS and SEP and
        read_at_next_turn is set.
        """
        self.read_at_next_turn = read_at_next_turn
        self.response_only = response_only
        self.mark_truncated = mark_truncated
        self.locate_responses = locate_responses
        self.member_encoders: tuple[TextEncoder, ...] = ()
        """Encoders of members 1 and up of an ensemble, if they differ from this one; `encode` runs them too."""
        self.tokenizer = tokenizer
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)
        self.uses_text_pairs = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        self.uses_token_types = "token_type_ids" in tokenizer.model_input_names
        if not self.uses_text_pairs and tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has neither CLS and SEP tokens nor a chat template, so no "
                "conversation can be rendered; use an encoder or an instruct model as backbone"
            )
        if self.uses_text_pairs and read_at_next_turn:
            raise ModelError(
                f"{tokenizer.name_or_path} is an encoder, which cannot predict a next message; set "
                "read_at_next_turn=false or use a decoder as backbone"
            )
        if not self.uses_text_pairs:
            check_rendered_texts(tokenizer)
        self.pad_id = self._choose_pad_id(embedding_rows or len(tokenizer))
        # Saved with the model, so that plain transformers pads with the token that config.json names.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)

    def _choose_pad_id(self, embedding_rows: int) -> int:
        """A pad token that no row ends with; the tokenizer's own one if it fits. Raises ModelError if there is none.

        transformers pools a decoder at the last token that is not the pad token, rluf and vLLM at the last token of the
        row. Both are the same token only if rows never end with the pad token. Templates of Llama 3 and Mistral end
        rows with the end token, which their tokenizers, having no pad token, would be padded with.
        """
        tokenizer = self.tokenizer
        candidates = [tokenizer.pad_token_id]
        if self.uses_text_pairs and candidates[0] is not None:
            return int(candidates[0])  # encoders pool at the first token, or by the mask
        special_tokens = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        candidates += [token_id for content, token_id in special_tokens.items() if "pad" in content.lower()]
        # A row never ends with the token that begins it.
        candidates += [tokenizer.unk_token_id, tokenizer.bos_token_id, *special_tokens.values()]
        end_ids = {tokenizer.eos_token_id}
        if not self.uses_text_pairs:
            rows = self._encode_chats([ScoringItem(EMPTY_CONVERSATION, text) for text in ("", "a")])
            end_ids |= {row.token_ids[-1] for row in rows if row.token_ids}  # a template may drop an empty response
        usable = (i for i in candidates if i is not None and i not in end_ids and i < embedding_rows)
        pad_id = next(usable, None)
        if pad_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no special token that could pad rows without ending "
                "them; add a pad token to the tokenizer and the model"
            )
        return int(pad_id)

    def encode(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        """Token ids of each item, in order. An empty response is valid: it has no tokens of its own.

        Control strings in messages and responses are left out: a policy must not gain by writing them.
        """
        if not items:
            return []
        visible_items = [
            ScoringItem(
                EMPTY_CONVERSATION if self.response_only else self._strip_control_strings(item.messages),
                remove_control_strings(item.response, self.tokenizer),
                item.is_truncated and self.mark_truncated,
            )
            for item in items
        ]
        rows = self._encode_text_pairs(visible_items) if self.uses_text_pairs else self._encode_chats(visible_items)
        if not self.member_encoders:
            return rows
        encodings_by_row = zip(*(encoder.encode(items) for encoder in self.member_encoders), strict=True)
        return [
            replace(row, member_encodings=member_encodings)
            for row, member_encodings in zip(rows, encodings_by_row, strict=True)
        ]

    def is_equivalent_to(self, other: TextEncoder) -> bool:
        """Whether both encode every item as the same ids."""
        # Compare the serialized tokenizers: the same tokenizer is often loaded from several folders.
        tokenizers = [encoder.tokenizer.backend_tokenizer.to_str() for encoder in (self, other)]
        return tokenizers[0] == tokenizers[1] and self._format_key() == other._format_key()

    def _format_key(self) -> tuple[int, bool, bool, bool]:
        """The options that change the encoded text, apart from the tokenizer."""
        return self.max_tokens, self.read_at_next_turn, self.response_only, self.mark_truncated

    def _strip_control_strings(self, messages: Sequence[Message]) -> list[Message]:
        return [
            Message(role=message["role"], content=remove_control_strings(message["content"], self.tokenizer))
            for message in messages
        ]

    def _encode_text_pairs(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        contexts = encode_texts(self.tokenizer, [render_context(item.messages) for item in items])
        responses = encode_texts(self.tokenizer, [item.response for item in items])
        cls_id, sep_id = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        token_budget = max(self.max_tokens - 3, 0)  # CLS and two SEP
        rows = []
        for item, context_ids, response_ids in zip(items, contexts, responses, strict=True):
            context_part, response_part = fit_token_budget(context_ids, response_ids, token_budget)
            token_ids = (cls_id, *context_part, sep_id, *response_part, *([] if item.is_truncated else [sep_id]))
            dropped = (len(context_ids) - len(context_part), len(response_ids) - len(response_part))
            rows.append(EncodedItem(token_ids, len(context_part) + 2, (), (0, 0), *dropped))
        return rows

    def _encode_chats(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        texts = [[*(message["content"] for message in item.messages), item.response] for item in items]
        rendered = [
            self._render_item(item, contents, response)
            for item, (*contents, response) in zip(items, mark_control_strings(self.tokenizer, texts), strict=True)
        ]
        rows = []
        encodings = encode_marked_texts(self.tokenizer, [chat.text for chat in rendered])
        for item, chat, (token_ids, starts) in zip(items, rendered, encodings, strict=True):
            fits = len(token_ids) <= self.max_tokens
            # Finding the response takes a second rendering.
            span = (0, 0) if fits and not self.locate_responses else self._find_response_span(item, chat, starts)
            if fits:
                row = EncodedItem(tuple(token_ids), len(token_ids), response_span=span, rejection=chat.rejection)
                rows.append(row)
                continue
            prompt_count, end_count = span
            parts = fit_token_budget(
                token_ids[:prompt_count], token_ids[prompt_count:], self.max_tokens,
                block_tokens=max(1, round(DROPPED_BLOCK_SHARE * self.max_tokens)),
            )  # fmt: skip
            dropped = (prompt_count - len(parts[0]), len(token_ids) - prompt_count - len(parts[1]))
            kept_ids, response_start = (*parts[0], *parts[1]), len(parts[0])
            span = (response_start, max(response_start, len(kept_ids) - (len(token_ids) - end_count)))
            rows.append(EncodedItem(kept_ids, len(kept_ids), (), span, *dropped, chat.rejection))
        return rows

    def _find_response_span(self, item: ScoringItem, chat: _RenderedChat, starts: Sequence[int]) -> tuple[int, int]:
        """Index of the response's first token, and of the first token behind it, from the tokens' `starts` in the text.

        The end-of-turn marker and the header of the user's next message are not part of the response.
        """
        prompt_text, _, response_end = self._apply_template(chat.messages, RESPONSE_MARKER).rpartition(RESPONSE_MARKER)
        if item.is_truncated:
            response_end = response_end.removeprefix(self._turn_end) if self.read_at_next_turn else ""
        prompt_length = len(remove_marks(prompt_text))
        end = len(remove_marks(chat.text)) - len(response_end)
        return sum(start < prompt_length for start in starts), sum(start < end for start in starts)

    def _render_item(self, item: ScoringItem, contents: Sequence[str], response: str) -> _RenderedChat:
        """The item's chat template with marked `contents` and `response`.

        A conversation that the template rejects is read with system messages as part of the user's and with one message
        per turn: prompts come from the policy's template, which may accept more than this one.
        """
        pairs = zip(item.messages, contents, strict=True)
        messages = [Message(role=message["role"], content=content) for message, content in pairs]
        render = self._render_cut_response if item.is_truncated else self._apply_template
        try:
            return _RenderedChat(render(messages, response), messages)
        except RejectedConversationError as error:
            messages = merge_turns(messages)
            return _RenderedChat(render(messages, response), messages, str(error))

    def _apply_template(self, messages: Sequence[Message], response: str) -> str:
        """Chat template rendered up to the end of the response, or to the header of the user's next message."""
        turns = [*messages, Message(role="assistant", content=response)]
        if self.read_at_next_turn:
            turns.append(Message(role="user", content=NEXT_TURN_MARKER))
        rendered = apply_chat_template(self.tokenizer, [t["role"] for t in turns], [t["content"] for t in turns])
        # The last marker: a message of the conversation could contain the same characters.
        return rendered[: rendered.rindex(NEXT_TURN_MARKER)] if self.read_at_next_turn else rendered

    def _render_cut_response(self, messages: Sequence[Message], response: str) -> str:
        """Rendered text without the end-of-turn marker; the header of the user's next message stays, where read."""
        prompt_text, _, response_end = self._apply_template(messages, RESPONSE_MARKER).rpartition(RESPONSE_MARKER)
        if not self.read_at_next_turn:
            return prompt_text + response
        return prompt_text + response + response_end.removeprefix(self._turn_end)

    @cached_property
    def _turn_end(self) -> str:
        """Text that the chat template puts after a response: the end-of-turn marker."""
        turns = [*EMPTY_CONVERSATION, {"role": "assistant", "content": RESPONSE_MARKER}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(RESPONSE_MARKER)[2]

    def collate(self, rows: Sequence[EncodedItem]) -> dict[str, torch.Tensor]:
        """Tensors [B, T], padded on the right to the longest row."""
        import torch

        max_length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), max_length), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), max_length), dtype=torch.long)
        token_types = torch.zeros((len(rows), max_length), dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row.token_ids)
            # From the length, never from the pad id: the pad token may be the end token, which occurs in the text.
            attention_mask[index, : len(row)] = 1
            token_types[index, row.response_start : len(row)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {**batch, "token_type_ids": token_types} if self.uses_token_types else batch


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """The conversation with alternating turns that starts with the user, as the strictest chat templates require."""
    turns: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1] = Message(role=role, content=f"{turns[-1]['content']}\n\n{message['content']}")
        elif turns or role == "user":
            turns.append(Message(role=role, content=message["content"]))
        else:
            turns += [*EMPTY_CONVERSATION, Message(role=role, content=message["content"])]
    return turns


def render_context(messages: Sequence[Message]) -> str:
    """Text that an encoder reads before the response: earlier messages as "role: content" lines, then the last as is.

    System messages are left out: they address the policy, and most conversations share the same ones.
    """
    dialogue = [message for message in messages if message["role"] != "system"]
    if not dialogue:
        return ""
    earlier_lines = [f"{message['role']}: {message['content']}\n" for message in dialogue[:-1]]
    return "".join([*earlier_lines, dialogue[-1]["content"]])


def fit_token_budget(
    prompt_ids: Sequence[int], response_ids: Sequence[int], token_budget: int, *, block_tokens: int = 1
) -> tuple[list[int], list[int]]:
    """The parts of prompt and response that fit into `token_budget` tokens together.

    The prompt loses its start, a multiple of `block_tokens`, but keeps MIN_PROMPT_SHARE of the budget (rounded up) if
    it has as many tokens. A response that is still too long loses its middle: the first half shows what it answers, the
    second how it ends.
    """
    prompt_minimum = min(len(prompt_ids), math.ceil(MIN_PROMPT_SHARE * token_budget))
    response_part, response_budget = list(response_ids), token_budget - prompt_minimum
    if len(response_ids) > response_budget:
        start_count = response_budget // 2
        end_start = len(response_ids) - (response_budget - start_count)
        response_part = [*response_ids[:start_count], *response_ids[end_start:]]
    dropped_count = max(0, len(prompt_ids) + len(response_part) - token_budget)
    dropped_count = min(math.ceil(dropped_count / block_tokens) * block_tokens, len(prompt_ids) - prompt_minimum)
    return list(prompt_ids[dropped_count:]), response_part


def is_truncated(row: Mapping[str, Any], text_column: str) -> bool:
    """Whether the text in a column of a log row was cut at the token limit; False if the log does not say.

    `finish_reason` is that of column response; `chosen` and `rejected` have columns of their own.
    """
    return row.get("finish_reason" if text_column == "response" else f"{text_column}_finish_reason") == "length"


def report_rejected_rows(rows: Sequence[EncodedItem], row_ids: Sequence[str], source_name: str) -> None:
    """Log how many conversations the chat template rejected; `row_ids` are repeated for rows of several responses."""
    rejected = [index for index, row in enumerate(rows) if row.rejection]
    if rejected:
        logger.warning(
            "%s: %d of %d conversations read with merged turns, as the chat template rejected them; first: %s (%s)",
            source_name, len(rejected), len(rows), row_ids[rejected[0] % len(row_ids)], rows[rejected[0]].rejection,
        )  # fmt: skip


def summarize_truncation(rows: Sequence[EncodedItem]) -> dict[str, float]:
    """Shares of encoded rows that did not fit into `max_tokens`, lost prompt or response tokens, or have no prompt."""
    if not rows:
        return {"cut_share": 0.0, "prompt_cut_share": 0.0, "response_cut_share": 0.0, "no_prompt_share": 0.0}
    dropped = np.asarray([(row.dropped_prompt_tokens > 0, row.dropped_response_tokens > 0) for row in rows])
    prompt_share, response_share = dropped.mean(0).tolist()
    # Only text pairs say where the response starts: after CLS, context and SEP. Decoders always keep some prompt.
    no_prompt = [row.response_start <= 2 and row.response_start < len(row) for row in rows]
    return {
        "cut_share": float(dropped.any(1).mean()), "prompt_cut_share": prompt_share,
        "response_cut_share": response_share, "no_prompt_share": float(np.mean(no_prompt)),
    }  # fmt: skip


CUT_SHARE_LIMIT = 0.1
"""Share of rows that a model cuts, or reads without a prompt, from which cards warn."""


def list_length_warnings(truncation: Mapping[str, Mapping[str, float]], max_tokens: int) -> list[str]:
    """Sentences about the splits (summarize_truncation by name) of which the model does not read a tenth or more."""
    sentences = {
        "cut_share": "{share:.0%} of the {split} rows are longer than max_tokens={limit} and are cut; raise it",
        "no_prompt_share": "{share:.0%} of the {split} rows are read without any prompt; check their messages, or "
        "raise max_tokens={limit}",
    }
    return [
        sentence.format(share=shares[name], split=split, limit=max_tokens)
        for split, shares in truncation.items()
        for name, sentence in sentences.items()
        if shares[name] >= CUT_SHARE_LIMIT
    ]


MAX_PADDING_SHARE = 1 / 8
"""Share of a batch that may be padding."""
MIN_FILL_SHARE = 1 / 16
"""Share of the token budget below which a batch accepts any padding, since small batches leave processors idle."""


def plan_token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row indices into batches of similar length, each at most `batch_tokens` with padding (or one longer row).

    Once a batch has MIN_FILL_SHARE of the budget, it ends where padding would exceed MAX_PADDING_SHARE.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    real_tokens = 0
    # Longest first, so that a batch that is too large for memory fails at once; the first row sets the padded length.
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch:
            filled_tokens = lengths[batch[0]] * len(batch)
            padded_tokens = filled_tokens + lengths[batch[0]]
            padding = padded_tokens - real_tokens - lengths[index]
            is_wasteful = padding > MAX_PADDING_SHARE * padded_tokens and filled_tokens >= MIN_FILL_SHARE * batch_tokens
            if padded_tokens > batch_tokens or is_wasteful:
                batches.append(batch)
                batch, real_tokens = [], 0
        batch.append(index)
        real_tokens += lengths[index]
    if batch:
        batches.append(batch)
    return batches


def find_carrier_rows(rows: Sequence[EncodedItem], *, is_causal: bool) -> list[int]:
    """For each row, the index of the row whose forward pass provides its hidden state; often the row itself.

    Equal rows share one pass. In a causal model, a row that is a prefix of another (an earlier message of the same
    conversation) needs no pass of its own either: its last hidden state is part of the longer row's.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].token_ids, rows[i].response_start))
    carriers = list(range(len(rows)))
    # Sorted order puts a prefix directly before its extension. Walking backwards resolves chains of prefixes to the
    # longest row, because the extension already points to its own carrier.
    for index, next_index in reversed(list(pairwise(order))):
        row, next_row = rows[index], rows[next_index]
        is_prefix = row.token_ids == next_row.token_ids[: len(row)]
        if is_prefix and (is_causal or row == next_row):
            carriers[index] = carriers[next_index]
    return carriers


def iter_shared_batches(
    rows: Sequence[EncodedItem], *, is_causal: bool, batch_tokens: int
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Batches of the rows that need a pass, each with the rows that it serves as (index in the batch, row) pairs."""
    rows_by_carrier: dict[int, list[int]] = {}
    for row_index, carrier in enumerate(find_carrier_rows(rows, is_causal=is_causal)):
        rows_by_carrier.setdefault(carrier, []).append(row_index)
    carriers = list(rows_by_carrier)
    for carrier_indices in plan_token_batches([len(rows[carrier]) for carrier in carriers], batch_tokens):
        batch = [carriers[index] for index in carrier_indices]
        readers = [
            (batch_index, row_index)
            for batch_index, carrier in enumerate(batch)
            for row_index in rows_by_carrier[carrier]
        ]
        yield batch, readers
