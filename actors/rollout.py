"""The rollout actor: one vLLM engine in one process, and what it says to the pumps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rluf.backends.vllm.engine import RolloutEngine, sample_seed, set_environment
from rluf.config.settings import Settings
from rluf.objectives.judges import passes
from rluf.types import Group, GroupInfo, Prompt, Sample


class RolloutActor:
    """Holds one engine. Many calls may run at once; only the three update phases must come in order."""

    def __init__(self, index: int, settings_json: str, model_path: str, version: int = 0) -> None:
        """Prepare engine `index`; `ready` starts it. `version` is the weight version of the model at `model_path`.

        vLLM reads its switches from the environment when it is imported, and its core process inherits them. They are
        set here, where nothing has imported vLLM yet; what the actor's runtime_env has set stays.
        """
        self._settings = settings = Settings.model_validate_json(settings_json)
        set_environment(settings)
        self._engine = RolloutEngine(f"rollout {index}", index, settings, Path(model_path), version)

    async def ready(self) -> dict[str, Any]:
        """Start the engine; returns its name, process ids, model and KV cache size in tokens."""
        return await self._engine.start()

    async def generate(self, prompt: Prompt, samples: int, seed: int) -> tuple[Group, GroupInfo]:
        """Sample `samples` responses to `prompt`: the whole group, and the small numbers for the driver."""
        seeds = [sample_seed(seed, prompt.id, index) for index in range(samples)]
        drafts = await self._engine.generate(prompt.token_ids, seeds)
        group = Group(
            prompt=prompt,
            samples=tuple(
                Sample(
                    prompt_id=prompt.id,
                    prompt_ids=prompt.token_ids,
                    response_ids=draft.response_ids,
                    rollout_logprobs=draft.logprobs,
                    version_spans=draft.version_spans,
                    finish_reason=draft.finish_reason,
                    text=draft.text,
                )
                for draft in drafts
            ),
            version=min(version for draft in drafts for _, version in draft.version_spans),
        )
        names = self._settings.objectives.judges
        if not names:
            return group, group.info
        return group, replace(group.info, passed=passes(names, [(prompt.messages, s.text) for s in group.samples]))

    async def logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        """The engine's logprobs [R] (nats, temperature 1) of a given response, for the probe after a publish."""
        return await self._engine.logprobs(prompt_ids, response_ids)

    async def begin_update(self, init: dict[str, Any]) -> None:
        """Publish, phase 1: meet the learner (once) and freeze generation. `init` is the learner's offer."""
        await self._engine.begin_update(init)

    async def update(self, bucket: dict[str, Any]) -> None:
        """Publish, phase 2: load one bucket of weights."""
        await self._engine.update(bucket)

    async def finish_update(self, version: int) -> None:
        """Publish, phases 3 and 4: the weights are `version` from here on; generation goes on."""
        await self._engine.finish_update(version)

    async def sleep(self) -> None:
        """Free the GPU for a learner rank on it."""
        await self._engine.sleep()

    async def wake(self, parts: tuple[str, ...]) -> None:
        """Come back to the GPU with `parts` (rluf.backends.colocation)."""
        await self._engine.wake(parts)

    async def version(self) -> int:
        """The weight version that new tokens are sampled with."""
        return self._engine.version

    def health(self) -> dict[str, Any]:
        """Engine name, weight version, samples running, whether vLLM's core lives."""
        return self._engine.health()

    async def shutdown(self) -> None:
        """End the engine and its core process."""
        self._engine.shutdown()
