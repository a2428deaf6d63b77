"""The reward actor: one objective's reward model, judge, function or service, or several objectives on one backbone.

Groups are scored as they finish. Groups that wait while a batch is being scored form the next batch, so that the model
runs on few large batches under load and answers at once when idle. Scoring runs in a thread, so that health checks are
answered meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.types import Group, Message, Score, ScoringItem

BatchScorer = Callable[[Sequence[ScoringItem]], dict[str, list[Score]]]
"""Scores of items in order, by objective."""
ScoresByObjective = dict[str, list[Score]]


class RewardActor:
    """Scores samples for its objectives. A plain class; the driver wraps it with ray.remote."""

    def __init__(self, settings_json: str, model_folders: Mapping[str, str | None]) -> None:
        """Store the arguments; loading is left to `start`.

        `model_folders` has the reward model folder of each objective, None for a judge. Several objectives are heads of
        one backbone, scored by one forward pass.
        """
        self.settings = Settings.model_validate_json(settings_json)
        self.model_folders = dict(model_folders)
        self.objective_names = "+".join(model_folders)
        self._scorer: BatchScorer | None = None
        self._pending_groups: list[tuple[Group, asyncio.Future[ScoresByObjective]]] = []
        self._drain_task: asyncio.Task[None] | None = None
        self._scored_count = 0
        self._batch_count = 0
        self._busy_seconds = 0.0

    async def start(self) -> dict[str, object]:
        """Load the model or judge and score two short items as a warm-up.

        Returns objectives, source, process id and the seconds it took. Raises ModelError or SettingsError naming what
        is wrong with the folder or the judge's name.
        """
        start_time = time.monotonic()
        if self._scorer is None:
            self._scorer = await asyncio.to_thread(self._load_scorer)
        return {
            "objective": self.objective_names,
            "source": self.settings.objectives.by_objective[next(iter(self.model_folders))].source,
            "pid": os.getpid(),
            "seconds": time.monotonic() - start_time,
        }

    def _load_scorer(self) -> BatchScorer:
        # Objectives of one actor share their source: only reward models on one backbone come in groups.
        objective_name = next(iter(self.model_folders))
        objective = self.settings.objectives.by_objective[objective_name]
        if objective.source in ("judge", "function"):
            from rluf.objectives.judges import build_rule_scorer

            rule_scorer = build_rule_scorer(objective_name, **objective.rule_arguments)
            return lambda items: {objective_name: rule_scorer(items)}
        if objective.source == "serve":
            return self._connect_service(objective_name, str(objective.path))
        folders = {name: Path(path) for name, path in self.model_folders.items() if path is not None}
        if len(folders) < len(self.model_folders):
            raise ModelError(
                f"objective {self.objective_names}: source model needs a reward model folder; train one first"
            )
        from rluf.models.hub import skip_scikit_learn

        skip_scikit_learn()  # before the imports below load transformers
        from rluf.reward.backbone import build_warmup_items, enable_fast_cpu_matmul
        from rluf.reward.model import load_reward_scorer
        from rluf.reward.text import SCORING_BATCH_TOKENS

        on_gpu = self.settings.cluster.gpus_per_reward > 0
        if not on_gpu:
            enable_fast_cpu_matmul()
        scorer = load_reward_scorer(folders, batch_tokens=SCORING_BATCH_TOKENS, device="cuda" if on_gpu else "cpu")
        scorer(build_warmup_items())
        return scorer

    def _connect_service(self, objective_name: str, url: str) -> BatchScorer:
        """A scorer that calls a scoring service: the scores of its models, without a model in this process."""
        from rluf.serve.client import RewardClient

        client = RewardClient(url)
        # One request now, so that a wrong URL or an unknown objective is reported before training starts. Its model
        # version is required of all later scores: rewards of two versions in one run would be on two scales.
        question = [Message(role="user", content="How are you?")]
        client.model_version = client.score(question, "Well, thank you.").model_version
        client.score_objective([ScoringItem(question, "Well, thank you.")], objective_name)
        return lambda items: {objective_name: client.score_objective(items, objective_name)}

    async def score_group(self, group: Group) -> ScoresByObjective:
        """Scores of the group's samples, in order, by objective. Groups that wait together are scored together."""
        if self._scorer is None:
            await self.start()
        future: asyncio.Future[ScoresByObjective] = asyncio.get_running_loop().create_future()
        self._pending_groups.append((group, future))
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = asyncio.create_task(self._score_pending())
        return await future

    async def _score_pending(self) -> None:
        """Score pending groups batch by batch until none is left."""
        await asyncio.sleep(0)  # let calls that have already arrived join the first batch
        # The last bits of a score depend on the other items of its batch, so deterministic runs score one by one.
        batch_limit = 1 if self.settings.run.deterministic else None
        while self._pending_groups:
            batch = self._pending_groups[:batch_limit]
            self._pending_groups = self._pending_groups[len(batch) :]
            scoring = asyncio.to_thread(self._score_batch, [group for group, _ in batch])
            (result,) = await asyncio.gather(scoring, return_exceptions=True)
            for index, (_, future) in enumerate(batch):
                if future.done():  # cancelled: its caller is gone
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result[index])

    def _score_batch(self, groups: Sequence[Group]) -> list[ScoresByObjective]:
        start_time = time.monotonic()
        items = [
            ScoringItem(
                group.prompt.messages,
                sample.text,
                sample.finish_reason == "length",
                group.prompt.id,
                group.prompt.topic,
                group.prompt.fields,
            )
            for group in groups
            for sample in group.samples
        ]
        if self._scorer is None:
            raise ModelError(f"the scorer of {self.objective_names} was used before it was loaded; call start first")
        # Scores of all items in order; each group takes the next ones from these iterators.
        scores_by_name = self._scorer(items)
        for name, scores in scores_by_name.items():
            _check_finite(name, scores)
        score_iterators = {name: iter(scores) for name, scores in scores_by_name.items()}
        scores_by_group = [
            {name: [next(scores) for _ in group.samples] for name, scores in score_iterators.items()}
            for group in groups
        ]
        self._scored_count += len(items)
        self._batch_count += 1
        self._busy_seconds += time.monotonic() - start_time
        return scores_by_group

    def get_health(self) -> dict[str, object]:
        """Counters since the start: samples scored, batches, seconds busy, and groups waiting now."""
        return {
            "objective": self.objective_names,
            "pid": os.getpid(),
            "loaded": self._scorer is not None,
            "scored": self._scored_count,
            "batches": self._batch_count,
            "busy_s": self._busy_seconds,
            "waiting": len(self._pending_groups),
            "scored_per_s": self._scored_count / self._busy_seconds if self._busy_seconds else 0.0,
            **self._read_gpu_memory(),
        }

    def _read_gpu_memory(self) -> dict[str, float]:
        if self.settings.cluster.gpus_per_reward == 0 or self._scorer is None:
            return {}  # must not touch a GPU: CUDA would allocate a context there
        from rluf.backends.gpu_metrics import read_gpu_memory

        return read_gpu_memory()


def _check_finite(objective_name: str, scores: Sequence[Score]) -> None:
    """Raise ModelError if a score is not a number: it would spread over the statistics and rewards of the whole run."""
    values = [(score.value, score.raw_logit, score.logit_spread, score.exact_logit or 0.0) for score in scores]
    bad = [value for value in values if not all(map(math.isfinite, value))]
    if bad:
        raise ModelError(
            f"objective {objective_name}: {len(bad)} of {len(scores)} scores are not finite, the first {bad[0][0]} "
            f"(logit {bad[0][1]}); check the weights of its reward model or service, or set model.dtype=float32"
        )
