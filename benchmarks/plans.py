"""Which plans find room on which clusters: predicted by the plan, then tried on Ray with declared GPUs.

Every node is a raylet on this machine that says it has GPUs: placement is real, nothing computes. Prints the table of
docs/clusters.md; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from cluster.autoscaling import nodes
from cluster.placement import Places
from cluster.plan import check, plan
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ResourceError, StallError

CONFIGS = Path(__file__).parents[1] / "configs"
ONE_GPU = ("cluster.gpus_per_engine=1",)
LABEL = ("cluster.labels=[learner:kind=learn]",)
HUGE = ("rollout.engines=48", "learner.ranks=128")


@dataclass(frozen=True)
class Case:
    """A config with overrides on `count` nodes of `gpus` GPUs and `cpus` CPUs each."""

    label: str
    config: str
    overrides: tuple[str, ...]
    count: int
    gpus: int
    cpus: int
    labelled: int = 0
    """Nodes of these that have the label kind=learn."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The cluster it is tried on."""
        return self.count, self.gpus, self.cpus, self.labelled

    @property
    def settings(self) -> Settings:
        """The settings of the case."""
        return load_settings(CONFIGS / self.config, self.overrides).settings


CASES = (
    Case("quickstart, engine on the GPU", "quickstart.yaml", ONE_GPU, 1, 1, 8),
    Case(
        "quickstart, engine and learner on one GPU",
        "quickstart.yaml",
        (*ONE_GPU, "cluster.gpus_per_learner=1"),
        1,
        1,
        8,
    ),
    Case("8B", "llama3-8b-8gpu.yaml", (), 1, 8, 96),
    Case("8B with 5 engines", "llama3-8b-8gpu.yaml", ("rollout.engines=5",), 1, 8, 96),
    Case("70B", "llama3-70b-64gpu.yaml", (), 8, 8, 96),
    Case(
        "70B, 2 engines, 16 ranks, small nodes",
        "llama3-70b-64gpu.yaml",
        ("rollout.engines=2", "learner.ranks=16"),
        8,
        4,
        96,
    ),
    Case("70B, learners on labelled nodes", "llama3-70b-64gpu.yaml", LABEL, 8, 8, 96, 4),
    Case("70B, learners on labelled nodes, too few", "llama3-70b-64gpu.yaml", LABEL, 8, 8, 96, 3),
    Case("70B, learners on labelled nodes, none", "llama3-70b-64gpu.yaml", LABEL, 8, 8, 96),
    Case("70B, 48 engines, 128 ranks", "llama3-70b-64gpu.yaml", HUGE, 8, 64, 256),
    Case("70B, 49 engines, 128 ranks", "llama3-70b-64gpu.yaml", ("rollout.engines=49", HUGE[1]), 8, 64, 256),
)


def predicted(case: Case) -> str:
    """Empty when the plan should find room, else why not."""
    node = {"CPU": float(case.cpus), "GPU": float(case.gpus)}
    each = [node | ({"kind=learn": 1.0} if number < case.labelled else {}) for number in range(case.count)]
    try:
        check(plan(case.settings), {key: amount * case.count for key, amount in node.items()}, each)
    except ResourceError as error:
        return str(error)
    return ""


async def tried(case: Case, seconds: float) -> bool:
    """Whether Ray gives the engines and learners their room."""
    places = Places(case.settings, learners=True)
    try:
        await places.ready(seconds)
    except StallError:
        return False
    finally:
        places.release()
    return True


def main() -> None:
    """One cluster a shape; print the table, then JSON."""
    import ray  # after the package cluster, which switches its token on
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose label has this in it")
    cases = [case for case in CASES if parser.parse_args().only in case.label]
    print("| plan | nodes | needs | predicted | Ray |\n|---|---|---|---|---|")
    agreed = 0
    for shape in dict.fromkeys(case.shape for case in cases):
        count, gpus, cpus, labelled = shape
        cluster = Cluster()
        for number in range(count):
            labels = {"kind": "learn"} if number < labelled else {}
            cluster.add_node(
                num_cpus=cpus, num_gpus=gpus, labels=labels, include_dashboard=False, object_store_memory=80 << 20
            )
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        for case in (one for one in cases if one.shape == shape):
            reason, asked = predicted(case), plan(case.settings)
            room = asyncio.run(tried(case, 30.0 if not reason else 5.0))
            agreed += room == (not reason)
            told = "placed" if not reason else f"refused: {reason.partition(';')[0]}"
            where = f"{len(nodes())} x {gpus} GPU, {cpus} CPU" + (f", {labelled} with the label" if labelled else "")
            needs = f"{asked.gpus:g} GPU, {asked.cpus:g} CPU"
            print(f"| {case.label} | {where} | {needs} | {told} | {'placed' if room else 'no room'} |", flush=True)
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"cases": len(cases), "as_predicted": agreed}))


if __name__ == "__main__":
    main()
