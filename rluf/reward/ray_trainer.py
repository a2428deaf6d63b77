"""Reward training on Ray Train: workers fed by Ray Data shards, one DeepSpeed engine each.

The same workers train several objectives one after another: starting a worker (importing torch, transformers and
DeepSpeed, forming the process group) takes longer than training a small model, about 15 seconds.
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

from rluf.config.reward import REACTION_HEADS
from rluf.config.settings import Settings
from rluf.errors import DataError, DeadlineError, ResourceError, RlufError
from rluf.models.hub import resolve_model
from rluf.reward.calibration import CARD_FILE
from rluf.utils.devices import build_device_environment
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    import ray.data

    from rluf.reward.fit import HeadData

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.log"
SPLIT_NAMES = ("train", "dev", "test")
WORKER_ENVIRONMENT = {
    # OpenMP threads that spin while they wait take the cores from the other workers of the machine.
    "KMP_BLOCKTIME": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
MAX_IN_MEMORY_BYTES = 64 << 20
"""Largest training split that the driver reads itself, in bytes of the Parquet file."""
MAX_RESTARTS = 3
"""Restarts of failed training workers; they resume from the last save. An error in the code fails again at once."""
LENGTH_SAMPLE_ROWS = 2000
"""Training rows that max_tokens=auto is derived from."""
UNLIMITED_TOKENS = 10**6
SAVE_INTERVAL_S = 60.0
"""Seconds of training that the loss of a worker may cost a model."""


def train_reward_models(
    settings: Settings,
    jobs: Mapping[str, tuple[Path, Path]],
    *,
    full_card: bool = False,
    earlier_models: Mapping[str, Path] | None = None,
    curve_shares: Sequence[float] = (),
    save_interval_s: float = SAVE_INTERVAL_S,
) -> dict[str, dict[str, Any]]:
    """Train the reward model of each objective (or head of a shared backbone); returns their cards.

    Ray must be initialized. `jobs` maps an objective to (data folder written by rluf.prepare, checkpoint folder to
    write). A checkpoint folder appears only when complete, and an existing one is not trained again. So a restarted
    worker resumes with the next objective, and within an objective at most `save_interval_s` seconds before the
    failure; of an ensemble only the member in training is saved, and earlier members are trained again. `full_card`
    adds slices, the robustness table and an HTML page to each card; `earlier_models` are models by objective to compare
    with; `curve_shares` are shares of the training rows for the learning curve, one more training each. Raises
    DataError, ModelError, ResourceError, or DeadlineError past timeouts.reward_training_s for all jobs together.
    """
    from rluf.reward.shared_backbone import get_data_objective

    groups = group_by_backbone(settings, tuple(jobs))
    for group in groups:
        for member in settings.reward.get_head_settings(group[0]).member_specs:
            # Downloaded here once, before several workers would download it at the same time.
            resolve_model(member.backbone, resolve_cache_folder(settings))
    for objective, (data_folder, output_folder) in jobs.items():
        _check_data_files(get_data_objective(objective), data_folder)
        output_folder.parent.mkdir(parents=True, exist_ok=True)
    settings = resolve_token_limits(settings, groups, {name: folder for name, (folder, _) in jobs.items()})
    data_folders = {get_data_objective(objective): data_folder for objective, (data_folder, _) in jobs.items()}
    # Next to the outputs, so that the checkpoints of the training are on the disk with room for models.
    storage = Path(tempfile.mkdtemp(prefix=".ray-train-", dir=next(iter(jobs.values()))[1].parent))
    train_loop_config = {
        "settings": settings.model_dump_json(),
        "jobs": {objective: (str(data_folder), str(output)) for objective, (data_folder, output) in jobs.items()},
        "groups": groups,
        "earlier_models": {objective: str(folder) for objective, folder in (earlier_models or {}).items()},
        "curve_shares": list(curve_shares),
        "save_interval_s": save_interval_s,
        "threads": _count_worker_threads(settings),
        "full_card": full_card,
        "progress_file": str(storage / PROGRESS_FILE),
    }
    trainer = _build_torch_trainer(settings, data_folders, storage, train_loop_config)
    try:
        _run_trainer(trainer, settings.timeouts.reward_training_s, tuple(jobs), storage / PROGRESS_FILE)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return {
        objective: json.loads((output_folder / CARD_FILE).read_text(encoding="utf-8"))
        for objective, (_, output_folder) in jobs.items()
    }


def resolve_token_limits(
    settings: Settings, groups: Sequence[Sequence[str]], data_folders: Mapping[str, Path]
) -> Settings:
    """The settings with the number that max_tokens=auto becomes on the training rows of each group's model.

    Rows are in random order, so the first ones are a sample. Heads of a shared backbone use the first one's section.
    """
    from itertools import islice

    import pyarrow.parquet

    from rluf.models.hub import load_tokenizer
    from rluf.reward.encoded_split import choose_token_limit
    from rluf.reward.shared_backbone import get_data_objective
    from rluf.reward.text import TextEncoder

    sections = {}
    for group in groups:
        model_settings = settings.reward.get_head_settings(group[0])
        if model_settings.max_tokens != "auto":
            continue
        limits = [(0, 0)]
        for backbone in dict.fromkeys(member.backbone for member in model_settings.member_specs):
            tokenizer = load_tokenizer(resolve_model(backbone, resolve_cache_folder(settings)))
            encoder = TextEncoder(tokenizer, UNLIMITED_TOKENS)
            for source in dict.fromkeys(map(get_data_objective, group)):
                file = pyarrow.parquet.ParquetFile(data_folders[group[0]] / source / "train.parquet")
                batches = islice(file.iter_batches(LENGTH_SAMPLE_ROWS), 1)
                rows = [row for batch in batches for row in batch.to_pylist()]
                limits += [choose_token_limit(rows, encoder)] if rows else []
        high_length, token_limit = max(limits)
        section_name = "love" if group[0] in REACTION_HEADS else group[0]
        sections[section_name] = model_settings.model_copy(update={"max_tokens": token_limit})
        logger.info(
            "reward.%s.max_tokens: auto became %d; 95%% of the training rows have at most %d tokens", section_name,
            token_limit, high_length,
        )  # fmt: skip
    return settings.model_copy(update={"reward": settings.reward.model_copy(update=sections)})


def _count_worker_threads(settings: Settings) -> int:
    """CPU threads of one worker: the setting, else this machine's cores divided by the number of workers."""
    return settings.cluster.threads_per_actor or max(1, (os.cpu_count() or 1) // settings.reward.max_workers)


def _build_torch_trainer(
    settings: Settings, data_folders: Mapping[str, Path], storage: Path, train_loop_config: dict[str, Any]
) -> Any:
    """Ray Train trainer of train_worker; `data_folders` are prepared data by the objective whose data is read."""
    import ray.data
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.data.DataContext.get_current().enable_progress_bars = False
    datasets = {source: _load_dataset(folder / source / "train.parquet") for source, folder in data_folders.items()}
    uses_gpu = settings.cluster.reward_training_gpus > 0
    resources = dict(zip(("CPU", "GPU"), settings.cluster.get_role_resources("reward_training"), strict=True))
    environment = {
        **WORKER_ENVIRONMENT,
        **build_device_environment(resources["GPU"]),
        "OMP_NUM_THREADS": str(train_loop_config["threads"]),
    }
    return TorchTrainer(
        train_worker,
        train_loop_config=train_loop_config,
        scaling_config=train.ScalingConfig(
            num_workers=settings.reward.workers,
            use_gpu=uses_gpu,
            resources_per_worker={name: amount for name, amount in resources.items() if amount > 0},
        ),
        datasets=datasets,
        dataset_config=train.DataConfig(
            datasets_to_split=list(datasets) if settings.reward.workers != 1 else [],
            # Restarted workers must get the same shards: saved progress names the rows that were read.
            execution_options=ray.data.ExecutionOptions(preserve_order=True),
        ),
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        run_config=train.RunConfig(
            name="reward",
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=MAX_RESTARTS),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            logging_config=train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _check_data_files(objective: str, data_folder: Path) -> None:
    for split in SPLIT_NAMES:
        path = data_folder / objective / f"{split}.parquet"
        if not path.exists():
            raise DataError(f"{path} is missing, so no reward model for {objective} can be trained; run rluf.prepare")


def _load_dataset(path: Path) -> ray.data.Dataset:
    import pyarrow.parquet
    import ray.data

    # Read a small file here: Ray Data's read tasks take seconds to start.
    if path.is_file() and path.stat().st_size <= MAX_IN_MEMORY_BYTES:
        return ray.data.from_arrow(pyarrow.parquet.read_table(str(path)))
    return ray.data.read_parquet(str(path))


def _run_trainer(trainer: Any, deadline_s: float, objectives: tuple[str, ...], progress_file: Path) -> None:
    """Run the trainer, and log the lines that rank 0 appends to `progress_file`."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    outcome: list[Exception | None] = []

    def run_fit() -> None:
        try:
            trainer.fit()
        except (TrainingFailedError, RayError, RlufError, OSError, RuntimeError, ValueError, TypeError) as error:
            outcome.append(error)
        else:
            outcome.append(None)

    # In a thread of its own: outside the main thread Ray Train does not install a handler for Ctrl-C, and the deadline
    # applies even if a call inside Ray hangs.
    thread = threading.Thread(target=run_fit, name="ray-train", daemon=True)
    thread.start()
    end_time = time.monotonic() + deadline_s
    offset = 0
    while thread.is_alive():
        thread.join(timeout=0.2)
        offset = _relay_progress(progress_file, offset)
        if time.monotonic() > end_time:
            raise DeadlineError(
                f"training the reward models {', '.join(objectives)} took longer than timeouts.reward_training_s="
                f"{deadline_s:g}; see the last progress line, then raise the deadline or add workers"
            )
    _relay_progress(progress_file, offset)
    if not outcome:
        raise ResourceError(f"reward training ({', '.join(objectives)}) ended without a result; see the log above")
    if outcome[0] is not None:
        raise _find_root_error(outcome[0], objectives) from outcome[0]


def _relay_progress(progress_file: Path, offset: int) -> int:
    """Log the complete lines of the file after byte `offset`; returns the offset behind them."""
    if not progress_file.is_file():
        return offset
    with progress_file.open("rb") as stream:
        stream.seek(offset)
        new_bytes = stream.read()
    # Rank 0 may be in the middle of a line: its first part is read again with the rest.
    complete_lines = new_bytes[: new_bytes.rfind(b"\n") + 1]
    for line in complete_lines.decode("utf-8", "replace").splitlines():
        logger.info("%s", line)
    return offset + len(complete_lines)


def _find_root_error(error: Exception, objectives: tuple[str, ...]) -> RlufError:
    """The RlufError that a worker raised, else a ResourceError that quotes Ray Train's message."""
    for failure in getattr(error, "worker_failures", {}).values():
        for candidate in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(candidate, RlufError):
                return candidate
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # The last line of a traceback names the error itself.
    last_line = lines[-1] if lines else type(error).__name__
    return ResourceError(f"reward training ({', '.join(objectives)}) failed on its workers: {last_line}")


def train_worker(config: Mapping[str, Any]) -> None:
    """Training loop of every Ray Train worker: train the objectives in turn; rank 0 writes the checkpoints."""
    import torch
    from ray import train

    from rluf.reward.backbone import enable_fast_cpu_matmul

    if train.get_context().get_world_rank() == 0:
        _redirect_logs(Path(config["progress_file"]))
    settings = Settings.model_validate_json(config["settings"])
    if settings.cluster.reward_training_gpus == 0:
        torch.set_num_threads(config["threads"])
        enable_fast_cpu_matmul()
    deadline = time.monotonic() + settings.timeouts.reward_training_s
    shard_reader = _ShardReader()
    for group in config["groups"]:
        jobs = {head: (Path(config["jobs"][head][0]), Path(config["jobs"][head][1])) for head in group}
        output_folders = {head: output_folder for head, (_, output_folder) in jobs.items()}
        # A restarted worker runs this loop from the beginning: what is already written is skipped.
        is_trained = all((folder / CARD_FILE).is_file() for folder in output_folders.values())
        has_curve = all(_has_learning_curve(folder) for folder in output_folders.values())
        curve_shares = [] if has_curve else config["curve_shares"]
        if is_trained:
            logger.info(
                "%s: already trained, reusing %s", ", ".join(group), ", ".join(map(str, output_folders.values()))
            )
        if is_trained and not curve_shares:
            continue
        head_data = _load_head_data(jobs, shard_reader)
        if not is_trained:
            _train_group(settings, output_folders, head_data, deadline, config)
        if curve_shares:
            _train_learning_curve(settings, output_folders, head_data, deadline, curve_shares)
        train.report({"objective": "+".join(group)})


def _has_learning_curve(model_folder: Path) -> bool:
    """Whether the model is written and its card has a learning curve."""
    card_path = model_folder / CARD_FILE
    return card_path.is_file() and "learning_curve" in json.loads(card_path.read_text(encoding="utf-8"))


def _redirect_logs(progress_file: Path) -> None:
    """Send this package's log lines to a file that the driver reads."""
    handler = logging.FileHandler(progress_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    package_logger = logging.getLogger("rluf")
    package_logger.handlers, package_logger.propagate = [handler], False
    package_logger.setLevel(logging.INFO)


def group_by_backbone(settings: Settings, objectives: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the objectives by the model to train: heads of the shared backbone together, all others separately."""
    shared_heads = tuple(head for head in settings.reward.shared_backbone_heads if head in objectives)
    separate: list[tuple[str, ...]] = [(objective,) for objective in objectives if objective not in shared_heads]
    return [shared_heads, *separate] if shared_heads else separate


class _ShardReader:
    """Reads this worker's shards of the training splits, each only once: several heads train on one log."""

    def __init__(self) -> None:
        self._rows_by_source: dict[str, list[dict[str, Any]]] = {}

    def get_rows(self, source: str) -> list[dict[str, Any]]:
        from ray import train

        if source not in self._rows_by_source:
            batches = train.get_dataset_shard(source).iter_batches(batch_size=None, batch_format="pyarrow")
            self._rows_by_source[source] = [row for table in batches for row in table.to_pylist()]
        return self._rows_by_source[source]


def _train_group(
    settings: Settings,
    output_folders: Mapping[str, Path],
    head_data: Sequence[HeadData],
    deadline: float,
    config: Mapping[str, Any],
) -> None:
    """Train one model on this rank, in step with the other ranks; rank 0 writes a folder per head."""
    from ray import train

    from rluf.reward.checkpoint import RewardCheckpointer
    from rluf.reward.export import export_models
    from rluf.reward.fit import train_ensemble

    start_time = time.monotonic()
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    checkpointer = RewardCheckpointer(rank=rank, has_shared_state=settings.reward.zero_stage == 0)
    members = train_ensemble(
        settings,
        head_data,
        deadline,
        rank=rank,
        world_size=world_size,
        checkpointer=checkpointer,
        save_interval_s=config["save_interval_s"],
    )
    if rank == 0:
        outputs = {data.head: (data.data_folder, output_folders[data.head]) for data in head_data}
        earlier_models = {head: Path(folder) for head, folder in config["earlier_models"].items()}
        export_models(
            settings, outputs, members, start_time, full_card=config["full_card"], earlier_models=earlier_models
        )


def _load_head_data(jobs: Mapping[str, tuple[Path, Path]], shard_reader: _ShardReader) -> list[HeadData]:
    """Rows of each head: this rank's shard of the training split, and the whole dev split."""
    from rluf.reward.export import read_split_rows
    from rluf.reward.fit import HeadData
    from rluf.reward.shared_backbone import get_data_objective

    head_data = []
    for head, (data_folder, _) in jobs.items():
        source = get_data_objective(head)
        folder = data_folder / source
        head_data.append(HeadData(head, shard_reader.get_rows(source), read_split_rows(folder / "dev.parquet"), folder))
    return head_data


def _train_learning_curve(
    settings: Settings,
    output_folders: Mapping[str, Path],
    head_data: Sequence[HeadData],
    deadline: float,
    shares: Sequence[float],
) -> None:
    """Train the written models again on shares of their rows, and add the results to their cards."""
    from ray import train

    from rluf.reward.export import add_learning_curve, measure_curve_point, subsample_rows
    from rluf.reward.fit import train_ensemble

    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    data_folders = {data.head: data.data_folder for data in head_data}
    curve_points = []
    for share in shares:
        logger.info("%s: learning curve share=%g of the rows", ", ".join(output_folders), share)
        subsampled_data = [
            replace(data, train_rows=subsample_rows(data.train_rows, share, data.head)) for data in head_data
        ]
        # Without a checkpointer: these short trainings start again after a failure.
        members = train_ensemble(settings, subsampled_data, deadline, rank=rank, world_size=world_size)
        curve_points.append(measure_curve_point(settings, members, data_folders, rank=rank))
    if rank == 0:
        add_learning_curve(output_folders, curve_points)
