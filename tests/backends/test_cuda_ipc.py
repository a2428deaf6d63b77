"""What of CUDA IPC publishing a CPU can check: the bytes of a bucket, and handles that travel without pickle."""

from __future__ import annotations

import json

import pytest
import torch
from torch.multiprocessing.reductions import reduce_tensor
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from rluf.backends.weight_transfer.cuda_ipc import describe, fill, gathered, plain, whole

BUCKET = [
    ("a", torch.randn(5, 7)),
    ("view", torch.arange(12.0).reshape(3, 4).t()),
    ("scalar", torch.tensor(3.5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_reads_from_the_buffer_what_was_filled_in(dtype: torch.dtype) -> None:
    bucket = [(name, tensor.to(dtype)) for name, tensor in BUCKET]
    buffer = torch.full((1000,), 255, dtype=torch.uint8)
    sizes = fill(buffer, bucket)
    told = json.loads(json.dumps(describe(bucket, sizes)))
    kinds = [getattr(torch, name) for name in told["dtype_names"]]
    got = unpack_tensor(buffer[: sum(sizes)], told["names"], told["shapes"], kinds, told["tensor_sizes"])
    assert [name for name, _ in got] == [name for name, _ in bucket]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(got, bucket, strict=True))


def test_handles_lose_their_types_on_the_way_and_get_them_back() -> None:
    """Arguments as reduce_tensor gives for a flat uint8 tensor on a GPU (torch 2.13)."""
    storage = type(torch.zeros(1)._typed_storage())
    what = (torch.Tensor, torch.Size([64]), torch.Size([1]), 0, storage, torch.uint8)
    arguments = (*what, 0, b"handle", 64, 128, False, b"count", 2, b"event", True)
    told = plain(arguments)
    assert all(isinstance(value, int | bytes | list | bool | None) for value in told)
    assert whole(told) == arguments
    kinds = reduce_tensor(torch.zeros(4, dtype=torch.uint8, device="meta"))[1]
    assert kinds[0] is torch.Tensor and kinds[4] is torch.uint8


def test_one_rank_gathers_its_own_handle() -> None:
    assert gathered({"gpu": [1, b"x"]}) == {"gpu": [1, b"x"]}
