"""Checkpoints of a run: which of them are whole, which one to go on from, which ones to keep.

A checkpoint is a folder step-<n> with the policy (a Hugging Face folder), one file of optimiser state a learner rank,
state.json (what the driver knows) and, written last, complete.json, which lists every other file with its size.
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

from rluf.types import Group, Prompt, Sample

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout; checkpoints of another one are skipped with a message."""
MANIFEST = "complete.json"
STATE = "state.json"
POLICY = "policy"
FOLDER = "checkpoints"
"""Where a run folder keeps them."""
ANSWERS = "base_answers.jsonl"
"""The base policy's answers, beside them."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What the driver must know to go on after optimiser step `step`, when the weights had version `step`.

    `world` is the number of learner ranks, `settings` the tree it ran with, `prompts` a digest of the training prompts
    in order, `pipeline` the cursors, the prompts in flight and the standardiser, `schedules` each rank's learning rate
    schedule, `rows` the metrics of the steps done, `watch` what the alarms have seen.
    """

    step: int
    world: int
    settings: Mapping[str, Any]
    prompts: str
    pipeline: Mapping[str, Any]
    schedules: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    watch: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int

    @property
    def policy(self) -> Path:
        """The policy as a Hugging Face folder."""
        return self.folder / POLICY

    def state(self) -> RunState:
        """What the driver knew when it was written."""
        content = json.loads((self.folder / STATE).read_text("utf-8"))
        content.pop("format")
        return RunState(**content)


def rank_file(folder: Path, rank: int, world: int, model: str = "learner") -> Path:
    """Where one learner rank keeps the optimiser state of its policy, or of its `critic`."""
    return folder / f"{model}-{rank}-of-{world}.safetensors"


def write_state(folder: Path, state: RunState) -> None:
    """Write state.json, then complete.json over all files that are in `folder` by now."""
    text = json.dumps({"format": FORMAT, **asdict(state)}, ensure_ascii=False)
    (folder / STATE).write_text(text, "utf-8")
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sizes}, indent=1), "utf-8")


def flaw(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be resumed from; None when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files: dict[str, int] = manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if manifest.get("format") != FORMAT:
        return f"it has format {manifest.get('format')}, this version reads {FORMAT}"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    needed = {STATE, f"{POLICY}/config.json"}
    return f"it lists no {min(needed - files.keys())}" if needed - files.keys() else None


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    number = folder.name.removeprefix("step-")
    return int(number) if folder.name.startswith("step-") and number.isdigit() else None


def newest_whole(folder: Path, at_most: float = float("inf")) -> Checkpoint | None:
    """The newest whole checkpoint below `folder` of a step up to `at_most`; broken ones are skipped with a message."""
    steps = {step: path for path in folder.glob("step-*") if (step := step_of(path)) is not None and step <= at_most}
    for left in sorted(folder.glob(".step-*.part")):
        logger.warning("checkpoint %s is left out: it was being written when its run ended", left)
    for step, path in sorted(steps.items(), reverse=True):
        problem = flaw(path)
        if problem is None:
            return Checkpoint(path, step)
        logger.warning("checkpoint %s is left out: %s", path, problem)
    return None


def superfluous(rewards: Mapping[int, float], keep: int) -> list[int]:
    """Steps whose checkpoints may go: all but the last `keep` and the one of the highest mean reward (0 keeps all)."""
    if keep == 0:
        return []
    steps = sorted(rewards)
    best = max(steps, key=lambda step: (rewards[step], step), default=None)
    return [step for step in steps[:-keep] if step != best]


def prune(folder: Path, rewards: Mapping[int, float], keep: int) -> None:
    """Delete the checkpoints that `superfluous` names; `rewards` has the mean reward of every step done."""
    there = {step for path in folder.glob("step-*") if (step := step_of(path)) is not None}
    for step in superfluous({step: rewards.get(step, float("-inf")) for step in there}, keep):
        shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints below `folder` of steps after `step`."""
    for path in folder.glob("step-*"):
        if (step_of(path) or 0) > step:
            shutil.rmtree(path)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Stands for the training prompts and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.token_ids}\n".encode())
    return digest.hexdigest()[:16]


FREE = ("run", "tracking", "cluster", "name", "evaluate.users", "evaluate.responses_per_user")
"""Settings (or sections) that may change between a run and its resumption without changing what is learnt."""
FREE_KEYS = (
    "algorithm.steps", "learner.save_every", "learner.keep_checkpoints", "learner.deadline_s", "rollout.deadline_s",
    "publish.deadline_s", "publish.probe_tolerance", "reward.deadline_s", "reward.retries", "rollout.engines",
    "rollout.kv_cache_gib", "rollout.gpu_memory_share",
)  # fmt: skip


def changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ and matter to what is learnt, each with both values."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        dotted = f"{prefix}{key}"
        old, new = before.get(key), now.get(key)
        if dotted in FREE or dotted in FREE_KEYS or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changed(old, new, f"{dotted}.")
        else:
            found.append(f"{dotted} (then {old!r}, now {new!r})")
    return found


def group_to_json(group: Group) -> dict[str, Any]:
    """A group as plain JSON types."""
    return asdict(group)


def group_from_json(content: Mapping[str, Any]) -> Group:
    """The group that `group_to_json` wrote."""
    prompt = dict(content["prompt"])
    prompt |= {"messages": tuple(prompt["messages"]), "token_ids": tuple(prompt["token_ids"])}
    samples = []
    for one in content["samples"]:
        tuples = {key: tuple(one[key]) for key in ("prompt_ids", "response_ids", "rollout_logprobs")}
        spans = tuple((int(start), int(version)) for start, version in one["version_spans"])
        samples.append(Sample(**{**one, **tuples, "version_spans": spans}))
    return Group(Prompt(**prompt), tuple(samples), int(content["version"]))
