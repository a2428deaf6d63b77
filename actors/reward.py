"""A scorer as a Ray actor: one objective's reward model, rule judge or service, or several objectives' shared backbone.

Groups are scored as they finish. Groups that wait while a batch is being scored go into the next batch together, so the
model runs on few large batches under load and answers at once when idle. Scoring runs in a thread: health checks are
answered meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.types import Group, Score

if TYPE_CHECKING:
    from rluf.reward.text import Item

logger = logging.getLogger(__name__)

Scorer = Callable[[Sequence["Item"]], dict[str, list[Score]]]
"""Scores of items in order, by objective."""
Scores = dict[str, list[Score]]


class RewardActor:
    """Scores samples for its objectives. A plain class; the driver wraps it with ray.remote."""

    def __init__(self, settings_json: str, sources: Mapping[str, str | None]) -> None:
        """`sources` has the reward model folder by objective, None for a judge. Several objectives are heads of one
        backbone, scored by one forward pass. Nothing is loaded before `ready`.
        """
        self.settings = Settings.model_validate_json(settings_json)
        self.sources = dict(sources)
        self.objective = "+".join(sources)
        self._scorer: Scorer | None = None
        self._waiting: list[tuple[Group, asyncio.Future[Scores]]] = []
        self._running: asyncio.Task[None] | None = None
        self._scored = 0
        self._batches = 0
        self._busy_s = 0.0

    async def ready(self) -> dict[str, object]:
        """Load the model or judge and try it on two short items.

        Returns objectives, source, pid and the seconds it took. Raises ModelError or SettingsError that names what is
        wrong with the folder or the judge's name.
        """
        started = time.monotonic()
        if self._scorer is None:
            self._scorer = await asyncio.to_thread(self._load)
        return {
            "objective": self.objective,
            "source": self.settings.objectives.named[next(iter(self.sources))].source,
            "pid": os.getpid(),
            "seconds": time.monotonic() - started,
        }

    def _load(self) -> Scorer:
        name = next(iter(self.sources))
        objective = self.settings.objectives.named[name]
        if objective.source == "judge":
            from rluf.objectives.judges import judge_scorer

            judge = judge_scorer(str(objective.judge), name)
            return lambda items: {name: judge(items)}
        if objective.source == "serve":
            return self._served(name, str(objective.path))
        folders = {head: Path(path) for head, path in self.sources.items() if path is not None}
        if len(folders) < len(self.sources):
            raise ModelError(f"objective {self.objective} has source model but no reward model folder; train one first")
        from rluf.reward.backbone import probe_items, quick_cpu_matmul
        from rluf.reward.model import load_scorers

        on_gpu = self.settings.cluster.gpus_per_reward > 0
        if not on_gpu:
            quick_cpu_matmul()
        scorer = load_scorers(
            folders, batch_tokens=self.settings.objectives.batch_tokens, device="cuda" if on_gpu else "cpu"
        )
        scorer(probe_items())
        return scorer

    def _served(self, name: str, url: str) -> Scorer:
        """Let a service score: the same scores as its models give here, and no model in this process."""
        from rluf.serve.client import RewardClient

        client = RewardClient(url)
        client.scores([([{"role": "user", "content": "How are you?"}], "Well, thank you.")], name)
        return lambda items: {name: client.scores(items, name)}

    async def score(self, group: Group) -> Scores:
        """Scores of the group's samples, in order, by objective. Groups that wait together are scored together."""
        if self._scorer is None:
            await self.ready()
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        """Score all that waits, batch after batch, until nothing does."""
        await asyncio.sleep(0)  # let calls that have already arrived join the first batch
        at_once = 1 if self.settings.run.deterministic else None  # last bits depend on what else is in a batch
        while self._waiting:
            batch, self._waiting = self._waiting[:at_once], self._waiting[len(self._waiting[:at_once]) :]
            work = asyncio.to_thread(self._score, [group for group, _ in batch])
            (outcome,) = await asyncio.gather(work, return_exceptions=True)
            for place, (_, future) in enumerate(batch):
                if future.done():  # its caller has gone
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome[place])

    def _score(self, groups: Sequence[Group]) -> list[Scores]:
        started = time.monotonic()
        items: list[Item] = [(group.prompt.messages, sample.text) for group in groups for sample in group.samples]
        if self._scorer is None:
            raise ModelError(f"the scorer of {self.objective} was asked before it was loaded; call ready first")
        scores = {name: iter(made) for name, made in self._scorer(items).items()}
        found = [{name: [next(made) for _ in group.samples] for name, made in scores.items()} for group in groups]
        self._scored += len(items)
        self._batches += 1
        self._busy_s += time.monotonic() - started
        return found

    def health(self) -> dict[str, object]:
        """Counters since the start: samples scored, batches, seconds busy, and groups waiting now."""
        return {
            "objective": self.objective,
            "pid": os.getpid(),
            "loaded": self._scorer is not None,
            "scored": self._scored,
            "batches": self._batches,
            "busy_s": self._busy_s,
            "waiting": len(self._waiting),
        }
