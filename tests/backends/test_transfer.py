"""The learner's side of publishing: what a segment holds, who may read it, and that nothing is left behind."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rluf.backends.weight_transfer.base import DiskSender, ShmSender, machine_id, read_file, read_segment
from rluf.errors import ResourceError, SyncError

BUCKET = [
    ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("b", torch.randn(5, 7).bfloat16()),
    ("scalar", torch.tensor(3.5, dtype=torch.float16)),
    ("empty", torch.empty(0, 4)),
    ("view", torch.arange(12, dtype=torch.int64).reshape(3, 4).t()),
]


def test_a_bucket_arrives_bit_for_bit_and_survives_the_next_one() -> None:
    sender = ShmSender()
    received = read_segment(**sender.send(BUCKET))
    sender.send([("other", torch.full((1000,), -1.0))])
    assert [name for name, _ in received] == [name for name, _ in BUCKET]
    for (_, sent), (_, got) in zip(BUCKET, received, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert torch.equal(got, sent)
    sender.close()


def test_a_larger_bucket_grows_the_segment_and_finish_gives_the_memory_back() -> None:
    sender = ShmSender()
    sender.send([("small", torch.zeros(4))])
    large = torch.randn(1 << 18)
    bucket = sender.send([("large", large)])
    assert torch.equal(read_segment(**bucket)[0][1], large)
    sender.finish()
    assert os.stat(bucket["path"]).st_size == 0
    assert torch.equal(read_segment(**sender.send([("again", large)]))[0][1], large)
    sender.close()
    sender.close()


def test_a_strange_or_vanished_segment_is_refused() -> None:
    sender = ShmSender()
    bucket = sender.send(BUCKET)
    with pytest.raises(SyncError, match="is not the learner's shared memory"):
        read_segment(**(bucket | {"token": "00" * 16}))
    with pytest.raises(SyncError, match="shorter"):
        read_segment(**(bucket | {"size": 1 << 24}))
    sender.close()
    with pytest.raises(SyncError, match=r"publish\.engine=nccl"):
        read_segment(**bucket)


def test_an_offer_names_this_machine() -> None:
    sender = ShmSender()
    assert sender.offer(3) == {"engine": "shm", "version": 3, "machine": machine_id()}
    sender.close()


def test_a_killed_sender_leaves_nothing_behind() -> None:
    script = (
        "import sys, torch; from rluf.backends.weight_transfer.base import ShmSender\n"
        "s = ShmSender(); b = s.send([('x', torch.arange(4.0))]); sys.stdout.write(repr(b) + '\\n')\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    bucket = ast.literal_eval(process.stdout.readline())
    assert torch.equal(read_segment(**bucket)[0][1], torch.arange(4.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not os.path.exists(bucket["path"])
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "rluf" in name]


def test_files_carry_a_bucket_bit_for_bit_and_leave_nothing_behind(tmp_path: Path) -> None:
    sender = DiskSender(tmp_path / "publish")
    assert Path(sender.offer(1)["folder"]).is_dir()
    head = torch.randn(4, 3)
    sent = [*BUCKET, ("head", head), ("tied", head)]
    bucket = sender.send(sent)
    received = dict(read_file(bucket["path"]))
    assert [[name, list(tensor.shape)] for name, tensor in sent] == bucket["entries"]
    assert all(torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype for name, tensor in sent)
    again = sender.send([("a", torch.zeros(2))])
    assert again["path"] != bucket["path"] and not Path(bucket["path"]).exists()
    sender.finish()
    with pytest.raises(SyncError, match=r"run\.cache"):
        read_file(again["path"])
    sender.close()
    sender.close()
    assert list((tmp_path / "publish").iterdir()) == []


def test_a_full_disk_is_told_as_a_lack_of_room(small_disk: Callable[[int], Path]) -> None:
    sender = DiskSender(small_disk(1) / "publish")
    with pytest.raises(ResourceError, match=r"bucket could not be written to .*free some disk"):
        sender.send([("large", torch.zeros(1 << 20))])
    sender.close()
