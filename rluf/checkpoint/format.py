"""Checkpoint format: what a checkpoint contains, which ones are complete, and which ones to keep.

A checkpoint is a folder step-<n> below <run>/checkpoints. RunCheckpoint lists its files; RunState and ControllerState
list the parts of state.json. complete.json is written last and contains the size of every other file, so an interrupted
checkpoint is recognized.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rluf.types import Prompt

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Version of the layout; checkpoints of another one are skipped with a message. Format 1 had other keys and fields."""
MANIFEST_FILE = "complete.json"
STATE_FILE = "state.json"
POLICY_FOLDER = "policy"
CHECKPOINTS_FOLDER = "checkpoints"
"""Folder of the checkpoints within a run folder."""


@dataclass(frozen=True, slots=True)
class ControllerState:
    """State of the training loop between two steps; each part is what `state()` of its owner returns, as plain JSON."""

    work_buffer: Mapping[str, Any]
    """Position in the prompt order, and the prompts in flight with their seeds."""
    policy_updater: Mapping[str, Any]
    """KL coefficient, and the positions in the demonstrations and in the log."""
    reward_aggregator: Mapping[str, Any]
    """Reward normalizer, baseline signals and Lagrange multipliers."""
    weight_sync: Mapping[str, Any]
    """Probe prompt and responses, and the largest logprob gap so far."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that the driver needs to continue after optimizer step `step`: the content of state.json."""

    step: int
    """Optimizer steps done, which is also the weight version."""
    world_size: int
    """Number of learner ranks."""
    settings: Mapping[str, Any]
    """Settings of the run."""
    prompts_digest: str
    """Hash of the training prompts in order, see hash_prompts."""
    controller_state: ControllerState
    lr_schedules: Sequence[Mapping[str, Any]]
    """Learning rate schedule of each learner rank."""
    step_metrics: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Metrics of the steps done."""
    monitor_state: Mapping[str, Any] | None = None
    """State of the reward-hacking monitor; None where the run is not monitored."""


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A complete checkpoint on disk, and the place of each of its files."""

    folder: Path
    step: int

    @property
    def policy_folder(self) -> Path:
        """The policy as a Hugging Face folder, in its compute dtype."""
        return self.folder / POLICY_FOLDER

    @property
    def state_file(self) -> Path:
        """The RunState as JSON."""
        return self.folder / STATE_FILE

    def read_state(self) -> RunState:
        """The run state that was written with it."""
        content = json.loads(self.state_file.read_text("utf-8"))
        content.pop("format")
        controller_state = ControllerState(**content.pop("controller_state"))
        return RunState(controller_state=controller_state, **content)


def get_optimizer_state_path(folder: Path, rank: int, world_size: int, model_name: str = "learner") -> Path:
    """Master weights and AdamW state of one learner rank, of the policy (`learner`) or of PPO's `critic`."""
    # The number of ranks is part of the name: a ZeRO shard fits only the same rank of the same number.
    return folder / f"{model_name}-{rank}-of-{world_size}.safetensors"


def write_run_state(checkpoint_folder: Path, run_state: RunState) -> None:
    """Write state.json, then complete.json over all files that are in the folder by then."""
    state_json = json.dumps({"format": FORMAT_VERSION, **asdict(run_state)}, ensure_ascii=False)
    (checkpoint_folder / STATE_FILE).write_text(state_json, "utf-8")
    file_sizes = {
        str(file.relative_to(checkpoint_folder)): file.stat().st_size
        for file in checkpoint_folder.rglob("*")
        if file.is_file()
    }
    manifest = {"format": FORMAT_VERSION, "files": file_sizes}
    (checkpoint_folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), "utf-8")


def find_checkpoint_problem(checkpoint_folder: Path) -> str | None:
    """Describe why a folder cannot be resumed from; None when it is complete."""
    try:
        manifest = json.loads((checkpoint_folder / MANIFEST_FILE).read_text("utf-8"))
        file_sizes: dict[str, int] = manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__})"
    if manifest.get("format") != FORMAT_VERSION:
        return (
            f"it has checkpoint format {manifest.get('format')}, this version of rluf reads format {FORMAT_VERSION} "
            "only; resume it with the version that wrote it, or start a new run from its policy folder (model.path)"
        )
    # Sizes, not hashes: reading hundreds of gigabytes again at every start would cost minutes, and what goes wrong in
    # practice is a copy that was cut short.
    for name, size in file_sizes.items():
        file = checkpoint_folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    missing_files = {STATE_FILE, f"{POLICY_FOLDER}/config.json"} - file_sizes.keys()
    return f"its {MANIFEST_FILE} does not list {min(missing_files)}" if missing_files else None


def parse_step(checkpoint_folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    number = checkpoint_folder.name.removeprefix("step-")
    return int(number) if checkpoint_folder.name.startswith("step-") and number.isdigit() else None


def find_newest_complete(checkpoints_folder: Path, max_step: float = float("inf")) -> RunCheckpoint | None:
    """The newest complete checkpoint of a step up to `max_step`; others are skipped with a warning."""
    folder_by_step = {
        step: folder
        for folder in checkpoints_folder.glob("step-*")
        if (step := parse_step(folder)) is not None and step <= max_step
    }
    for partial_folder in sorted(checkpoints_folder.glob(".step-*.part")):
        logger.warning("checkpoint %s: skipped, it was being written when its run ended", partial_folder)
    for step, folder in sorted(folder_by_step.items(), reverse=True):
        problem = find_checkpoint_problem(folder)
        if problem is None:
            return RunCheckpoint(folder, step)
        logger.warning("checkpoint %s: skipped, %s", folder, problem)
    return None


def select_steps_to_delete(reward_by_step: Mapping[int, float], keep_count: int) -> list[int]:
    """Steps whose checkpoints are deleted: all but the last `keep_count` and the one with the highest mean reward.

    A `keep_count` of 0 keeps all.
    """
    if keep_count == 0:
        return []
    steps = sorted(reward_by_step)
    best_step = max(steps, key=lambda step: (reward_by_step[step], step), default=None)
    return [step for step in steps[:-keep_count] if step != best_step]


def prune_checkpoints(checkpoints_folder: Path, reward_by_step: Mapping[int, float], keep_count: int) -> None:
    """Delete the checkpoints of `select_steps_to_delete`; `reward_by_step` has the mean reward of every step done."""
    steps_on_disk = {step for folder in checkpoints_folder.glob("step-*") if (step := parse_step(folder)) is not None}
    known_rewards = {step: reward_by_step.get(step, float("-inf")) for step in steps_on_disk}
    for step in select_steps_to_delete(known_rewards, keep_count):
        shutil.rmtree(checkpoints_folder / f"step-{step}", ignore_errors=True)
    # Partial folders of earlier, killed runs: none is being written now.
    for partial_folder in checkpoints_folder.glob(".step-*"):
        shutil.rmtree(partial_folder, ignore_errors=True)


def delete_checkpoints_after(checkpoints_folder: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`."""
    for folder in checkpoints_folder.glob("step-*"):
        if (parse_step(folder) or 0) > step:
            shutil.rmtree(folder)


def hash_prompts(prompts: Iterable[Prompt]) -> str:
    """Digest of the training prompts and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.token_ids}\n".encode())
    return digest.hexdigest()[:16]


CHANGEABLE_SECTIONS = ("run", "tracking", "cluster", "timeouts")
"""Settings sections that may change when a run is resumed, since they do not affect what is trained."""
CHANGEABLE_KEYS = (
    "name", "evaluate.simulated_users", "algorithm.steps", "learner.checkpoint_every_steps",
    "learner.keep_checkpoints", "weight_sync.logprob_tolerance", "rollout.engines",
    "rollout.kv_cache_gib", "rollout.gpu_memory_share", "rollout.eager", "weight_sync.transport",
    # Optimizer state is read by any number of ranks and any ZeRO stage: results differ by rounding.
    "learner.workers", "learner.zero_stage", "learner.offload_optimizer", "learner.gradient_checkpointing",
    "algorithm.micro_batch_tokens",
)  # fmt: skip
"""Single settings that may change when a run is resumed."""


def diff_settings(
    old_settings: Mapping[str, Any], new_settings: Mapping[str, Any], key_prefix: str = ""
) -> dict[str, str]:
    """Settings that differ and affect training, by dotted key, each described by both values."""
    differences: dict[str, str] = {}
    for key in sorted({*old_settings, *new_settings}):
        dotted_key = f"{key_prefix}{key}"
        saved, current = old_settings.get(key), new_settings.get(key)
        if dotted_key in CHANGEABLE_SECTIONS or dotted_key in CHANGEABLE_KEYS or saved == current:
            continue
        if isinstance(saved, Mapping) and isinstance(current, Mapping):
            differences |= diff_settings(saved, current, f"{dotted_key}.")
        else:
            differences[dotted_key] = f"{dotted_key} (then {saved!r}, now {current!r})"
    return differences
