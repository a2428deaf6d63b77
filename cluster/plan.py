"""Resource plan: the bundles a run reserves, and their check against the cluster before anything starts.

Pure functions of settings and numbers; only `check_host_disk` reads the machine (free disk space).
"""

from __future__ import annotations

import io
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rluf.config.derived import (
    ActorPoolPlan,
    estimate_checkpoint_bytes,
    estimate_host_bytes,
    estimate_policy_bytes,
    format_bytes,
    plan_actor_pools,
)
from rluf.config.model_shape import estimate_model_shape
from rluf.config.settings import Settings
from rluf.errors import ResourceError

logger = logging.getLogger(__name__)

RUN_FOLDER_BYTES = 64 << 20
"""Allowance for metrics, logs and the report of a run."""
RESOURCE_TOLERANCE = 1e-9
"""Resource amounts are sums of fractions such as 0.1, which differ from the exact sum by rounding."""


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Actor pools of a run and what each reserves.

    `training_pools` are the actors that run concurrently during training, `reward_training_pools` the reward training
    workers that run before them. `host_bytes` estimates the host memory of the former, of which engines and learners
    share GPUs where `is_colocated`.
    """

    training_pools: tuple[ActorPoolPlan, ...]
    reward_training_pools: tuple[ActorPoolPlan, ...]
    host_bytes: int
    is_colocated: bool = False

    @property
    def placed_pools(self) -> tuple[ActorPoolPlan, ...]:
        """`training_pools` as Ray places them: an engine and a learner that share a GPU are one."""
        return _merge_colocated_pools(self.training_pools) if self.is_colocated else self.training_pools

    @property
    def cpu_count(self) -> float:
        """Ray CPUs of the larger of the two phases; at least 1, which reading the log takes."""
        return max(1.0, *(_total(pools, "CPU") for pools in (self.training_pools, self.reward_training_pools)))

    @property
    def gpu_count(self) -> float:
        """GPUs of the larger of the two phases."""
        return max(_count_gpus(pools) for pools in (self.placed_pools, self.reward_training_pools))

    @property
    def bundles(self) -> tuple[dict[str, float], ...]:
        """One Ray bundle per placed actor of the training phase, the largest first."""
        return tuple(_pool_bundle(pool) for pool in self._pools_largest_first for _ in range(pool.actor_count))

    @property
    def node_labels(self) -> tuple[dict[str, str], ...]:
        """The labels that the node of each of `bundles` must have."""
        return tuple(pool.node_labels for pool in self._pools_largest_first for _ in range(pool.actor_count))

    @property
    def autoscaler_bundles(self) -> tuple[tuple[dict[str, float], dict[str, str]], ...]:
        """Bundles, with labels, that an autoscaler must provide so that either phase can run.

        Those of the training phase, then the part of reward training's that exceeds their sum.
        """
        requests = list(zip(self.bundles, self.node_labels, strict=True))
        # The phases run one after the other and share nodes: only the excess of the second one is requested.
        excess = {
            kind: _total(self.reward_training_pools, kind) - sum(bundle.get(kind, 0.0) for bundle in self.bundles)
            for kind in ("CPU", "GPU")
        }
        for pool in self.reward_training_pools:
            for _ in range(pool.actor_count):
                bundle = {
                    kind: min(amount, excess[kind])
                    for kind, amount in _pool_bundle(pool).items()
                    if excess[kind] > RESOURCE_TOLERANCE
                }
                excess = {kind: amount - bundle.get(kind, 0.0) for kind, amount in excess.items()}
                requests += [(bundle, pool.node_labels)] if bundle else []
        return tuple(requests)

    @property
    def _pools_largest_first(self) -> list[ActorPoolPlan]:
        return sorted(self.placed_pools, key=lambda pool: (-pool.gpus_per_actor, -pool.cpus_per_actor))


def plan_resources(settings: Settings) -> ResourcePlan:
    """The resource plan of `settings`."""
    pools = plan_actor_pools(settings)
    return ResourcePlan(
        training_pools=tuple(pool for pool in pools if pool.role != "reward_training"),
        reward_training_pools=tuple(pool for pool in pools if pool.role == "reward_training"),
        host_bytes=estimate_host_bytes(settings),
        is_colocated=settings.is_colocated,
    )


def _merge_colocated_pools(pools: Sequence[ActorPoolPlan]) -> tuple[ActorPoolPlan, ...]:
    """`pools` with engines and learners as pairs, each with a GPU to itself, whatever their shares of it are."""
    rollout, learner = (next(pool for pool in pools if pool.role == role) for role in ("rollout", "learner"))
    pair = replace(
        rollout,
        name="rollout with learner",
        cpus_per_actor=rollout.cpus_per_actor + learner.cpus_per_actor,
        gpus_per_actor=1.0,
        node_labels=rollout.node_labels | learner.node_labels,
    )
    return pair, *(pool for pool in pools if pool not in (rollout, learner))


def _pool_bundle(pool: ActorPoolPlan) -> dict[str, float]:
    return {"CPU": pool.cpus_per_actor, **({"GPU": pool.gpus_per_actor} if pool.gpus_per_actor else {})}


def _total(pools: Sequence[ActorPoolPlan], resource_kind: str) -> float:
    return sum(pool.actor_count * _pool_bundle(pool).get(resource_kind, 0.0) for pool in pools)


def _count_gpus(pools: Sequence[ActorPoolPlan]) -> float:
    """GPUs that the actors of `pools` need at once."""
    sharing = [pool for pool in pools if pool.role == "reward" and 0 < pool.gpus_per_actor < 1]
    total = _total([pool for pool in pools if pool not in sharing], "GPU")
    if sharing:
        # Reward actors share GPUs with each other only, and a share lies on one GPU: 3 of 0.6 need 3 GPUs.
        actors_per_gpu = _count_shares_per_gpu(sharing[0].gpus_per_actor)
        total += math.ceil(sum(pool.actor_count for pool in sharing) / actors_per_gpu)
    return total


def _count_shares_per_gpu(share: float) -> int:
    return math.floor(1 / share + RESOURCE_TOLERANCE)


def _count_places(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many of `bundle` a node has room for."""
    counts_by_kind = []
    for kind, amount in bundle.items():
        available = node.get(kind, 0.0)
        if kind == "GPU" and amount < 1:
            whole_gpus = math.floor(available + RESOURCE_TOLERANCE)
            rest = max(0.0, available - whole_gpus)
            counts_by_kind.append(
                whole_gpus * _count_shares_per_gpu(amount) + math.floor(rest / amount + RESOURCE_TOLERANCE)
            )
        else:
            counts_by_kind.append(math.floor(available / amount + RESOURCE_TOLERANCE))
    return min(counts_by_kind)


def format_plan(resource_plan: ResourcePlan, *, use_rich: bool) -> str:
    """The plan as a table, by rich for a terminal or as plain aligned text."""
    header = ("pool", "actors", "CPU each", "GPU each", "memory each (estimate)")
    rows = [
        (
            pool.name,
            str(pool.actor_count),
            f"{pool.cpus_per_actor:g}",
            f"{pool.gpus_per_actor:g}",
            format_bytes(pool.bytes_per_actor) if pool.memory_bytes else "-",
        )
        for pool in (*resource_plan.training_pools, *resource_plan.reward_training_pools)
    ]
    host_memory = format_bytes(resource_plan.host_bytes)
    total = (
        f"at once: {resource_plan.cpu_count:g} CPU, {resource_plan.gpu_count:g} GPU, about {host_memory} of host memory"
    )
    if use_rich:
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, caption=total)
        for row in rows:
            table.add_row(*row)
        output = io.StringIO()
        Console(file=output, force_terminal=True).print(table)
        return output.getvalue()
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([*lines, total]) + "\n"


def check_plan(
    resource_plan: ResourcePlan, cluster_resources: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()
) -> None:
    """Compare a plan with the cluster's total resources (`ray.cluster_resources()`), and with each node's when given.

    Raises ResourceError naming what is missing, which actors request it, and the ways out. Memory is an estimate, so
    a shortage of it is only logged as a warning.
    """
    for kind, needed in (("GPU", resource_plan.gpu_count), ("CPU", resource_plan.cpu_count)):
        available = cluster_resources.get(kind, 0.0)
        if needed > available + RESOURCE_TOLERANCE:
            advice = _gpu_shortage_advice(needed, available) if kind == "GPU" else _cpu_shortage_advice(needed)
            raise ResourceError(
                f"the plan needs {needed:g} {kind}s, but the cluster has {available:g} "
                f"({_describe_requesters(resource_plan, kind)}); {advice}"
            )
    if nodes:
        for bundle, node_labels in zip(resource_plan.bundles, resource_plan.node_labels, strict=True):
            _check_bundle_fits(bundle, node_labels, nodes)
        for pool in resource_plan.placed_pools:
            _check_pool_fits(pool, resource_plan.placed_pools, nodes)
    free_memory = cluster_resources.get("memory")
    if free_memory is not None and resource_plan.host_bytes > free_memory:
        logger.warning(
            "plan: the actors may need about %s of host memory and Ray reports %s free; "
            "if they die, lower algorithm.micro_batch_tokens or rollout.kv_cache_gib",
            format_bytes(resource_plan.host_bytes),
            format_bytes(free_memory),
        )


def _check_bundle_fits(
    bundle: Mapping[str, float], node_labels: Mapping[str, str], nodes: Sequence[Mapping[str, float]]
) -> None:
    """Raise ResourceError when no node with the labels is large enough for a bundle, which cannot span nodes."""
    labeled_nodes = [node for node in nodes if all(f"{key}={value}" in node for key, value in node_labels.items())]
    if not labeled_nodes:
        raise ResourceError(_no_label_message(node_labels, nodes))
    if any(all(node.get(kind, 0.0) >= amount for kind, amount in bundle.items()) for node in labeled_nodes):
        return
    requested = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    kind = "GPU" if "GPU" in bundle else "CPU"
    largest = max(node.get(kind, 0.0) for node in labeled_nodes)
    raise ResourceError(
        f"one actor needs {requested} on one node, but the largest node {_label_phrase(node_labels)}has {largest:g} "
        f"{kind}s; lower cluster.gpus_per_engine, or add a larger node"
    )


def _check_pool_fits(pool: ActorPoolPlan, pools: Sequence[ActorPoolPlan], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ResourceError when the nodes that can run a pool's actors are too few for it and the pools bound to them.

    Each condition is necessary, none is sufficient: what Ray cannot place all the same meets timeouts.actor_start_s.
    """
    labels, bundle = _list_labels(pool), _pool_bundle(pool)
    suited = [node for node in nodes if labels <= node.keys() and (not pool.gpus_per_actor or node.get("GPU"))]
    bound = [p for p in pools if labels <= _list_labels(p) and (p.gpus_per_actor or not pool.gpus_per_actor)]
    label_text = f"{_label_phrase(pool.node_labels)}(cluster.node_labels)" if labels else "that can run them"
    advice = "give the label to more nodes, or request fewer actors there, or remove the entry from cluster.node_labels"
    if not labels:
        advice = "request fewer actors, or smaller ones (cluster.gpus_per_engine), or add nodes"
    for kind in bundle:
        needed, available = _total(bound, kind), sum(node.get(kind, 0.0) for node in suited)
        if needed > available + RESOURCE_TOLERANCE:
            names = ", ".join(f"{p.name} {p.actor_count} x {_pool_bundle(p).get(kind, 0.0):g}" for p in bound)
            raise ResourceError(
                f"{names} need {needed:g} {kind}s on nodes {label_text}, which have {available:g}; {advice}"
            )
    slot_count = sum(_count_places(bundle, node) for node in suited)
    if slot_count < pool.actor_count:
        request = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        raise ResourceError(
            f"{pool.name}: {pool.actor_count} actors of {request} each, which span no nodes, but the nodes have places "
            f"for {slot_count}; {advice}"
        )


def _list_labels(pool: ActorPoolPlan) -> set[str]:
    return {f"{key}={value}" for key, value in pool.node_labels.items()}


def _label_phrase(node_labels: Mapping[str, str]) -> str:
    return "".join(f"with the label {key}={value} " for key, value in node_labels.items())


def _no_label_message(node_labels: Mapping[str, str], nodes: Sequence[Mapping[str, float]]) -> str:
    # Ray gives every node a label with its own id: of no use as a suggestion.
    labels = sorted({key for node in nodes for key in node if "=" in key and not key.startswith("ray.io/node-id")})
    return (
        f"cluster.node_labels requests nodes {_label_phrase(node_labels)}but no node has it (existing labels: "
        f"{', '.join(labels) or 'none'}); start a node with it (ray start --labels key=value), or name an existing "
        "label, or remove the entry from cluster.node_labels"
    )


def _describe_requesters(resource_plan: ResourcePlan, resource_kind: str) -> str:
    phases = (resource_plan.training_pools, resource_plan.reward_training_pools)
    largest_phase = max(phases, key=lambda pools: _total(pools, resource_kind))
    amounts = [(pool.name, pool.actor_count, _pool_bundle(pool).get(resource_kind, 0.0)) for pool in largest_phase]
    return ", ".join(f"{name} {count} x {amount:g}" for name, count, amount in amounts if amount)


def _gpu_shortage_advice(needed: float, available: float) -> str:
    if available == 0:
        return (
            "set cluster.gpus_per_engine=0, cluster.gpus_per_learner=0 and cluster.gpus_per_reward=0 to run on CPUs; "
            f"or set RAY_ADDRESS to a cluster with {math.ceil(needed)} GPUs, or timeouts.autoscale_s where nodes join "
            "later; or, if this machine has GPUs, check that nvidia-smi lists them and CUDA_VISIBLE_DEVICES does not "
            "hide them"
        )
    return (
        "lower rollout.engines, learner.workers or objectives.*.replicas; or let reward actors share a GPU or use none "
        f"(cluster.gpus_per_reward=0.1 or 0); or add nodes until the cluster has {math.ceil(needed)} GPUs"
    )


def _cpu_shortage_advice(needed: float) -> str:
    return (
        "lower rollout.engines, learner.workers or objectives.*.replicas; or use a cluster with "
        f"{math.ceil(needed)} CPUs (RAY_ADDRESS)"
    )


def run_disk_bytes(settings: Settings) -> int:
    """Bytes a run may write to its folder: the final policy, small files, and the checkpoints that exist at once."""
    learner, checkpoint_count = settings.learner, 0
    if learner.checkpoint_every_steps:
        checkpoint_count = math.ceil(settings.algorithm.steps / learner.checkpoint_every_steps)
    if learner.keep_checkpoints:
        # In addition to the newest ones: the best one, and the one being written.
        checkpoint_count = min(checkpoint_count, learner.keep_checkpoints + 2)
    return estimate_policy_bytes(settings) + checkpoint_count * estimate_checkpoint_bytes(settings) + RUN_FOLDER_BYTES


def cache_disk_bytes(settings: Settings) -> int:
    """Bytes a run may write to its cache: the converted policy, and each reward model with its best epoch."""
    objectives = settings.objectives.by_objective
    trained = [name for name, o in objectives.items() if o.source == "model" and o.path is None]
    backbones = [settings.reward.get_head_settings(name).backbone for name in trained]
    # Two copies (the current and the best epoch) of float32 weights.
    bytes_per_parameter = 2 * 4
    return estimate_policy_bytes(settings) + sum(
        bytes_per_parameter * estimate_model_shape(backbone).parameter_count for backbone in backbones
    )


def check_free_space(folder: Path, needed_bytes: int, free_bytes: int, setting_key: str) -> None:
    """Raise ResourceError when `folder` has too few bytes free; `setting_key` names the setting that moves it."""
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{folder} has {format_bytes(free_bytes)} free, but the run may need {format_bytes(needed_bytes)}; free "
            f"some space there, or point {setting_key} at a larger disk, or lower learner.keep_checkpoints or the size "
            "of the model"
        )


def check_host_disk(settings: Settings, runs_folder: Path, cache_folder: Path) -> None:
    """Check the free disk space of both folders on this machine. Raises ResourceError naming the folder."""
    needs = [
        (runs_folder, run_disk_bytes(settings), "run.root"),
        (cache_folder, cache_disk_bytes(settings), "run.cache"),
    ]
    existing_folders = [_nearest_existing_folder(folder) for folder, _, _ in needs]
    is_same_disk = len({folder.stat().st_dev for folder in existing_folders}) == 1
    total_bytes = sum(needed_bytes for _, needed_bytes, _ in needs)
    for (folder, needed_bytes, setting_key), existing_folder in zip(needs, existing_folders, strict=True):
        free_bytes = shutil.disk_usage(existing_folder).free
        check_free_space(folder, total_bytes if is_same_disk else needed_bytes, free_bytes, setting_key)


def _nearest_existing_folder(folder: Path) -> Path:
    """`folder` or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
