"""Reward training on Ray Train: workers fed by Ray Data shards, one DeepSpeed engine each.

Several objectives are trained one after another by the same workers, since starting a worker (torch, transformers and
DeepSpeed imported, process group formed) takes longer than training a small model for a quarter of a minute.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError, RlufError, StallError
from rluf.models.hub import resolve_model
from rluf.utils.paths import cache_dir

if TYPE_CHECKING:
    import ray.data

    from rluf.reward.fit import Splits

logger = logging.getLogger(__name__)

CARD = "reward_card.json"
PAGE = "reward_card.html"
PROGRESS = "progress.log"
SPLITS = ("train", "dev", "test")
QUIET = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
SMALL_BYTES = 64 << 20
SAVE_S = 60.0
"""Seconds of training that a lost worker may cost a model alone, or heads of one backbone."""


def train_rewards(
    settings: Settings,
    jobs: Mapping[str, tuple[Path, Path]],
    *,
    thorough: bool = False,
    before: Mapping[str, Path] | None = None,
    curve: Sequence[float] = (),
    save_s: float = SAVE_S,
) -> dict[str, dict[str, Any]]:
    """Train the reward model of each objective, or head of reward.heads; returns their cards. Ray must be initialised.

    `jobs` maps an objective to (data folder written by rluf.prepare, checkpoint folder to write). A checkpoint folder
    appears only when whole; one that is already there is kept, so a worker that is started again goes on with the next
    objective, and within one from where training stood at most `save_s` seconds before; but of an ensemble only the
    member in training is kept, so that those before it are trained again. `thorough` adds slices, the robustness table
    and a page to each card; `before` names earlier models by objective, which the cards compare; `curve` are shares of
    the training rows with which each model, once written, is trained again, for the learning curve in its card.
    Raises DataError, ModelError, ResourceError, or StallError past reward.deadline_s for all jobs together.
    """
    import ray.data
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    from rluf.reward.shared_backbone import data_of

    groups = grouped(settings, tuple(jobs))
    for group in groups:
        for member in settings.reward.of_head(group[0]).members:
            resolve_model(member.backbone, cache_dir(settings))  # once, before any worker starts
    for objective, (data, out) in jobs.items():
        _check_data(data_of(objective), data)
        out.parent.mkdir(parents=True, exist_ok=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    sources = {data_of(objective): data for objective, (data, _) in jobs.items()}
    datasets = {source: _dataset(data / source / "train.parquet") for source, data in sources.items()}
    cluster, workers = settings.cluster, settings.reward.workers
    resources = {"CPU": cluster.cpus_per_reward, "GPU": cluster.gpus_per_reward}
    threads = str(cluster.threads or max(1, (os.cpu_count() or 1) // settings.reward.most_workers))
    options = ray.data.ExecutionOptions(preserve_order=True)  # workers started again get the same shards
    storage = Path(tempfile.mkdtemp(prefix=".ray-train-", dir=next(iter(jobs.values()))[1].parent))
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "settings": settings.model_dump_json(),
            "jobs": {objective: (str(data), str(out)) for objective, (data, out) in jobs.items()},
            "groups": groups,
            "before": {objective: str(folder) for objective, folder in (before or {}).items()},
            "curve": list(curve),
            "save_s": save_s,
            "threads": int(threads),
            "thorough": thorough,
            "progress": str(storage / PROGRESS),
        },
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=cluster.gpus_per_reward > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount > 0},
        ),
        datasets=datasets,
        dataset_config=train.DataConfig(
            datasets_to_split=list(sources) if workers != 1 else [], execution_options=options
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_reward > 0 else "gloo"),
        run_config=train.RunConfig(
            name="reward",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=settings.reward.retries),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            logging_config=train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {**QUIET, "OMP_NUM_THREADS": threads}},
        ),
    )
    try:
        _fit(trainer, settings.reward.deadline_s, tuple(jobs), storage / PROGRESS)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return {objective: json.loads((out / CARD).read_text(encoding="utf-8")) for objective, (_, out) in jobs.items()}


def _check_data(objective: str, data: Path) -> None:
    for split in SPLITS:
        path = data / objective / f"{split}.parquet"
        if not path.exists():
            raise DataError(f"{path} is missing, so no reward model for {objective} can be trained; run rluf.prepare")


def _dataset(path: Path) -> ray.data.Dataset:
    """The training split as a Ray Data set. A small file goes in as it is: read tasks take seconds to start."""
    import pyarrow.parquet
    import ray.data

    if path.is_file() and path.stat().st_size <= SMALL_BYTES:
        return ray.data.from_arrow(pyarrow.parquet.read_table(str(path)))
    return ray.data.read_parquet(str(path))


def _fit(trainer: Any, deadline_s: float, objectives: tuple[str, ...], progress: Path) -> None:
    """Run the trainer in a thread: Ray Train then leaves Ctrl-C alone, and the deadline holds whatever hangs.

    Meanwhile lines that rank 0 appends to the file `progress` are logged here.
    """
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            trainer.fit()
        except (TrainingFailedError, RayError, RlufError, OSError, RuntimeError, ValueError, TypeError) as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    end = time.monotonic() + deadline_s
    told = 0
    while thread.is_alive():
        thread.join(timeout=0.2)
        told = _tell(progress, told)
        if time.monotonic() > end:
            raise StallError(
                f"training the reward models {', '.join(objectives)} took longer than "
                f"reward.deadline_s={deadline_s:g}; see the last progress line, then raise the deadline or add workers"
            )
    _tell(progress, told)
    if not outcome:
        raise ResourceError(f"reward training ({', '.join(objectives)}) ended without a result; the log above says why")
    if outcome[0] is not None:
        raise _cause(outcome[0], objectives) from outcome[0]


def _tell(progress: Path, told: int) -> int:
    """Log the whole lines of the file after byte `told`; returns where they end."""
    if not progress.is_file():
        return told
    with progress.open("rb") as stream:
        stream.seek(told)
        fresh = stream.read()
    whole = fresh[: fresh.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", "replace").splitlines():
        logger.info("%s", line)
    return told + len(whole)


def _cause(error: Exception, objectives: tuple[str, ...]) -> RlufError:
    """The error of ours that a worker raised, else a ResourceError that quotes what Ray Train said."""
    for failure in getattr(error, "worker_failures", {}).values():
        for candidate in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(candidate, RlufError):
                return candidate
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    tail = lines[-1] if lines else type(error).__name__
    return ResourceError(f"reward training ({', '.join(objectives)}) failed on its workers: {tail}")


def work(config: Mapping[str, Any]) -> None:
    """What every worker does: train the objectives in turn. Rank 0 writes the checkpoints."""
    import torch
    from ray import train

    from rluf.reward.backbone import quick_cpu_matmul

    if train.get_context().get_world_rank() == 0:
        _log_to(Path(config["progress"]))
    settings = Settings.model_validate_json(config["settings"])
    if settings.cluster.gpus_per_reward == 0:
        torch.set_num_threads(config["threads"])
        quick_cpu_matmul()
    started = time.monotonic()
    shards = _Shards()
    for group in config["groups"]:
        jobs = {head: (Path(data), Path(out)) for head in group for data, out in [config["jobs"][head]]}
        deadline, outs = started + settings.reward.deadline_s, {head: out for head, (_, out) in jobs.items()}
        kept = all((out / CARD).is_file() for out in outs.values())
        curve = [] if all(_has_curve(out) for out in outs.values()) else config["curve"]
        if kept:
            logger.info("%s: already trained, kept", ", ".join(group))
        if kept and not curve:
            continue
        splits = _splits(jobs, shards)
        if not kept:
            _train_group(settings, outs, splits, deadline, config)
        if curve:
            _learning_curve(settings, outs, splits, deadline, curve)
        train.report({"objective": "+".join(group)})


def _has_curve(out: Path) -> bool:
    """Whether the model is written and its card has a learning curve."""
    card = out / CARD
    return card.is_file() and "learning_curve" in json.loads(card.read_text(encoding="utf-8"))


def _log_to(progress: Path) -> None:
    """Send this package's log lines to a file that the driver reads."""
    handler = logging.FileHandler(progress, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("rluf")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)


def grouped(settings: Settings, wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """The objectives to train by model: heads of one backbone together, all others alone."""
    shared = tuple(head for head in settings.reward.heads if head in wanted)
    alone: list[tuple[str, ...]] = [(objective,) for objective in wanted if objective not in shared]
    return [shared, *alone] if shared else alone


class _Shards:
    """This worker's shards of the training splits, read once each: several heads learn from one log."""

    def __init__(self) -> None:
        self._read: dict[str, list[dict[str, Any]]] = {}

    def of(self, source: str) -> list[dict[str, Any]]:
        from ray import train

        if source not in self._read:
            batches = train.get_dataset_shard(source).iter_batches(batch_size=None, batch_format="pyarrow")
            self._read[source] = [row for table in batches for row in table.to_pylist()]
        return self._read[source]


def _train_group(
    settings: Settings, outs: Mapping[str, Path], splits: Sequence[Splits], deadline: float, config: Mapping[str, Any]
) -> None:
    """Train one model on this rank, in step with the others: a head an entry of `splits`; rank 0 writes `outs`."""
    from ray import train

    from rluf.reward.checkpoint import Keeper
    from rluf.reward.export import finish
    from rluf.reward.fit import train_members

    clock = time.monotonic()
    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    keeper = Keeper(rank=rank, shared_state=settings.reward.zero_stage == 0)
    members = train_members(settings, splits, deadline, rank=rank, world=world, keeper=keeper, save_s=config["save_s"])
    if rank == 0:
        places = {split.head: (split.folder, outs[split.head]) for split in splits}
        before = {head: Path(folder) for head, folder in config["before"].items()}
        finish(settings, places, members, clock, thorough=config["thorough"], before=before)


def _splits(jobs: Mapping[str, tuple[Path, Path]], shards: _Shards) -> list[Splits]:
    """The rows of each head: this rank's shard of the training split, and dev."""
    from rluf.reward.export import table
    from rluf.reward.fit import Splits
    from rluf.reward.shared_backbone import data_of

    folders = {head: data / data_of(head) for head, (data, _) in jobs.items()}
    return [
        Splits(head, shards.of(data_of(head)), table(folder / "dev.parquet"), folder)
        for head, folder in folders.items()
    ]


def _learning_curve(
    settings: Settings, outs: Mapping[str, Path], splits: Sequence[Splits], deadline: float, shares: Sequence[float]
) -> None:
    """Train the written models again, whole, on shares of their rows, and put what comes out into their cards."""
    from ray import train

    from rluf.reward.export import add_curve, point, thinned
    from rluf.reward.fit import train_members

    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    points = []
    for share in shares:
        logger.info("%s: learning curve, %g of the rows", ", ".join(outs), share)
        part = [replace(split, train=thinned(split.train, share, split.head)) for split in splits]
        members = train_members(settings, part, deadline, rank=rank, world=world)
        points.append(point(settings, members, {split.head: split.folder for split in part}, rank=rank))
    if rank == 0:
        add_curve(outs, points)
