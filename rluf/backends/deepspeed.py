"""DeepSpeed: the only module that touches its API. Turns a torch module into a data-parallel engine with AdamW.

Used by the policy learner and by reward training. Compute runs in `dtype`, while the optimiser keeps float32 master
weights: a bfloat16 weight near 1 cannot hold an update below 0.004, so without them small updates would vanish.
Gradients of many micro-batches are summed in float32 (ZeRO 1 to 3; ZeRO 0 sums in `dtype`, as DeepSpeed offers no
other) and reduced over ranks at the last micro-batch of a step, so the number of micro-batches is free.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rluf.algorithms.lora import Adapter, adapters, plain_name
from rluf.backends.colocation import STATES, WEIGHTS
from rluf.backends.weight_transfer.lora import adapter_names
from rluf.errors import ModelError, ResourceError
from rluf.utils.files import write_error

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
BUCKET_ELEMENTS = 50_000_000
"""Elements that ranks reduce or gather at once."""
SAVE_BYTES = 256 << 20
"""Bytes of weights gathered at once for a checkpoint."""


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which DeepSpeed and others know that this process is a rank."""


def join_group(*, rank: int, world: int, host: str, port: int, device: torch.device, timeout_s: float) -> None:
    """Form the process group of `world` ranks around `host`:`port`; gloo on CPUs, NCCL on GPUs.

    Rank 0 listens on the port. Collectives that wait longer than `timeout_s` fail afterwards. Raises ResourceError that
    names the rank when the others do not come in time or the port is taken.
    """
    os.environ.update({key: str(value) for key, value in zip(PLACE, (rank, world, 0, host, port), strict=True)})
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        leave_group()
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"learner rank {rank} of {world} could not join the process group at {host}:{port} within {timeout_s:g} s: "
            f"{reason}; check that all {world} ranks are alive, reach that host, and that the port is free"
        ) from error


def leave_group() -> None:
    """Leave the process group, if this process is in one. DeepSpeed forgets its own groups too: another may follow.

    Nor is the environment left as that of a rank, which libraries take for distributed training.
    """
    for name in PLACE:
        os.environ.pop(name, None)
    if not dist.is_initialized():
        return
    if (comm := sys.modules.get("deepspeed.comm")) is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def init_deepspeed(
    model: nn.Module,
    *,
    zero_stage: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    grad_clip: float,
    dtype: torch.dtype,
    world: int,
    offload: bool = False,
    total_steps: int | None = None,
) -> DeepSpeedEngine:
    """Wrap `model` in a DeepSpeed engine with AdamW; the process group must exist already (all ranks call this).

    The learning rate rises linearly over `warmup_steps` optimiser steps (the first has a share of it already), then
    stays, or with `total_steps` falls linearly to zero at that step. `grad_clip` bounds the global gradient norm.
    `offload` keeps optimiser state in host memory. `dtype` is bfloat16 or float32. Gradients are averaged over ranks.
    Raises ResourceError when the process group has another size than `world`.
    """
    deepspeed = _deepspeed()
    if not dist.is_initialized() or dist.get_world_size() != world:
        size = dist.get_world_size() if dist.is_initialized() else 0
        raise ResourceError(f"DeepSpeed was asked for {world} ranks, but the process group has {size}; join it first")
    model = model.to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # On the CPU the fused AdamW is one pass over memory. Offloaded state lives on the CPU too.
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=_schedule(warmup_steps, total_steps),
        config=_config(zero_stage, grad_clip, dtype, world, offload),
        dist_init_required=False,
    )
    if world == 1 and zero_stage == 0 and dtype == torch.float32:
        engine.enable_backward_allreduce = False  # one rank alone would copy all its gradients out and back
    engine.train()
    return engine


def init_reference(
    model: nn.Module, *, zero_stage: int, dtype: torch.dtype, device: torch.device, world: int
) -> nn.Module:
    """Freeze `model` for forward passes only: sharded over ranks at ZeRO 3, a whole copy on each rank otherwise."""
    model = model.to(dtype).eval()
    model.requires_grad_(False)
    if zero_stage < 3:
        return model.to(device)
    config = _config(3, 0.0, dtype, world, offload=False)
    engine, *_ = _deepspeed().initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    return engine


@contextlib.contextmanager
def sharded_loading(zero_stage: int, dtype: torch.dtype, world: int) -> Iterator[None]:
    """At ZeRO 3, let transformers load models shard by shard inside the block, so that no rank holds a whole one."""
    if zero_stage < 3:
        yield
        return
    _deepspeed()
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(_config(3, 0.0, dtype, world, offload=False))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


def parameter_count(engine: DeepSpeedEngine) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum(_numel(parameter) for parameter in engine.module.parameters())


def accumulate(engine: DeepSpeedEngine, forward: Callable[[], tuple[Tensor, Result]], *, last: bool) -> Result:
    """Run `forward` -> (scalar loss, anything) and add its gradient; returns the anything.

    Mark the step's last micro-batch with `last`: there ranks reduce, so all ranks must mark the same call.
    """
    engine.set_gradient_accumulation_boundary(last)
    loss, result = forward()
    engine.backward(loss, scale_wrt_gas=False)
    return result


def apply_step(engine: DeepSpeedEngine) -> tuple[bool, float]:
    """Clip, update and clear gradients. Returns (whether the update was applied, global gradient norm before clipping).

    An update with a non-finite gradient on any rank is skipped on every rank: weights and optimiser state stay.
    """
    norm = _plain_norm(engine)
    if norm is not None and not math.isfinite(norm):
        engine.optimizer.zero_grad()
        engine.zero_grad()
        return False, float("inf")
    engine.step()
    reported = engine.get_global_grad_norm()
    if reported is not None:
        norm = float(reported)
    return bool(engine.was_step_applied()), float("nan") if norm is None else norm


def _plain_norm(engine: DeepSpeedEngine) -> float | None:
    """Gradient norm at ZeRO 0, where DeepSpeed has no guard of its own; None above it.

    Gradients are reduced by then, so all ranks see the same value.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def learning_rate(engine: DeepSpeedEngine) -> float:
    """Learning rate that the next optimiser step will use."""
    return float(engine.get_lr()[0])


def gather_parameters(engine: DeepSpeedEngine, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Whole weights in `dtype`, as (name, tensor) buckets of about `bucket_bytes` bytes; a larger tensor goes alone.

    Tied weights come under every name they have (so lm_head.weight comes even if it is the embedding), weights with a
    LoRA adapter with its change merged in. Below ZeRO 3 tensors are the weights themselves, or merged copies; at ZeRO 3
    they are gathered copies, and all ranks must iterate in lockstep.
    """
    bucket: list[tuple[str, nn.Parameter]] = []
    size, changes = 0, adapters(engine.module)
    for own_name, parameter in engine.module.named_parameters(remove_duplicate=False):
        name = plain_name(own_name)
        if name is None:
            continue
        nbytes = _numel(parameter) * parameter.element_size()
        if bucket and size + nbytes > bucket_bytes:
            yield _whole(bucket, changes)
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += nbytes
    if bucket:
        yield _whole(bucket, changes)


def gather_adapters(engine: DeepSpeedEngine) -> Iterator[list[tuple[str, Tensor]]]:
    """The LoRA matrices under PEFT's names, all in one bucket; at ZeRO 3 all ranks must iterate in lockstep."""
    named = [
        pair
        for weight, change in adapters(engine.module).items()
        for pair in zip(adapter_names(weight), (change.down, change.up), strict=True)
    ]
    yield _whole(named, {})


def offload(engine: DeepSpeedEngine, parts: Sequence[str]) -> None:
    """Move `parts` (rluf.backends.colocation: weights, states) to host memory. Harmless for what is there.

    ZeRO 2 only: DeepSpeed 0.19 has no offload_states for ZeRO 1 in bfloat16, and for ZeRO 3 only with its own Adam.
    """
    _deepspeed()
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    kinds = {
        WEIGHTS: {Kind.lp_params},
        STATES: {Kind.optim_states, Kind.hp_params, Kind.lp_grads, Kind.contiguous_grad_buffer},
    }
    wanted = set().union(*(kinds[part] for part in parts))
    engine.offload_states(include=wanted, pin_memory=engine.device.type == "cuda")


def reload(engine: DeepSpeedEngine) -> None:
    """Bring back all that `offload` has moved."""
    engine.reload_states()


def save_hf(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write the weights in `dtype` with config.json as a Hugging Face folder; all ranks call, rank 0 writes.

    Raises ModelError when the disk refuses it.
    """
    writes = dist.get_rank() == 0
    once = {plain_name(name) for name, _ in engine.module.named_parameters()}
    state: dict[str, Tensor] = {}
    for bucket in gather_parameters(engine, SAVE_BYTES):
        if writes:
            state.update({name: tensor.to("cpu", copy=True) for name, tensor in bucket if name in once})
    if not writes:
        return
    state.update({name: buffer.cpu() for name, buffer in _persistent_buffers(engine.module)})
    try:
        engine.module.save_pretrained(str(folder), state_dict=state)
    except (OSError, SafetensorError) as error:
        raise write_error("the policy", folder, error) from error


def save_optimizer(engine: DeepSpeedEngine, file: Path, extra: dict[str, Tensor]) -> dict[str, Any]:
    """Write this rank's float32 master weights and AdamW state as safetensors; returns the schedule, which is JSON.

    DeepSpeed's own checkpoints are pickles, which run code when read; these are plain tensors. `extra` tensors are kept
    beside them. Weights in `dtype` are not: they are the policy folder. Raises what `write_error` says when the disk
    refuses.
    """
    state: dict[str, Tensor] = {f"extra.{name}": tensor for name, tensor in extra.items()}
    for index, master in enumerate(_masters(engine)):
        state[f"{index}.master"] = master.detach()
        for name, tensor in engine.basic_optimizer.state.get(master, {}).items():
            state[f"{index}.{name}"] = tensor
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)
    except (OSError, SafetensorError) as error:
        raise write_error("the optimiser state", file, error) from error
    schedule: dict[str, Any] = engine.lr_scheduler.state_dict()
    return schedule


def load_optimizer(engine: DeepSpeedEngine, file: Path, schedule: dict[str, Any]) -> dict[str, Tensor]:
    """Put back what `save_optimizer` wrote, on the same rank of the same number of ranks; returns the extra tensors.

    What is trained takes its weights from there; what is frozen stays as it was loaded. Raises ModelError when the file
    is of another model or layout.
    """
    try:
        kept = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the optimiser state {file} cannot be read: {error}; resume from another one") from error
    optimizer = engine.basic_optimizer
    for index, master in enumerate(_masters(engine)):
        parts = {name.partition(".")[2]: t for name, t in kept.items() if name.partition(".")[0] == str(index)}
        found = parts.pop("master", None)
        if found is None or found.shape != master.shape:
            shape = None if found is None else tuple(found.shape)
            raise ModelError(
                f"{file} holds a part of shape {shape} where the optimiser has {tuple(master.shape)}; resume with the "
                "model, learner.ranks and learner.zero_stage of the run that wrote it"
            )
        with torch.no_grad():
            master.copy_(found)
        if parts:
            optimizer.state[master] = {name: tensor.to(master.device) for name, tensor in parts.items()}
    _refresh(engine)
    engine.lr_scheduler.load_state_dict(schedule)
    for group, rate in zip(optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return {name.removeprefix("extra."): tensor for name, tensor in kept.items() if name.startswith("extra.")}


def _refresh(engine: DeepSpeedEngine) -> None:
    """Round the optimiser's float32 weights into the module's, as the end of a step does. All ranks call it."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for index in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for masters, group in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, group, strict=True):
                parameter.data.copy_(master.data)


def _masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's float32 weights as the optimiser holds them: flat shards with ZeRO, whole tensors without."""
    if engine.zero_optimization_stage() == 3:  # ZeRO 3 lends them to the optimiser only during a step
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = {name for name in module.state_dict() if plain_name(name) == name}
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in names)


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO 3 left only a shard here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _whole(bucket: list[tuple[str, nn.Parameter]], changes: Mapping[str, Adapter]) -> list[tuple[str, Tensor]]:
    """The parameters of `bucket` as whole tensors, each with its adapter's change."""
    here = {name: changes[name] for name, _ in bucket if name in changes}
    held = [parameter for _, parameter in bucket]
    held += [parameter for change in here.values() for parameter in (change.down, change.up)]
    sharded = {id(parameter): parameter for parameter in held if hasattr(parameter, "ds_id")}
    if not sharded:
        return [(name, _merged(parameter.detach(), here.get(name))) for name, parameter in bucket]
    with _deepspeed().zero.GatheredParameters(list(sharded.values())):
        return [(name, _merged(parameter.detach(), here.get(name)).clone()) for name, parameter in bucket]


def _merged(weight: Tensor, change: Adapter | None) -> Tensor:
    return weight if change is None else change.merged(weight, change.down.detach(), change.up.detach())


def _schedule(warmup_steps: int, total_steps: int | None) -> Callable[[torch.optim.Optimizer], Any]:
    """Linear warm-up, then constant or linear decay; DeepSpeed calls it with the optimiser."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if total_steps is None:
            return 1.0
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _config(zero_stage: int, grad_clip: float, dtype: torch.dtype, world: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. Its batch sizes are 1, since micro-batches here are packed and of any number."""
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    if zero_stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if offload and zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _deepspeed() -> Any:
    """Import DeepSpeed, told beforehand to use the CPU where there is no GPU.

    On the CPU it would compile a shared-memory collective for inference at the first start: two minutes of g++ for what
    training never calls, under a lock that a killed process leaves behind for the next one to wait at. An empty table
    of compatible operators (only that collective looks it up, version 0.19) leaves it out.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
