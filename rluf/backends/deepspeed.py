"""DeepSpeed, whose API only this module and optimizer_state touch: a torch module as a data-parallel AdamW engine.

Used by the policy learner and by reward training. Compute runs in `dtype`, while the optimizer has float32 master
weights: a bfloat16 weight near 1 cannot represent an update below 0.004, so without them small updates would vanish.
Gradients of many micro-batches are summed in float32 (ZeRO 1 to 3; ZeRO 0 sums in `dtype`, as DeepSpeed offers no
other), and a step may have any number of micro-batches. ZeRO 0 and 1 reduce them over ranks at the last one, ZeRO 2 and
3 at every one, since no rank has room for all gradients; on GPUs that overlaps with the backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from rluf.backends.colocation import OPTIMIZER_STATES_TAG, WEIGHTS_TAG
from rluf.backends.weight_transfer.lora import get_lora_names
from rluf.errors import ResourceError
from rluf.models.lora import LoraAdapter, find_lora_adapters, get_checkpoint_name
from rluf.utils.files import build_write_error

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

ForwardResult = TypeVar("ForwardResult")
MAX_GRAD_NORM = 1.0
"""Gradient clipping: maximum global norm, the usual default of trainers."""
BUCKET_ELEMENTS = 50_000_000
"""Elements that ranks reduce or gather in one collective."""
SAVE_BUCKET_BYTES = 256 << 20
"""Bytes of weights gathered at once for a checkpoint."""

RANK_ENVIRONMENT_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that make DeepSpeed and other libraries treat this process as a rank."""


def claim_port(host: str) -> socket.socket:
    """A socket bound to a free port of `host`, which no other process then gets until the socket is closed.

    Stores of torch and vLLM can listen on the port in the meantime: on Linux, sockets with SO_REUSEADDR share an
    address of which at most one listens.
    """
    reservation = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((host, 0))
    return reservation


def join_process_group(
    *, rank: int, world_size: int, host: str, port: int, device: torch.device, timeout_s: float
) -> None:
    """Form the process group of `world_size` ranks around `host`:`port`; gloo on CPUs, NCCL on GPUs.

    Rank 0 listens on the port. A collective that waits longer than `timeout_s` fails. Raises ResourceError naming the
    rank when the others do not join in time or the port is in use.
    """
    # Local rank 0 everywhere: Ray shows each actor its own GPU only.
    rank_values = (rank, world_size, 0, host, port)
    os.environ.update({key: str(value) for key, value in zip(RANK_ENVIRONMENT_KEYS, rank_values, strict=True)})
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        # DeepSpeed counts ranks in a communicator of its own, which wraps this group. Without it sharded loading at
        # ZeRO 3 assumes a single rank.
        _import_deepspeed(device).init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        leave_process_group()
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"learner rank {rank} of {world_size} could not join the process group at {host}:{port} within "
            f"{timeout_s:g} s: {reason}; check that all {world_size} ranks are alive, reach that host, and that the "
            "port is free"
        ) from error


def leave_process_group() -> None:
    """Leave the process group, if this process is in one, so that it can join another later.

    The environment of a rank is removed too: libraries take it for distributed training.
    """
    for name in RANK_ENVIRONMENT_KEYS:
        os.environ.pop(name, None)
    if not dist.is_initialized():
        return
    # Through DeepSpeed where it is in use: its own registry would still refer to the destroyed group.
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
    dtype: torch.dtype,
    world_size: int,
    device: torch.device,
    max_grad_norm: float = MAX_GRAD_NORM,
    weight_decay: float = 0.0,
    offload_optimizer: bool = False,
    total_steps: int | None = None,
    has_cosine_decay: bool = False,
    adam_betas: tuple[float, float] = (0.9, 0.999),
) -> DeepSpeedEngine:
    """Wrap `model` in a DeepSpeed engine with AdamW; all ranks call it, after joining a process group.

    The learning rate rises linearly over `warmup_steps` optimizer steps (the first step is not zero), then stays
    constant, or with `total_steps` falls to zero at that step, linearly or with `has_cosine_decay` as a half cosine.
    `max_grad_norm` bounds the global gradient norm. `weight_decay` is 0 for a policy, which its KL term keeps near the
    reference. `offload_optimizer` places the optimizer state in host memory. `dtype` is bfloat16 or float32. Gradients
    are averaged over ranks. Raises ResourceError when the size of the process group is not `world_size`, or DeepSpeed
    runs on another kind of device than `device` in this process.
    """
    deepspeed = _import_deepspeed(device)
    if not dist.is_initialized() or dist.get_world_size() != world_size:
        group_size = dist.get_world_size() if dist.is_initialized() else 0
        raise ResourceError(
            f"DeepSpeed: expected a process group of {world_size} ranks, got {group_size}; join the process group first"
        )
    model = model.to(dtype)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused, since on the CPU that is one pass over memory; offloaded state is on the CPU too.
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=adam_betas, weight_decay=weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=_build_lr_schedule(warmup_steps, total_steps, has_cosine_decay=has_cosine_decay),
        config=_build_deepspeed_config(
            zero_stage, max_grad_norm, dtype, world_size, offload_optimizer=offload_optimizer, device=device
        ),
        dist_init_required=False,
    )
    if world_size == 1 and zero_stage == 0 and dtype == torch.float32:
        # Reducing over a single rank would copy all gradients to a bucket and back.
        engine.enable_backward_allreduce = False
    if zero_stage == 0:
        # In bfloat16 DeepSpeed's trial step on zero gradients counts as AdamW's first, which biases its correction:
        # the first update would be 0.74 of the learning rate.
        engine.basic_optimizer.state.clear()
    engine.train()
    return engine


def init_reference_model(
    model: nn.Module, *, zero_stage: int, dtype: torch.dtype, device: torch.device, world_size: int
) -> nn.Module:
    """Freeze `model` for forward passes: sharded over ranks at ZeRO 3, a full copy on each rank otherwise."""
    model = model.to(dtype).eval()
    model.requires_grad_(False)
    if zero_stage < 3:
        return model.to(device)
    config = _build_deepspeed_config(3, 0.0, dtype, world_size, device=device)
    engine, *_ = _import_deepspeed(device).initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    return engine


@contextlib.contextmanager
def sharded_loading(zero_stage: int, dtype: torch.dtype, world_size: int, device: torch.device) -> Iterator[None]:
    """At ZeRO 3, make transformers load models sharded inside the block, so that no rank has to fit a full model."""
    if zero_stage < 3:
        yield
        return
    _import_deepspeed(device)
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps only a weak reference: the object must live as long as the block.
    hf_config = HfDeepSpeedConfig(_build_deepspeed_config(3, 0.0, dtype, world_size, device=device))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del hf_config


def count_parameters(engine: DeepSpeedEngine) -> int:
    """Number of parameters of the whole model; tied ones count once."""
    return sum(_count_elements(parameter) for parameter in engine.module.parameters())


def accumulate_gradients(
    engine: DeepSpeedEngine, forward: Callable[[], tuple[Tensor, ForwardResult]], *, is_last: bool
) -> ForwardResult:
    """Run `forward` -> (scalar loss, result), add the gradient of the loss, and return the result.

    `is_last` marks the last micro-batch of the step, where ranks reduce at ZeRO 0 and 1: all ranks must mark the same
    call. At ZeRO 2 and 3 ranks reduce in every call.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    loss, result = forward()
    # Unscaled: the loss weights already refer to the whole step, whatever the number of micro-batches.
    engine.backward(loss, scale_wrt_gas=False)
    return result


def apply_optimizer_step(engine: DeepSpeedEngine) -> tuple[bool, float]:
    """Clip, update and clear gradients. Returns (whether the update was applied, global gradient norm before clipping).

    An update with a non-finite gradient on any rank is skipped on every rank: weights and optimizer state stay.
    """
    grad_norm = _compute_unsharded_grad_norm(engine)
    if grad_norm is not None and not math.isfinite(grad_norm):
        engine.optimizer.zero_grad()
        engine.zero_grad()
        return False, float("inf")
    engine.step()
    sharded_norm = engine.get_global_grad_norm()
    if sharded_norm is not None:
        grad_norm = float(sharded_norm)
    return bool(engine.was_step_applied()), float("nan") if grad_norm is None else grad_norm


def _compute_unsharded_grad_norm(engine: DeepSpeedEngine) -> float | None:
    """Gradient norm at ZeRO 0, where DeepSpeed does not skip non-finite gradients itself; None above it.

    Gradients are reduced by then, so all ranks get the same value.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def get_learning_rate(engine: DeepSpeedEngine) -> float:
    """Learning rate of the next optimizer step."""
    return float(engine.get_lr()[0])


def gather_parameters(engine: DeepSpeedEngine, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Full weights in `dtype`, as (name, tensor) buckets of about `bucket_bytes`; a larger tensor has its own bucket.

    Tied weights are yielded under every name they have (lm_head.weight too, where it is the embedding), weights with a
    LoRA adapter with the adapter merged in. Below ZeRO 3 tensors are the weights themselves, or merged copies; at
    ZeRO 3 they are gathered copies, and all ranks must iterate in lockstep.
    """
    bucket: list[tuple[str, nn.Parameter]] = []
    size, lora_adapters = 0, find_lora_adapters(engine.module)
    for parameter_name, parameter in engine.module.named_parameters(remove_duplicate=False):
        name = get_checkpoint_name(parameter_name)
        if name is None:
            continue
        nbytes = _count_elements(parameter) * parameter.element_size()
        if bucket and size + nbytes > bucket_bytes:
            yield _gather_bucket(bucket, lora_adapters)
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += nbytes
    if bucket:
        yield _gather_bucket(bucket, lora_adapters)


def gather_checkpoint_tensors(engine: DeepSpeedEngine, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """As gather_parameters, but under the names and shapes of the checkpoint, with its persistent buffers.

    transformers fuses the experts of a mixture into one tensor when it loads a checkpoint; this is the reverse, as in
    save_pretrained.
    """
    from transformers.core_model_loading import revert_weight_conversion

    buffers = [(name, buffer.detach()) for name, buffer in _iter_persistent_buffers(engine.module)]
    for bucket in itertools.chain(gather_parameters(engine, bucket_bytes), [buffers] if buffers else []):
        checkpoint_tensors = revert_weight_conversion(engine.module, dict(bucket))
        yield [(name, tensor.contiguous()) for name, tensor in checkpoint_tensors.items()]


def gather_lora_matrices(engine: DeepSpeedEngine) -> Iterator[list[tuple[str, Tensor]]]:
    """The LoRA matrices under PEFT's names, all in one bucket; at ZeRO 3 all ranks must iterate in lockstep."""
    named_matrices = [
        named_matrix
        for weight_name, adapter in find_lora_adapters(engine.module).items()
        for named_matrix in zip(get_lora_names(weight_name), (adapter.lora_a, adapter.lora_b), strict=True)
    ]
    yield _gather_bucket(named_matrices, {})


def offload_to_host(engine: DeepSpeedEngine, components: Sequence[str]) -> None:
    """Move `components` (tags of rluf.backends.colocation) to host memory. Harmless for what is already there.

    ZeRO 2 only: DeepSpeed 0.19 has no offload_states for ZeRO 1 in bfloat16, and for ZeRO 3 only with its own Adam.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as StateType

    states_by_tag = {
        WEIGHTS_TAG: {StateType.lp_params},
        OPTIMIZER_STATES_TAG: {
            StateType.optim_states,
            StateType.hp_params,
            StateType.lp_grads,
            StateType.contiguous_grad_buffer,
        },
    }
    states = set().union(*(states_by_tag[component] for component in components))
    engine.offload_states(include=states, pin_memory=engine.device.type == "cuda")


def reload_to_device(engine: DeepSpeedEngine) -> None:
    """Restore everything that `offload_to_host` has moved."""
    engine.reload_states()


def save_hf_model(engine: DeepSpeedEngine, model_folder: Path) -> None:
    """Write the weights in `dtype` with config.json as a Hugging Face folder; all ranks call it, rank 0 writes.

    Raises ResourceError on a full disk and ModelError on another write error.
    """
    is_writer = dist.get_rank() == 0
    # Tied weights have several names but are saved once: a safetensors file refuses tensors that share memory.
    # named_parameters without remove_duplicate=False lists each under its first name only.
    saved_names = {get_checkpoint_name(name) for name, _ in engine.module.named_parameters()}
    state_dict: dict[str, Tensor] = {}
    for bucket in gather_parameters(engine, SAVE_BUCKET_BYTES):
        if is_writer:
            state_dict.update({name: tensor.to("cpu", copy=True) for name, tensor in bucket if name in saved_names})
    if not is_writer:
        return
    state_dict.update({name: buffer.cpu() for name, buffer in _iter_persistent_buffers(engine.module)})
    try:
        engine.module.save_pretrained(str(model_folder), state_dict=state_dict)
    except (OSError, SafetensorError) as error:
        raise build_write_error("the policy", model_folder, error) from error


def _iter_persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # A state dict leaves out buffers that are recomputed on load, such as rotary frequencies.
    names = {name for name in module.state_dict() if get_checkpoint_name(name) == name}
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in names)


def _count_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO 3 has only a shard on this rank."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _gather_bucket(
    bucket: list[tuple[str, nn.Parameter]], lora_adapters: Mapping[str, LoraAdapter]
) -> list[tuple[str, Tensor]]:
    """The parameters of `bucket` as whole tensors, each with its adapter merged in."""
    adapters = {name: lora_adapters[name] for name, _ in bucket if name in lora_adapters}
    parameters = [parameter for _, parameter in bucket]
    parameters += [matrix for adapter in adapters.values() for matrix in (adapter.lora_a, adapter.lora_b)]
    sharded = {id(parameter): parameter for parameter in parameters if hasattr(parameter, "ds_id")}
    if not sharded:
        return [(name, _merge_adapter(parameter.detach(), adapters.get(name))) for name, parameter in bucket]
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(sharded.values())):
        # Cloned, since the gathered memory is released at the end of the block.
        return [(name, _merge_adapter(parameter.detach(), adapters.get(name)).clone()) for name, parameter in bucket]


def _merge_adapter(weight: Tensor, lora_adapter: LoraAdapter | None) -> Tensor:
    if lora_adapter is None:
        return weight
    return lora_adapter.merge_into(weight, lora_adapter.lora_a.detach(), lora_adapter.lora_b.detach())


def _build_lr_schedule(
    warmup_steps: int, total_steps: int | None, *, has_cosine_decay: bool = False
) -> Callable[[torch.optim.Optimizer], Any]:
    """Factory of the LR schedule, which DeepSpeed calls with the optimizer: warm-up, then constant or decay to 0."""

    def compute_lr_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if total_steps is None:
            return 1.0
        remaining = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        return 0.5 - 0.5 * math.cos(math.pi * remaining) if has_cosine_decay else remaining

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, compute_lr_factor)


def _build_deepspeed_config(
    zero_stage: int,
    max_grad_norm: float,
    dtype: torch.dtype,
    world_size: int,
    *,
    offload_optimizer: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": on_gpu}
    if zero_stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if offload_optimizer and zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        # Batch sizes of 1 disable DeepSpeed's own accounting: micro-batches here are packed, of any number and size,
        # and accumulate_gradients marks the end of a step.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # A sum over ranks in bfloat16 rounds away small gradients, so it is float32 wherever it is cheap: not at ZeRO 3
        # on GPUs, which reduces every micro-batch and would send twice the bytes. The sum over micro-batches is
        # float32 there too.
        "communication_data_type": "bf16" if on_gpu and zero_stage == 3 and dtype == torch.bfloat16 else "fp32",
        "zero_optimization": zero,
        # torch's AdamW, not DeepSpeed's CPU Adam, which compiles an extension: ZeRO calls it untested.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for `device`. Raises ResourceError when this process already uses it on another kind."""
    # Chosen at its import, for the whole process. By itself DeepSpeed takes a GPU wherever one is visible, also in a
    # process that trains on the CPU next to one.
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if (device_type := get_accelerator().device_name()) != device.type:
        raise ResourceError(
            f"DeepSpeed runs on {device_type} in this process and cannot train on {device}; set "
            f"DS_ACCELERATOR={device.type} before the process starts"
        )
    if device.type == "cpu":
        # On the CPU it would compile a shared-memory collective for inference at the first start: two minutes of g++
        # for what training never calls, under a lock that a killed process leaves behind for the next one to wait on.
        # An empty table of compatible operators, which only that collective reads (version 0.19), prevents it.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
