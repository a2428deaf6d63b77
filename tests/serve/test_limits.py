"""Errors, batching by tokens, and the running mean of the drift metric."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.serve.api import ApiError
from rluf.serve.batching import BATCHES_WITHOUT_WAIT, WAIT_FRACTION, BatchStats, RequestBatcher, estimate_tokens
from rluf.serve.middleware import RUNNING_MEAN_WINDOW, RunningMean, ServeMetrics
from rluf.types import Score, ScoringItem


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer, so that a simulation does not depend on the load."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class VirtualTimePolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return VirtualTimeLoop()


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """Run the tests of this file in virtual time."""
    return VirtualTimePolicy()


@pytest.fixture(autouse=True)
def use_the_time_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.serve.batching.monotonic", lambda: asyncio.get_running_loop().time())


def make_item(text: str) -> ScoringItem:
    return ScoringItem([{"role": "user", "content": "?"}], text)


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ApiError(429, "busy", "wait", 2.4)))
    assert error.body == {"error": {"message": "wait", "type": "busy", "code": 429}}
    assert error.headers == {"Retry-After": "3"}


@given(st.lists(st.tuples(st.text(max_size=400), st.integers(1, 4)), min_size=1, max_size=20), st.integers(1, 400))
def test_each_request_gets_its_own_results_and_batches_stay_in_the_budget(
    requests: list[tuple[str, int]], budget: int
) -> None:
    batches: list[BatchStats] = []

    async def run_batch(items: list[ScoringItem]) -> list[str]:
        await asyncio.sleep(0)
        return [item.response.upper() for item in items]

    async def submit_all() -> list[list[str]]:
        batcher = RequestBatcher(
            run_batch,
            batch_tokens=budget,
            max_item_tokens=100,
            max_queued_responses=1000,
            replica_count=1,
            on_batch_end=batches.append,
        )
        return await asyncio.gather(*(batcher.submit([make_item(text)] * count) for text, count in requests))

    results = asyncio.run(submit_all())
    assert results == [[text.upper()] * count for text, count in requests]
    assert sum(stats.item_count for stats in batches) == sum(count for _, count in requests)
    largest = max(count * estimate_tokens(make_item(text), 100) for text, count in requests)
    assert all(stats.token_count <= max(budget, largest) for stats in batches)


async def test_requests_that_arrive_during_a_batch_form_the_next_one_and_a_full_queue_rejects() -> None:
    sizes: list[int] = []
    gate = asyncio.Event()

    async def run_batch(items: list[ScoringItem]) -> list[int]:
        sizes.append(len(items))
        await gate.wait()
        return [0] * len(items)

    batcher = RequestBatcher(
        run_batch, batch_tokens=10_000, max_item_tokens=100, max_queued_responses=8, replica_count=1
    )
    first = asyncio.create_task(batcher.submit([make_item("a")]))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(batcher.submit([make_item("b")])) for _ in range(8)]
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError, match="already queued") as rejection:
        await batcher.submit([make_item("c")])
    assert rejection.value.status == 429
    assert int(rejection.value.headers["Retry-After"]) >= 1
    others[0].cancel()
    gate.set()
    await asyncio.gather(first, *others, return_exceptions=True)
    assert sizes == [1, 7]
    assert batcher.queued_items == 0


def make_batcher(seconds: float) -> tuple[list[int], RequestBatcher[int]]:
    """Sizes of the batches so far, and a batcher whose batches take `seconds`."""
    sizes: list[int] = []

    async def run_batch(items: list[ScoringItem]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(seconds)
        return [0] * len(items)

    return sizes, RequestBatcher(
        run_batch, batch_tokens=10_000, max_item_tokens=100, max_queued_responses=100, replica_count=1
    )


async def test_clients_that_send_again_after_a_reply_share_a_batch() -> None:
    sizes, batcher = make_batcher(0.06)

    async def send_repeatedly() -> None:
        for _ in range(6):
            await batcher.submit([make_item("again")])
            await asyncio.sleep(0.002)  # network time of the reply and of the next request

    first = asyncio.create_task(send_repeatedly())
    await asyncio.sleep(0.01)
    await asyncio.gather(first, *(send_repeatedly() for _ in range(3)))
    assert sizes[2:] == [4, 4, 4, 4, 3]


async def test_after_a_wait_in_vain_the_next_batches_do_not_wait() -> None:
    sizes, batcher = make_batcher(0.06)
    await asyncio.gather(*(batcher.submit([make_item("once")]) for _ in range(4)))
    clock = asyncio.get_running_loop().time
    waits = []
    for _ in range(3):
        start_time = clock()
        await asyncio.gather(batcher.submit([make_item("a")]), batcher.submit([make_item("b")]))
        waits.append(clock() - start_time)
        batcher._expected_requests = 4  # as if two more requests had been answered
    assert sizes == [4, 2, 2, 2]
    assert waits[0] >= 0.06 + 0.9 * WAIT_FRACTION * 0.06
    assert batcher._skip_wait_batches == BATCHES_WITHOUT_WAIT - 2


@pytest.mark.parametrize(("seconds", "later_requests", "batch_count"), [(0.005, 1, 2), (0.06, 1, 1), (0.06, 7, 2)])
async def test_short_or_large_batches_send_the_next_one_ahead(
    seconds: float, later_requests: int, batch_count: int
) -> None:
    sizes, batcher = make_batcher(seconds)
    await batcher.submit([make_item("first")])
    running = asyncio.create_task(batcher.submit([make_item("a")]))
    await asyncio.sleep(0.002)
    others = [
        asyncio.create_task(batcher.submit([make_item("b" * 400)])) for _ in range(later_requests)
    ]  # 100 tokens each
    await asyncio.sleep(0.001)
    assert len(sizes) - 1 == batch_count
    await asyncio.gather(running, *others)


async def test_a_failed_batch_fails_its_requests_and_the_next_one_runs() -> None:
    async def run_batch(items: list[ScoringItem]) -> list[int]:
        if items[0].response == "bad":
            raise OSError("broken")
        return [1] * len(items)

    batcher = RequestBatcher(run_batch, batch_tokens=8, max_item_tokens=100, max_queued_responses=100, replica_count=1)
    failed_result, good_result = await asyncio.gather(
        batcher.submit([make_item("bad")]), batcher.submit([make_item("good")]), return_exceptions=True
    )
    assert isinstance(failed_result, OSError)
    assert good_result == [1]


def test_the_running_mean_follows_a_change_and_drift_is_its_difference_to_the_card() -> None:
    running_mean = RunningMean()
    assert [running_mean.add_value(value) for value in (1.0, 0.0, 0.5)] == pytest.approx([1.0, 0.5, 0.5])
    for _ in range(10 * RUNNING_MEAN_WINDOW):
        running_mean.add_value(0.9)
    assert running_mean.mean == pytest.approx(0.9, abs=1e-3)
    metrics = ServeMetrics()
    scores = [Score("love", 0.2, 0.0), Score("love", 0.4, 0.0, is_cut=True)]
    metrics.record_scores("love", "v1", scores, {"love": 0.1})
    text = metrics.to_prometheus_text().decode()
    assert 'rluf_scores_total{objective="love",version="v1"} 2.0' in text
    assert 'rluf_cut_scores_total{objective="love",version="v1"} 1.0' in text
    assert f'rluf_score_drift{{objective="love",version="v1"}} {0.30000000000000004 - 0.1}' in text


def make_timed_batcher(items_per_s: float, deadline_s: float, replica_count: int = 1) -> RequestBatcher[str]:
    async def run_batch(items: list[ScoringItem]) -> list[str]:
        await asyncio.sleep(len(items) / items_per_s)
        return [item.response for item in items]

    return RequestBatcher(
        run_batch, batch_tokens=160, max_item_tokens=100, max_queued_responses=1000, replica_count=replica_count,
        deadline_s=deadline_s,
    )  # fmt: skip


@dataclass(frozen=True)
class Overload:
    """Requests at four times the speed of the replicas: sizes in responses, lengths in characters, by turns."""

    sizes: tuple[int, ...] = (16,)
    lengths: tuple[int, ...] = (300,)
    tokens_per_s: float = 5000.0
    replica_count: int = 1
    max_replicas: int = 1
    slow_share: float = 1.0
    """Speed from the middle on, relative to the start."""


OVERLOADS = {
    "small requests": Overload(), "large requests": Overload((256,)), "one by one": Overload((1,), tokens_per_s=1000.0),
    "four replicas": Overload(replica_count=4, max_replicas=4), "sizes by turns": Overload((1, 256)),
    "lengths by turns": Overload(lengths=(15, 1500)), "a rare large request": Overload((1,) * 40 + (128,), (300, 1500)),
    "a slow model": Overload((4,), tokens_per_s=300.0), "a slow model, one by one": Overload((1,), tokens_per_s=250.0),
    "a slow model, many": Overload((64,), (60,), tokens_per_s=250.0), "a fast model": Overload(tokens_per_s=20_000.0),
    "replicas that are not up yet": Overload((4,), tokens_per_s=2000.0, max_replicas=4),
    "a model that becomes slow": Overload((4,), slow_share=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLOADS)
def test_under_fourfold_overload_nearly_all_work_is_answered_in_time(name: str) -> None:
    case, loop = OVERLOADS[name], VirtualTimeLoop()
    deadline_s, duration_s = 30.0, 200.0
    locks = [asyncio.Lock() for _ in range(case.replica_count)]
    tokens = {"timely": 0, "late": 0, "refused": 0, "possible": 0.0}

    def get_speed() -> float:
        return case.tokens_per_s * (1.0 if loop.time() < duration_s / 2 else case.slow_share)

    async def run_batch(items: list[ScoringItem]) -> list[str]:
        # A replica scores one batch at a time; a batch that is sent ahead waits for it.
        async with min(locks, key=lambda lock: (lock.locked(), len(lock._waiters or ()))):
            await asyncio.sleep(sum(estimate_tokens(item, 512) for item in items) / get_speed())
        return [""] * len(items)

    batcher = RequestBatcher(
        run_batch, batch_tokens=8192, max_item_tokens=512, max_queued_responses=1024, replica_count=case.max_replicas,
        deadline_s=deadline_s,
    )  # fmt: skip

    async def send_request(items: list[ScoringItem], token_count: int) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await batcher.submit(items)
            tokens["timely"] += token_count
        except TimeoutError:
            tokens["late"] += token_count
        except ApiError as error:
            assert error.status == 429 and 0 < (error.retry_after_s or 0) <= deadline_s
            tokens["refused"] += token_count

    async def overload() -> None:
        tasks, number = [], 0
        while loop.time() < duration_s:
            # Sizes and lengths of different periods, so that all pairs occur.
            item = make_item("x" * case.lengths[number // len(case.sizes) % len(case.lengths)])
            items = [item] * case.sizes[number % len(case.sizes)]
            token_count = len(items) * estimate_tokens(item, 512)
            tasks.append(asyncio.create_task(send_request(items, token_count)))
            interval_s, number = token_count / (4 * get_speed() * case.replica_count), number + 1
            tokens["possible"] += interval_s * get_speed() * case.replica_count
            await asyncio.sleep(interval_s)
        await asyncio.gather(*tasks)

    loop.run_until_complete(overload())
    loop.close()
    assert tokens["timely"] >= 0.9 * tokens["possible"], tokens
    # A model that becomes slow makes late what was accepted before.
    assert tokens["late"] <= (0.02 if case.slow_share == 1 else 0.25) * tokens["possible"], tokens
    assert tokens["refused"] > 2 * tokens["possible"]


@pytest.mark.parametrize("replica_count", [1, 4])
async def test_a_request_that_cannot_be_answered_in_time_is_refused_at_once(replica_count: int) -> None:
    batcher = make_timed_batcher(50.0, 2.0, replica_count)
    tasks = [asyncio.create_task(batcher.submit([make_item("x" * 20)] * 10)) for _ in range(200)]
    await asyncio.sleep(0.05)
    refused = [task for task in tasks if task.done() and isinstance(task.exception(), ApiError)]
    # 50 items a second and batch, two batches a replica, 80% of 2 s: 16 requests of 10 items; running ones count half.
    assert 7 * replica_count <= len(tasks) - len(refused) <= 22 * replica_count
    retry_after_s = max(error.retry_after_s for task in refused if isinstance(error := task.exception(), ApiError))
    assert retry_after_s <= 2000 / 50
    for task in tasks:
        task.cancel()


async def test_the_queue_is_reported_when_requests_come_and_when_they_start() -> None:
    sizes: list[int] = []
    gate = asyncio.Event()

    async def run_batch(items: list[ScoringItem]) -> list[str]:
        await gate.wait()
        return [""] * len(items)

    batcher = RequestBatcher(
        run_batch, batch_tokens=10, max_item_tokens=10, max_queued_responses=100, replica_count=1,
        on_queue_change=lambda: sizes.append(batcher.queued_items),
    )  # fmt: skip
    tasks = [asyncio.create_task(batcher.submit([make_item("x" * 30)])) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert max(sizes) == 4
    gate.set()
    await asyncio.gather(*tasks)
    assert sizes[-1] == 0
