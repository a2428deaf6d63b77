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
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError, ResourceError, RlufError, StallError
from rluf.models import resolve_model
from rluf.paths import cache_dir

if TYPE_CHECKING:
    import ray.data

    from rluf.engine.train_member import Member
    from rluf.objectives.calibration import Calibration
    from rluf.objectives.scorer import RewardModel
    from rluf.objectives.training import Rows

logger = logging.getLogger(__name__)

CARD = "reward_card.json"
PAGE = "reward_card.html"
PROGRESS = "progress.log"
SPLITS = ("train", "dev", "test")
QUIET = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
SMALL_BYTES = 64 << 20
EVAL_TOKENS = 4096
"""Padded tokens of a forward pass without gradient."""


def train_rewards(
    settings: Settings, jobs: Mapping[str, tuple[Path, Path]], *, thorough: bool = False
) -> dict[str, dict[str, Any]]:
    """Train the reward model of each objective; returns their cards. Ray must be initialised.

    `jobs` maps an objective to (data folder written by rluf.prepare, checkpoint folder to write). A checkpoint folder
    appears only when whole; one that is already there is kept, so a worker that is started again goes on with the next
    objective. `thorough` adds slices, the robustness table and a page to each card. Raises DataError, ModelError,
    ResourceError, or StallError past reward.deadline_s for all jobs together.
    """
    import ray.data
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    for objective, (data, out) in jobs.items():
        for member in settings.reward.named[objective].members:
            resolve_model(member.backbone, cache_dir(settings))  # once, before any worker starts
        _check_data(objective, data)
        out.parent.mkdir(parents=True, exist_ok=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    datasets = {objective: _dataset(data / objective / "train.parquet") for objective, (data, _) in jobs.items()}
    cluster, workers = settings.cluster, settings.reward.workers
    resources = {"CPU": cluster.cpus_per_reward, "GPU": cluster.gpus_per_reward}
    threads = str(cluster.threads or max(1, (os.cpu_count() or 1) // workers))
    storage = Path(tempfile.mkdtemp(prefix=".ray-train-", dir=next(iter(jobs.values()))[1].parent))
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "settings": settings.model_dump_json(),
            "jobs": {objective: (str(data), str(out)) for objective, (data, out) in jobs.items()},
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
        dataset_config=train.DataConfig(datasets_to_split=list(jobs) if workers > 1 else []),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_reward > 0 else "gloo"),
        run_config=train.RunConfig(
            name="reward",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=settings.reward.retries),
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

    from rluf.objectives.backbone import quick_cpu_matmul

    if train.get_context().get_world_rank() == 0:
        _log_to(Path(config["progress"]))
    settings = Settings.model_validate_json(config["settings"])
    if settings.cluster.gpus_per_reward == 0:
        torch.set_num_threads(config["threads"])
        quick_cpu_matmul()
    started = time.monotonic()
    for objective, (data, out) in config["jobs"].items():
        if (Path(out) / CARD).is_file():
            logger.info("%s: already trained, kept", objective)
            continue
        _train_one(
            settings,
            objective,
            Path(data) / objective,
            Path(out),
            started + settings.reward.deadline_s,
            config["thorough"],
        )
        train.report({"objective": objective})


def _log_to(progress: Path) -> None:
    """Send this package's log lines to a file that the driver reads."""
    handler = logging.FileHandler(progress, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("rluf")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)


def _train_one(settings: Settings, objective: str, data: Path, out: Path, deadline: float, thorough: bool) -> None:
    """Train one objective on this rank, in step with the others: one model, or an ensemble's members in turn."""
    from ray import train

    from rluf.engine.train_member import Splits, train_member

    clock = time.monotonic()
    chosen = settings.reward.named[objective]
    records = Splits(_shard(objective), _table(data / "dev.parquet"), data)
    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    shared: dict[str, Any] = {}
    members = [
        train_member(settings, objective, records, number, deadline, rank=rank, world=world, shared=shared)
        for number in range(len(chosen.members))
    ]
    if rank == 0:
        finish(settings, objective, data, out, members, clock, thorough)


def finish(
    settings: Settings,
    objective: str,
    data: Path,
    out: Path,
    members: Sequence[Member],
    clock: float,
    thorough: bool,
) -> None:
    """Calibrate the trained members together and write the checkpoint folder `out`; rank 0 alone does."""
    from rluf.engine.train_member import balance
    from rluf.objectives.calibration import Calibration
    from rluf.objectives.card import calibrate, describe_training

    first, chosen = members[0], settings.reward.named[objective]
    balance(members)
    logits = np.mean([member.found.dev_logits for member in members], axis=0)
    base = Calibration(
        objective,
        prior_shift=first.found.shift,
        max_tokens=first.encoder.max_tokens,
        members=len(members),
        next_turn=first.encoder.next_turn,
    )
    calibration = calibrate(first.dev, logits, base, chosen.calibration)
    training = describe_training([member.found for member in members], first.rows, first.dev)
    _write(settings, data, out, members, calibration, training, clock, thorough)


def _shard(objective: str) -> list[dict[str, Any]]:
    """This worker's shard of the training split."""
    from ray import train

    records: list[dict[str, Any]] = []
    for table in train.get_dataset_shard(objective).iter_batches(batch_size=None, batch_format="pyarrow"):
        records.extend(table.to_pylist())
    return records


def _table(path: Path) -> list[dict[str, Any]]:
    """All rows of a split. dev and test are read directly: they are not dealt out, and a Ray Data run has its cost."""
    import pyarrow.parquet

    records: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path)).to_pylist()
    return records


def _write(
    settings: Settings,
    data: Path,
    out: Path,
    members: Sequence[Member],
    calibration: Calibration,
    training: dict[str, Any],
    clock: float,
    thorough: bool,
) -> None:
    """Checkpoint folder with its card: read back as everyone else will, tried on the test split, renamed into place."""
    from rluf.objectives.card import make_card
    from rluf.objectives.page import card_page
    from rluf.objectives.scorer import RewardModel, member_folder
    from rluf.objectives.training import encode_rows

    objective = calibration.objective
    part = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        for number, member in enumerate(members):
            member.save(member_folder(part, number))
        calibration.save(part)
        scorer = RewardModel.load(part, batch_tokens=EVAL_TOKENS)
        pairs = settings.reward.named[objective].loss == "bradley_terry"
        records = _table(data / "test.parquet")
        test = encode_rows(records, scorer.encoder, pairs=pairs, where=f"{data}/test.parquet")
        started = time.monotonic()
        logits = scorer.raw(test.sequences)
        card = make_card(calibration, test, logits, seed=settings.seed)
        card["scoring_tokens_per_second"] = round(test.tokens / max(time.monotonic() - started, 1e-9), 1)
        card |= {"training": training, "settings": settings.reward.named[objective].model_dump(mode="json")}
        card |= {"seed": settings.seed, "seconds": round(time.monotonic() - clock, 3)}
        if thorough:
            card |= _more(scorer, records, test, logits, settings.seed)
            (part / PAGE).write_text(card_page(card), encoding="utf-8")
        (part / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(part, out)
    except OSError as error:
        raise ModelError(f"the reward model could not be written to {out}: {error}; free some disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    logger.info("%s: written to %s after %.1f s", objective, out, card["seconds"])


def _more(
    scorer: RewardModel, records: Sequence[Mapping[str, Any]], test: Rows, raw: Sequence[float], seed: int
) -> dict[str, Any]:
    """The parts of a card that take a while: slices of the test rows, and what changed responses do to the score."""
    from rluf.objectives.robustness import robustness, slices

    logits, count = scorer.calibration.logits(raw), len(test)
    of_rows = logits[:count] - logits[count:] if test.pairs else logits
    return {
        "slices": slices(records, of_rows, None if test.pairs else test.labels),
        "robustness": robustness(scorer, records, pairs=test.pairs, seed=seed),
    }
