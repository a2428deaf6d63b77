"""Tokens, rates, hashed users, batches by tokens, and the running mean behind the drift figure."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.reward.text import Item
from rluf.serve.batching import IN_VAIN, LINGER, Batcher, Round, estimated_tokens
from rluf.serve.limits import ApiError, RateLimit, authorised, hashed_user, token_digest
from rluf.serve.metrics import WINDOW, RunningMean, ServeMetrics


def item(text: str) -> Item:
    return [{"role": "user", "content": "?"}], text


@pytest.mark.parametrize(
    ("header", "let_in"),
    [("Bearer secret", True), ("bearer secret", True), ("Bearer other", False), ("secret", False), (None, False)],
)
def test_only_the_token_opens(header: str | None, let_in: bool) -> None:
    assert authorised(header, token_digest("secret")) is let_in
    assert authorised(header, None)


def test_users_are_hashed_with_the_salt() -> None:
    assert hashed_user("ann", "s") == hashed_user("ann", "s")
    assert len({hashed_user("ann", "s"), hashed_user("ann", "t"), hashed_user("bob", "s")}) == 3
    assert "ann" not in hashed_user("ann", "s")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ApiError(429, "busy", "wait", 2.4)))
    assert error.body == {"error": {"message": "wait", "type": "busy", "code": 429}}
    assert error.headers == {"Retry-After": "3"}


def test_a_client_gets_its_rate_and_two_seconds_at_once() -> None:
    now = [0.0]
    limit = RateLimit(5, lambda: now[0])
    assert [limit.take("a") for _ in range(10)] == [0.0] * 10
    assert limit.take("a") == pytest.approx(0.2)
    assert limit.take("b") == 0.0
    now[0] = 1.0
    assert [limit.take("a") > 0 for _ in range(6)] == [False] * 5 + [True]


@given(st.lists(st.tuples(st.text(max_size=400), st.integers(1, 4)), min_size=1, max_size=20), st.integers(1, 400))
def test_each_request_gets_its_own_results_and_batches_keep_the_budget(
    requests: list[tuple[str, int]], budget: int
) -> None:
    rounds: list[Round] = []

    async def run(items: list[Item]) -> list[str]:
        await asyncio.sleep(0)
        return [response.upper() for _, response in items]

    async def ask() -> list[list[str]]:
        batcher = Batcher(run, batch_tokens=budget, longest=100, max_waiting=1000, replicas=1, on_round=rounds.append)
        return await asyncio.gather(*(batcher.submit([item(text)] * count) for text, count in requests))

    found = asyncio.run(ask())
    assert found == [[text.upper()] * count for text, count in requests]
    assert sum(done.items for done in rounds) == sum(count for _, count in requests)
    largest = max(count * estimated_tokens(item(text), 100) for text, count in requests)
    assert all(done.tokens <= max(budget, largest) for done in rounds)


async def test_what_arrives_while_busy_is_scored_together_and_too_much_is_refused() -> None:
    sizes: list[int] = []
    gate = asyncio.Event()

    async def run(items: list[Item]) -> list[int]:
        sizes.append(len(items))
        await gate.wait()
        return [0] * len(items)

    batcher = Batcher(run, batch_tokens=10_000, longest=100, max_waiting=8, replicas=1)
    first = asyncio.create_task(batcher.submit([item("a")]))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(batcher.submit([item("b")])) for _ in range(8)]
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError, match="max_waiting=8") as refused:
        await batcher.submit([item("c")])
    assert refused.value.status == 429
    assert int(refused.value.headers["Retry-After"]) >= 1
    others[0].cancel()
    gate.set()
    await asyncio.gather(first, *others, return_exceptions=True)
    assert sizes == [1, 7]
    assert batcher.waiting == 0


def batches(seconds: float) -> tuple[list[int], Batcher[int]]:
    """Sizes of the batches so far, and a batcher whose batches take `seconds`."""
    sizes: list[int] = []

    async def run(items: list[Item]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(seconds)
        return [0] * len(items)

    return sizes, Batcher(run, batch_tokens=10_000, longest=100, max_waiting=100, replicas=1)


async def test_callers_that_ask_again_when_they_are_answered_share_a_batch() -> None:
    sizes, batcher = batches(0.06)

    async def caller() -> None:
        for _ in range(6):
            await batcher.submit([item("again")])
            await asyncio.sleep(0.002)  # an answer's way to its caller and the next request's way back

    first = asyncio.create_task(caller())
    await asyncio.sleep(0.01)
    await asyncio.gather(first, *(caller() for _ in range(3)))
    assert sizes[2:] == [4, 4, 4, 4, 3]


async def test_a_batch_that_waited_in_vain_keeps_the_next_ones_from_waiting() -> None:
    sizes, batcher = batches(0.06)
    await asyncio.gather(*(batcher.submit([item("once")]) for _ in range(4)))
    clock = asyncio.get_running_loop().time
    waits = []
    for _ in range(3):
        began = clock()
        await asyncio.gather(batcher.submit([item("a")]), batcher.submit([item("b")]))
        waits.append(clock() - began)
        batcher._expected = 4  # as if two more had been answered
    assert sizes == [4, 2, 2, 2]
    assert waits[0] >= 0.06 + 0.9 * LINGER * 0.06
    assert batcher._without == IN_VAIN - 2


@pytest.mark.parametrize(("seconds", "second", "at_once"), [(0.005, 1, 2), (0.06, 1, 1), (0.06, 7, 2)])
async def test_brief_or_large_batches_have_the_next_one_at_hand(seconds: float, second: int, at_once: int) -> None:
    sizes, batcher = batches(seconds)
    await batcher.submit([item("first")])
    running = asyncio.create_task(batcher.submit([item("a")]))
    await asyncio.sleep(0.002)
    others = [asyncio.create_task(batcher.submit([item("b" * 400)])) for _ in range(second)]  # 100 tokens each
    await asyncio.sleep(0.001)
    assert len(sizes) - 1 == at_once
    await asyncio.gather(running, *others)


async def test_a_failed_batch_fails_its_requests_and_the_next_one_runs() -> None:
    async def run(items: list[Item]) -> list[int]:
        if items[0][1] == "bad":
            raise OSError("broken")
        return [1] * len(items)

    batcher = Batcher(run, batch_tokens=8, longest=100, max_waiting=100, replicas=1)
    bad, good = await asyncio.gather(
        batcher.submit([item("bad")]), batcher.submit([item("good")]), return_exceptions=True
    )
    assert isinstance(bad, OSError)
    assert good == [1]


def test_the_running_mean_follows_a_change_and_drift_is_its_distance_from_the_card() -> None:
    mean = RunningMean()
    assert [mean.add(value) for value in (1.0, 0.0, 0.5)] == pytest.approx([1.0, 0.5, 0.5])
    for _ in range(10 * WINDOW):
        mean.add(0.9)
    assert mean.mean == pytest.approx(0.9, abs=1e-3)
    metrics = ServeMetrics()
    metrics.scored("love", "v1", [0.2, 0.4], {"love": 0.1})
    text = metrics.text().decode()
    assert 'rluf_scores_total{objective="love",version="v1"} 2.0' in text
    assert f'rluf_score_drift{{objective="love",version="v1"}} {0.30000000000000004 - 0.1}' in text
