"""A full object store on a full disk: one message with the remedy, and no hang. Real Ray."""

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
from rluf.train.actor_calls import call_with_timeout, put_object

pytestmark = pytest.mark.slow


@pytest.fixture
def small_store_ray(small_disk: Callable[[int], Path]) -> Iterator[None]:
    """A store of 80 MB that may spill 8 MB."""
    spilling = {"type": "filesystem", "params": {"directory_path": str(small_disk(8))}}
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000,
        _system_config={"object_spilling_config": json.dumps(spilling), "local_fs_capacity_threshold": 0.001},
    )  # fmt: skip
    yield
    ray.shutdown()


class ArrayMaker:
    """Makes objects of 30 MB."""

    def make_array(self) -> np.ndarray:
        return np.ones(30_000_000, np.uint8)


@pytest.mark.usefixtures("small_store_ray")
def test_a_full_store_on_a_full_disk_is_one_message() -> None:
    async def fill_store() -> None:
        worker = ray.remote(ArrayMaker).remote()
        refs: list[ObjectRef[np.ndarray]] = []
        for _ in range(6):
            refs.append(worker.make_array.remote())
            await call_with_timeout(refs[-1], 60.0, "worker 0 (testing)")

    message = r"worker 0 \(testing\) found Ray's object store full.*free the disk that holds Ray's folder"
    with pytest.raises(ResourceError, match=message) as raised:
        asyncio.run(fill_store())
    assert len(str(raised.value).splitlines()) == 1
    driver_refs = []
    with pytest.raises(ResourceError, match=r"^the driver found Ray's object store full"):
        for _ in range(6):
            driver_refs.append(put_object(np.ones(30_000_000, np.uint8)))
