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
"""Responses per second and batch that admission assumes before the first measurement."""
FIRST_BATCH_TOKENS = 1024
"""Maximum tokens of the batch that gives the first measurement: a slow model would spend the deadline on a full one."""
BATCH_DEADLINE_SHARE = 0.2
"""A batch may take this share of the deadline, so that a request never waits for a long one and then for its own."""
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
    deadline: float
    future: asyncio.Future[list[ItemResult]]


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Responses, estimated tokens and seconds of one finished batch."""

    item_count: int
    token_count: int
    seconds: float


class Throughput:
    """Tokens per second of all batches together while at least one runs, and of one batch with its wait; None before.

    Tokens, not responses, since long and short ones may alternate. All batches together, since it is not known how many
    replicas are up, and which batches wait for another one at theirs.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.batch_tokens_per_s = 0.0
        self._means: list[float] = []
        self._running_count, self._measured_until = 0, 0.0

    def start_batch(self, now: float) -> None:
        """Note that a batch starts at `now` (seconds)."""
        if not self._running_count:
            self._measured_until = now
        self._running_count += 1

    def end_batch(self, tokens: int, now: float, seconds: float) -> None:
        """Note that a batch of `tokens` ends after `seconds`; 0 tokens if it failed, which measures nothing."""
        self._running_count -= 1
        values = (tokens, now - self._measured_until, seconds)
        self._measured_until = now
        if not tokens:
            return
        # Means of both sides of the ratio: batches of several replicas may end at the same moment.
        weights = zip(self._means or values, values, strict=True)
        self._means = [mean + NEW_SAMPLE_WEIGHT * (value - mean) for mean, value in weights]
        mean_tokens, mean_interval_s, mean_batch_s = self._means
        self.tokens_per_s = mean_tokens / max(mean_interval_s, 1e-6)
        self.batch_tokens_per_s = mean_tokens / max(mean_batch_s, 1e-6)


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
        self._throughput, self._mean_batch_s = Throughput(), math.inf
        self._expected_requests, self._wait_until, self._skip_wait_batches = 0, 0.0, 0
        self._expected_arrived = asyncio.Event()
        self.queued_items = self._queued_tokens = self._running_tokens = 0

    async def submit(self, items: Sequence[ScoringItem]) -> list[ItemResult]:
        """Return the items' results in order. Raises ApiError 429 before too long a wait, or what `run_batch` raised.

        A wait is too long if it ends past the deadline at the present throughput, or behind a full queue.
        """
        tokens = sum(estimate_tokens(item, self.max_item_tokens) for item in items)
        self._check_capacity(len(items), tokens)
        future: asyncio.Future[list[ItemResult]] = asyncio.get_running_loop().create_future()
        request = _QueuedRequest[ItemResult](items, tokens, monotonic() + self.deadline_s, future)
        self._queued_requests.append(request)
        self.queued_items += len(items)
        self._queued_tokens += tokens
        self._on_queue_change()
        if len(self._queued_requests) >= self._expected_requests:
            self._expected_arrived.set()
        self._start_batch()
        return await request.future

    def _check_capacity(self, item_count: int, tokens: int) -> None:
        # A request to an idle service is always accepted: one larger than the limit could never run, and without it a
        # throughput measured in a bad moment would never be measured again.
        if not self.queued_items and not self._running_batches:
            return
        tokens_per_item = (self._queued_tokens + tokens) / (self.queued_items + item_count)
        tokens_per_s = self._throughput.tokens_per_s
        if tokens_per_s is None:
            tokens_per_s = INITIAL_ITEMS_PER_S * tokens_per_item * max(1, len(self._running_batches))
        # The batches that run are not done yet either: on average half of them.
        wait_s = (self._queued_tokens + self._running_tokens / 2 + tokens) / tokens_per_s
        excess_items = self.queued_items + item_count - self.max_queued_responses
        excess_s = max(
            wait_s - ADMITTED_DEADLINE_SHARE * self.deadline_s, excess_items * tokens_per_item / tokens_per_s
        )
        if excess_s > 0:
            message = f"{self.queued_items} responses are already queued, {wait_s:.3g} s of work with this request"
            # What was accepted is done within the deadline, however long the measured throughput says.
            raise ApiError(429, "busy", f"{message}; try again later", min(excess_s, self.deadline_s))

    @property
    def _batch_budget(self) -> float:
        """Maximum tokens of the next batch, unless one request has more."""
        if self._throughput.tokens_per_s is None:
            return min(self.batch_tokens, FIRST_BATCH_TOKENS)
        return min(self.batch_tokens, BATCH_DEADLINE_SHARE * self.deadline_s * self._throughput.batch_tokens_per_s)

    def _start_batch(self) -> None:
        """Start one more batch if requests are queued and a replica has a free slot."""
        send_ahead = self._mean_batch_s < SHORT_BATCH_S or self._queued_tokens >= MIN_FILL_SHARE * self._batch_budget
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
        """Take requests in arrival order up to the budget, at least one; drop those whose caller has left.

        A request that would be late is refused here, since its work would delay those behind it too.
        """
        requests: list[_QueuedRequest[ItemResult]] = []
        tokens, budget, now = 0, self._batch_budget, monotonic()
        while self._queued_requests and (not requests or tokens + self._queued_requests[0].tokens <= budget):
            request = self._queued_requests.popleft()
            self.queued_items -= len(request.items)
            self._queued_tokens -= request.tokens
            if request.future.done():
                continue
            tokens_per_s = self._throughput.tokens_per_s or math.inf
            if now + request.tokens / tokens_per_s > request.deadline and self._queued_requests:
                message = "the service has become slower than when it accepted this request; try again later"
                retry_after_s = min(self._queued_tokens / tokens_per_s, self.deadline_s)
                request.future.set_exception(ApiError(429, "busy", message, retry_after_s))
                continue
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
        tokens = sum(request.tokens for request in requests)
        self._throughput.start_batch(start_time)
        self._running_tokens += tokens
        # gather only to receive the error as a value: every request of the batch must get it.
        (result,) = await asyncio.gather(self._run_batch(items), return_exceptions=True)
        self._running_tokens -= tokens
        end_time = monotonic()
        is_done = not isinstance(result, BaseException)
        self._throughput.end_batch(tokens if is_done else 0, end_time, end_time - start_time)
        start = 0
        for request in requests:
            rows, start = slice(start, start + len(request.items)), start + len(request.items)
            if request.future.done():
                continue
            if isinstance(result, BaseException):
                request.future.set_exception(result)
            else:
                request.future.set_result(result[rows])
        if is_done:
            self._record_batch(requests, end_time - start_time)

    def _record_batch(self, requests: Sequence[_QueuedRequest[ItemResult]], seconds: float) -> None:
        """Update the batch time and the expectations for the next batch."""
        item_count, token_count = sum(len(r.items) for r in requests), sum(r.tokens for r in requests)
        if math.isinf(self._mean_batch_s):
            self._mean_batch_s = seconds
        else:
            self._mean_batch_s += NEW_SAMPLE_WEIGHT * (seconds - self._mean_batch_s)
        self._expected_requests = len(requests) + len(self._queued_requests)
        # A batch that fills the device gains nothing from more items; a short one is over before anyone could join.
        is_small = token_count + self._queued_tokens < MIN_FILL_SHARE * self._batch_budget
        should_wait = is_small and self._mean_batch_s >= SHORT_BATCH_S
        self._wait_until = monotonic() + min(WAIT_FRACTION * seconds, MAX_BATCH_WAIT_S) if should_wait else 0.0
        self._on_batch_end(BatchStats(item_count, token_count, seconds))
