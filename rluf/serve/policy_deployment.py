"""Ray Serve deployment of a policy: a vLLM engine whose weights can be replaced in place."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from rluf.backends.weight_transfer.base import WeightManifest, list_checkpoint_files
from rluf.config.policy import ModelSettings, RolloutSettings
from rluf.config.run import ClusterSettings
from rluf.config.settings import Settings
from rluf.errors import ActorLostError, ModelError, RlufError
from rluf.serve.api import ApiError, ChatSampling
from rluf.types import Message

if TYPE_CHECKING:
    import torch

    from rluf.backends.vllm.engine import RolloutEngine
    from rluf.backends.weight_transfer.base import WeightSender

logger = logging.getLogger("rluf.serve")

BUCKET_BYTES = 256 << 20
"""Bytes of weights that are read from disk and sent to the engine at once; bounds host memory."""
ENGINE_SETTING_KEYS = {"model", "rollout", "cluster", "seed"}
"""Settings sections that an engine reads. Changes of other sections do not restart a policy."""


def load_engine_settings(settings_json: str) -> Settings:
    """Load the sections ENGINE_SETTING_KEYS from JSON; every other section has its defaults."""
    sections: dict[str, Any] = json.loads(settings_json)
    # model_construct skips the rules between sections: the driver has checked them on the complete settings, and they
    # need not hold between these sections and the defaults of the others.
    return Settings.model_construct(
        model=ModelSettings.model_validate(sections["model"]),
        rollout=RolloutSettings.model_validate(sections["rollout"]),
        cluster=ClusterSettings.model_validate(sections["cluster"]),
        seed=sections["seed"],
    )


class ChatCompletion(NamedTuple):
    """A sampled response, its finish reason, its token counts and the policy version that produced it.

    `temperature` is that of the sampling, `response_logprob` the log-probability (nats) of all response tokens under
    the sampling distribution; None if a stop string cut the text, which then has other tokens, and at temperature 0,
    where the engine reports that of another distribution.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    response_tokens: int
    policy_version: str
    temperature: float = 1.0
    response_logprob: float | None = None


class PolicyDeployment:
    """One replica of a policy. `application` turns this plain class into a deployment."""

    def __init__(self, settings_json: str) -> None:
        """`settings_json` has at least the sections ENGINE_SETTING_KEYS. Nothing is loaded yet."""
        self._settings = load_engine_settings(settings_json)
        self._engine: RolloutEngine | None = None
        self._served_version, self._wanted_version, self._sync_count = "", "", 0
        self._chats_allowed = asyncio.Event()
        self._running_chats = 0
        self._change_lock = asyncio.Lock()
        self._change_tasks: set[asyncio.Task[None]] = set()
        self._failure: str | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the policy of the deployment's user_config (path, version).

        The first call starts the engine before Ray Serve counts the replica as started. Later calls replace the
        weights between two chats; of several pending ones only the newest is used. If a version cannot be read or has
        other shapes, the present one stays and the error is logged. A transfer that fails halfway makes the replica
        unhealthy.
        """
        policy_folder, self._wanted_version = Path(user_config["path"]), str(user_config["version"])
        if self._engine is None:
            await self._start_engine(policy_folder, self._wanted_version)
        else:
            task = asyncio.create_task(self._replace_weights(policy_folder, self._wanted_version))
            self._change_tasks.add(task)
            task.add_done_callback(self._on_change_done)

    async def check_health(self) -> None:
        """Raise ActorLostError once the engine is unusable; Ray Serve then restarts the replica."""
        engine = self._engine
        if engine is not None and (self._failure or not engine.get_health()["alive"]):
            message = self._failure or f"the engine of policy {self._served_version} has died"
            raise ActorLostError(message, self._served_version)

    async def describe(self) -> str:
        """Return the served policy version."""
        return self._served_version

    async def complete_chat(
        self, messages: Sequence[Message], seed: int, sampling: ChatSampling | None = None
    ) -> ChatCompletion:
        """Sample one response. Raises ApiError 422 for a too long conversation, RlufError if the engine fails."""
        from rluf.models.hub import render_prompt

        # A loop, because the next update may have closed the gate again before this task runs.
        while not self._chats_allowed.is_set():
            await self._chats_allowed.wait()
        engine, version = self._engine, self._served_version
        if engine is None or self._failure:
            raise ActorLostError(self._failure or "the replica was called before its policy was loaded", version)
        prompt_ids = render_prompt(self._tokenizer, messages)
        max_tokens = self._settings.rollout.max_prompt_tokens
        if len(prompt_ids) > max_tokens:
            raise ApiError(
                422, "too_long", f"the conversation has {len(prompt_ids)} tokens, the policy reads at most {max_tokens}"
            )
        sampling = sampling or ChatSampling()
        # No await between the gate above and this increment: a weight update waits only for the chats it can count.
        self._running_chats += 1
        try:
            (generation,) = await engine.generate(
                prompt_ids, [seed], sampling.temperature, max_tokens=sampling.max_tokens
            )
        finally:
            self._running_chats -= 1
        text = self._tokenizer.decode(generation.response_ids, skip_special_tokens=True)
        uncut_text, text = text, truncate_at_stop(text, sampling.stop)
        is_cut = len(text) < len(uncut_text)
        temperature = self._settings.rollout.temperature if sampling.temperature is None else sampling.temperature
        response_logprob = None if is_cut or not temperature else math.fsum(generation.logprobs)
        return ChatCompletion(
            text, "stop" if is_cut else generation.finish_reason, len(prompt_ids), len(generation.response_ids),
            version, temperature, response_logprob,
        )  # fmt: skip

    async def _start_engine(self, policy_folder: Path, version: str) -> None:
        from rluf.backends.vllm.engine import RolloutEngine, set_vllm_environment
        from rluf.backends.weight_transfer.shm import ShmSender
        from rluf.models.hub import load_tokenizer

        set_vllm_environment(self._settings)
        engine = RolloutEngine(f"policy {version}", 0, self._settings, policy_folder)
        await engine.start()
        trust_remote_code = self._settings.model.trust_remote_code
        self._tokenizer = load_tokenizer(policy_folder, trust_remote_code=trust_remote_code)
        self._serve_version(engine, ShmSender(), policy_folder, version)

    def _serve_version(self, engine: RolloutEngine, sender: WeightSender, policy_folder: Path, version: str) -> None:
        """Serve `version` with a started engine; `sender` transfers later versions to it."""
        self._expected_shapes = WeightManifest(policy_folder, engine.has_tied_embeddings).expected_shapes
        self._engine, self._weight_sender, self._served_version = engine, sender, version
        self._chats_allowed.set()

    async def _replace_weights(self, policy_folder: Path, version: str) -> None:
        """Load the weights of another folder into the running engine, by the same path as weight sync in training."""
        engine = self._engine
        async with self._change_lock:
            if engine is None or self._failure or version != self._wanted_version or version == self._served_version:
                return
            try:
                manifest = await asyncio.to_thread(WeightManifest, policy_folder, engine.has_tied_embeddings)
                check_same_shapes(self._expected_shapes, manifest.expected_shapes, policy_folder)
            except (RlufError, OSError, ValueError, KeyError, SafetensorError):
                logger.exception("policy: version %s cannot be loaded; the present version stays", version)
                return
            self._chats_allowed.clear()
            is_complete = False
            try:
                while self._running_chats:
                    await asyncio.sleep(0.01)
                await self._transfer_weights(engine, policy_folder, manifest)
                self._served_version, is_complete = version, True
                logger.warning("policy: serving version %s", version)
            finally:
                # A partial transfer leaves a mix of two versions in the engine; only a new engine is consistent.
                if not is_complete:
                    self._failure = f"policy version {version} could not be loaded; the replica restarts"
                # Opened in any case: waiting chats must see the failure instead of waiting forever.
                self._chats_allowed.set()

    def _on_change_done(self, change_task: asyncio.Task[None]) -> None:
        """Log the error of a failed weight change; nothing awaits the task."""
        self._change_tasks.discard(change_task)
        if not change_task.cancelled() and change_task.exception() is not None:
            message = self._failure or "a version cannot be loaded"
            logger.error("policy: %s", message, exc_info=change_task.exception())

    async def _transfer_weights(self, engine: RolloutEngine, policy_folder: Path, manifest: WeightManifest) -> None:
        sender = self._weight_sender
        self._sync_count += 1
        await engine.begin_weight_update(sender.begin(self._sync_count))
        buckets = iter_weight_buckets(policy_folder, manifest)
        while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
            await engine.load_weight_bucket(await asyncio.to_thread(sender.send_bucket, bucket))
        await engine.finish_weight_update(self._sync_count)
        sender.end()


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    positions = [position for string in stop if (position := text.find(string)) >= 0]
    return text[: min(positions)] if positions else text


def iter_weight_buckets(folder: Path, manifest: WeightManifest) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the named tensors of a Hugging Face folder in buckets: every tensor of `manifest`, once."""
    from safetensors import safe_open

    remaining_names = set(manifest.expected_shapes)
    bucket: list[tuple[str, torch.Tensor]] = []
    bucket_bytes = 0
    for file in list_checkpoint_files(folder):
        with safe_open(str(file), framework="pt") as checkpoint:
            for name in sorted(remaining_names.intersection(checkpoint.keys())):
                tensor = checkpoint.get_tensor(name)
                remaining_names.remove(name)
                bucket.append((name, tensor))
                # Checkpoints with tied embeddings store one tensor for both, but the engine expects both names.
                bucket += [(tied_name, tensor) for tied_name, source in manifest.tied_sources.items() if source == name]
                bucket_bytes += tensor.numel() * tensor.element_size()
                if bucket_bytes >= BUCKET_BYTES:
                    yield bucket
                    bucket, bucket_bytes = [], 0
    if bucket:
        yield bucket


def check_same_shapes(
    expected_shapes: Mapping[str, tuple[int, ...]], new_shapes: Mapping[str, tuple[int, ...]], new_folder: Path
) -> None:
    """Raise ModelError when the weights in `new_folder` differ in name or shape from those that the engine expects."""
    different_names = sorted(
        name for name in expected_shapes.keys() | new_shapes.keys() if expected_shapes.get(name) != new_shapes.get(name)
    )
    if different_names:
        name = different_names[0]
        raise ModelError(
            f"{new_folder} does not fit the running engine: {name} has shape {new_shapes.get(name, 'missing')}, "
            f"expected {expected_shapes.get(name, 'missing')} ({len(different_names)} tensors differ); serve it under "
            "another name"
        )
