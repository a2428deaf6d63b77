"""Prompts on their way through a step: admission, running groups, prompts in flight with their seeds, scored groups."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rluf.errors import DeadlineError
from rluf.objectives.aggregator import GroupScores, compute_overlong_penalties, compute_signal
from rluf.train.prompts import list_prompt_ids

if TYPE_CHECKING:
    from ray import ObjectRef

    from rluf.types import Group, GroupInfo, Prompt, Score

ADMISSION_SEED_STRIDE = 1000
"""Distance of the seeds of consecutive groups. Sample seeds are hashes of group seed, prompt and index, so 1 would do
too, but another stride would change the samples of every seeded run."""


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group as the driver sees it: reference to its samples, their lengths, and each objective's scores [samples]."""

    group_ref: ObjectRef[Group]
    info: GroupInfo
    scores: Mapping[str, tuple[Score, ...]]
    admission_index: int = 0
    """Position in the order of admission, which tells groups of one prompt apart."""

    def build_group_scores(
        self,
        uncertainty_penalty: float,
        *,
        penalize_truncated: bool = False,
        max_tokens: int = 0,
        overlong_buffer: int = 0,
    ) -> GroupScores:
        """The aggregator's view of this group; `uncertainty_penalty` see rluf.objectives.aggregator.compute_signal.

        With an `overlong_buffer`, responses that come closer than it to `max_tokens` have a penalty.
        """
        signals = {
            name: [compute_signal(s, uncertainty_penalty) for s in scores] for name, scores in self.scores.items()
        }
        finished = self.info.finished if penalize_truncated else ()
        penalties = compute_overlong_penalties(self.info.response_token_counts, max_tokens, overlong_buffer)
        plain_objectives = [name for name, scores in self.scores.items() if not all(s.is_probability for s in scores)]
        return GroupScores(
            self.info.prompt_id,
            self.info.topic,
            signals,
            self.info.passed_judges,
            finished,
            penalties,
            plain_objectives,
        )


class CountingIterator:
    """An endless iterator that counts the items taken from it, so that a checkpoint can store its position."""

    def __init__(self, source: Iterator[int]) -> None:
        """Wrap `source`."""
        self.count = 0
        self._source = source

    def __iter__(self) -> CountingIterator:
        """Return itself."""
        return self

    def __next__(self) -> int:
        """Return the next item."""
        self.count += 1
        return next(self._source)

    def skip(self, count: int) -> None:
        """Advance by `count` items."""
        for _ in range(count):
            next(self)


def iter_prompt_order(repeats: Sequence[int], seed: int) -> Iterator[int]:
    """Endless order of prompt indices: each pass is a new shuffle from `seed` with prompt i repeats[i] times."""
    for epoch in itertools.count():
        order = [index for index, repeat_count in enumerate(repeats) for _ in range(repeat_count)]
        # A generator per pass: the order of a pass does not depend on what was shuffled for earlier passes.
        random.Random(f"{seed}-{epoch}").shuffle(order)
        yield from order


def compute_admission_capacity(
    *,
    concurrency: int,
    running_groups: int,
    accepted_groups: int,
    weight_version: int,
    groups_per_step: int,
    max_staleness: int,
) -> int:
    """Groups that may start now: min(concurrency - running, (staleness + version + 1) * batch - (accepted + running)).

    `concurrency` is the number of groups the engines run at once, `running_groups` those being generated or scored,
    `accepted_groups` those finished since the run began, `weight_version` the optimizer steps done, `groups_per_step`
    the groups of a step. Never negative. Source: AReaL, arXiv 2505.24298, section 5.1.
    """
    free_slots = concurrency - running_groups
    # A group that starts now is trained on at version (accepted + running) // batch; this bound keeps that within
    # max_staleness versions of now. With 0 nothing of the next batch starts before this version exists (synchronous).
    allowed_by_staleness = (max_staleness + weight_version + 1) * groups_per_step - (accepted_groups + running_groups)
    return max(0, min(free_slots, allowed_by_staleness))


class WorkBuffer:
    """Admits prompts, runs them as tasks, and hands out scored groups.

    Each admitted prompt has an admission index and a seed, and is in flight from its admission until its group is
    trained on or dropped. A checkpoint lists the prompts in flight: a resumed run sends them again with their own
    seeds, so that no sample is lost or counted twice.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_cursor: CountingIterator,
        *,
        seed: int,
        group_limit: int,
        run_group: Callable[[Prompt, int], Awaitable[ScoredGroup]],
        admission_capacity: Callable[[int, int], int],
    ) -> None:
        """Admit `prompts` in the order of `prompt_cursor`, at most `group_limit` accepted groups in the whole run.

        `run_group` samples and scores a prompt with a seed. `admission_capacity` gives the number of groups that may
        start now, from the numbers of running and of accepted groups.
        """
        self.prompt_cursor = prompt_cursor
        self.accepted_count = 0
        """Groups that were scored and not dropped since the run began, those still in the queue included."""
        self.dropped_count = 0
        """Groups dropped since the last call of `collect_batch` began."""
        self._prompts, self._seed, self._group_limit = prompts, seed, group_limit
        self._run_group, self._admission_capacity = run_group, admission_capacity
        self._index_by_prompt_id = {prompt_id: index for index, prompt_id in enumerate(list_prompt_ids(prompts))}
        self._admitted_count = 0
        self._running_tasks: set[asyncio.Task[None]] = set()
        self._scored_groups: asyncio.Queue[ScoredGroup | None] = asyncio.Queue()
        self._failed_task: asyncio.Task[None] | None = None
        self._in_flight: dict[int, tuple[str, int]] = {}
        self._to_resend: dict[int, tuple[str, int]] = {}

    def get_state(self) -> dict[str, Any]:
        """Position in the prompt order, and prompts in flight as [admission index, prompt id, seed], as plain JSON."""
        in_flight = self._to_resend | self._in_flight
        return {
            "prompt_cursor": self.prompt_cursor.count,
            "in_flight": [[admission_index, *sent] for admission_index, sent in in_flight.items()],
        }

    def restore(self, state: Mapping[str, Any], accepted_count: int) -> None:
        """Restore `state`, taken when `accepted_count` groups had been trained on; prompts in flight are sent again."""
        self.prompt_cursor.skip(int(state["prompt_cursor"]))
        self._to_resend = {int(index): (str(prompt_id), int(seed)) for index, prompt_id, seed in state["in_flight"]}
        # One prompt is taken from the cursor per admission, and the indices in flight are below this count.
        self._admitted_count = self.prompt_cursor.count
        self.accepted_count = accepted_count

    def admit_prompts(self) -> None:
        """Start groups: first those in flight at the checkpoint, then new ones while the staleness rule leaves room."""
        to_resend, self._to_resend = self._to_resend, {}
        for admission_index, (prompt_id, seed) in to_resend.items():
            self._start_group(self._prompts[self._index_by_prompt_id[prompt_id]], seed, admission_index)
        running_count = len(self._running_tasks)
        capacity = self._admission_capacity(running_count, self.accepted_count)
        for _ in range(min(capacity, self._group_limit - self.accepted_count - running_count)):
            prompt = self._prompts[next(self.prompt_cursor)]
            # The seed depends on the admission index, not on time: a prompt sent again reproduces its samples.
            self._start_group(prompt, self._seed + ADMISSION_SEED_STRIDE * self._admitted_count, self._admitted_count)
            self._admitted_count += 1

    def _start_group(self, prompt: Prompt, seed: int, admission_index: int) -> None:
        # Recorded here rather than in the task, which starts later: a checkpoint in between would lose the prompt.
        self._in_flight[admission_index] = (prompt.id, seed)
        task = asyncio.create_task(self._run_and_queue(prompt, seed, admission_index))
        self._running_tasks.add(task)
        task.add_done_callback(self._record_failure)

    def _record_failure(self, task: asyncio.Task[None]) -> None:
        """Wake `collect_batch` for a failed task, so that it need not wait for thousands of tasks one by one."""
        if not task.cancelled() and task.exception() is not None:
            self._failed_task = self._failed_task or task
            self._scored_groups.put_nowait(None)

    async def _run_and_queue(self, prompt: Prompt, seed: int, admission_index: int) -> None:
        scored_group = replace(await self._run_group(prompt, seed), admission_index=admission_index)
        self.accepted_count += 1
        # Only a task that succeeds leaves the set: `collect_batch` finds failed ones there and raises their error.
        self._running_tasks.discard(asyncio.current_task())
        await self._scored_groups.put(scored_group)
        self.admit_prompts()

    async def collect_batch(
        self, step: int, group_count: int, *, accept_group: Callable[[ScoredGroup], bool], timeout_s: float
    ) -> list[ScoredGroup]:
        """Wait for `group_count` scored groups that `accept_group` accepts; the others are dropped and replaced.

        A failed rollout or scoring call ends the wait with its error. Raises DeadlineError when nothing finishes for
        `timeout_s` seconds.
        """
        batch: list[ScoredGroup] = []
        self.dropped_count = 0
        self.admit_prompts()
        while len(batch) < group_count:
            try:
                scored_group = await asyncio.wait_for(self._scored_groups.get(), timeout_s)
            except TimeoutError:
                raise DeadlineError(
                    f"waited {timeout_s:g} s for a group of step {step}: {len(batch)} of {group_count} are complete, "
                    f"{len(self._running_tasks)} in flight; check the rollout and reward actors' logs in the Ray "
                    "dashboard, or raise timeouts.call_s"
                ) from None
            if self._failed_task is not None:
                self._failed_task.result()
            if scored_group is None:
                continue
            if accept_group(scored_group):
                batch.append(scored_group)
            else:
                del self._in_flight[scored_group.admission_index]
                self.accepted_count -= 1
                self.dropped_count += 1
                self.admit_prompts()
        # Order of arrival depends on timing; a fixed order makes packing, and so the loss, reproducible.
        return sorted(batch, key=lambda group: (group.info.prompt_id, group.admission_index))

    def mark_trained(self, batch: Sequence[ScoredGroup]) -> None:
        """Remove the groups of a finished update from the prompts in flight."""
        for scored_group in batch:
            del self._in_flight[scored_group.admission_index]

    async def close(self) -> None:
        """Cancel the running groups."""
        for task in self._running_tasks:
            task.cancel()
        await asyncio.gather(*self._running_tasks, return_exceptions=True)
