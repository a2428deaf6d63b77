"""Dynamic batching by tokens: requests that arrive while the models are busy form the next batch.

An idle service runs a request at once; a busy one runs batches of up to `batch_tokens`. Clients often send their next
request right after a reply. If such clients are few and batches are slow, the next batch waits for them for a fraction
of the batch time, since one joint batch costs less than two. After a wait in vain the next batches do not wait. When
`max_queued_responses` is reached, a request is rejected with the time after which a retry makes sense.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

from rluf.reward.text import MIN_FILL_SHARE
from rluf.serve.api import ApiError
from rluf.types import ScoringItem

ItemResult = TypeVar("ItemResult")

CHARS_PER_TOKEN = 3
"""For the estimate only; exact token counts bound the forward passes themselves (plan_token_batches)."""
INITIAL_ITEMS_PER_S = 50.0
"""Responses per second that Retry-After assumes before the first measurement."""
SHORT_BATCH_S = 0.03
"""Batches shorter than this are dominated by the hop to the model, so a replica gets its next batch before it has
finished the present one. A queue that fills MIN_FILL_SHARE of a batch has the same effect."""
WAIT_FRACTION, MAX_BATCH_WAIT_S = 0.2, 0.02
"""A batch waits for the clients of the last one: this fraction of the last batch's time, and at most this many s."""
BATCHES_WITHOUT_WAIT = 16
"""Number of batches that do not wait after one that waited in vain."""
MAX_QUEUED_RESPONSES = 1024
"""Responses waiting to be scored before requests get 429: seconds of work, more would only time out later."""
ADMITTED_DEADLINE_SHARE = 0.8
"""A request is admitted if its expected wait is at most this share of the deadline; the rest covers errors of it."""
NEW_SAMPLE_WEIGHT = 0.2
"""Weight of the newest batch in the exponential means of throughput and batch time."""


def estimate_tokens(item: ScoringItem, max_item_tokens: int) -> int:
    """Estimate from its characters how many tokens a reward model reads of an item, at most `max_item_tokens`."""
    char_count = len(item.response) + sum(len(message["content"]) for message in item.messages)
    return min(max_item_tokens, 4 + char_count // CHARS_PER_TOKEN)  # 4: special tokens of the template


@dataclass(slots=True)
class _QueuedRequest(Generic[ItemResult]):
    items: Sequence[ScoringItem]
    tokens: int
    future: asyncio.Future[list[ItemResult]]


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Responses, estimated tokens and seconds of one finished batch."""

    item_count: int
    token_count: int
    seconds: float


class RequestBatcher(Generic[ItemResult]):
    """Combines the items of many requests into batches for `run_batch`, which returns one result per item, in order.

    Not thread-safe: all calls must come from one asyncio loop. Each replica runs one batch at a time; a second one is
    sent ahead when batches are short or the queue is long.
    """

    def __init__(
        self,
        run_batch: Callable[[list[ScoringItem]], Awaitable[list[ItemResult]]],
        *,
        batch_tokens: int,
        max_item_tokens: int,
        max_queued_responses: int,
        replica_count: int,
        deadline_s: float = math.inf,
        on_batch_end: Callable[[BatchStats], None] = lambda _: None,
        on_queue_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_item_tokens` is the most that any model reads of an item; `deadline_s` bounds the time of a request.

        `on_batch_end` gets the finished batches; `on_queue_change` is called when `queued_items` has changed.
        """
        self.deadline_s, self._on_queue_change = deadline_s, on_queue_change
        self._run_batch, self._on_batch_end = run_batch, on_batch_end
        self.batch_tokens, self.max_item_tokens = batch_tokens, max_item_tokens
        self.max_queued_responses, self.replica_count = max_queued_responses, replica_count
        self._queued_requests: deque[_QueuedRequest[ItemResult]] = deque()
        self._running_batches: set[asyncio.Task[None]] = set()
        self._items_per_s, self._mean_batch_s = INITIAL_ITEMS_PER_S, math.inf
        self._expected_requests, self._wait_until, self._skip_wait_batches = 0, 0.0, 0
        self._expected_arrived = asyncio.Event()
        self.queued_items = self._queued_tokens = self._running_items = 0

    async def submit(self, items: Sequence[ScoringItem]) -> list[ItemResult]:
        """Return the items' results in order. Raises ApiError 429 before too long a wait, or what `run_batch` raised.

        A wait is too long if it ends past the deadline at the present throughput, or behind a full queue.
        """
        self._check_capacity(len(items))
        tokens = sum(estimate_tokens(item, self.max_item_tokens) for item in items)
        request = _QueuedRequest[ItemResult](items, tokens, asyncio.get_running_loop().create_future())
        self._queued_requests.append(request)
        self.queued_items += len(items)
        self._queued_tokens += tokens
        self._on_queue_change()
        if len(self._queued_requests) >= self._expected_requests:
            self._expected_arrived.set()
        self._start_batch()
        return await request.future

    def _check_capacity(self, item_count: int) -> None:
        # A request on an empty queue is always accepted: one larger than the limit could never run, and without it a
        # throughput measured in a bad moment would never be measured again.
        if not self.queued_items:
            return
        # Batches that run at the same time, on several replicas or sent ahead, share the throughput of one batch.
        items_per_s = self._items_per_s * max(1, len(self._running_batches))
        timely_items = ADMITTED_DEADLINE_SHARE * self.deadline_s * items_per_s
        # The batches that run are not done yet either: on average half of them.
        waiting_items = self.queued_items + self._running_items / 2 + item_count
        excess_items = max(self.queued_items + item_count - self.max_queued_responses, waiting_items - timely_items)
        if excess_items > 0:
            message = f"{self.queued_items} responses are already queued, at {items_per_s:.3g} per second"
            raise ApiError(429, "busy", f"{message}; try again later", excess_items / items_per_s)

    def _start_batch(self) -> None:
        """Start one more batch if requests are queued and a replica has a free slot."""
        send_ahead = self._mean_batch_s < SHORT_BATCH_S or self._queued_tokens >= MIN_FILL_SHARE * self.batch_tokens
        slot_count = self.replica_count * (2 if send_ahead else 1)
        if len(self._running_batches) < slot_count and self._queued_requests:
            task = asyncio.create_task(self._run_next_batch())
            self._running_batches.add(task)
            task.add_done_callback(self._on_batch_done)

    def _on_batch_done(self, task: asyncio.Task[None]) -> None:
        self._running_batches.discard(task)
        self._start_batch()

    async def _wait_for_expected(self) -> None:
        """Wait briefly until as many requests are queued as were answered or queued at the end of the last batch."""
        remaining_s = self._wait_until - monotonic()
        if remaining_s <= 0 or len(self._queued_requests) >= self._expected_requests or len(self._running_batches) > 1:
            return
        if self._skip_wait_batches:
            self._skip_wait_batches -= 1
            return
        self._expected_arrived.clear()
        try:
            await asyncio.wait_for(self._expected_arrived.wait(), remaining_s)
        except TimeoutError:
            self._skip_wait_batches = BATCHES_WITHOUT_WAIT

    def _take_requests(self) -> list[_QueuedRequest[ItemResult]]:
        """Take requests in arrival order up to the token budget, at least one; drop those whose caller has left."""
        requests: list[_QueuedRequest[ItemResult]] = []
        tokens = 0
        while self._queued_requests and (not requests or tokens + self._queued_requests[0].tokens <= self.batch_tokens):
            request = self._queued_requests.popleft()
            self.queued_items -= len(request.items)
            self._queued_tokens -= request.tokens
            if not request.future.done():
                requests.append(request)
                tokens += request.tokens
        self._on_queue_change()
        return requests

    async def _run_next_batch(self) -> None:
        await asyncio.sleep(0)  # let requests that have already arrived join
        await self._wait_for_expected()
        requests = self._take_requests()
        if not requests:
            return
        items = [item for request in requests for item in request.items]
        start_time = monotonic()
        self._running_items += len(items)
        # gather only to receive the error as a value: every request of the batch must get it.
        (result,) = await asyncio.gather(self._run_batch(items), return_exceptions=True)
        self._running_items -= len(items)
        seconds = monotonic() - start_time
        start = 0
        for request in requests:
            rows, start = slice(start, start + len(request.items)), start + len(request.items)
            if request.future.done():
                continue
            if isinstance(result, BaseException):
                request.future.set_exception(result)
            else:
                request.future.set_result(result[rows])
        if not isinstance(result, BaseException):
            self._record_batch(requests, seconds)

    def _record_batch(self, requests: Sequence[_QueuedRequest[ItemResult]], seconds: float) -> None:
        """Update the rate and the expectations for the next batch."""
        item_count, token_count = sum(len(r.items) for r in requests), sum(r.tokens for r in requests)
        self._items_per_s += NEW_SAMPLE_WEIGHT * (item_count / max(seconds, 1e-6) - self._items_per_s)
        if math.isinf(self._mean_batch_s):
            self._mean_batch_s = seconds
        else:
            self._mean_batch_s += NEW_SAMPLE_WEIGHT * (seconds - self._mean_batch_s)
        self._expected_requests = len(requests) + len(self._queued_requests)
        # A batch that fills the device gains nothing from more items; a short one is over before anyone could join.
        is_small = token_count + self._queued_tokens < MIN_FILL_SHARE * self.batch_tokens
        should_wait = is_small and self._mean_batch_s >= SHORT_BATCH_S
        self._wait_until = monotonic() + min(WAIT_FRACTION * seconds, MAX_BATCH_WAIT_S) if should_wait else 0.0
        self._on_batch_end(BatchStats(item_count, token_count, seconds))
