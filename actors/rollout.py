"""The rollout actor: one vLLM engine in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rluf.backends.vllm.engine import RolloutEngine, derive_sample_seed, set_vllm_environment
from rluf.config.settings import Settings
from rluf.objectives.judges import judge_group
from rluf.types import Group, GroupInfo, Prompt, Sample


class RolloutActor:
    """One engine. Many calls may run concurrently; only the weight update phases must come in order."""

    def __init__(self, index: int, settings_json: str, model_path: str, version: int = 0) -> None:
        """Prepare engine `index`; `start` starts it. `version` is the weight version of the model at `model_path`."""
        self._settings = settings = Settings.model_validate_json(settings_json)
        # vLLM reads its environment variables at import, and its core process inherits them. This constructor runs
        # before anything in the process imports vLLM. Variables of the actor's runtime_env take precedence.
        set_vllm_environment(settings)
        self._engine = RolloutEngine(f"rollout {index}", index, settings, Path(model_path), version)

    async def start(self) -> dict[str, Any]:
        """Start the engine; returns its name, process ids, model and KV cache size in tokens."""
        return await self._engine.start()

    async def generate_group(
        self, prompt: Prompt, sample_count: int, seed: int, temperature: float | None = None
    ) -> tuple[Group, GroupInfo]:
        """Sample `sample_count` responses to `prompt`: the group, and its small numbers for the driver.

        `temperature` None is rollout.temperature.
        """
        # One seed per sample, from the prompt and not from the order of requests: a repeated call reproduces them.
        seeds = [derive_sample_seed(seed, prompt.id, index) for index in range(sample_count)]
        generations = await self._engine.generate(prompt.token_ids, seeds, temperature)
        group = Group(
            prompt=prompt,
            samples=tuple(
                Sample(
                    prompt_id=prompt.id,
                    prompt_ids=prompt.token_ids,
                    response_ids=generation.response_ids,
                    rollout_logprobs=generation.logprobs,
                    version_spans=generation.version_spans,
                    finish_reason=generation.finish_reason,
                    text=generation.text,
                )
                for generation in generations
            ),
            # The oldest version of any token: weights may be updated while a sample is generated.
            weight_version=min(version for generation in generations for _, version in generation.version_spans),
        )
        gate_judges = self._settings.aggregation.gate_judges
        return group, judge_group(gate_judges, group) if gate_judges else group.info

    async def probe_logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        """The engine's log-probabilities [R] (nats, temperature 1) of a given response, for the check after a sync."""
        return await self._engine.compute_logprobs(prompt_ids, response_ids)

    async def begin_weight_update(self, transfer_info: dict[str, Any]) -> None:
        """Weight sync, phase 1: connect to the learner (once) and pause generation.

        `transfer_info` is what the learner's begin_weight_sync returned.
        """
        await self._engine.begin_weight_update(transfer_info)

    async def load_weight_bucket(self, bucket: dict[str, Any]) -> None:
        """Weight sync, phase 2: load one bucket of weights."""
        await self._engine.load_weight_bucket(bucket)

    async def finish_weight_update(self, version: int) -> None:
        """Weight sync, phases 3 and 4: set the weight version to `version` and resume generation."""
        await self._engine.finish_weight_update(version)

    async def sleep(self) -> None:
        """Free the GPU memory for a learner rank on the same GPU."""
        await self._engine.sleep()

    async def wake(self, tags: tuple[str, ...]) -> None:
        """Load the components `tags` into GPU memory again (rluf.backends.colocation)."""
        await self._engine.wake(tags)

    async def get_weight_version(self) -> int:
        """The weight version that new tokens are sampled with."""
        return self._engine.weight_version

    def get_health(self) -> dict[str, Any]:
        """Engine name, weight version, number of running samples, whether vLLM's core process is alive."""
        return self._engine.get_health()

    async def shutdown(self) -> None:
        """End the engine and its core process."""
        self._engine.shutdown()
