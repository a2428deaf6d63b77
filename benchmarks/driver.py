"""Where the driver saturates: its own scheduling code with simulated engines that answer after a delay.

WorkBuffer admits prompts, ActorCalls sends each group to the least busy of N engines and then to three reward pools,
all in one event loop, as in a run. Only the actors are simulated: a call is answered after a random delay, without Ray.

The clock of the event loop is the CPU time of this process plus the time that it would have waited idle, so a result is
that of a machine whose core belongs to the driver, whatever else runs here, and waiting takes no time. Measured are
calls per second of that clock and of the driver's CPU time (the most that one driver can do), the delay from a
simulated answer until the driver acts on it (in milliseconds), and the memory of the driver after the first groups have
been replaced, in the middle, and at the end. The last line is JSON.

Usage: python benchmarks/driver.py [--engines 1024] [--groups-in-flight 10000] [--steps 40] [--call-s 20]
       python benchmarks/driver.py --groups-in-flight 100 --steps 10000       # memory over many steps
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import selectors
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rluf.tracking.timeline import RunTimeline
from rluf.train.actor_calls import ActorCalls, ActorGroups, ActorRef, ActorRestarter, RestartBudget
from rluf.train.work_buffer import (
    CountingIterator,
    ScoredGroup,
    WorkBuffer,
    compute_admission_capacity,
    iter_prompt_order,
)
from rluf.types import GroupInfo, Prompt
from rluf.utils.event_loop import collect_garbage_rarely

OBJECTIVES = ("love", "helpfulness", "safety")
MAX_DELAYS = 200_000
"""Delays of the last calls that are stored, so that their list does not grow over many steps."""


class IdleSkippingSelector(selectors.SelectSelector):
    """Reports that the time to wait has passed, instead of waiting; `skipped_s` is the sum of these times."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Events that are there now."""
        events = super().select(0)
        if not events and timeout is not None and timeout > 0:
            self.skipped_s += timeout
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock runs while this process computes and jumps where it would wait."""

    def __init__(self) -> None:
        self._idle_selector = IdleSkippingSelector()
        super().__init__(self._idle_selector)

    def time(self) -> float:
        """CPU seconds of this process, and the seconds of waiting that were skipped."""
        return time.process_time() + self._idle_selector.skipped_s


class SimulatedMethod:
    """A remote method that is answered after a delay; `delays` collects how late the driver acts on answers."""

    def __init__(self, mean_s: float, delays: list[float]) -> None:
        self._mean_s, self._delays = mean_s, delays

    def options(self, **_: object) -> SimulatedMethod:
        """Ray's options have no effect here."""
        return self

    def remote(self, *_: object) -> Any:
        """An awaitable that completes after the delay; a pair where Ray would return two references."""
        answer_s = self._mean_s * random.uniform(0.5, 1.5)
        loop = asyncio.get_running_loop()
        answer_time = loop.time() + answer_s

        async def wait() -> None:
            await asyncio.sleep(answer_s)
            self._delays.append(loop.time() - answer_time)

        return wait()


def read_memory_mib() -> float:
    """Resident memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) / 1024


async def simulate(engines: int, groups_in_flight: int, steps: int, call_s: float) -> dict[str, Any]:
    """Figures of `steps` steps of one batch each, a tenth of the groups in flight."""
    delays: list[float] = []

    def make_pool(role: str, count: int, mean_s: float) -> list[ActorRef]:
        handle: Any = SimpleNamespace(call=SimulatedMethod(mean_s, delays))
        return [ActorRef(role, index, handle) for index in range(count)]

    rollout_pool = make_pool("rollout", engines, call_s)
    reward_pools = {name: make_pool(f"{name} reward", max(1, engines // 8), call_s / 10) for name in OBJECTIVES}
    supervisor: Any = SimpleNamespace(
        settings=SimpleNamespace(weight_sync=SimpleNamespace(transport="shm")),
        actor_groups=ActorGroups(rollout_pool, reward_pools),
        on_loss=None,
    )

    async def sync_engine(_: ActorRef) -> None:
        """No engine is lost."""

    calls = ActorCalls(ActorRestarter(supervisor, RestartBudget(3), sync_engine), RunTimeline())
    call_count = 0

    async def call(pool: list[ActorRef], prompt_id: str) -> None:
        nonlocal call_count
        await calls.call(pool, "call", timeout_s=600, task_name="t", activity="a", prompt_id=prompt_id, work_units=8)
        call_count += 1

    async def run_group(prompt: Prompt, seed: int) -> ScoredGroup:
        await call(rollout_pool, prompt.id)
        await asyncio.gather(*(call(pool, prompt.id) for pool in reward_pools.values()))
        return ScoredGroup(cast(Any, None), cast(GroupInfo, SimpleNamespace(prompt_id=prompt.id)), {})

    batch_groups = max(1, groups_in_flight // 10)
    prompts = [Prompt(str(index), (), (), "", "train") for index in range(2 * groups_in_flight)]
    version, start_cpu_s = 0, 0.0

    def compute_capacity(running_groups: int, accepted_groups: int) -> int:
        return compute_admission_capacity(
            concurrency=groups_in_flight, running_groups=running_groups, accepted_groups=accepted_groups,
            max_staleness=20, weight_version=version, groups_per_step=batch_groups,
        )  # fmt: skip

    buffer = WorkBuffer(
        prompts, CountingIterator(iter_prompt_order([1] * len(prompts), 1)), seed=1, group_limit=batch_groups * steps,
        run_group=run_group, admission_capacity=compute_capacity,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    start_time, memory_mib, start_calls = loop.time(), list[float](), 0
    for version in range(steps):
        buffer.admit_prompts()
        batch = await buffer.collect_batch(version, batch_groups, accept_group=lambda _: True, timeout_s=3600)
        buffer.mark_trained(batch)
        if version == min(12, steps // 2):  # the first groups have all been replaced
            start_time, start_calls, start_cpu_s = loop.time(), call_count, time.process_time()
            delays.clear()
        if version in (min(12, steps // 2), steps // 2, steps - 1):
            memory_mib.append(read_memory_mib())
        del delays[:-MAX_DELAYS]
    delays.sort()
    return {
        "engines": engines, "groups_in_flight": groups_in_flight, "steps": steps, "call_s": call_s,
        "calls_per_s": round((call_count - start_calls) / (loop.time() - start_time), 1),
        "calls_per_cpu_s": round((call_count - start_calls) / (time.process_time() - start_cpu_s), 1),
        "delay_p50_ms": round(1e3 * delays[len(delays) // 2], 2),
        "delay_p99_ms": round(1e3 * delays[len(delays) * 99 // 100], 2),
        "delay_max_ms": round(1e3 * delays[-1], 2),
        "memory_mib": [round(mib, 1) for mib in memory_mib],
    }  # fmt: skip


def main() -> None:
    """Simulate and write the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1024)
    parser.add_argument("--groups-in-flight", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--call-s", type=float, default=20.0, help="mean seconds of a simulated generation")
    args = parser.parse_args()
    with collect_garbage_rarely(), asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        figures = runner.run(simulate(args.engines, args.groups_in_flight, args.steps, args.call_s))
    sys.stdout.write(json.dumps({"benchmark": "driver", **figures}) + "\n")


if __name__ == "__main__":
    main()
