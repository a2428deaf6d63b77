"""An object store that is full, on a disk that is full: one message that says what to do, and no hang. Real Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import ObjectRef

from rluf.errors import ResourceError
from rluf.train.actor_groups import kept, within

pytestmark = pytest.mark.slow


@pytest.fixture
def tight_ray(small_disk: Callable[[int], Path]) -> Iterator[None]:
    """A store of 80 MB that may spill 8 MB."""
    spill = {"type": "filesystem", "params": {"directory_path": str(small_disk(8))}}
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000,
        _system_config={"object_spilling_config": json.dumps(spill), "local_fs_capacity_threshold": 0.001},
    )  # fmt: skip
    yield
    ray.shutdown()


class Hoarder:
    """Makes objects of 30 MB."""

    def make(self) -> np.ndarray:
        return np.ones(30_000_000, np.uint8)


@pytest.mark.usefixtures("tight_ray")
def test_a_full_store_and_a_full_disk_are_one_message() -> None:
    async def fill() -> None:
        worker = ray.remote(Hoarder).remote()
        held: list[ObjectRef[np.ndarray]] = []
        for _ in range(6):
            held.append(worker.make.remote())
            await within(held[-1], 60.0, "worker 0 (testing)")

    told = r"worker 0 \(testing\) found Ray's object store full.*free the disk that holds Ray's folder"
    with pytest.raises(ResourceError, match=told) as caught:
        asyncio.run(fill())
    assert len(str(caught.value).splitlines()) == 1
    own = []
    with pytest.raises(ResourceError, match=r"^the driver found Ray's object store full"):
        for _ in range(6):
            own.append(kept(np.ones(30_000_000, np.uint8)))
