"""CUDA IPC transport, as far as a CPU can check it: buffer layout, and handles without pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.reductions import reduce_tensor

from rluf.backends.weight_transfer.cuda_ipc import (
    describe_bucket,
    fill_buffer,
    from_plain_arguments,
    gather_ipc_handles,
    to_plain_arguments,
)

BUCKET = [
    ("a", torch.randn(5, 7)),
    ("view", torch.arange(12.0).reshape(3, 4).t()),
    ("scalar", torch.tensor(3.5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_unpacks_a_filled_buffer(dtype: torch.dtype) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    bucket = [(name, tensor.to(dtype)) for name, tensor in BUCKET]
    buffer = torch.full((1000,), 255, dtype=torch.uint8)
    sizes = fill_buffer(buffer, bucket)
    info = json.loads(json.dumps(describe_bucket(bucket, sizes)))
    dtypes = [getattr(torch, name) for name in info["dtype_names"]]
    tensors = unpack_tensor(buffer[: sum(sizes)], info["names"], info["shapes"], dtypes, info["tensor_sizes"])
    assert [name for name, _ in tensors] == [name for name, _ in bucket]
    assert all(torch.equal(tensor, sent) for (_, tensor), (_, sent) in zip(tensors, bucket, strict=True))


def test_handle_types_are_removed_and_restored() -> None:
    """Arguments as reduce_tensor gives for a flat uint8 tensor on a GPU (torch 2.13)."""
    storage = type(torch.zeros(1)._typed_storage())
    types_and_shape = (torch.Tensor, torch.Size([64]), torch.Size([1]), 0, storage, torch.uint8)
    arguments = (*types_and_shape, 0, b"handle", 64, 128, False, b"count", 2, b"event", True)
    plain_arguments = to_plain_arguments(arguments)
    assert all(isinstance(value, int | bytes | list | bool | None) for value in plain_arguments)
    assert from_plain_arguments(plain_arguments) == arguments
    meta_arguments = reduce_tensor(torch.zeros(4, dtype=torch.uint8, device="meta"))[1]
    assert meta_arguments[0] is torch.Tensor and meta_arguments[4] is torch.uint8


def test_a_single_rank_gathers_its_own_handle() -> None:
    assert gather_ipc_handles({"gpu": [1, b"x"]}) == {"gpu": [1, b"x"]}


def gather_as_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    handles = gather_ipc_handles({f"gpu {rank}": [rank, "handle"]})
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(handles))
    dist.destroy_process_group()


def test_every_rank_has_the_handles_of_all_gpus(tmp_path: Path) -> None:
    mp.spawn(gather_as_rank, args=(str(tmp_path),), nprocs=2)
    gathered = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert gathered == 2 * [{"gpu 0": [0, "handle"], "gpu 1": [1, "handle"]}]
