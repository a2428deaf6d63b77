"""Reward functions: `(batch of rows) -> one number per row`, synchronous or async, as plug-ins of an objective.

A row is a dict with `messages`, `response`, `finish_reason` (stop or length), `prompt_id`, `topic`, and every further
field of the prompt's row in `data.prompts`, such as a reference answer. A function in TRL's signature,
`(prompts, completions, **columns)`, is called with keywords as TRL's GRPOTrainer does.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import suppress
from functools import cache
from typing import Any, cast

from rluf.errors import RlufError, SettingsError
from rluf.types import Score, ScoringItem
from rluf.utils.plugins import check_signature, load_plugin

RewardRow = dict[str, Any]
RewardFunction = Callable[[Sequence[RewardRow]], Sequence[float] | Awaitable[Sequence[float]]]
MAX_REWARD = 1e30
"""Larger numbers are refused like infinite ones: their squares would overflow."""
SIGNATURE = "a function of a list of rows that returns a list of numbers"
MESSAGES_HINT = (
    "prompts and completions are lists of messages, [{'role': ..., 'content': ...}], or texts where the parameter is "
    "annotated list[str]"
)
UNAVAILABLE_ARGUMENTS = frozenset({"completion_ids", "environments", "log_extra", "log_metric", "trainer_state"})
"""What TRL passes apart from texts and columns of the data set, and rluf does not."""


def build_function_scorer(objective: str, reference: str) -> Callable[[Sequence[ScoringItem]], list[Score]]:
    """Build a scoring function of items from module:function. SettingsError if it cannot be loaded or takes no batch.

    The scoring function raises SettingsError where the reward function does not return one finite number per item.
    """
    label = f"reward function {reference!r}"
    plugin = load_plugin(reference, kind="reward function", signature=SIGNATURE)
    function = build_reward_function(plugin, label)

    def describe_input(rows: Sequence[RewardRow]) -> str:
        """What the function got: most errors of a first try come from a wrong idea of it."""
        if function is not plugin:
            return MESSAGES_HINT
        return f"a row has the keys {', '.join(dict.fromkeys(key for row in rows for key in row))}"

    def score_items(items: Sequence[ScoringItem]) -> list[Score]:
        rows = [build_row(item) for item in items]
        with _NoteOnError(f"raised by {label} of objective {objective}; {describe_input(rows)}"):
            result: Any = function(rows)
            if inspect.isawaitable(result):
                result = asyncio.run_coroutine_threadsafe(_wait_for(result), _get_event_loop()).result()
        # Their items are numbers too, in the wrong order or of the wrong kind: keys, digits.
        values = [] if isinstance(result, Mapping | Set | str | bytes) else _read_numbers(result)
        if len(values) != len(items) or not all(abs(value) < MAX_REWARD for value in values):
            hint = "; leave prompts that cannot be judged out of data.prompts" if _has_none(result) else ""
            raise SettingsError(
                f"{label} of objective {objective}: expected one finite number for each of "
                f"{len(items)} responses, got {str(result)[:200]}{hint}"
            )
        return [Score(objective, value, value, is_probability=False) for value in values]

    return score_items


def build_reward_function(function: Any, label: str) -> RewardFunction:
    """The function itself if it takes rows, else a function of rows that calls it as TRL does.

    It is TRL's if it has a parameter `completions` or `completion_ids`, or takes keywords only. Its columns are the
    other keys of the rows, as lists; a parameter without default is required in every row. SettingsError for any other
    signature, and for arguments that only TRL's trainer has.
    """
    parameters = _read_parameters(function)
    keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not _is_like_trl(parameters):
        check_signature(function, label, SIGNATURE, 1)
        return cast("RewardFunction", function)
    required = _list_required(parameters)
    if unavailable := required & UNAVAILABLE_ARGUMENTS:
        raise SettingsError(f"{label}: rluf does not pass {', '.join(sorted(unavailable))}; write {SIGNATURE}")

    def score_rows(rows: Sequence[RewardRow]) -> Any:
        keys = dict.fromkeys(key for row in rows for key in row)
        columns: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in keys}
        columns["prompts"] = columns.pop("messages", [])
        columns["completions"] = [[{"role": "assistant", "content": text}] for text in columns.pop("response", [])]
        for name in ("prompts", "completions"):
            if name in parameters and re.search(r"\[(<class ')?str('>)?\]$", str(parameters[name].annotation)):
                columns[name] = [messages[-1]["content"] for messages in columns[name]]
        for row in rows:
            if missing := required - {"prompts", "completions", *row}:
                raise SettingsError(
                    f"{label} takes {', '.join(sorted(missing))}, which prompt {row['prompt_id']!r} of data.prompts "
                    "does not have"
                )
        return function(**{key: values for key, values in columns.items() if keywords or key in parameters})

    return score_rows


class _NoteOnError:
    """Adds a note to an exception of the user's code, which the driver prints with the message."""

    def __init__(self, note: str) -> None:
        self.note = note

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, RlufError):
            error.add_note(self.note)


def list_required_fields(function: Any) -> set[str]:
    """Fields that every row of `data.prompts` must have for a function in TRL's signature; none for any other one."""
    parameters = _read_parameters(function)
    if not _is_like_trl(parameters):
        return set()
    return _list_required(parameters) - {"prompts", "completions", "finish_reason", "prompt_id", "topic"}


def _read_parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    with suppress(TypeError, ValueError):  # not a function, or a built-in one without a signature
        return inspect.signature(function).parameters
    return {}


def _is_like_trl(parameters: Mapping[str, inspect.Parameter]) -> bool:
    takes_keywords_only = [parameter.kind for parameter in parameters.values()] == [inspect.Parameter.VAR_KEYWORD]
    return takes_keywords_only or not {"completions", "completion_ids"}.isdisjoint(parameters)


def _list_required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    named_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind in named_kinds
    }


def build_row(item: ScoringItem) -> RewardRow:
    """The row of an item; fields of the prompt never replace the built-in ones."""
    return {
        **(item.fields or {}),
        "messages": [{**message} for message in item.messages],  # a function may change its own
        "response": item.response,
        "finish_reason": "length" if item.is_truncated else "stop",
        "prompt_id": item.prompt_id,
        "topic": item.topic,
    }


def _read_numbers(result: Any) -> list[float]:
    try:
        return [math.nan if isinstance(value, str | bytes) else float(value) for value in result]
    except (TypeError, ValueError):
        return []


def _has_none(result: Any) -> bool:
    return isinstance(result, list | tuple) and any(value is None for value in result)


async def _wait_for(result: Awaitable[Sequence[float]]) -> Sequence[float]:
    return await result


@cache
def _get_event_loop() -> asyncio.AbstractEventLoop:
    """One event loop per process, in a thread of its own: HTTP clients of async functions keep their connections."""
    event_loop = asyncio.new_event_loop()
    threading.Thread(target=event_loop.run_forever, name="reward functions", daemon=True).start()
    return event_loop
