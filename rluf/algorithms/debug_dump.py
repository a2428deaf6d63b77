"""Dump a step with a non-finite gradient to files, and replay it to find the sample that caused it.

A dump consists of plain tensors and JSON: the policy's weights, the step's samples and the learner inputs. A replay
takes one process, without Ray and DeepSpeed; the sum over micro-batches does not depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rluf.algorithms.logprobs import compute_response_logprobs
from rluf.algorithms.losses import compute_policy_loss
from rluf.algorithms.packing import MicroBatch, pack_micro_batch
from rluf.algorithms.policy_io import load_policy
from rluf.algorithms.registry import LearnerInputs
from rluf.checkpoint.format import group_from_json, group_to_json
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.types import Group
from rluf.utils.files import build_write_error

POLICY_FOLDER = "policy"
"""Folder of the policy's weights within a dump."""
RANK_FILE_PATTERN = "rank-*.json"


@dataclass(frozen=True, slots=True)
class StepDump:
    """One step as the learners received it; `micro_batches` are those of all ranks."""

    settings: Settings
    reference_folder: Path
    step: int
    groups: Mapping[int, Group]
    learner_inputs: LearnerInputs
    micro_batches: Sequence[MicroBatch]


@dataclass(frozen=True, slots=True)
class ReplayFinding:
    """Result of one replayed micro-batch: the prompt ids of its samples, and the names of non-finite values."""

    micro_batch_index: int
    prompt_ids: tuple[str, ...]
    non_finite_names: tuple[str, ...]


def write_step_dump(dump_folder: Path, rank: int, step_dump: StepDump) -> None:
    """Write one rank's share of a step into `dump_folder`; the caller writes the weights into POLICY_FOLDER.

    Raises ResourceError on a full disk and ModelError on another write error.
    """
    content = {
        "settings": step_dump.settings.model_dump(mode="json"),
        "reference_folder": str(step_dump.reference_folder),
        "step": step_dump.step,
        "groups": {str(index): group_to_json(group) for index, group in step_dump.groups.items()},
        "learner_inputs": asdict(step_dump.learner_inputs),
        "micro_batches": step_dump.micro_batches,
    }
    try:
        dump_folder.mkdir(parents=True, exist_ok=True)
        (dump_folder / f"rank-{rank}.json").write_text(json.dumps(content))
    except OSError as error:
        raise build_write_error("the dump of a step with a non-finite gradient", dump_folder, error) from error


def read_step_dump(dump_folder: Path) -> StepDump:
    """The step that `write_step_dump` wrote, of all ranks together. Raises DataError when there is none."""
    rank_files = sorted(dump_folder.glob(RANK_FILE_PATTERN))
    if not rank_files or not (dump_folder / POLICY_FOLDER).is_dir():
        raise DataError(
            f"{dump_folder} contains no dumped step: expected {RANK_FILE_PATTERN} and {POLICY_FOLDER}/; give the "
            "folder that the error message named"
        )
    rank_contents = [json.loads(file.read_text()) for file in rank_files]
    # Settings and learner inputs are the same on every rank; groups and micro-batches are each rank's own.
    first_rank = rank_contents[0]
    return StepDump(
        settings=Settings.model_validate(first_rank["settings"]),
        reference_folder=Path(first_rank["reference_folder"]),
        step=int(first_rank["step"]),
        groups={int(i): group_from_json(group) for content in rank_contents for i, group in content["groups"].items()},
        learner_inputs=LearnerInputs(**first_rank["learner_inputs"]),
        micro_batches=[
            [(group_index, sample_index) for group_index, sample_index in micro_batch]
            for content in rank_contents
            for micro_batch in content["micro_batches"]
        ],
    )


def replay_step(dump_folder: Path) -> Iterator[ReplayFinding]:
    """Replay a dumped step micro-batch by micro-batch, in its dtype, on the CPU."""
    step_dump = read_step_dump(dump_folder)
    dtype = getattr(torch, step_dump.settings.policy_dtype)
    policy, reference = (
        load_policy(folder, dtype=dtype) for folder in (dump_folder / POLICY_FOLDER, step_dump.reference_folder)
    )
    for micro_batch_index, micro_batch in enumerate(step_dump.micro_batches):
        # Each micro-batch alone: in the step's gradient sum, one non-finite sample would make everything NaN.
        policy.zero_grad()
        prompt_ids = tuple(dict.fromkeys(step_dump.groups[group_index].prompt.id for group_index, _ in micro_batch))
        non_finite_names = tuple(_find_non_finite(step_dump, micro_batch, policy, reference))
        yield ReplayFinding(micro_batch_index, prompt_ids, non_finite_names)


def _find_non_finite(
    step_dump: StepDump, micro_batch: MicroBatch, policy: nn.Module, reference: nn.Module
) -> Iterator[str]:
    """Names of the non-finite values of one micro-batch, in the order in which they are computed."""
    learner_inputs = step_dump.learner_inputs
    temperature = step_dump.settings.rollout.temperature
    batch = pack_micro_batch(micro_batch, step_dump.groups, learner_inputs.advantages, learner_inputs.loss_weights)
    with torch.no_grad():
        reference_logprobs = compute_response_logprobs(reference, batch, temperature)
    policy_logprobs = compute_response_logprobs(policy, batch, temperature)
    result = compute_policy_loss(
        policy_logprobs,
        reference_logprobs,
        batch,
        step_dump.settings.algorithm,
        loss_name=learner_inputs.policy_loss,
        kl_coef=learner_inputs.loss_kl_coef,
        kl_to_go_coef=learner_inputs.kl_to_go_coef,
    )
    result.loss.backward()
    # NaN marks demonstrations, which have no rollout logprobs.
    rollout_logprobs = batch.rollout_logprobs[~batch.rollout_logprobs.isnan()]
    values: dict[str, Tensor] = {
        "advantages": batch.advantages, "loss weights": batch.loss_weights, "rollout logprobs": rollout_logprobs,
        "reference logprobs": reference_logprobs, "policy logprobs": policy_logprobs, "loss": result.loss,
    }  # fmt: skip
    values |= {f"gradient of {name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return (name for name, value in values.items() if not bool(torch.isfinite(value).all()))
