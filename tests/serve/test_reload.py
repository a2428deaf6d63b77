"""How a replica replaces a policy's weights. The engine is a stand-in with a real WeightManifest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from rluf.backends.vllm import engine as vllm_engine
from rluf.backends.vllm.engine import RolloutEngine
from rluf.backends.weight_transfer.base import WeightManifest
from rluf.backends.weight_transfer.shm import ShmSender
from rluf.config.settings import Settings
from rluf.errors import ActorLostError
from rluf.models import hub
from rluf.serve.policy_deployment import PolicyDeployment, iter_weight_buckets

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
WTE = "transformer.wte.weight"
PLAIN = {EMBEDDINGS: (8, 4), NORM: (4,)}


class StubEngine:
    """The part of a RolloutEngine that PolicyDeployment uses; checks weights by a manifest. `gate` delays buckets."""

    def __init__(self, folder: Path, is_tied: bool) -> None:
        self.has_tied_embeddings, self.is_paused, self.gate = is_tied, False, asyncio.Event()
        self.load_error: Exception | None = None
        self._manifest = WeightManifest(folder, is_tied)
        self.gate.set()

    async def begin_weight_update(self, _: dict[str, Any]) -> None:
        self._manifest.reset()
        self.is_paused = True

    async def load_weight_bucket(self, bucket: dict[str, Any]) -> None:
        await self.gate.wait()
        if self.load_error is not None:
            raise self.load_error
        self._manifest.check_bucket((name, shape) for name, _, shape, _ in bucket["entries"])

    async def finish_weight_update(self, _: int) -> None:
        self._manifest.check_complete()
        self.is_paused = False

    def get_health(self) -> dict[str, Any]:
        return {"alive": True}


def write_policy_folder(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], **files: Mapping[str, tuple[int, ...]]
) -> Path:
    folder.mkdir()
    for name, file_shapes in {"model": shapes, **files}.items():
        save_file({key: torch.zeros(shape) for key, shape in file_shapes.items()}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2" if WTE in shapes else "llama"}))
    return folder


def make_replica(folder: Path, *, is_tied: bool = True) -> tuple[PolicyDeployment, StubEngine]:
    """A replica that serves version one, and its engine."""
    policy, engine = PolicyDeployment(Settings().model_dump_json()), StubEngine(folder, is_tied)
    policy._serve_version(cast(RolloutEngine, engine), ShmSender(), folder, "one")
    return policy, engine


async def wait_for_changes(policy: PolicyDeployment) -> None:
    """Wait until all changes have ended, with or without an error."""
    await asyncio.gather(*policy._change_tasks, return_exceptions=True)


async def reload_policy(policy: PolicyDeployment, folder: Path, version: str) -> None:
    await policy.reconfigure({"path": str(folder), "version": version})
    await wait_for_changes(policy)


@pytest.mark.parametrize(
    ("shapes", "is_tied"),
    [
        (PLAIN, True),
        (PLAIN | {HEAD: (8, 4)}, True),
        (PLAIN | {HEAD: (8, 4)}, False),
        ({"language_model.model.embed_tokens.weight": (8, 4), NORM: (4,)}, True),
        (PLAIN | {FREQUENCIES: (2,)}, True),
        ({WTE: (8, 4), NORM: (4,)}, True),
    ],
    ids=["tied", "tied and stored", "untied", "another prefix", "frequencies", "gpt2"],
)
async def test_the_engine_gets_the_weights_that_it_expects(
    shapes: Mapping[str, tuple[int, ...]], is_tied: bool, tmp_path: Path
) -> None:
    policy, engine = make_replica(write_policy_folder(tmp_path / "one", shapes), is_tied=is_tied)
    await reload_policy(policy, write_policy_folder(tmp_path / "two", shapes), "two")
    assert await policy.describe() == "two"
    assert not engine.is_paused
    await policy.check_health()


@pytest.mark.parametrize("trust_remote_code", [False, True])
async def test_a_tokenizer_with_code_of_its_own_is_read_as_the_settings_say(
    trust_remote_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[bool] = []

    class StartedEngine(StubEngine):
        def __init__(self, name: str, engine_index: int, settings: Settings, model_folder: Path) -> None:
            super().__init__(model_folder, is_tied=True)

        async def start(self) -> None:
            pass

    monkeypatch.setattr(vllm_engine, "RolloutEngine", StartedEngine)
    monkeypatch.setattr(hub, "load_tokenizer", lambda folder, *, trust_remote_code: trusted.append(trust_remote_code))
    settings = Settings.model_validate({"model": {"trust_remote_code": trust_remote_code}})
    policy = PolicyDeployment(settings.model_dump_json())
    await policy._start_engine(write_policy_folder(tmp_path / "one", PLAIN), "one")
    assert trusted == [trust_remote_code]


def test_a_tied_head_is_sent_as_its_embedding_whatever_that_is_called(tmp_path: Path) -> None:
    folder = write_policy_folder(tmp_path / "one", {WTE: (8, 4), NORM: (4,)})
    sent = [name for bucket in iter_weight_buckets(folder, WeightManifest(folder, True)) for name, _ in bucket]
    assert sorted(sent) == sorted([WTE, HEAD, NORM])


async def test_a_tied_head_may_be_stored_in_one_version_and_not_in_the_next(tmp_path: Path) -> None:
    policy, _ = make_replica(write_policy_folder(tmp_path / "one", PLAIN | {HEAD: (8, 4)}))
    await reload_policy(policy, write_policy_folder(tmp_path / "two", PLAIN), "two")
    assert await policy.describe() == "two"


async def test_files_that_the_index_omits_are_not_sent(tmp_path: Path) -> None:
    policy, _ = make_replica(write_policy_folder(tmp_path / "one", PLAIN))
    two = write_policy_folder(tmp_path / "two", PLAIN, consolidated={"tok_embeddings.weight": (8, 4)})
    index = {"weight_map": dict.fromkeys(PLAIN, "model.safetensors")}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    await reload_policy(policy, two, "two")
    assert await policy.describe() == "two"


@pytest.mark.parametrize("defect", ["shape", "truncated", "missing"])
async def test_a_version_with_other_shapes_or_unreadable_files_leaves_the_present_one(
    defect: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, engine = make_replica(write_policy_folder(tmp_path / "one", PLAIN))
    two = write_policy_folder(tmp_path / "two", PLAIN if defect == "truncated" else {**PLAIN, NORM: (5,)})
    if defect == "truncated":
        (two / "model.safetensors").write_bytes(b"cut short")
    if defect == "missing":
        two = tmp_path / "nowhere"
    await reload_policy(policy, two, "two")
    assert "policy: version two cannot be loaded; the present version stays" in caplog.text
    assert await policy.describe() == "one"
    assert not engine.is_paused
    await policy.check_health()


@pytest.mark.parametrize(
    "load_error", [OSError("gone"), RuntimeError("EngineCore failed"), Exception("collective_rpc")]
)
async def test_a_failed_transfer_makes_the_replica_unhealthy(load_error: Exception, tmp_path: Path) -> None:
    policy, engine = make_replica(write_policy_folder(tmp_path / "one", PLAIN))
    engine.load_error = load_error
    await reload_policy(policy, write_policy_folder(tmp_path / "two", PLAIN), "two")
    with pytest.raises(ActorLostError, match="version two could not be loaded"):
        await policy.check_health()
    with pytest.raises(ActorLostError, match="version two could not be loaded"):
        await policy.complete_chat([{"role": "user", "content": "Hello?"}], 1)
    engine.load_error = None
    await reload_policy(policy, tmp_path / "one", "one")  # only a new engine is consistent
    with pytest.raises(ActorLostError):
        await policy.check_health()


async def test_a_folder_that_changes_during_the_read_makes_the_replica_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = make_replica(write_policy_folder(tmp_path / "one", PLAIN))
    two = write_policy_folder(tmp_path / "two", PLAIN)

    def truncate_then_read(*arguments: Any) -> Any:
        (two / "model.safetensors").write_bytes(b"cut short")
        yield from iter_weight_buckets(*arguments)

    monkeypatch.setattr("rluf.serve.policy_deployment.iter_weight_buckets", truncate_then_read)
    await reload_policy(policy, two, "two")
    with pytest.raises(ActorLostError, match="version two could not be loaded"):
        await policy.check_health()


async def test_a_return_to_the_old_version_during_a_load_ends_on_the_old_one(tmp_path: Path) -> None:
    one, two, three = (write_policy_folder(tmp_path / name, PLAIN) for name in ("one", "two", "three"))
    policy, engine = make_replica(one)
    engine.gate.clear()
    await policy.reconfigure({"path": str(two), "version": "two"})
    while not engine.is_paused:
        await asyncio.sleep(0.01)
    await policy.reconfigure({"path": str(three), "version": "three"})
    await policy.reconfigure({"path": str(one), "version": "one"})
    engine.gate.set()
    await wait_for_changes(policy)
    assert await policy.describe() == "one"
