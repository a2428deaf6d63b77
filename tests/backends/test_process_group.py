"""Joining and leaving a process group leaves no trace, also when the other ranks never join."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from rluf.backends.deepspeed import RANK_ENVIRONMENT_KEYS, claim_port, join_process_group, leave_process_group
from rluf.errors import ResourceError


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::1", 0))
        except OSError:
            return False
    return True


def find_free_port() -> int:
    with claim_port("127.0.0.1") as reservation:
        return int(reservation.getsockname()[1])


def test_a_reserved_port_goes_to_no_other_process_until_its_rank_listens_there() -> None:
    reservation = claim_port("127.0.0.1")
    port = int(reservation.getsockname()[1])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for use_libuv in (True, False):  # torch's store and vLLM's
        store = TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20), use_libuv=use_libuv)
        store.set("key", "value")
        del store
    join_process_group(rank=0, world_size=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    leave_process_group()
    reservation.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ranks_meet_at_an_ipv6_address() -> None:
    with claim_port("::1") as reservation:
        port = int(reservation.getsockname()[1])
        join_process_group(rank=0, world_size=1, host="::1", port=port, device=torch.device("cpu"), timeout_s=30)
    value = torch.ones(1)
    torch.distributed.all_reduce(value)
    assert torch.distributed.get_world_size() == 1 and value.item() == 1
    leave_process_group()


def test_leaving_a_group_removes_the_environment_of_a_rank() -> None:
    join_process_group(
        rank=0, world_size=1, host="127.0.0.1", port=find_free_port(), device=torch.device("cpu"), timeout_s=60
    )
    assert os.environ["WORLD_SIZE"] == "1"
    leave_process_group()
    assert not [name for name in RANK_ENVIRONMENT_KEYS if name in os.environ]


def test_a_rank_without_the_others_raises_and_leaves_no_environment() -> None:
    with pytest.raises(ResourceError, match="rank 0 of 2 could not join"):
        join_process_group(
            rank=0, world_size=2, host="127.0.0.1", port=find_free_port(), device=torch.device("cpu"), timeout_s=1
        )
    assert not [name for name in RANK_ENVIRONMENT_KEYS if name in os.environ]
    leave_process_group()
