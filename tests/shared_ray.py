"""One Ray cluster per test process: each module connects to it as a job of its own, and must leave it empty."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray._common.utils import reset_ray_address
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[1]
CPU_COUNT = 2
IDLE_TIMEOUT_S = 60.0
RAY_DATA_ACTORS = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor")
"""Detached actors that Ray Data starts once per cluster, for all jobs."""


class SharedRay:
    """A cluster of one node with 2 CPUs, whose workers can import the tests. Starts at the first connection."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None

    @property
    def address(self) -> str:
        """For RAY_ADDRESS, where the code under test connects by itself."""
        return str(self._start().address)

    @contextmanager
    def connect(self, worker_environment: Mapping[str, str] | None = None) -> Iterator[None]:
        """Connect this process. The job's actors end with it; other remains are an AssertionError."""
        runtime_env = {"env_vars": dict(worker_environment)} if worker_environment else None
        ray.init(address=self.address, log_to_driver=False, runtime_env=runtime_env)
        try:
            yield
        finally:
            ray.shutdown()
            self.check_idle()

    def check_idle(self) -> None:
        """Wait until nothing runs on the cluster. Else ends it, for the next module, and raises AssertionError."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while remains := self.list_remains():
            # A detached actor does not end by waiting.
            if time.monotonic() > deadline or any(name.startswith("detached") for name in remains):
                self.close()
                raise AssertionError(f"left on the shared Ray cluster: {', '.join(remains)}")
            time.sleep(0.1)

    def list_remains(self) -> list[str]:
        """Actors, placement groups and occupied CPUs, in words."""
        state = self._start().global_state
        remains = [
            f"{'detached ' if actor['IsDetached'] else ''}actor {actor['ActorClassName']} {actor['Name']}".strip()
            for actor in state.actor_table(None).values()
            if actor["State"] != "DEAD" and actor["ActorClassName"] not in RAY_DATA_ACTORS
        ]
        groups = state.placement_group_table().items()
        remains += [f"placement group {name}" for name, group in groups if group["state"] != "REMOVED"]
        if (free_cpus := state.available_resources().get("CPU", 0.0)) != CPU_COUNT:
            remains.append(f"{CPU_COUNT - free_cpus:g} occupied CPUs")
        return remains

    def close(self) -> None:
        """End the cluster; a later connection starts another one."""
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None

    def _start(self) -> Cluster:
        if self._cluster is None:
            ensure_token_if_auth_enabled({}, create_token_if_missing=True)  # ray.init does so for a local cluster
            self._cluster = Cluster()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(ROOT))
                self._cluster.add_node(
                    num_cpus=CPU_COUNT,
                    include_dashboard=False,
                    dashboard_port=None,  # any free one: other test processes have a cluster too
                    include_log_monitor=False,
                    object_store_memory=256 << 20,
                )
            # The file with the cluster's address: Ray Train's controllers of other processes would read it.
            reset_ray_address()
        return self._cluster
