"""Reward functions: `(batch of rows) -> one number per row`, synchronous or async, as plug-ins of an objective.

A row is a dict with `messages`, `response`, `finish_reason` (stop or length), `prompt_id`, `topic`, and every further
field of the prompt's row in `data.prompts`, such as a reference answer.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from functools import cache
from typing import Any

from rluf.errors import SettingsError
from rluf.types import Score, ScoringItem
from rluf.utils.plugins import load_plugin

RewardRow = dict[str, Any]
RewardFunction = Callable[[Sequence[RewardRow]], Sequence[float] | Awaitable[Sequence[float]]]
MAX_REWARD = 1e30
"""Larger numbers are refused like infinite ones: their squares would overflow."""
SIGNATURE = "a function of a list of rows that returns a list of numbers"


def build_function_scorer(objective: str, reference: str) -> Callable[[Sequence[ScoringItem]], list[Score]]:
    """Build a scoring function of items from module:function. SettingsError if it cannot be loaded or takes no batch.

    The scoring function raises SettingsError where the reward function does not return one finite number per item.
    """
    function: RewardFunction = load_plugin(reference, kind="reward function", signature=SIGNATURE, argument_count=1)

    def score_items(items: Sequence[ScoringItem]) -> list[Score]:
        result: Any = function([build_row(item) for item in items])
        if inspect.isawaitable(result):
            result = asyncio.run_coroutine_threadsafe(_wait_for(result), _get_event_loop()).result()
        # Their items are numbers too, in the wrong order or of the wrong kind: keys, digits.
        values = [] if isinstance(result, Mapping | Set | str | bytes) else _read_numbers(result)
        if len(values) != len(items) or not all(abs(value) < MAX_REWARD for value in values):
            raise SettingsError(
                f"reward function {reference!r} of objective {objective}: expected one finite number for each of "
                f"{len(items)} responses, got {str(result)[:200]}"
            )
        return [Score(objective, value, value, is_probability=False) for value in values]

    return score_items


def build_row(item: ScoringItem) -> RewardRow:
    """The row of an item; fields of the prompt never replace the built-in ones."""
    return {
        **(item.fields or {}),
        "messages": list(item.messages),
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


async def _wait_for(result: Awaitable[Sequence[float]]) -> Sequence[float]:
    return await result


@cache
def _get_event_loop() -> asyncio.AbstractEventLoop:
    """One event loop per process, in a thread of its own: HTTP clients of async functions keep their connections."""
    event_loop = asyncio.new_event_loop()
    threading.Thread(target=event_loop.run_forever, name="reward functions", daemon=True).start()
    return event_loop
