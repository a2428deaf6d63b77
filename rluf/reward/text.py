"""How a conversation and a response become the token ids that a classifier reads.

Encoders (tokenizers with a CLS and a SEP token) read a text pair: context | response. Decoders read the chat template
rendered up to the end of the response, so that the last token has seen everything. Old text is cut first.
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

NEXT = "\u2063next\u2063"
"""Stands for the user's next message while a chat template is rendered; the text ends where it would begin."""

NOTHING: Sequence[Message] = ({"role": "user", "content": ""},)
"""The conversation before a response that is read alone."""

Item = tuple[Sequence[Message], str]
"""A conversation that ends with a user message, and one response to it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids [T] of one item; `second` is the position where the response's segment starts (T for decoders)."""

    ids: tuple[int, ...]
    second: int
    others: tuple[Encoded, ...] = ()
    """The same item as the further members of an ensemble read it, where their backbones differ."""

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """Turns items into token ids of at most `max_tokens`, always in the same way for training and scoring."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        *,
        next_turn: bool = False,
        response_alone: bool = False,
    ) -> None:
        """`tokenizer` is the backbone's; `next_turn` ends a decoder's text with the opening of the user's next message.

        With `response_alone` an empty message stands for each conversation.

        Raises ModelError when it has neither CLS and SEP nor a chat template, or has them and next_turn is asked for.
        """
        self.next_turn = next_turn
        self.response_alone = response_alone
        self.others: tuple[TextEncoder, ...] = ()
        """Encoders of an ensemble's further members, where their backbones differ; `encode` then asks them too."""
        self.tokenizer = tokenizer
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)
        self.pair = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        self.segments = "token_type_ids" in tokenizer.model_input_names
        if not self.pair and tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has neither CLS and SEP tokens nor a chat template, so no "
                "conversation can be written for it; use an encoder or an instruct model as backbone"
            )
        if self.pair and next_turn:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} is an encoder's, which foresees no next message; set "
                "next_turn=false or take a decoder as backbone"
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has neither a pad nor an end token; add one")
        self.pad_id = int(pad)

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Token ids of each item, in order. An empty response is fine: it has no tokens of its own."""
        if not items:
            return []
        heard = [(NOTHING, response) for _, response in items] if self.response_alone else items
        rows = self._pairs(heard) if self.pair else self._chats(heard)
        if not self.others:
            return rows
        each = zip(*(other.encode(items) for other in self.others), strict=True)
        return [Encoded(row.ids, row.second, others) for row, others in zip(rows, each, strict=True)]

    def same_as(self, other: TextEncoder) -> bool:
        """Whether both make the same ids of every item."""
        mine, its = (e.tokenizer.backend_tokenizer.to_str() for e in (self, other))
        return (mine, *self._way()) == (its, *other._way())

    def _way(self) -> tuple[int, bool, bool]:
        """How the text is written, whatever the tokenizer."""
        return self.max_tokens, self.next_turn, self.response_alone

    def _pairs(self, items: Sequence[Item]) -> list[Encoded]:
        contexts = self._ids([context_text(messages) for messages, _ in items])
        responses = self._ids([response for _, response in items])
        cls, sep = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        room = max(self.max_tokens - 3, 0)
        rows = []
        for context, response in zip(contexts, responses, strict=True):
            second = _last(response, room)
            first = _last(context, room - len(second))
            rows.append(Encoded((cls, *first, sep, *second, sep), len(first) + 2))
        return rows

    def _chats(self, items: Sequence[Item]) -> list[Encoded]:
        from jinja2 import TemplateError

        texts = []
        for messages, response in items:
            turns = [{"role": m["role"], "content": m["content"]} for m in messages]
            turns.append({"role": "assistant", "content": response})
            if self.next_turn:
                turns.append({"role": "user", "content": NEXT})
            try:
                text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
                texts.append(text[: text.rindex(NEXT)] if self.next_turn else text)
            except TemplateError as error:
                name = self.tokenizer.name_or_path
                raise ModelError(f"the chat template of {name} refused a conversation: {error}") from error
        rows = [_last(ids, self.max_tokens) for ids in self._ids(texts)]
        return [Encoded(tuple(ids), len(ids)) for ids in rows]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def collate(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Tensors [B, T] padded on the right to the longest row; the mask comes from lengths, never from the pad id."""
        import torch

        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        kinds = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row.ids)
            mask[index, : len(row)] = 1
            kinds[index, row.second : len(row)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        return {**batch, "token_type_ids": kinds} if self.segments else batch


def context_text(messages: Sequence[Message]) -> str:
    """What an encoder reads before the response: earlier messages one a line with their role, then the last as it is.

    System messages are left out: they speak to the policy, and the same ones stand before most conversations.
    """
    heard = [message for message in messages if message["role"] != "system"]
    if not heard:
        return ""
    earlier = [f"{message['role']}: {message['content']}\n" for message in heard[:-1]]
    return "".join([*earlier, heard[-1]["content"]])


def _last(ids: Sequence[int], count: int) -> Sequence[int]:
    return ids[-count:] if count > 0 else []


PADDING = 1 / 8
"""Share of a batch that may be padding."""
BUSY = 1 / 16
"""Share of the token budget below which a batch takes any padding: small ones leave processors idle."""


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices cut into batches of like length, each at most `batch_tokens` once padded (or one row longer than that).

    A batch that fills a sixteenth of that ends where padding would be more than an eighth of its tokens. The longest
    come first, so that a batch too large for memory fails at once.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if current:
            filled = lengths[current[0]] * len(current)
            padded = filled + lengths[current[0]]
            wasteful = PADDING * padded < padded - tokens - lengths[index] and BUSY * batch_tokens <= filled
            if padded > batch_tokens or wasteful:
                batches.append(current)
                current, tokens = [], 0
        current.append(index)
        tokens += lengths[index]
    if current:
        batches.append(current)
    return batches


def carriers(rows: Sequence[Encoded], *, causal: bool) -> list[int]:
    """For each row the index of one whose forward pass gives what this one needs; often itself.

    Equal rows share one pass. Where the model is causal, a row that another one begins with (an earlier message of the
    same conversation) needs no pass of its own either: its last hidden state stands in the longer row's.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].ids, rows[i].second))
    found = list(range(len(rows)))
    for here, after in reversed(list(pairwise(order))):
        short, long = rows[here], rows[after]
        if short.ids == long.ids[: len(short)] and (causal or short == long):
            found[here] = found[after]
    return found


def shared_batches(
    rows: Sequence[Encoded], *, causal: bool, batch_tokens: int
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Batches of the rows that need a pass, each with what can be read off it: (place in the batch, row) pairs."""
    carried: dict[int, list[int]] = {}
    for index, carrier in enumerate(carriers(rows, causal=causal)):
        carried.setdefault(carrier, []).append(index)
    kept = list(carried)
    for group in token_batches([len(rows[index]) for index in kept], batch_tokens):
        batch = [kept[place] for place in group]
        yield batch, [(place, index) for place, carrier in enumerate(batch) for index in carried[carrier]]
