"""From settings to the bundles a run reserves, compared with what the cluster has before anything starts.

Pure functions of settings and numbers; what is read from the machine (free disk) is read in one place,
`check_host`.
"""

from __future__ import annotations

import io
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rluf.config.derived import Pool, checkpoint_bytes, host_bytes, policy_bytes, pools, show_bytes
from rluf.config.model_shape import model_shape
from rluf.config.settings import Settings
from rluf.errors import ResourceError

logger = logging.getLogger(__name__)

RUN_FOLDER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs, and what each reserves.

    `align` are the actors that run at once while the policy moves; `train` are the reward training workers before them.
    `host_bytes` estimates the host memory of the former.
    """

    align: tuple[Pool, ...]
    train: tuple[Pool, ...]
    host_bytes: int

    @property
    def cpus(self) -> float:
        """Ray CPUs of the hungrier of the two phases; reading the log takes one CPU in any case."""
        return max(1.0, *(sum(p.count * p.cpus for p in phase) for phase in (self.align, self.train)))

    @property
    def gpus(self) -> float:
        """GPUs of the hungrier of the two phases."""
        return max(sum(p.count * p.gpus for p in phase) for phase in (self.align, self.train))

    @property
    def bundles(self) -> tuple[dict[str, float], ...]:
        """One Ray bundle an actor of the alignment phase, the largest first."""
        return tuple(_bundle(pool) for pool in self._largest_first for _ in range(pool.count))

    @property
    def labels(self) -> tuple[dict[str, str], ...]:
        """The labels that the node of each of `bundles` must have."""
        return tuple(pool.labels for pool in self._largest_first for _ in range(pool.count))

    @property
    def asked(self) -> tuple[tuple[dict[str, float], dict[str, str]], ...]:
        """Bundles, with labels, that an autoscaler must find room for so that either phase can run.

        Those of the alignment phase, then of reward training what goes beyond their sum.
        """
        found = list(zip(self.bundles, self.labels, strict=True))
        short = {
            kind: sum(pool.count * _bundle(pool).get(kind, 0.0) for pool in self.train)
            - sum(bundle.get(kind, 0.0) for bundle in self.bundles)
            for kind in ("CPU", "GPU")
        }
        for pool in self.train:
            for _ in range(pool.count):
                part = {kind: min(amount, short[kind]) for kind, amount in _bundle(pool).items() if short[kind] > 1e-9}
                short = {kind: left - part.get(kind, 0.0) for kind, left in short.items()}
                found += [(part, pool.labels)] if part else []
        return tuple(found)

    @property
    def _largest_first(self) -> list[Pool]:
        return sorted(self.align, key=lambda pool: (-pool.gpus, -pool.cpus))


def plan(settings: Settings) -> Plan:
    """The bundles that `settings` ask for."""
    found = pools(settings)
    return Plan(
        align=tuple(pool for pool in found if pool.role != "reward_training"),
        train=tuple(pool for pool in found if pool.role == "reward_training"),
        host_bytes=host_bytes(settings),
    )


def _bundle(pool: Pool) -> dict[str, float]:
    return {"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})}


def table(planned: Plan, *, fancy: bool) -> str:
    """The plan as a table: `fancy` for a terminal (rich), else plain aligned text."""
    head = ("pool", "actors", "CPU each", "GPU each", "memory each (estimate)")
    rows = [
        (p.name, str(p.count), f"{p.cpus:g}", f"{p.gpus:g}", show_bytes(p.bytes_each) if p.memory else "-")
        for p in (*planned.align, *planned.train)
    ]
    total = (
        f"at once: {planned.cpus:g} CPU, {planned.gpus:g} GPU, about {show_bytes(planned.host_bytes)} of host memory"
    )
    if fancy:
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*head, caption=total)
        for row in rows:
            drawn.add_row(*row)
        out = io.StringIO()
        Console(file=out, force_terminal=True).print(drawn)
        return out.getvalue()
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join([*lines, total]) + "\n"


def check(planned: Plan, available: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()) -> None:
    """Compare a plan with the cluster's total resources (`ray.cluster_resources()`), and with each node's when given.

    Raises ResourceError naming what is missing, who asks for it, and three ways out. Memory is only an estimate, so a
    shortage of it is logged as a warning.
    """
    for kind, need in (("GPU", planned.gpus), ("CPU", planned.cpus)):
        have = available.get(kind, 0.0)
        if need > have + 1e-9:
            raise ResourceError(
                f"the plan needs {need:g} {kind}s, but the cluster has {have:g} ({_who(planned, kind)}); "
                + (_gpu_fixes(need, have) if kind == "GPU" else _cpu_fixes(need))
            )
    for bundle, wanted in zip(planned.bundles, planned.labels, strict=True) if nodes else ():
        labelled = [node for node in nodes if all(f"{key}={value}" in node for key, value in wanted.items())]
        if not labelled:
            raise ResourceError(_no_label(wanted, nodes))
        if not any(all(node.get(kind, 0.0) >= amount for kind, amount in bundle.items()) for node in labelled):
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
            largest = max(node.get("GPU" if "GPU" in bundle else "CPU", 0.0) for node in labelled)
            raise ResourceError(
                f"one actor needs {asked} on one node, but the largest node {_with(wanted)}has {largest:g} "
                f"{'GPU' if 'GPU' in bundle else 'CPU'}s; lower rollout.tensor_parallel with cluster.gpus_per_engine, "
                "lower cluster.cpus_per_engine or cluster.cpus_per_learner, or add a larger node"
            )
    for pool in planned.align if nodes else ():
        _check_labelled(pool, nodes)
    memory = available.get("memory")
    if memory is not None and planned.host_bytes > memory:
        logger.warning(
            "the actors may need about %s of host memory and Ray counts %s free; "
            "if they die, lower algorithm.micro_batch_tokens or rollout.kv_cache_gib",
            show_bytes(planned.host_bytes),
            show_bytes(memory),
        )


def _check_labelled(pool: Pool, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ResourceError when the nodes with a pool's labels are too few for all of its actors."""
    wanted = {f"{key}={value}" for key, value in pool.labels.items()}
    for kind, each in _bundle(pool).items() if wanted else ():
        need, have = pool.count * each, sum(node.get(kind, 0.0) for node in nodes if wanted <= node.keys())
        if need > have + 1e-9:
            raise ResourceError(
                f"{pool.name} {pool.count} x {each:g} need {need:g} {kind}s on nodes {_with(pool.labels)}"
                f"(cluster.labels), which have {have:g}; give the label to more nodes, or ask for fewer actors there, "
                "or take the entry out of cluster.labels"
            )


def _with(wanted: Mapping[str, str]) -> str:
    return "".join(f"with the label {key}={value} " for key, value in wanted.items())


def _no_label(wanted: Mapping[str, str], nodes: Sequence[Mapping[str, float]]) -> str:
    there = sorted({key for node in nodes for key in node if "=" in key and not key.startswith("ray.io/node-id")})
    return (
        f"cluster.labels asks for nodes {_with(wanted)}but no node has it (there are: {', '.join(there) or 'none'}); "
        "start a node with it (ray start --labels key=value), or name a label that is there, or take the entry out of "
        "cluster.labels"
    )


def _who(planned: Plan, kind: str) -> str:
    phase = max(
        (planned.align, planned.train), key=lambda pools: sum(p.count * _bundle(p).get(kind, 0.0) for p in pools)
    )
    asks = [(p.name, p.count, _bundle(p).get(kind, 0.0)) for p in phase]
    return ", ".join(f"{name} {count} x {each:g}" for name, count, each in asks if each)


def _gpu_fixes(need: float, have: float) -> str:
    if have == 0:
        return (
            "set cluster.gpus_per_engine=0, cluster.gpus_per_learner=0 and cluster.gpus_per_reward=0 to run on CPUs; "
            f"or set cluster.address to a cluster with {math.ceil(need)} GPUs; or, if this machine has GPUs, see that "
            "nvidia-smi lists them and CUDA_VISIBLE_DEVICES does not hide them"
        )
    return (
        "lower rollout.engines, learner.ranks or objectives.*.replicas; or let reward actors share a GPU or use none "
        f"(cluster.gpus_per_reward=0.1 or 0); or add nodes until the cluster has {math.ceil(need)} GPUs"
    )


def _cpu_fixes(need: float) -> str:
    return (
        "lower rollout.engines, learner.ranks or objectives.*.replicas; or reserve less for each actor "
        "(cluster.cpus_per_engine, cluster.cpus_per_learner, cluster.cpus_per_reward); or use a cluster with "
        f"{math.ceil(need)} CPUs (cluster.address)"
    )


def disk_need(settings: Settings) -> int:
    """Bytes a run may write to its folder: the final policy, small files, and the checkpoints there are at once.

    Those are the newest ones that are kept, the best one and the one being written.
    """
    learner = settings.learner
    written = math.ceil(settings.algorithm.steps / learner.save_every) if learner.save_every else 0
    at_once = min(written, learner.keep_checkpoints + 2) if learner.keep_checkpoints else written
    return policy_bytes(settings) + at_once * checkpoint_bytes(settings) + RUN_FOLDER_BYTES


def cache_need(settings: Settings) -> int:
    """Bytes a run may write to its cache: the converted policy, and each reward model with its best epoch beside it."""
    models, objectives = settings.reward, settings.objectives.named
    backbones = {"love": models.love, "helpfulness": models.helpfulness, "safety": models.safety}
    trained = [name for name, o in objectives.items() if o.source == "model" and o.path is None]
    return policy_bytes(settings) + sum(2 * 4 * model_shape(backbones[name].backbone).parameters for name in trained)


def check_space(folder: Path, need: int, free: int, key: str) -> None:
    """Raise ResourceError when `folder` has less than `need` bytes free; `key` names the setting that moves it."""
    if free < need:
        raise ResourceError(
            f"{folder} has {show_bytes(free)} free, but the run may need {show_bytes(need)}; free some space there, "
            f"or point {key} at a larger disk, or lower learner.keep_checkpoints or the size of the model"
        )


def check_host(settings: Settings, runs: Path, cache: Path) -> None:
    """Check the free disk space under `runs` and `cache` on this machine. Raises ResourceError naming the folder."""
    places = [(runs, disk_need(settings), "run.root"), (cache, cache_need(settings), "run.cache")]
    free = [shutil.disk_usage(_existing(folder)).free for folder, _, _ in places]
    same = _existing(runs).stat().st_dev == _existing(cache).stat().st_dev
    for (folder, need, key), left in zip(places, free, strict=True):
        check_space(folder, sum(n for _, n, _ in places) if same else need, left, key)


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there already."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
