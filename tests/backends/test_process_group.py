"""A process joins a group and leaves it as it was, also where the others never come."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from rluf.backends.deepspeed import PLACE, join_group, leave_group
from rluf.errors import ResourceError


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_who_has_left_a_group_is_no_rank_any_more() -> None:
    join_group(rank=0, world=1, host="127.0.0.1", port=_port(), device=torch.device("cpu"), timeout_s=60)
    assert os.environ["WORLD_SIZE"] == "1"
    leave_group()
    assert not [name for name in PLACE if name in os.environ]


def test_a_rank_whose_others_do_not_come_says_so_and_is_no_rank() -> None:
    with pytest.raises(ResourceError, match="rank 0 of 2 could not join"):
        join_group(rank=0, world=2, host="127.0.0.1", port=_port(), device=torch.device("cpu"), timeout_s=1)
    assert not [name for name in PLACE if name in os.environ]
    leave_group()
