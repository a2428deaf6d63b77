"""Optimizer state on disk: float32 master weights and AdamW moments of each rank, readable by any number of ranks.

DeepSpeed's own checkpoints are pickles, which run code when read; these are plain tensors. Each file also records which
elements of which parameter its tensors contain, so that ranks of another number or ZeRO stage can collect theirs, as
DeepSpeed's universal checkpoints allow after a conversion.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rluf.errors import ModelError
from rluf.utils.files import build_write_error

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LAYOUT_KEY = "layout"
"""Key of the file's metadata with the fragments of each master weight, as JSON."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A range of a flattened parameter, and its position in the flat master weight of a rank."""

    parameter: str
    start: int
    """First element of the range within the parameter."""
    offset: int
    """Position of that element in the master weight."""
    count: int


Layout = list[list[Fragment]]
"""Fragments of each master weight of a rank; elements without a fragment are padding."""


def save_optimizer_state(engine: DeepSpeedEngine, file: Path, extra_tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write this rank's float32 master weights and AdamW state as safetensors; returns the LR schedule for JSON.

    The file also contains `extra_tensors`, and not the weights in `dtype`, which are the policy folder. Raises
    ResourceError on a full disk and ModelError on another write error.
    """
    state: dict[str, Tensor] = {f"extra.{name}": tensor for name, tensor in extra_tensors.items()}
    for index, master in enumerate(list_master_weights(engine)):
        state[f"{index}.master"] = master.detach()
        for name, tensor in engine.basic_optimizer.state.get(master, {}).items():
            state[f"{index}.{name}"] = tensor
    layout_json = json.dumps([[astuple(fragment) for fragment in fragments] for fragments in _describe_layout(engine)])
    try:
        cpu_tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(cpu_tensors, file, metadata={LAYOUT_KEY: layout_json})
    except (OSError, SafetensorError) as error:
        raise build_write_error("the optimizer state", file, error) from error
    lr_schedule: dict[str, Any] = engine.lr_scheduler.state_dict()
    return lr_schedule


def load_optimizer_state(engine: DeepSpeedEngine, files: Sequence[Path], schedule: dict[str, Any]) -> dict[str, Tensor]:
    """Restore what `save_optimizer_state` wrote into `files`, in the order of the ranks that wrote them.

    The number of ranks and the ZeRO stage may be others than those of the engine. Trained parameters get their weights
    from the master weights; frozen ones stay as they were loaded. The learning rate is that of the engine's own
    schedule at the saved step. Returns the extra tensors of this rank, or of the last one where fewer ranks wrote them.
    Raises ModelError when the files are of another model, or of a release that wrote no layout and another layout.
    """
    own_file = files[min(dist.get_rank(), len(files) - 1)]
    masters, layout = list_master_weights(engine), _describe_layout(engine)
    try:
        with safe_open(own_file, "pt") as handle:
            saved_layout, keys = _parse_layout(handle), set(handle.keys())
            shapes = [handle.get_slice(f"{i}.master").get_shape() for i in range(len(masters)) if f"{i}.master" in keys]
        # The shapes too: padding depends on the stage.
        is_own_layout = saved_layout == layout and shapes == [list(master.shape) for master in masters]
        if saved_layout is None or is_own_layout:
            saved_tensors = load_file(own_file)
        else:
            sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in _iter_trained(engine)}
            saved_tensors = _collect_fragments(files, own_file, layout, masters, sizes)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the optimizer state {own_file} cannot be read: {error}; resume from another one") from error
    optimizer = engine.basic_optimizer
    for index, master in enumerate(masters):
        prefix = f"{index}."
        parameter_state = {
            name.removeprefix(prefix): tensor for name, tensor in saved_tensors.items() if name.startswith(prefix)
        }
        saved_master = parameter_state.pop("master", None)
        if saved_master is None or saved_master.shape != master.shape:
            saved_shape = None if saved_master is None else tuple(saved_master.shape)
            raise ModelError(
                f"{own_file}: expected master weights of shape {tuple(master.shape)}, got {saved_shape}; resume with "
                "the model, learner.workers and learner.zero_stage of the run that wrote it"
            )
        with torch.no_grad():
            master.copy_(saved_master)
        if parameter_state:
            optimizer.state[master] = {name: tensor.to(master.device) for name, tensor in parameter_state.items()}
    _copy_masters_to_model(engine)
    _restore_schedule(engine, schedule)
    return {name.removeprefix("extra."): tensor for name, tensor in saved_tensors.items() if name.startswith("extra.")}


def list_master_weights(engine: DeepSpeedEngine) -> list[Tensor]:
    """Float32 weights in this rank's optimizer: flat shards with ZeRO, whole tensors without."""
    # ZeRO 3 gives them to the optimizer only during a step.
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _describe_layout(engine: DeepSpeedEngine) -> Layout:
    """Which elements of which parameters the master weights of this rank contain."""
    names, trained = zip(*_iter_trained(engine), strict=True)
    masters, rank = list_master_weights(engine), dist.get_rank()
    if engine.zero_optimization_stage() == 3:
        # Each parameter is cut into equal ranges, one per rank, the last of them padded. A master is one sub-group.
        name_by_id = {id(parameter): name for name, parameter in zip(names, trained, strict=True)}
        return [
            _build_fragments([(name_by_id[id(p)], int(p.ds_numel), int(p.partition_numel())) for p in sub_group], rank)
            for sub_group in engine.optimizer.fp16_groups
        ]
    sizes = [parameter.numel() for parameter in trained]
    if [master.numel() for master in masters] == sizes:
        return [[Fragment(name, 0, 0, size)] for name, size in zip(names, sizes, strict=True)]
    # All parameters one after the other, padded at the end and cut into equal ranges, one per rank.
    (master,) = masters
    fragments, position, first = [], 0, rank * master.numel()
    for name, size in zip(names, sizes, strict=True):
        start, end = max(position, first), min(position + size, first + master.numel())
        if start < end:
            fragments.append(Fragment(name, start - position, start - first, end - start))
        position += size
    return [fragments]


def _build_fragments(shards: Sequence[tuple[str, int, int]], rank: int) -> list[Fragment]:
    """Fragments of the shards of `rank`, each (parameter, its size, padded length), which follow each other."""
    fragments, offset = [], 0
    for name, size, shard_size in shards:
        count = min(shard_size, size - rank * shard_size)
        if count > 0:
            fragments.append(Fragment(name, rank * shard_size, offset, count))
        offset += shard_size
    return fragments


def _iter_trained(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _parse_layout(handle: Any) -> Layout | None:
    """The layout in an open file's metadata; None in files of earlier releases."""
    layout_json = (handle.metadata() or {}).get(LAYOUT_KEY)
    if layout_json is None:
        return None
    return [[Fragment(*values) for values in fragments] for fragments in json.loads(layout_json)]


def _collect_fragments(
    files: Sequence[Path], own_file: Path, layout: Layout, masters: Sequence[Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Tensors as a rank of `layout` would have saved them, from the fragments of all `files`.

    Reads only the ranges it needs, so a rank needs memory for its own shard. `sizes` are those of whole parameters.
    """
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        sources: dict[str, dict[int, tuple[Any, str, Fragment]]] = defaultdict(dict)
        for file in files:
            handle = stack.enter_context(safe_open(file, "pt"))
            saved_layout = _parse_layout(handle)
            if saved_layout is None:
                raise ModelError(f"{file} is of a release that could not resume with other ranks; use that release")
            for index, fragments in enumerate(saved_layout):
                for fragment in fragments:
                    # Without ZeRO every rank has all parameters: one copy of each range is enough.
                    sources[fragment.parameter].setdefault(fragment.start, (handle, f"{index}.", fragment))
            if file == own_file:
                tensors |= {name: handle.get_tensor(name) for name in list(handle.keys()) if name.startswith("extra.")}
        for name in sorted({*sizes, *sources}):
            saved_size = sum(fragment.count for _, _, fragment in sources[name].values())
            if saved_size != sizes.get(name, 0):
                raise ModelError(
                    f"{own_file}: expected {sizes.get(name, 0)} elements of {name}, got {saved_size}; resume with the "
                    "model and learner.lora_rank of the run that wrote it"
                )
        for index, (fragments, master) in enumerate(zip(layout, masters, strict=True)):
            # A rank beyond the last parameter has padding only, which no file contains.
            tensors[f"{index}.master"] = torch.zeros(master.shape, dtype=torch.float32)
            for target in fragments:
                for source in sources[target.parameter].values():
                    _copy_states(tensors, f"{index}.", master, target, *source)
    return tensors


def _copy_states(
    tensors: dict[str, Tensor],
    prefix: str,
    master: Tensor,
    target: Fragment,
    handle: Any,
    saved_prefix: str,
    source: Fragment,
) -> None:
    """Copy the elements that two fragments share, of the master weight and of each state of the optimizer."""
    start = max(target.start, source.start)
    count = min(target.start + target.count, source.start + source.count) - start
    if count <= 0:
        return
    saved_shape = handle.get_slice(f"{saved_prefix}master").get_shape()
    first, position = start - source.start + source.offset, start - target.start + target.offset
    for key in list(handle.keys()):
        if not key.startswith(saved_prefix):
            continue
        name, saved_slice = prefix + key.removeprefix(saved_prefix), handle.get_slice(key)
        if saved_slice.get_shape() != saved_shape:  # the step count, a scalar
            # Cloned: a tensor shared by several parameters would be incremented by each of them.
            tensors[name] = handle.get_tensor(key).clone()
            continue
        is_flat = len(saved_shape) == 1
        values = saved_slice[first : first + count] if is_flat else saved_slice[:].flatten()[first : first + count]
        if name not in tensors:
            tensors[name] = torch.zeros(master.shape, dtype=torch.float32)
        tensors[name].view(-1)[position : position + count] = values


def _copy_masters_to_model(engine: DeepSpeedEngine) -> None:
    """Round the float32 master weights into the module's weights, as the end of a step does. All ranks call it."""
    # Private attributes of DeepSpeed 0.19.8, one branch per optimizer wrapper (ZeRO 3; ZeRO 1 and 2, and BF16; FP16):
    # check them at every upgrade. In float32 without ZeRO there is no wrapper, and the masters are the weights.
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for index in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)


def _restore_schedule(engine: DeepSpeedEngine, schedule: dict[str, Any]) -> None:
    """Continue the engine's own schedule at the step of a saved one: a changed learning rate or decay takes effect."""
    scheduler = engine.lr_scheduler
    position = {key: schedule[key] for key in ("last_epoch", "_step_count")}
    rates = [
        base_rate * compute_factor(position["last_epoch"])
        for base_rate, compute_factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict({**scheduler.state_dict(), **position, "_last_lr": rates})
    # The scheduler sets the rate only on its next step, after the first update would have used the initial one.
    for group, learning_rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = learning_rate
