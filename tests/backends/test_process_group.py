"""Joining and leaving a process group leaves no trace, also when the other ranks never join."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from rluf.backends.deepspeed import RANK_ENVIRONMENT_KEYS, join_process_group, leave_process_group
from rluf.errors import ResourceError


def find_free_port() -> int:
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        return int(free_socket.getsockname()[1])


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
