"""Weight sync: learner weights to every engine, with a version number, then a comparison of log-probabilities."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rluf.algorithms.sync_check import ProbeLogprobs, find_sync_problem
from rluf.errors import WeightSyncError
from rluf.train.actor_calls import ActorGroups, fetch_group, gather_calls, switch_gpu_phase

if TYPE_CHECKING:
    from ray import ObjectRef

    from rluf.config.settings import Settings
    from rluf.train.actor_calls import ActorCalls, ActorRef
    from rluf.types import Group

T = TypeVar("T")
CPU_PROBE_TOKENS, GPU_PROBE_TOKENS = 24, 256
"""Response tokens compared between learner and engine after each sync. benchmarks/probe.py finds every planted fault
with 24. On GPUs, where they cost nothing, more tokens average the larger and more uneven noise of their kernels."""
MIN_PROBE_RESPONSES = 2
"""Responses that they come from, where there are as many: one alone cannot show samples that affect each other."""
CPU_PROBE_PROMPT_HEAD, CPU_PROBE_PROMPT_TAIL = 32, 96
"""Tokens of a longer prompt that the probe reads on CPUs. Any tokens show wrong weights, and reading a chat of 1,024
tokens on both sides took an eighth of a step. The head has the tokens at the start that models attend to."""

logger = logging.getLogger(__name__)


def shorten_probe_prompt(token_ids: list[int]) -> list[int]:
    """The head and the tail of a prompt that is longer than both."""
    if len(token_ids) <= CPU_PROBE_PROMPT_HEAD + CPU_PROBE_PROMPT_TAIL:
        return token_ids
    return token_ids[:CPU_PROBE_PROMPT_HEAD] + token_ids[-CPU_PROBE_PROMPT_TAIL:]


class WeightSync:
    """Transfers weights from the learners to the engines and verifies that they arrived."""

    def __init__(self, settings: Settings, actor_groups: ActorGroups, calls: ActorCalls | None = None) -> None:
        """Sync from the learners to the engines of `actor_groups`.

        With `calls`, a sync during which an engine is lost starts again with the engines that are left; the replacement
        is brought up to date by `sync_new_engine`. Without it the loss is raised.
        """
        self._settings, self._actor_groups, self._calls = settings, actor_groups, calls
        self._probe_prompt_ids: list[int] = []
        self._probe_responses: list[list[int]] = []
        self._probe_logprobs: dict[str, ProbeLogprobs] = {}
        self._worst_gap = 0.0
        self._version = 0

    async def prepare_probe(self, group_ref: ObjectRef[Group]) -> None:
        """Before the first update: store responses of a group as the probe and read their log-probabilities.

        Engines whose log-probabilities were not read yet, as after a resume, are read now; weights must be in sync.
        Raises WeightSyncError when an engine differs by more than the tolerance.
        """
        await self._retry_on_loss(lambda: self._prepare_probe_once(group_ref))

    async def _prepare_probe_once(self, group_ref: ObjectRef[Group]) -> None:
        if not self._probe_responses:
            group: Group = await fetch_group(group_ref)
            self._probe_prompt_ids = list(group.prompt.token_ids)
            if not self._settings.policy_gpus:
                self._probe_prompt_ids = shorten_probe_prompt(self._probe_prompt_ids)
            tokens_left = GPU_PROBE_TOKENS if self._settings.policy_gpus else CPU_PROBE_TOKENS
            max_tokens = tokens_left // min(MIN_PROBE_RESPONSES, len(group.samples))
            for sample in group.samples:
                response = list(sample.response_ids[: min(tokens_left, max_tokens)])
                self._probe_responses += [response] if response else []
                tokens_left -= len(response)
        if any(str(engine) not in self._probe_logprobs for engine in self._actor_groups.rollout_actors):
            readings = await self._read_probe_logprobs()
            self._check_equal_weights(readings)
            self._record_probe(readings)

    def _check_equal_weights(self, readings: Mapping[str, ProbeLogprobs]) -> None:
        """Raise WeightSyncError if an engine that loaded the learner's weights itself reads them differently."""
        tolerance = self._settings.weight_sync.logprob_tolerance
        for engine_name, reading in readings.items():
            # Negated, so that a NaN gap fails too.
            if not reading.mean_gap <= tolerance:
                raise WeightSyncError(
                    f"{engine_name} and the learner read the same weights differently: "
                    f"mean |logprob difference| is {reading.mean_gap:.4f} nats per token, above "
                    f"weight_sync.logprob_tolerance={tolerance:g}; model.path lacks weights, or vLLM and "
                    "transformers compute this architecture differently: run python -m rluf.train --check"
                )

    async def sync(self, version: int) -> dict[str, float]:
        """Transfer the learners' weights as `version` and verify them, after `prepare_probe`.

        Returns `sync_logprob_gap`, the mean absolute log-probability difference in nats per token, and `sync_check_s`,
        the seconds the check took. Raises DeadlineError naming the phase that exceeded timeouts.call_s,
        WeightSyncError naming an engine whose weights are wrong (rluf.algorithms.sync_check).
        """

        async def transfer_and_verify() -> dict[str, float]:
            await self.transfer(version)
            start_time = time.monotonic()
            gap = await self._verify_logprobs(version)
            return {"sync_logprob_gap": gap, "sync_check_s": time.monotonic() - start_time}

        return await self._retry_on_loss(transfer_and_verify)

    async def transfer(self, version: int) -> None:
        """Send the weights in vLLM's four phases, without the check."""
        self._version = version
        # Without a member, the others wait in NCCL's broadcast until timeouts.call_s: the loss must end the attempt.
        self._actor_groups.in_collective_sync = self._is_collective
        await switch_gpu_phase(self._settings, self._actor_groups, "sync")
        # Rank 0's replies describe the transfer and each bucket; the other ranks only take part in gathering.
        engine_indices = {str(engine): engine.index for engine in self._actor_groups.rollout_actors}
        transfer_info = await self._call_learners("begin_weight_sync", version, engine_indices)
        await self._call_engines("begin_weight_update", transfer_info[0])
        while (buckets := await self._call_learners("send_next_weight_bucket"))[0] is not None:
            await self._call_engines("load_weight_bucket", buckets[0])
        await self._call_engines("finish_weight_update", version)
        await self._call_learners("end_weight_sync")
        self._actor_groups.in_collective_sync = False

    async def sync_new_engine(self, engine: ActorRef, version: int, *, needs_weights: bool) -> None:
        """Bring a restarted engine to the learners' weights, which are `version`, if it `needs_weights`; verify it."""
        actor_groups = ActorGroups(rollout_actors=[engine], learner_actors=self._actor_groups.learner_actors)
        # One engine alone and no retry: if it dies again, its restart task fails and the budget decides.
        engine_sync = WeightSync(self._settings, actor_groups)
        engine_sync.restore(self.get_state())
        if self._probe_responses:
            engine_sync._probe_logprobs = await engine_sync._read_probe_logprobs()
            if not needs_weights:
                self._check_equal_weights(engine_sync._probe_logprobs)
            # The jump test needs some gap to compare with. That of an engine with older weights includes more than
            # rounding, so it counts only where no other gap is known.
            gaps = (reading.mean_gap for reading in engine_sync._probe_logprobs.values())
            engine_sync._worst_gap = engine_sync._worst_gap or max(gaps)
        if needs_weights:
            await engine_sync.sync(version)
        self._record_probe(engine_sync._probe_logprobs)

    def get_state(self) -> dict[str, Any]:
        """Probe and largest gap so far, as plain JSON."""
        return {
            "probe_prompt_ids": self._probe_prompt_ids,
            "probe_responses": self._probe_responses,
            "worst_gap": self._worst_gap,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; log-probabilities are not in it, `prepare_probe` reads them again."""
        self._probe_prompt_ids = list(state["probe_prompt_ids"])
        self._probe_responses = [list(response) for response in state["probe_responses"]]
        self._worst_gap = float(state["worst_gap"])

    async def _retry_on_loss(self, operation: Callable[[], Awaitable[T]]) -> T:
        if self._calls is None:
            return await operation()
        # No wait for replacements: during a sync the weight lock keeps them out of the pool, so they would never come.
        return await self._calls.retry_on_loss(operation, wait_until_healthy=False)

    async def _verify_logprobs(self, version: int) -> float:
        """The largest gap between the learner and an engine. Raises WeightSyncError naming an engine that is wrong."""
        if not self._actor_groups.rollout_actors:
            return 0.0  # all engines are being restarted; each is verified before it joins the pool
        readings = await self._read_probe_logprobs()
        if problem := self._find_problem(readings):
            # One unlucky batch of kernels must not end a run: wrong weights are wrong in a second reading too.
            logger.warning("weight sync %d: %s; reading the probe again", version, problem)
            readings = await self._read_probe_logprobs()
            if problem := self._find_problem(readings):
                raise WeightSyncError(f"{problem}, twice after sync {version}")
        self._record_probe(readings)
        return max(reading.mean_gap for reading in readings.values())

    def _find_problem(self, readings: Mapping[str, ProbeLogprobs]) -> str | None:
        """What is wrong with the first engine that disagrees with the learner; None if none does."""
        tolerance = self._settings.weight_sync.logprob_tolerance
        for engine_name, reading in readings.items():
            if problem := find_sync_problem(self._probe_logprobs[engine_name], reading, self._worst_gap, tolerance):
                return f"{engine_name} disagrees with the learner: {problem}"
        return None

    def _record_probe(self, readings: Mapping[str, ProbeLogprobs]) -> None:
        """Store the latest log-probabilities by engine, and the largest gap of all."""
        self._probe_logprobs |= readings
        self._worst_gap = max([self._worst_gap, *(reading.mean_gap for reading in readings.values())])

    async def _read_probe_logprobs(self) -> dict[str, ProbeLogprobs]:
        """Log-probabilities of the probe by the learner and by each engine; in turn where they share GPUs."""
        settings, actor_groups = self._settings, self._actor_groups
        if not settings.is_colocated:
            learner_rows, engine_rows = await asyncio.gather(
                self._compute_learner_logprobs(), self._compute_engine_logprobs()
            )
        elif actor_groups.phase == "generate":
            # Start with the side that is on the GPUs now: one phase switch instead of two.
            engine_rows = await self._compute_engine_logprobs()
            await switch_gpu_phase(settings, actor_groups, "learn")
            learner_rows = await self._compute_learner_logprobs()
        else:
            learner_rows = await self._compute_learner_logprobs()
            await switch_gpu_phase(settings, actor_groups, "generate")
            engine_rows = await self._compute_engine_logprobs()
        learner_logprobs = tuple(logprob for row in learner_rows[0] for logprob in row)
        return {
            str(engine): ProbeLogprobs(learner_logprobs, tuple(logprob for rows in engine_rows for logprob in rows[i]))
            for i, engine in enumerate(actor_groups.rollout_actors)
        }

    async def _compute_learner_logprobs(self) -> list[Any]:
        """Each rank's log-probabilities [responses][tokens]."""
        return await self._call_learners("probe_logprobs", self._probe_prompt_ids, self._probe_responses)

    async def _compute_engine_logprobs(self) -> list[list[Any]]:
        """The engines' log-probabilities [responses][engines][tokens]."""
        prompt_ids, responses = self._probe_prompt_ids, self._probe_responses
        calls = (self._call_engines("probe_logprobs", prompt_ids, response) for response in responses)
        return list(await asyncio.gather(*calls))

    @property
    def _is_collective(self) -> bool:
        return self._settings.weight_sync.transport == "nccl"

    async def _call_learners(self, method: str, *args: object) -> list[Any]:
        return await self._call_actors(self._actor_groups.learner_actors, method, *args)

    async def _call_engines(self, method: str, *args: object) -> list[Any]:
        # Wait for every engine before a loss is raised: no call may be outstanding when phase 1 begins again. In a
        # broadcast there is no beginning again, and the other engines may wait for the lost one forever.
        wait_for_all = not self._actor_groups.in_collective_sync
        return await self._call_actors(self._actor_groups.rollout_actors, method, *args, wait_for_all=wait_for_all)

    async def _call_actors(
        self, actors: list[ActorRef], method: str, *args: object, wait_for_all: bool = False
    ) -> list[Any]:
        """Call `method` on all actors; Ray's dashboard and timeline show each call with its actor and version."""
        calls = []
        for actor in actors:
            named_method = getattr(actor.handle, method).options(name=f"{actor}: {method} v{self._version}")
            calls.append((actor, named_method.remote(*args)))
        return await gather_calls(
            calls, self._settings.timeouts.call_s, f"weight sync: {method}", wait_for_all=wait_for_all
        )
