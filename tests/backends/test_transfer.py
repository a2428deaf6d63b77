"""Weight transfer: the manifest of an update, and bit-exact buckets over shared memory and disk without leftovers."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rluf.backends.weight_transfer import create_weight_receiver, create_weight_sender
from rluf.backends.weight_transfer.base import (
    WeightManifest,
    WeightReceiver,
    WeightSender,
    read_checkpoint_shapes,
)
from rluf.backends.weight_transfer.disk import DiskReceiver, DiskSender, read_bucket_file
from rluf.backends.weight_transfer.nccl import check_nccl_group
from rluf.backends.weight_transfer.shm import ShmReceiver, ShmSender, get_machine_id, read_segment
from rluf.config.load import load_settings
from rluf.errors import ResourceError, WeightSyncError

BUCKET = [
    ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("b", torch.randn(5, 7).bfloat16()),
    ("scalar", torch.tensor(3.5, dtype=torch.float16)),
    ("empty", torch.empty(0, 4)),
    ("view", torch.arange(12, dtype=torch.int64).reshape(3, 4).t()),
]


def test_a_received_bucket_is_bit_exact_and_independent_of_the_next_one() -> None:
    sender = ShmSender()
    received = read_segment(**sender.send_bucket(BUCKET))
    sender.send_bucket([("other", torch.full((1000,), -1.0))])
    assert [name for name, _ in received] == [name for name, _ in BUCKET]
    for (_, sent), (_, tensor) in zip(BUCKET, received, strict=True):
        assert tensor.dtype == sent.dtype and tensor.shape == sent.shape
        assert torch.equal(tensor, sent)
    sender.close()


def test_a_larger_bucket_grows_the_segment_and_end_releases_it() -> None:
    sender = ShmSender()
    sender.send_bucket([("small", torch.zeros(4))])
    large = torch.randn(1 << 18)
    bucket = sender.send_bucket([("large", large)])
    assert torch.equal(read_segment(**bucket)[0][1], large)
    sender.end()
    assert os.stat(bucket["path"]).st_size == 0
    assert torch.equal(read_segment(**sender.send_bucket([("again", large)]))[0][1], large)
    sender.close()
    sender.close()


def test_a_foreign_or_closed_segment_is_refused() -> None:
    sender = ShmSender()
    bucket = sender.send_bucket(BUCKET)
    with pytest.raises(WeightSyncError, match="is not the learner's shared memory"):
        read_segment(**(bucket | {"token": "00" * 16}))
    with pytest.raises(WeightSyncError, match="shorter"):
        read_segment(**(bucket | {"size": 1 << 24}))
    sender.close()
    with pytest.raises(WeightSyncError, match=r"weight_sync\.transport=nccl"):
        read_segment(**bucket)


def test_the_transfer_info_has_the_machine() -> None:
    sender = ShmSender()
    assert sender.begin(3) == {"transport": "shm", "weight_version": 3, "machine": get_machine_id()}
    sender.close()


def test_a_killed_sender_leaves_nothing_behind() -> None:
    script = (
        "import sys, torch; from rluf.backends.weight_transfer.shm import ShmSender\n"
        "s = ShmSender(); b = s.send_bucket([('x', torch.arange(4.0))]); sys.stdout.write(repr(b) + '\\n')\n"
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


def test_files_are_bit_exact_and_deleted(tmp_path: Path) -> None:
    sender = DiskSender(tmp_path / "weight_sync")
    assert Path(sender.begin(1)["folder"]).is_dir()
    shared = torch.randn(4, 3)
    sent = [*BUCKET, ("head", shared), ("tied", shared)]
    bucket = sender.send_bucket(sent)
    received = dict(read_bucket_file(bucket["path"]))
    assert [[name, list(tensor.shape)] for name, tensor in sent] == bucket["entries"]
    assert all(torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype for name, tensor in sent)
    next_bucket = sender.send_bucket([("a", torch.zeros(2))])
    assert next_bucket["path"] != bucket["path"] and not Path(bucket["path"]).exists()
    sender.end()
    with pytest.raises(WeightSyncError, match=r"run\.cache"):
        read_bucket_file(next_bucket["path"])
    sender.close()
    sender.close()
    assert list((tmp_path / "weight_sync").iterdir()) == []


def test_a_full_disk_is_a_resource_error(small_disk: Callable[[int], Path]) -> None:
    sender = DiskSender(small_disk(1) / "weight_sync")
    with pytest.raises(ResourceError, match=r"bucket could not be written to .*free some disk"):
        sender.send_bucket([("large", torch.zeros(1 << 20))])
    sender.close()


@pytest.mark.parametrize("transport", ["shm", "disk"])
def test_a_receiver_loads_what_its_sender_sends(transport: str, tmp_path: Path) -> None:
    settings = load_settings(None, [f"weight_sync.transport={transport}", f"run.cache={tmp_path}"]).settings
    sender: WeightSender = create_weight_sender(settings, "", 0, {"rollout 0": 0})
    receiver: WeightReceiver = create_weight_receiver(transport, torch.device("cpu"), None)
    receiver.begin(sender.begin(1))
    bucket_info = sender.send_bucket(BUCKET)
    assert [(name, list(shape)) for name, shape in receiver.list_tensors(bucket_info)] == [
        (name, list(tensor.shape)) for name, tensor in BUCKET
    ]
    loaded: dict[str, torch.Tensor] = {}
    receiver.receive_bucket(bucket_info, loaded.update)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in BUCKET)
    receiver.end()
    sender.end()
    receiver.close()
    sender.close()


def test_a_receiver_refuses_a_sender_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="another machine or container"):
        ShmReceiver(torch.device("cpu")).begin({"machine": "other"})
    with pytest.raises(WeightSyncError, match="does not exist on this engine's host"):
        DiskReceiver(torch.device("cpu")).begin({"folder": str(tmp_path / "missing")})


WEIGHTS = {
    "model.embed_tokens.weight": torch.zeros(8, 4),
    "model.norm.weight": torch.zeros(4),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
}


def write_model(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def test_rotary_frequencies_are_not_weights(tmp_path: Path) -> None:
    assert read_checkpoint_shapes(write_model(tmp_path)) == {
        "model.embed_tokens.weight": (8, 4),
        "model.norm.weight": (4,),
    }


def test_the_index_selects_the_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file({"tok_embeddings.weight": torch.zeros(8, 4)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "tok_embeddings.weight" not in read_checkpoint_shapes(tmp_path)


def test_a_tied_head_must_be_sent(tmp_path: Path) -> None:
    manifest = WeightManifest(write_model(tmp_path), has_tied_embeddings=True)
    manifest.reset()
    manifest.check_bucket([("model.embed_tokens.weight", [8, 4]), ("model.norm.weight", [4])])
    with pytest.raises(WeightSyncError, match=r"1 of 3 tensors were not sent: lm_head\.weight"):
        manifest.check_complete()
    manifest.check_bucket([("lm_head.weight", (8, 4))])
    manifest.check_complete()


def test_unknown_misshapen_and_repeated_tensors_are_refused(tmp_path: Path) -> None:
    manifest = WeightManifest(write_model(tmp_path), has_tied_embeddings=False)
    manifest.reset()
    with pytest.raises(WeightSyncError, match="does not contain"):
        manifest.check_bucket([("lm_head.weight", (8, 4))])
    with pytest.raises(WeightSyncError, match=r"expected shape \(8, 4\), got \(4, 8\)"):
        manifest.check_bucket([("model.embed_tokens.weight", (4, 8))])
    manifest.check_bucket([("model.norm.weight", (4,))])
    with pytest.raises(WeightSyncError, match="twice"):
        manifest.check_bucket([("model.norm.weight", (4,))])
    manifest.reset()
    manifest.check_bucket([("model.norm.weight", (4,))])


@pytest.mark.parametrize(("available", "disabled"), [(False, True), (True, True), (False, False)])
def test_a_group_without_nccl_is_refused(available: bool, disabled: bool) -> None:
    """vLLM's communicator turns itself off where it finds no library; its broadcasts then transfer nothing."""
    with pytest.raises(WeightSyncError, match=r"could not load libnccl.*VLLM_NCCL_SO_PATH"):
        check_nccl_group(SimpleNamespace(available=available, disabled=disabled))
    check_nccl_group(SimpleNamespace(available=True, disabled=False))
