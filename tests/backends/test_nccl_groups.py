"""NCCL groups that are made again after the loss of an engine: real rendezvous over TCP, only NCCL is replaced."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rluf.backends.weight_transfer import ensure_weight_sender, nccl
from rluf.backends.weight_transfer.nccl import NcclReceiver, NcclSender
from rluf.config.load import load_settings
from rluf.errors import ActorLostError, WeightSyncError
from rluf.train.actor_calls import ActorGroups, ActorRef
from rluf.train.weight_sync import WeightSync

OVERRIDES = [
    "weight_sync.transport=nccl", "cluster.gpus_per_engine=2", "cluster.gpus_per_learner=1", "rollout.engines=3",
    "timeouts.call_s=20",
]  # fmt: skip


class StandInCommunicator:
    """Sends objects through the group's store, as PyNcclCommunicator sends tensors between GPUs."""

    available, disabled = True, False

    def __init__(self, group: Any, device: object) -> None:
        self.group, self.is_destroyed = group, False

    def destroy(self) -> None:
        self.is_destroyed = True


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    def send(iterator: Any, group: StandInCommunicator, **_: object) -> None:
        group.group.broadcast_obj([(name, tensor.clone()) for name, tensor in iterator], src=0)

    def receive(group: StandInCommunicator, post_unpack_func: Any, **_: object) -> None:
        post_unpack_func(group.group.broadcast_obj(None, src=0))

    monkeypatch.setattr(pynccl, "PyNcclCommunicator", StandInCommunicator)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", send)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_consumer", receive)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    event = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: event))


def find_address() -> tuple[str, int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return "127.0.0.1", int(listener.getsockname()[1])


class StandInEngine:
    """The workers of one engine, and what vLLM's side of the engine does with the learner's transfer info."""

    def __init__(self, index: int) -> None:
        from rluf.backends.vllm.engine import RolloutEngine

        self.engine = RolloutEngine(f"rollout {index}", index, load_settings(None, OVERRIDES).settings, cast(Any, None))
        self.receivers: list[NcclReceiver] = []
        self.group_id, self.joined_groups, self.ranks = "", 0, set[int]()

    def receive(self, pool: ThreadPoolExecutor, transfer_info: Mapping[str, Any], bucket: Any) -> list[torch.Tensor]:
        """One sync of one bucket; the tensor that each worker received."""
        if self.group_id != transfer_info["group_id"]:
            for receiver in self.receivers:
                receiver.close()
            ranks = [SimpleNamespace(data_parallel_index=0, world_size=2, rank=rank) for rank in range(2)]
            self.receivers = [NcclReceiver(torch.device("cpu"), cast(Any, rank)) for rank in ranks]
            init_info = self.engine._build_init_info(dict(transfer_info))
            list(pool.map(lambda receiver: receiver.begin(init_info), self.receivers))
            self.group_id, self.joined_groups = transfer_info["group_id"], self.joined_groups + 1
        self.ranks = {receiver._group.group.rank for receiver in self.receivers}
        received: list[torch.Tensor] = []

        def load(weights: Sequence[tuple[str, torch.Tensor]]) -> None:
            received.extend(tensor for _, tensor in weights)

        list(pool.map(lambda receiver: receiver.receive_bucket(bucket, load), self.receivers))
        return received


def sync(
    sender: NcclSender | None, engines: Mapping[str, StandInEngine], version: int, pool: ThreadPoolExecutor
) -> NcclSender:
    """One weight sync to `engines` by name."""
    indices = {name: engine.engine.engine_index for name, engine in engines.items()}
    new_sender = ensure_weight_sender(sender, load_settings(None, OVERRIDES).settings, indices, find_address)
    assert isinstance(new_sender, NcclSender)
    transfer_info = new_sender.begin(version)
    # Joining and receiving happen on every engine at once, while the learner's next call waits for them.
    bucket = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]]}
    with ThreadPoolExecutor(4) as engine_threads:
        waits = [engine_threads.submit(engine.receive, pool, transfer_info, bucket) for engine in engines.values()]
        assert new_sender.send_bucket([("w", torch.full((2,), float(version)))])["names"] == bucket["names"]
        new_sender.end()
        for wait in waits:
            received = wait.result(timeout=20)
            assert len(received) == 2 and all(tensor.tolist() == [version, version] for tensor in received)
    return new_sender


@pytest.mark.usefixtures("without_gpus")
def test_a_group_is_made_again_without_a_lost_engine_and_with_its_replacement() -> None:
    with ThreadPoolExecutor(8) as pool:
        engines = {f"rollout {index}": StandInEngine(index) for index in range(3)}
        first = sync(sync(None, engines, 1, pool), engines, 2, pool)
        assert [engine.joined_groups for engine in engines.values()] == [1, 1, 1]
        assert [engine.ranks for engine in engines.values()] == [{1, 2}, {3, 4}, {5, 6}]
        del engines["rollout 1"]
        second = sync(first, engines, 3, pool)
        assert second is not first and first._group is None
        assert [engine.ranks for engine in engines.values()] == [{1, 2}, {3, 4}]
        replacement = {"rollout 1, start 2": StandInEngine(1)}
        third = sync(second, replacement, 3, pool)  # alone, before it joins the others
        everyone = {**engines, **replacement}
        fourth = sync(third, everyone, 4, pool)
        assert [engine.ranks for engine in everyone.values()] == [{1, 2}, {5, 6}, {3, 4}]
        assert sync(fourth, everyone, 5, pool) is fourth
        # Between the loss of the last engine and its replacement there is nobody to send to.
        alone = ensure_weight_sender(fourth, load_settings(None, OVERRIDES).settings, {}, find_address)
        alone.begin(6)
        alone.send_bucket([("w", torch.zeros(2))])
        alone.end()
        alone.close()


@pytest.mark.usefixtures("without_gpus")
def test_a_rendezvous_that_vllm_cannot_reach_is_refused() -> None:
    settings = load_settings(None, OVERRIDES).settings
    sender = ensure_weight_sender(None, settings, {"rollout 0": 0}, lambda: ("fd00::7", 1234))
    with pytest.raises(WeightSyncError, match=r"IPv4 only, but the learner's address is fd00::7"):
        sender.begin(1)
    sender.close()


class StandInMethod:
    """A remote method that records its arguments and answers, fails, or never answers."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], answers: Mapping[str, Any]) -> None:
        self._name, self._calls, self._answers = name, calls, answers

    def options(self, **_: object) -> StandInMethod:
        return self

    async def remote(self, *arguments: object) -> Any:
        self._calls.append((self._name, *arguments))
        answer = self._answers.get(self._name)
        if isinstance(answer, Exception):
            raise answer
        if answer == "hangs":
            await asyncio.sleep(60)
        return answer


class StandInHandle:
    """Any method by name."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> StandInMethod:
        return StandInMethod(name, self.calls, self._answers)


def make_sync(transport: str, *engines: Any) -> tuple[WeightSync, ActorGroups, Any]:
    overrides = OVERRIDES if transport == "nccl" else []
    learner = StandInHandle(begin_weight_sync={})
    actor_groups = ActorGroups(
        rollout_actors=[ActorRef("rollout", 2 * i, cast(Any, engine)) for i, engine in enumerate(engines)],
        learner_actors=[ActorRef("learner", 0, cast(Any, learner))],
    )
    return WeightSync(load_settings(None, overrides).settings, actor_groups), actor_groups, learner


async def test_the_learner_learns_which_engines_take_part_in_a_sync() -> None:
    weight_sync, actor_groups, learner = make_sync("nccl", StandInHandle(), StandInHandle())
    await weight_sync.transfer(3)
    assert learner.calls[0] == ("begin_weight_sync", 3, {"rollout 0": 0, "rollout 2": 2})
    assert actor_groups.in_collective_sync is False


@pytest.mark.parametrize("method", ["begin_weight_update", "finish_weight_update"])
async def test_a_loss_during_a_broadcast_is_raised_while_the_others_hang(method: str) -> None:
    """The first engine waits in the broadcast for the lost one: its own deadline would end the run."""
    lost = StandInHandle(**{method: ActorLostError("rollout 2 died", "rollout 2")})
    weight_sync, actor_groups, _ = make_sync("nccl", StandInHandle(**{method: "hangs"}), lost)
    start_time = time.monotonic()
    with pytest.raises(ActorLostError, match="rollout 2 died"):
        await weight_sync.transfer(3)
    assert time.monotonic() - start_time < 5
    assert actor_groups.in_collective_sync, "no engine may be replaced alone now"


async def test_a_loss_over_shared_memory_waits_for_the_other_engines() -> None:
    lost = StandInHandle(begin_weight_update=ActorLostError("rollout 2 died", "rollout 2"))
    weight_sync, actor_groups, _ = make_sync("shm", StandInHandle(), lost)
    with pytest.raises(ActorLostError, match="rollout 2 died"):
        await weight_sync.transfer(3)
    assert not actor_groups.in_collective_sync


def test_a_sender_of_another_transport_stays(tmp_path: Any) -> None:
    settings = load_settings(None, ["weight_sync.transport=disk", f"run.cache={tmp_path}"]).settings
    sender = ensure_weight_sender(None, settings, {"rollout 0": 0}, find_address)
    assert ensure_weight_sender(sender, settings, {}, find_address) is sender
    sender.close()
    assert not isinstance(sender, nccl.NcclSender)
