"""A step whose gradient was not finite, kept as files, and done again to find which sample it came from.

What is kept are plain tensors and JSON: the policy's weights, the step's samples, what the learners were told of them.
Doing it again takes one process, no Ray and no DeepSpeed; sums over micro-batches do not depend on how many ranks there
were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rluf.algorithms.logprobs import response_logprobs
from rluf.algorithms.losses import policy_loss
from rluf.algorithms.packing import MicroBatch, pack
from rluf.algorithms.policy_io import load_policy
from rluf.algorithms.registry import Lesson
from rluf.checkpoint.format import group_from_json, group_to_json
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.types import Group
from rluf.utils.files import write_error

POLICY = "policy"
"""Folder of the policy's weights within a dump."""
RANK = "rank-*.json"


@dataclass(frozen=True, slots=True)
class Dump:
    """A step as it was given to the learners: `plan` holds the micro-batches of all ranks."""

    settings: Settings
    reference: Path
    step: int
    groups: Mapping[int, Group]
    lesson: Lesson
    plan: Sequence[MicroBatch]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one micro-batch gave: its samples as prompt ids, and what in it was not finite (empty if all was)."""

    micro_batch: int
    prompts: tuple[str, ...]
    not_finite: tuple[str, ...]


def write_dump(folder: Path, rank: int, dump: Dump) -> None:
    """Write one rank's part of a step into `folder`; its weights go into the sub-folder POLICY.

    Raises what `write_error` says when the disk refuses.
    """
    told = {
        "settings": dump.settings.model_dump(mode="json"),
        "reference": str(dump.reference),
        "step": dump.step,
        "groups": {str(index): group_to_json(group) for index, group in dump.groups.items()},
        "lesson": asdict(dump.lesson),
        "plan": dump.plan,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    except OSError as error:
        raise write_error("a step that stopped the run", folder, error) from error


def read_dump(folder: Path) -> Dump:
    """The step that `write_dump` kept, of all ranks together. Raises DataError when there is none."""
    files = sorted(folder.glob(RANK))
    if not files or not (folder / POLICY).is_dir():
        raise DataError(f"{folder} holds no step ({RANK} and {POLICY}/); give the folder that the error named")
    parts = [json.loads(file.read_text()) for file in files]
    return Dump(
        settings=Settings.model_validate(parts[0]["settings"]),
        reference=Path(parts[0]["reference"]),
        step=int(parts[0]["step"]),
        groups={int(i): group_from_json(group) for part in parts for i, group in part["groups"].items()},
        lesson=Lesson(**parts[0]["lesson"]),
        plan=[[(group, sample) for group, sample in members] for part in parts for members in part["plan"]],
    )


def replay(folder: Path) -> Iterator[Finding]:
    """Do the step in `folder` again, micro-batch by micro-batch, in the dtype it was done in, on the CPU."""
    dump = read_dump(folder)
    dtype = getattr(torch, dump.settings.policy_dtype)
    policy, reference = (load_policy(path, dtype=dtype) for path in (folder / POLICY, dump.reference))
    for number, members in enumerate(dump.plan):
        policy.zero_grad()
        prompts = tuple(dict.fromkeys(dump.groups[group].prompt.id for group, _ in members))
        yield Finding(number, prompts, tuple(_not_finite(dump, members, policy, reference)))


def _not_finite(dump: Dump, members: MicroBatch, policy: nn.Module, reference: nn.Module) -> Iterator[str]:
    """Names of what is not finite in one micro-batch, in the order in which it is computed."""
    lesson, algorithm, temperature = dump.lesson, dump.settings.algorithm, dump.settings.rollout.temperature
    batch = pack(members, dump.groups, lesson.advantages, lesson.weights)
    with torch.no_grad():
        base = response_logprobs(reference, batch, temperature)
    logprobs = response_logprobs(policy, batch, temperature)
    result = policy_loss(logprobs, base, batch, algorithm, loss=lesson.loss, kl_coef=lesson.kl_coef, slope=lesson.slope)
    result.loss.backward()
    sampled = batch.rollout_logprobs[~batch.rollout_logprobs.isnan()]
    values: dict[str, Tensor] = {
        "advantages": batch.advantages,
        "loss weights": batch.loss_weights,
        "rollout logprobs": sampled,
        "reference logprobs": base,
        "policy logprobs": logprobs,
        "loss": result.loss,
    }
    values |= {f"gradient of {name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return (name for name, value in values.items() if not bool(torch.isfinite(value).all()))
