"""Publishing: learner weights to every engine in vLLM's four phases, a version number on each, then a probe."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray import ObjectRef

from rluf.algorithms.sync_check import Reading, sync_problem
from rluf.backends.colocation import shares_gpus
from rluf.config.settings import Settings
from rluf.errors import SyncError
from rluf.train.actor_groups import Crew, Member, everyone, within
from rluf.train.gpu_phases import turn
from rluf.types import Group

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
"""Response tokens of the first batch, of as few responses as hold them, whose logprobs are compared between learner and
engine after each publish: as many as benchmarks/probe.py finds every fault with."""


class Publisher:
    """Sends weights and checks that they arrived."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        """Publish from `crew.learners` to `crew.rollouts`."""
        self.settings, self.crew = settings, crew
        self._prompt: list[int] = []
        self._responses: list[list[int]] = []
        self._readings: dict[str, Reading] = {}
        self._worst = 0.0
        self._version = 0

    async def publish(self, version: int) -> dict[str, float]:
        """Publish the learners' weights as `version`, after `prepare`.

        Returns `probe`, the mean absolute logprob difference in nats a token, and `probe_s`, the seconds it took.
        Raises StallError naming the phase past `publish.deadline_s`, SyncError naming an engine whose weights are wrong
        (rluf.algorithms.sync_check).
        """
        await self.send(version)
        since = time.monotonic()
        gap = await self._probe(version)
        return {"probe": gap, "probe_s": time.monotonic() - since}

    async def send(self, version: int) -> None:
        """The four phases without the probe."""
        seconds, self._version = self.settings.publish.deadline_s, version
        await turn(self.settings, self.crew, "publish")
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

    async def _learners(self, method: str, seconds: float, *args: object) -> list[Any]:
        calls = [(m, self._call(m, method, *args)) for m in self.crew.learners]
        return await everyone(calls, seconds, f"publish: {method}")

    async def _engines(self, method: str, seconds: float, *args: object) -> list[Any]:
        calls = [(m, self._call(m, method, *args)) for m in self.crew.rollouts]
        return await everyone(calls, seconds, f"publish: {method}")

    def _call(self, member: Member, method: str, *args: object) -> ObjectRef[Any]:
        """A call that Ray's dashboard and timeline show with its actor and the version that is published."""
        named = getattr(member.handle, method).options(name=f"{member}: {method} v{self._version}")
        ref: ObjectRef[Any] = named.remote(*args)
        return ref

    async def prepare(self, group: ObjectRef[Group]) -> None:
        """Before the first update: keep responses of `group` as the probe, and read them while weights are equal."""
        if self._responses:
            return
        first: Group = await within(group, 60.0, "the object store")
        self._prompt = list(first.prompt.token_ids)
        left = PROBE_TOKENS
        for sample in first.samples:
            response = list(sample.response_ids[:left])
            self._responses += [response] if response else []
            left -= len(response)
        self._readings = await self._read()
        self._worst = max((reading.gap for reading in self._readings.values()), default=0.0)

    def state(self) -> dict[str, Any]:
        """The probe's responses and the largest gap so far as plain JSON, for a checkpoint."""
        return {"prompt": self._prompt, "responses": self._responses, "worst": self._worst}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; what engines say of the responses is asked anew."""
        self._prompt = list(state["prompt"])
        self._responses = [list(response) for response in state["responses"]]
        self._worst = float(state["worst"])

    async def _probe(self, version: int) -> float:
        """The largest gap between the learner and an engine; raises SyncError naming an engine that is wrong."""
        found = await self._read()
        for name, reading in found.items():
            problem = sync_problem(self._readings[name], reading, self._worst, self.settings.publish.probe_tolerance)
            if problem is not None:
                raise SyncError(f"{name} disagrees with the learner after publishing version {version}: {problem}")
        self._readings = found
        gap = max(reading.gap for reading in found.values())
        self._worst = max(self._worst, gap)
        return gap

    async def _read(self) -> dict[str, Reading]:
        """The learner's and each engine's logprobs of the probe, all asked at once unless they take turns on GPUs."""
        settings, crew = self.settings, self.crew
        if not shares_gpus(settings):
            learners, engines = await asyncio.gather(self._learnt(), self._engined())
        elif crew.phase == "generate":
            engines = await self._engined()
            await turn(settings, crew, "learn")
            learners = await self._learnt()
        else:
            learners = await self._learnt()
            await turn(settings, crew, "generate")
            engines = await self._engined()
        truth = tuple(value for row in learners[0] for value in row)
        return {
            str(member): Reading(truth, tuple(value for rows in engines for value in rows[index]))
            for index, member in enumerate(self.crew.rollouts)
        }

    async def _learnt(self) -> list[Any]:
        """What each learner rank says of the probe's responses: a row of logprobs for each response."""
        return await self._learners("logprobs", self.settings.publish.deadline_s, self._prompt, self._responses)

    async def _engined(self) -> list[list[Any]]:
        """What the engines say: for each response a row of logprobs from each engine."""
        seconds = self.settings.publish.deadline_s
        calls = (self._engines("logprobs", seconds, self._prompt, response) for response in self._responses)
        return list(await asyncio.gather(*calls))
