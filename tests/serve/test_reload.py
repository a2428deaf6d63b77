"""How a replica changes a policy's weights. The engine is a stand-in with the real checklist."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from rluf.backends.vllm.engine import RolloutEngine
from rluf.backends.weight_transfer.base import ShmSender
from rluf.backends.weight_transfer.manifest import Checklist
from rluf.config.settings import Settings
from rluf.errors import LostError
from rluf.serve.policy_deployment import Policy, weights

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
PLAIN = {EMBEDDINGS: (8, 4), NORM: (4,)}


class Engine:
    """What a Policy sees of its engine; weights must come as its checklist says. `gate` holds up the first bucket."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.tied, self.paused, self.gate = tied, False, asyncio.Event()
        self.trouble: Exception | None = None
        self._checklist = Checklist(folder, tied)
        self.gate.set()

    async def begin_update(self, _: dict[str, Any]) -> None:
        self._checklist.start()
        self.paused = True

    async def update(self, bucket: dict[str, Any]) -> None:
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        self._checklist.admit((name, shape) for name, _, shape, _ in bucket["entries"])

    async def finish_update(self, _: int) -> None:
        self._checklist.finish()
        self.paused = False

    def health(self) -> dict[str, Any]:
        return {"alive": True}


def policy_folder(place: Path, shapes: Mapping[str, tuple[int, ...]], **files: Mapping[str, tuple[int, ...]]) -> Path:
    place.mkdir()
    for name, held in {"model": shapes, **files}.items():
        save_file({key: torch.zeros(shape) for key, shape in held.items()}, place / f"{name}.safetensors")
    (place / "config.json").write_text("{}")
    return place


def serving(folder: Path, *, tied: bool = True) -> tuple[Policy, Engine]:
    """A replica that serves version one."""
    policy, engine = Policy(Settings().model_dump_json()), Engine(folder, tied)
    policy._begin(cast(RolloutEngine, engine), ShmSender(), folder, "one")
    return policy, engine


async def changed(policy: Policy) -> None:
    """Until all changes are through, however they ended."""
    await asyncio.gather(*policy._changes, return_exceptions=True)


async def take(policy: Policy, folder: Path, version: str) -> None:
    await policy.reconfigure({"path": str(folder), "version": version})
    await changed(policy)


@pytest.mark.parametrize(
    ("shapes", "tied"),
    [
        (PLAIN, True),
        (PLAIN | {HEAD: (8, 4)}, True),
        (PLAIN | {HEAD: (8, 4)}, False),
        ({"language_model.model.embed_tokens.weight": (8, 4), NORM: (4,)}, True),
        (PLAIN | {FREQUENCIES: (2,)}, True),
    ],
    ids=["tied", "tied and stored", "untied", "another prefix", "frequencies"],
)
async def test_an_engine_is_sent_what_it_expects(
    shapes: Mapping[str, tuple[int, ...]], tied: bool, tmp_path: Path
) -> None:
    policy, engine = serving(policy_folder(tmp_path / "one", shapes), tied=tied)
    await take(policy, policy_folder(tmp_path / "two", shapes), "two")
    assert await policy.describe() == "two"
    assert not engine.paused
    await policy.check_health()


async def test_a_tied_head_may_be_stored_in_one_version_and_not_in_the_next(tmp_path: Path) -> None:
    policy, _ = serving(policy_folder(tmp_path / "one", PLAIN | {HEAD: (8, 4)}))
    await take(policy, policy_folder(tmp_path / "two", PLAIN), "two")
    assert await policy.describe() == "two"


async def test_files_that_the_index_leaves_out_are_not_sent(tmp_path: Path) -> None:
    policy, _ = serving(policy_folder(tmp_path / "one", PLAIN))
    two = policy_folder(tmp_path / "two", PLAIN, consolidated={"tok_embeddings.weight": (8, 4)})
    index = {"weight_map": dict.fromkeys(PLAIN, "model.safetensors")}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    await take(policy, two, "two")
    assert await policy.describe() == "two"


@pytest.mark.parametrize("spoilt", ["shape", "truncated", "gone"])
async def test_a_version_that_does_not_fit_or_cannot_be_read_leaves_the_present_one(
    spoilt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, engine = serving(policy_folder(tmp_path / "one", PLAIN))
    two = policy_folder(tmp_path / "two", PLAIN if spoilt == "truncated" else {**PLAIN, NORM: (5,)})
    if spoilt == "truncated":
        (two / "model.safetensors").write_bytes(b"cut short")
    if spoilt == "gone":
        two = tmp_path / "nowhere"
    await take(policy, two, "two")
    assert "policy version two cannot be taken; the present one stays" in caplog.text
    assert await policy.describe() == "one"
    assert not engine.paused
    await policy.check_health()


@pytest.mark.parametrize("trouble", [OSError("gone"), RuntimeError("EngineCore failed"), Exception("collective_rpc")])
async def test_a_change_that_breaks_off_ends_the_replica(trouble: Exception, tmp_path: Path) -> None:
    policy, engine = serving(policy_folder(tmp_path / "one", PLAIN))
    engine.trouble = trouble
    await take(policy, policy_folder(tmp_path / "two", PLAIN), "two")
    with pytest.raises(LostError, match="version two could not be loaded"):
        await policy.check_health()
    with pytest.raises(LostError, match="version two could not be loaded"):
        await policy.chat([{"role": "user", "content": "Hello?"}], 1)
    engine.trouble = None
    await take(policy, tmp_path / "one", "one")  # only a new engine is sure to be whole
    with pytest.raises(LostError):
        await policy.check_health()


async def test_a_folder_that_changes_while_it_is_read_ends_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = serving(policy_folder(tmp_path / "one", PLAIN))
    two = policy_folder(tmp_path / "two", PLAIN)

    def reading(*arguments: Any) -> Any:
        (two / "model.safetensors").write_bytes(b"cut short")
        yield from weights(*arguments)

    monkeypatch.setattr("rluf.serve.policy_deployment.weights", reading)
    await take(policy, two, "two")
    with pytest.raises(LostError, match="version two could not be loaded"):
        await policy.check_health()


async def test_going_back_while_the_next_version_loads_ends_on_the_old_one(tmp_path: Path) -> None:
    one, two, three = (policy_folder(tmp_path / name, PLAIN) for name in ("one", "two", "three"))
    policy, engine = serving(one)
    engine.gate.clear()
    await policy.reconfigure({"path": str(two), "version": "two"})
    while not engine.paused:
        await asyncio.sleep(0.01)
    await policy.reconfigure({"path": str(three), "version": "three"})
    await policy.reconfigure({"path": str(one), "version": "one"})
    engine.gate.set()
    await changed(policy)
    assert await policy.describe() == "one"
