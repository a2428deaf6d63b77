"""Dynamic batching by tokens: what waits while the models are busy goes into the next batch together.

An idle service answers at once, a busy one works in batches of up to `batch_tokens`. Callers that were answered just
now often ask again: where they are few and take long, the next batch waits for them a fraction of that time, since
together they cost less than apart; where that was in vain, the next batches do not wait. Past `max_waiting` responses a
request is refused with the time after which it is worth trying again.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

from rluf.reward.text import BUSY, Item
from rluf.serve.limits import ApiError

Result = TypeVar("Result")

CHARS_PER_TOKEN = 3
"""For the estimate only; the forward passes themselves are bounded by exact token counts (token_batches)."""
START_RATE = 50.0
"""Responses a second that Retry-After assumes before anything was measured."""
BRIEF_S = 0.03
"""Seconds of a batch below which the way to the model counts: then a replica gets its next batch before it is done, as
it does where that one is BUSY."""
LINGER, LONGEST_LINGER_S = 0.2, 0.02
"""Share of the last batch's time, and seconds at most, that a batch waits for those who were answered by the last."""
IN_VAIN = 16
"""Batches that do not wait after one that waited in vain."""


def estimated_tokens(item: Item, longest: int) -> int:
    """Tokens that a reward model will read of an item, from its characters, at most `longest`."""
    messages, response = item
    chars = len(response) + sum(len(message["content"]) for message in messages)
    return min(longest, 4 + chars // CHARS_PER_TOKEN)


@dataclass(slots=True)
class _Waiting(Generic[Result]):
    items: Sequence[Item]
    tokens: int
    future: asyncio.Future[list[Result]]


@dataclass(frozen=True, slots=True)
class Round:
    """One batch that was run: responses, estimated tokens, seconds."""

    items: int
    tokens: int
    seconds: float


class Batcher(Generic[Result]):
    """Collects items of many requests into batches for `run`, which returns one result an item, in order.

    All calls belong to one asyncio loop. Each of `replicas` works on one batch at a time, and has a second one at hand
    where batches are brief or large enough.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        *,
        batch_tokens: int,
        longest: int,
        max_waiting: int,
        replicas: int,
        on_round: Callable[[Round], None] = lambda _: None,
    ) -> None:
        """`longest` is the most tokens that any model reads of an item; `on_round` hears of each batch that ended."""
        self._run, self._on_round = run, on_round
        self.batch_tokens, self.longest, self.max_waiting, self.replicas = batch_tokens, longest, max_waiting, replicas
        self._queue: deque[_Waiting[Result]] = deque()
        self._rounds: set[asyncio.Task[None]] = set()
        self._rate, self._seconds = START_RATE, math.inf
        self._expected, self._until, self._without = 0, 0.0, 0
        self._complete = asyncio.Event()
        self.waiting = self._tokens = 0

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of the items, in order. Raises ApiError 429 when too much waits already, or what `run` raised."""
        if self.waiting and self.waiting + len(items) > self.max_waiting:
            raise ApiError(
                429,
                "busy",
                f"{self.waiting} responses wait to be scored already (serve.max_waiting={self.max_waiting}); "
                "try again later",
                self.waiting / self._rate,
            )
        tokens = sum(estimated_tokens(item, self.longest) for item in items)
        entry = _Waiting[Result](items, tokens, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self.waiting += len(items)
        self._tokens += tokens
        if len(self._queue) >= self._expected:
            self._complete.set()
        self._start()
        return await entry.future

    def _start(self) -> None:
        """One more batch, if there is something for it and room."""
        ahead = self._seconds < BRIEF_S or self._tokens >= BUSY * self.batch_tokens
        room = self.replicas * (2 if ahead else 1)
        if len(self._rounds) < room and self._queue:
            task = asyncio.create_task(self._round())
            self._rounds.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._rounds.discard(task)
        self._start()

    async def _linger(self) -> None:
        """Wait for as many requests as there were when the last batch ended, for a while: see LINGER."""
        left = self._until - monotonic()
        if left <= 0 or len(self._queue) >= self._expected or len(self._rounds) > 1:
            return
        if self._without:
            self._without -= 1
            return
        self._complete.clear()
        try:
            await asyncio.wait_for(self._complete.wait(), left)
        except TimeoutError:
            self._without = IN_VAIN

    def _take(self) -> list[_Waiting[Result]]:
        """Requests in order of arrival until the budget is spent; at least one. Those whose caller left are dropped."""
        taken: list[_Waiting[Result]] = []
        tokens = 0
        while self._queue and (not taken or tokens + self._queue[0].tokens <= self.batch_tokens):
            entry = self._queue.popleft()
            self.waiting -= len(entry.items)
            self._tokens -= entry.tokens
            if not entry.future.done():
                taken.append(entry)
                tokens += entry.tokens
        return taken

    async def _round(self) -> None:
        await asyncio.sleep(0)  # let requests that have already arrived join
        await self._linger()
        taken = self._take()
        if not taken:
            return
        items = [item for entry in taken for item in entry.items]
        started = monotonic()
        (outcome,) = await asyncio.gather(self._run(items), return_exceptions=True)
        seconds = monotonic() - started
        at = 0
        for entry in taken:
            part, at = slice(at, at + len(entry.items)), at + len(entry.items)
            if entry.future.done():
                continue
            if isinstance(outcome, BaseException):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome[part])
        if not isinstance(outcome, BaseException):
            self._rate = 0.8 * self._rate + 0.2 * len(items) / max(seconds, 1e-6)
            self._seconds = seconds if math.isinf(self._seconds) else 0.8 * self._seconds + 0.2 * seconds
            self._expected = len(taken) + len(self._queue)
            few = sum(entry.tokens for entry in taken) + self._tokens < BUSY * self.batch_tokens
            pays = few and self._seconds >= BRIEF_S
            self._until = monotonic() + min(LINGER * seconds, LONGEST_LINGER_S) if pays else 0.0
            self._on_round(Round(len(items), sum(entry.tokens for entry in taken), seconds))
