"""Publishing: learner weights to every engine in vLLM's four phases, a version number on each, then a probe."""

from __future__ import annotations

import logging
from statistics import fmean
from typing import Any

from ray import ObjectRef

from actors.supervisor import Crew, everyone, within
from rluf.config.settings import Settings
from rluf.errors import SyncError
from rluf.types import Group

logger = logging.getLogger(__name__)

PROBE_SAMPLES = 2
"""Responses of the first batch whose logprobs are compared between learner and engine after each publish."""


class Publisher:
    """Sends weights and checks that they arrived."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        """Publish from `crew.learners` to `crew.rollouts`."""
        self.settings, self.crew = settings, crew
        self._probes: list[tuple[list[int], list[int]]] = []

    async def publish(self, version: int, group: ObjectRef[Group]) -> float:
        """Publish the learners' weights as `version`; returns the probe's mean absolute logprob difference (nats).

        The first call keeps samples of `group` as the probe. Raises StallError naming the phase past
        `publish.deadline_s`, SyncError when learner and engine disagree by more than `publish.probe_tolerance`.
        """
        seconds = self.settings.publish.deadline_s
        init: dict[str, Any] = {"engine": self.settings.publish.engine, "version": version}
        offers = await self._learners("begin_publish", seconds, init)
        await self._engines("begin_update", seconds, offers[0])
        while True:
            buckets = await self._learners("next_bucket", seconds)
            if buckets[0] is None:
                break
            await self._engines("update", seconds, buckets[0])
        await self._engines("finish_update", seconds, version)
        await self._learners("end_publish", seconds)
        return await self._probe(version, group)

    async def _learners(self, method: str, seconds: float, *args: object) -> list[Any]:
        calls = [(m, getattr(m.handle, method).remote(*args)) for m in self.crew.learners]
        return await everyone(calls, seconds, f"publish: {method}")

    async def _engines(self, method: str, seconds: float, *args: object) -> list[Any]:
        calls = [(m, getattr(m.handle, method).remote(*args)) for m in self.crew.rollouts]
        return await everyone(calls, seconds, f"publish: {method}")

    async def _probe(self, version: int, group: ObjectRef[Group]) -> float:
        if not self._probes:
            first: Group = await within(group, 60.0, "the object store")
            taken = first.samples[:PROBE_SAMPLES]
            self._probes = [(list(s.prompt_ids), list(s.response_ids)) for s in taken]
        seconds, worst = self.settings.publish.deadline_s, 0.0
        for prompt, response in self._probes:
            truth: list[float] = (await self._learners("logprobs", seconds, prompt, response))[0]
            for member, found in zip(
                self.crew.rollouts, await self._engines("logprobs", seconds, prompt, response), strict=True
            ):
                gap = fmean(abs(a - b) for a, b in zip(truth, found, strict=True))
                if not gap <= self.settings.publish.probe_tolerance:
                    raise SyncError(
                        f"{member} disagrees with the learner after publishing version {version}: mean |logprob "
                        f"difference| {gap:.4f} nats a token, publish.probe_tolerance is "
                        f"{self.settings.publish.probe_tolerance:g}; the engine holds wrong weights, or the tolerance "
                        "is too tight for this dtype"
                    )
                worst = max(worst, gap)
        return worst
