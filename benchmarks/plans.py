"""Placement of resource plans on clusters: predicted by the plan, then tried on Ray with declared GPUs.

Every node is a raylet on this machine that declares GPUs: placement is real, nothing computes. Prints the table of
docs/clusters.md; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from cluster.autoscaling import list_node_resources
from cluster.placement import PlacementGroups
from cluster.plan import check_plan, plan_resources
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import DeadlineError, ResourceError

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"
ONE_GPU = ("cluster.gpus_per_engine=1",)
LABELED_LEARNERS = ("cluster.node_labels={learner: {kind: learn}}",)
LARGE_PLAN = ("rollout.engines=47", "learner.workers=128")


@dataclass(frozen=True)
class PlanCase:
    """A config with overrides on a cluster of equal nodes."""

    label: str
    config: str
    overrides: tuple[str, ...]
    node_count: int
    gpus_per_node: int
    cpus_per_node: int
    labeled_nodes: int = 0
    """How many of the nodes have the label kind=learn."""

    @property
    def cluster_shape(self) -> tuple[int, int, int, int]:
        """Nodes, GPUs per node, CPUs per node, labeled nodes."""
        return self.node_count, self.gpus_per_node, self.cpus_per_node, self.labeled_nodes

    @property
    def settings(self) -> Settings:
        """The settings of the case."""
        return load_settings(CONFIG_FOLDER / self.config, self.overrides).settings


PLAN_CASES = (
    PlanCase("quickstart, engine on the GPU", "quickstart.yaml", ONE_GPU, 1, 1, 8),
    PlanCase(
        "quickstart, engine and learner on one GPU",
        "quickstart.yaml",
        (*ONE_GPU, "cluster.gpus_per_learner=1"),
        1,
        1,
        8,
    ),
    PlanCase("8B", "llama3-8b-8gpu.yaml", (), 1, 8, 96),
    PlanCase("8B colocated on all 8 GPUs", "llama3-8b-8gpu.yaml", ("rollout.engines=8", "learner.workers=8"), 1, 8, 96),
    PlanCase("70B", "llama3-70b-64gpu.yaml", (), 8, 8, 96),
    PlanCase(
        "70B, 2 engines, 8 ranks, small nodes",
        "llama3-70b-64gpu.yaml",
        ("rollout.engines=2", "learner.workers=8"),
        8,
        4,
        96,
    ),
    PlanCase("70B, learners on labelled nodes", "llama3-70b-64gpu.yaml", LABELED_LEARNERS, 8, 8, 96, 4),
    PlanCase("70B, learners on labelled nodes, too few", "llama3-70b-64gpu.yaml", LABELED_LEARNERS, 8, 8, 96, 3),
    PlanCase("70B, learners on labelled nodes, none", "llama3-70b-64gpu.yaml", LABELED_LEARNERS, 8, 8, 96),
    PlanCase("70B, 47 engines, 128 ranks", "llama3-70b-64gpu.yaml", LARGE_PLAN, 8, 64, 256),
    PlanCase("70B, 48 engines, 128 ranks", "llama3-70b-64gpu.yaml", ("rollout.engines=48", LARGE_PLAN[1]), 8, 64, 256),
)


def predict_refusal(case: PlanCase) -> str:
    """The predicted refusal; empty if the plan should fit."""
    node_resources = {"CPU": float(case.cpus_per_node), "GPU": float(case.gpus_per_node)}
    resources_by_node = [
        node_resources | ({"kind=learn": 1.0} if node_index < case.labeled_nodes else {})
        for node_index in range(case.node_count)
    ]
    try:
        check_plan(
            plan_resources(case.settings),
            {key: amount * case.node_count for key, amount in node_resources.items()},
            resources_by_node,
        )
    except ResourceError as error:
        return str(error)
    return ""


async def try_placement(case: PlanCase, timeout_s: float) -> bool:
    """Whether Ray places the engines and learners in time."""
    placement_groups = PlacementGroups(case.settings, with_learners=True)
    try:
        await placement_groups.wait_until_ready(timeout_s)
    except DeadlineError:
        return False
    finally:
        placement_groups.release()
    return True


def main() -> None:
    """Start one cluster per shape; print the table, then JSON."""
    import ray  # after rluf, which enables token authentication
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose label contains this")
    cases = [case for case in PLAN_CASES if parser.parse_args().only in case.label]
    print("| plan | nodes | needs | predicted | Ray |\n|---|---|---|---|---|")
    agreed_count = 0
    for shape in dict.fromkeys(case.cluster_shape for case in cases):
        node_count, gpus, cpus, labeled = shape
        cluster = Cluster()
        for node_index in range(node_count):
            labels = {"kind": "learn"} if node_index < labeled else {}
            cluster.add_node(
                num_cpus=cpus, num_gpus=gpus, labels=labels, include_dashboard=False, object_store_memory=80 << 20
            )
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        for case in [case for case in cases if case.cluster_shape == shape]:
            refusal, resource_plan = predict_refusal(case), plan_resources(case.settings)
            is_placed = asyncio.run(try_placement(case, 30.0 if not refusal else 5.0))
            agreed_count += is_placed == (not refusal)
            prediction = "placed" if not refusal else f"refused: {refusal.partition(';')[0]}"
            cluster_text = f"{len(list_node_resources())} x {gpus} GPU, {cpus} CPU" + (
                f", {labeled} with the label" if labeled else ""
            )
            needs_text = f"{resource_plan.gpu_count:g} GPU, {resource_plan.cpu_count:g} CPU"
            outcome = "placed" if is_placed else "no room"
            print(f"| {case.label} | {cluster_text} | {needs_text} | {prediction} | {outcome} |", flush=True)
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"cases": len(cases), "as_predicted": agreed_count}))


if __name__ == "__main__":
    main()
