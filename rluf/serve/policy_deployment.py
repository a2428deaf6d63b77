"""Served policies: vLLM's engine behind Ray Serve, with new weights taken in place."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from rluf.backends.weight_transfer.manifest import Checklist, checkpoint_files
from rluf.config.policy import ModelSettings, RolloutSettings
from rluf.config.run import ClusterSettings
from rluf.config.settings import Settings
from rluf.errors import LostError, ModelError, RlufError
from rluf.serve.limits import ApiError
from rluf.types import Message

if TYPE_CHECKING:
    import torch

    from rluf.backends.vllm.engine import RolloutEngine
    from rluf.backends.weight_transfer.base import Sender

logger = logging.getLogger("rluf.serve")

BUCKET_BYTES = 256 << 20
"""Weights that are read from disk and handed to the engine at once."""


TOLD = {"model", "rollout", "cluster", "seed"}
"""What an engine reads of the settings; a change elsewhere starts no policy anew."""


def engine_settings(told: str) -> Settings:
    """Settings with the parts TOLD of JSON, and defaults for all others.

    The rules between keys were kept where all keys were known; parts of them need not go with the others' defaults.
    """
    parts: dict[str, Any] = json.loads(told)
    return Settings.model_construct(
        model=ModelSettings.model_validate(parts["model"]),
        rollout=RolloutSettings.model_validate(parts["rollout"]),
        cluster=ClusterSettings.model_validate(parts["cluster"]),
        seed=parts["seed"],
    )


class Answer(NamedTuple):
    """What a policy said, why it ended, tokens read and written, and the version of the policy that said it."""

    text: str
    reason: str
    read: int
    written: int
    version: str


class Policy:
    """One replica of a policy. A plain class; `application` makes it a deployment."""

    def __init__(self, told: str) -> None:
        """`told` holds settings as JSON, at least those TOLD. Nothing is loaded yet."""
        self._settings = engine_settings(told)
        self._engine: RolloutEngine | None = None
        self._version, self._wanted, self._number = "", "", 0
        self._open = asyncio.Event()
        self._running = 0
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._lost: str | None = None

    async def reconfigure(self, chosen: dict[str, Any]) -> None:
        """Take the policy that the deployment's user_config names (path, version).

        The first starts the engine before the replica counts as started. Later ones replace its weights between two
        chats, and of several the last one counts. One that cannot be read or does not fit leaves the present one in
        place and an error in the log; one that breaks off half-way ends the replica's health.
        """
        path, self._wanted = Path(chosen["path"]), str(chosen["version"])
        if self._engine is None:
            await self._start(path, self._wanted)
        else:
            change = asyncio.create_task(self._change(path, self._wanted))
            self._changes.add(change)
            change.add_done_callback(self._changed)

    async def check_health(self) -> None:
        """Raises LostError once the engine is of no more use; Ray Serve then starts the replica anew."""
        engine = self._engine
        if engine is not None and (self._lost or not engine.health()["alive"]):
            raise LostError(self._lost or f"the engine of policy {self._version} has died", self._version)

    async def describe(self) -> str:
        """The version that is served."""
        return self._version

    async def chat(self, messages: Sequence[Message], seed: int) -> Answer:
        """One response. Raises ApiError 422 for a conversation that is too long, RlufError when the engine fails."""
        from rluf.models.hub import render_prompt

        while not self._open.is_set():
            await self._open.wait()
        engine, version = self._engine, self._version
        if engine is None or self._lost:
            raise LostError(self._lost or "the replica was asked before it had a policy", version)
        ids = render_prompt(self._tokenizer, messages)
        limit = self._settings.rollout.max_prompt_tokens
        if len(ids) > limit:
            raise ApiError(422, "too_long", f"the conversation has {len(ids)} tokens, the policy reads {limit} at most")
        self._running += 1
        try:
            (draft,) = await engine.generate(ids, [seed])
        finally:
            self._running -= 1
        return Answer(draft.text, draft.finish_reason, len(ids), len(draft.response_ids), version)

    async def _start(self, path: Path, version: str) -> None:
        from rluf.backends.vllm.engine import RolloutEngine, set_environment
        from rluf.backends.weight_transfer.base import ShmSender
        from rluf.models.hub import load_tokenizer

        set_environment(self._settings)
        engine = RolloutEngine(f"policy {version}", 0, self._settings, path)
        await engine.start()
        self._tokenizer = load_tokenizer(path)
        self._begin(engine, ShmSender(), path, version)

    def _begin(self, engine: RolloutEngine, sender: Sender, path: Path, version: str) -> None:
        """Serve `version` by a started engine; later ones reach it through `sender`."""
        self._shapes = Checklist(path, engine.tied).expected
        self._engine, self._sender, self._version = engine, sender, version
        self._open.set()

    async def _change(self, path: Path, version: str) -> None:
        """Put the weights of another folder into the running engine, as the train loop publishes them."""
        engine = self._engine
        async with self._turn:
            if engine is None or self._lost or version != self._wanted or version == self._version:
                return
            try:
                checklist = await asyncio.to_thread(Checklist, path, engine.tied)
                check_same_shape(self._shapes, checklist.expected, path)
            except (RlufError, OSError, ValueError, KeyError, SafetensorError):
                logger.exception("policy version %s cannot be taken; the present one stays", version)
                return
            self._open.clear()
            whole = False
            try:
                while self._running:
                    await asyncio.sleep(0.01)
                await self._publish(engine, path, checklist)
                self._version, whole = version, True
                logger.warning("serving policy version %s now", version)
            finally:
                if not whole:  # only a new engine is sure to be whole
                    self._lost = f"policy version {version} could not be loaded; the replica starts anew"
                self._open.set()

    def _changed(self, change: asyncio.Task[None]) -> None:
        """Log what a change broke off with."""
        self._changes.discard(change)
        if not change.cancelled() and change.exception() is not None:
            logger.error("%s", self._lost or "a policy version cannot be taken", exc_info=change.exception())

    async def _publish(self, engine: RolloutEngine, path: Path, checklist: Checklist) -> None:
        sender = self._sender
        self._number += 1
        await engine.begin_update(sender.offer(self._number))
        buckets = weights(path, checklist)
        while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
            await engine.update(await asyncio.to_thread(sender.send, bucket))
        await engine.finish_update(self._number)
        sender.finish()


def weights(folder: Path, checklist: Checklist) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Named tensors of a Hugging Face folder in buckets: each that its `checklist` has, once."""
    from safetensors import safe_open

    left = set(checklist.expected)
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for file in checkpoint_files(folder):
        with safe_open(str(file), framework="pt") as opened:
            for name in sorted(left.intersection(opened.keys())):
                tensor = opened.get_tensor(name)
                left.remove(name)
                bucket.append((name, tensor))
                if name == checklist.copied:
                    bucket.append(("lm_head.weight", tensor))
                size += tensor.numel() * tensor.element_size()
                if size >= BUCKET_BYTES:
                    yield bucket
                    bucket, size = [], 0
    if bucket:
        yield bucket


def check_same_shape(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], other: Path) -> None:
    """Raise ModelError when the weights in `other` differ in name or shape from those that the engine expects."""
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{other} does not fit the running engine: {name} is {theirs.get(name, 'missing')}, it was "
            f"{ours.get(name, 'missing')} ({len(wrong)} tensors differ); serve it under another name"
        )
