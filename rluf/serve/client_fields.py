"""Fields of other systems' clients that change nothing, so that the service accepts them without a field of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NEUTRAL_CHAT_VALUES: dict[str, Sequence[Any]] = {
    "tool_choice": ("none", "auto"), "modalities": (["text"],), "top_logprobs": (0,), "top_k": (0, -1), "min_p": (0,),
    "best_of": (1,), "repetition_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),
    "skip_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},), "functions": ([],), "logit_bias": ({},), "stop_token_ids": ([],), "bad_words": ([],),
    "echo": (False,), "use_beam_search": (False,), "length_penalty": (1,), "verbosity": ("medium",),
    "include_stop_str_in_output": (False,), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,), "documents": ([],), "mm_processor_kwargs": ({},), "prompt_cache_retention": (),
    "parallel_tool_calls": (), "service_tier": (), "prompt_cache_key": (),
    "priority": (), "request_id": (), "cache_salt": (),
}  # fmt: skip
"""Values of a chat's fields that change nothing (no values: at any)."""
NEUTRAL_SCORE_VALUES: dict[str, Sequence[Any]] = {
    "truncate_prompt_tokens": (-1,), "max_tokens_per_doc": (0,), "max_tokens_per_query": (0,),
    "rank_fields": (["text"],),
    "truncation_direction": ("Right", "right"), "padding": ("do_not_pad",), "encoding_format": ("float",),
    "embed_dtype": ("float32",), "endianness": ("native", "little"), "task": ("classify",), "parameters": ({},),
    "chat_template_kwargs": ({},), "mm_processor_kwargs": ({},), "tools": ([],),
    "add_generation_prompt": (False,), "continue_final_message": (False,), "add_special_tokens": (), "priority": (),
    "request_id": (), "cache_salt": (), "labels": (), "options": (),
}  # fmt: skip
"""The same for the fields of the scoring routes of other systems."""


def drop_neutral_fields(values: Any, neutral_values: Mapping[str, Sequence[Any]]) -> Any:
    """A request of another system's client without its nulls and the fields that change nothing at their value.

    No values for a name: the field changes nothing at any value. Other unknown fields are refused, never ignored.
    """
    if not isinstance(values, dict):
        return values
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (name in neutral_values and value in (neutral_values[name] or (value,)))
    }
