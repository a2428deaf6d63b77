"""Where a response ends: stop token ids of a model folder, stop strings, and the end of turn of the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import ModelError
from rluf.models.chat import RejectedConversationError, apply_chat_template, list_control_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESPONSE_MARKER = "\u2063response\u2063"
"""Placeholder of the response, which shows where a chat template puts it."""


def read_stop_token_ids(model_folder: Path, eos_token_id: int | None) -> list[int]:
    """Token ids that end a turn: the tokenizer's end of sequence, those of config.json and generation_config.json."""
    # Chat models often end a turn with another token than the tokenizer's eos_token; without it every response would
    # run into max_tokens.
    token_ids = set() if eos_token_id is None else {int(eos_token_id)}
    for file in (model_folder / "config.json", model_folder / "generation_config.json"):
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            # Models that also read images have the decoder's config inside.
            for section in (config, config.get("text_config") or {}):
                eos = section.get("eos_token_id")
                token_ids.update(int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"no eos_token_id could be read from {file}: {error}; it must be an id or a list"
            ) from error
    if not token_ids:
        raise ModelError(
            f"model {model_folder} defines no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    return sorted(token_ids)


def find_turn_end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the first control token that the chat template writes after a response; empty if it writes none.

    First that after the last response of a conversation, then that before the user's next message: some templates end
    the last one with another token. Raises RejectedConversationError if the template rejects both conversations.
    """
    control_ids = list_control_ids(tokenizer)
    turn_end_ids, rejection = [], None
    for roles, contents in ((["user", "assistant"], []), (["user", "assistant", "user"], ["Bye"])):
        try:
            text = apply_chat_template(tokenizer, roles, ["Hi", RESPONSE_MARKER, *contents])
        except RejectedConversationError as error:
            rejection = error
            continue
        ending = text.partition(RESPONSE_MARKER)[2].partition("Bye")[0]
        token_ids: list[int] = tokenizer(ending, add_special_tokens=False)["input_ids"]
        turn_end_ids += [token_id for token_id in token_ids if token_id in control_ids][:1]
    if rejection is not None and not turn_end_ids:
        raise rejection
    return list(dict.fromkeys(turn_end_ids))


def find_response_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends a logged response, as the policy would: that of the template, else the end token.

    Raises ModelError if the tokenizer has neither.
    """
    try:
        turn_end_ids = find_turn_end_ids(tokenizer)
    except RejectedConversationError:
        turn_end_ids = []
    end_id = next(iter(turn_end_ids), tokenizer.eos_token_id)
    if end_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no token that ends a response; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(end_id)


def list_stop_token_ids(tokenizer: PreTrainedTokenizerFast, stop_strings: Sequence[str]) -> list[int]:
    """Ids of the stop strings that are a token of their own in the vocabulary's added tokens."""
    added_ids = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return [added_ids[text] for text in stop_strings if text in added_ids]


def count_tokens_before_stop(
    tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], stop_strings: Sequence[str]
) -> int:
    """Number of leading tokens whose text contains a stop string for the first time; all of them if none does."""

    def has_stop_string(count: int) -> bool:
        text = tokenizer.decode(token_ids[:count], skip_special_tokens=False)
        return any(stop_string in text for stop_string in stop_strings)

    if not has_stop_string(len(token_ids)):
        return len(token_ids)
    low, high = 0, len(token_ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has_stop_string(middle) else (middle, high)
    return high
