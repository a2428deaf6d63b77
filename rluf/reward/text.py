"""Encode a conversation and a response as the token ids that a classifier reads.

Encoders (tokenizers with CLS and SEP tokens) read a text pair: context | response. Decoders read the chat template
rendered up to the end of the response, so that the last token attends to everything. Truncation removes the oldest
text first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rluf.errors import ModelError
from rluf.types import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

NEXT_TURN_MARKER = "\u2063next\u2063"
"""Placeholder content of the user's next message when a chat template is rendered; the text is cut before it."""

EMPTY_CONVERSATION: Sequence[Message] = ({"role": "user", "content": ""},)
"""Conversation in front of a response that is read without its context."""

SCORING_BATCH_TOKENS = 8192
"""Padded tokens that a reward actor or a service scores at once: bounds memory, and the wait of the next request."""

ScoringItem = tuple[Sequence[Message], str]
"""A conversation that ends with a user message, and one response to it."""


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """Token ids [T] of one item; `response_start` is where the response's segment starts (T for decoders)."""

    token_ids: tuple[int, ...]
    response_start: int
    member_encodings: tuple[EncodedItem, ...] = ()
    """Encodings of the same item for members 1 and up of an ensemble, if their encoders differ from the first's."""

    def __len__(self) -> int:
        return len(self.token_ids)


class TextEncoder:
    """Encodes items as at most `max_tokens` token ids, identically for training and scoring."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        *,
        read_at_next_turn: bool = False,
        response_only: bool = False,
    ) -> None:
        """Set up the text format for the backbone's `tokenizer`.

        `read_at_next_turn` ends a decoder's text with the header of the user's next message. `response_only` replaces
        each conversation by an empty user message. Raises ModelError when the tokenizer has neither CLS and SEP nor a
        chat template, or when it has CLS and SEP and read_at_next_turn is set.
        """
        self.read_at_next_turn = read_at_next_turn
        self.response_only = response_only
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
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has neither a pad nor an end token; add one")
        self.pad_id = int(pad_id)

    def encode(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        """Token ids of each item, in order. An empty response is valid: it has no tokens of its own."""
        if not items:
            return []
        visible_items = [(EMPTY_CONVERSATION, response) for _, response in items] if self.response_only else items
        rows = self._encode_text_pairs(visible_items) if self.uses_text_pairs else self._encode_chats(visible_items)
        if not self.member_encoders:
            return rows
        encodings_by_row = zip(*(encoder.encode(items) for encoder in self.member_encoders), strict=True)
        return [
            EncodedItem(row.token_ids, row.response_start, member_encodings)
            for row, member_encodings in zip(rows, encodings_by_row, strict=True)
        ]

    def is_equivalent_to(self, other: TextEncoder) -> bool:
        """Whether both encode every item as the same ids."""
        # Compare the serialized tokenizers: the same tokenizer is often loaded from several folders.
        tokenizers = [encoder.tokenizer.backend_tokenizer.to_str() for encoder in (self, other)]
        return tokenizers[0] == tokenizers[1] and self._format_key() == other._format_key()

    def _format_key(self) -> tuple[int, bool, bool]:
        """The options that change the encoded text, apart from the tokenizer."""
        return self.max_tokens, self.read_at_next_turn, self.response_only

    def _encode_text_pairs(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        contexts = self._tokenize([render_context(messages) for messages, _ in items])
        responses = self._tokenize([response for _, response in items])
        cls_id, sep_id = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        token_budget = max(self.max_tokens - 3, 0)  # CLS and two SEP
        rows = []
        for context_ids, response_ids in zip(contexts, responses, strict=True):
            response_part = _take_last(response_ids, token_budget)
            context_part = _take_last(context_ids, token_budget - len(response_part))
            token_ids = (cls_id, *context_part, sep_id, *response_part, sep_id)
            rows.append(EncodedItem(token_ids, len(context_part) + 2))
        return rows

    def _encode_chats(self, items: Sequence[ScoringItem]) -> list[EncodedItem]:
        from jinja2 import TemplateError

        texts = []
        for messages, response in items:
            turns = [{"role": m["role"], "content": m["content"]} for m in messages]
            turns.append({"role": "assistant", "content": response})
            if self.read_at_next_turn:
                turns.append({"role": "user", "content": NEXT_TURN_MARKER})
            try:
                rendered = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
            except TemplateError as error:
                model_name = self.tokenizer.name_or_path
                raise ModelError(f"the chat template of {model_name} rejected a conversation: {error}") from error
            # The last marker: a message of the conversation could contain the same characters.
            texts.append(rendered[: rendered.rindex(NEXT_TURN_MARKER)] if self.read_at_next_turn else rendered)
        rows = [_take_last(token_ids, self.max_tokens) for token_ids in self._tokenize(texts)]
        return [EncodedItem(tuple(token_ids), len(token_ids)) for token_ids in rows]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        token_ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids

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


def render_context(messages: Sequence[Message]) -> str:
    """Text that an encoder reads before the response: earlier messages as "role: content" lines, then the last as is.

    System messages are left out: they address the policy, and most conversations share the same ones.
    """
    dialogue = [message for message in messages if message["role"] != "system"]
    if not dialogue:
        return ""
    earlier_lines = [f"{message['role']}: {message['content']}\n" for message in dialogue[:-1]]
    return "".join([*earlier_lines, dialogue[-1]["content"]])


def _take_last(token_ids: Sequence[int], count: int) -> Sequence[int]:
    # ids[-0:] would be the whole list.
    return token_ids[-count:] if count > 0 else []


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
