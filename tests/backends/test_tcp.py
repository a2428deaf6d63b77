"""Weights over TCP: what an engine fetches, who may fetch it, and what a broken or silent network costs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from rluf.backends.weight_transfer.base import make_sender
from rluf.backends.weight_transfer.tcp import TcpSender, fetch
from rluf.config.load import load_settings
from rluf.errors import LostError, ResourceError

BUCKET = [
    ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
    ("b", torch.randn(5, 7).bfloat16()),
    ("scalar", torch.tensor(3.5, dtype=torch.float16)),
    ("empty", torch.empty(0, 4)),
    ("view", torch.arange(12, dtype=torch.int64).reshape(3, 4).t()),
    ("large", torch.randn(3 << 20)),
]


@pytest.fixture
def sender() -> Iterator[TcpSender]:
    made = TcpSender("127.0.0.1", 5.0)
    yield made
    made.close()


def where(sent: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in sent.items() if key != "entries"}


def test_a_bucket_arrives_bit_for_bit_at_every_engine(sender: TcpSender) -> None:
    sent = sender.send(BUCKET)
    assert sent["entries"] == [[name, list(tensor.shape)] for name, tensor in BUCKET]
    assert {key: sender.offer(7)[key] for key in ("engine", "version", "host")} == {
        "engine": "tcp", "version": 7, "host": "127.0.0.1",
    }  # fmt: skip
    for _ in range(2):
        received = dict(fetch(**where(sent)))
        assert received.keys() == dict(BUCKET).keys()
        for name, tensor in BUCKET:
            assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)


def test_only_the_present_bucket_is_there_and_only_for_the_token(sender: TcpSender) -> None:
    first = sender.send(BUCKET[:1])
    second = sender.send(BUCKET[1:2])
    with pytest.raises(LostError, match="the learner holds another bucket by now"):
        fetch(**where(first | {"seconds": 1.0}))
    with pytest.raises(LostError, match="the connection ended after 0 of 8 bytes"):
        fetch(**where(second | {"token": "00" * 16, "seconds": 1.0}))
    assert torch.equal(fetch(**where(second))[0][1], BUCKET[1][1])
    sender.finish()
    with pytest.raises(LostError):
        fetch(**where(second | {"seconds": 1.0}))


def test_a_learner_out_of_reach_is_named_within_the_deadline(sender: TcpSender) -> None:
    sent = sender.send(BUCKET[:1])
    sender.close()
    sender.close()
    begun = time.monotonic()
    with pytest.raises(
        LostError, match=rf"bucket 1 from the learner at 127.0.0.1:{sent['port']} within 1.6 s .*firewall"
    ):
        fetch(**where(sent | {"seconds": 2.0}))
    assert time.monotonic() - begun < 4.0


def relay(port: int, breaks: int) -> tuple[socket.socket, list[int]]:
    """A way to `port` whose first `breaks` connections end in the middle of the answer."""
    listener, seen = socket.create_server(("127.0.0.1", 0)), []

    def run() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            seen.append(len(seen))
            with near, socket.create_connection(("127.0.0.1", port)) as far:
                far.sendall(near.recv(64))
                left = 1 << 20 if len(seen) <= breaks else 1 << 30
                while left > 0 and (chunk := far.recv(1 << 16)):
                    near.sendall(chunk)
                    left -= len(chunk)

    threading.Thread(target=run, daemon=True).start()
    return listener, seen


def test_a_connection_that_breaks_is_made_anew(sender: TcpSender) -> None:
    sent = sender.send(BUCKET)
    listener, seen = relay(sent["port"], breaks=1)
    with listener:
        found = fetch(**where(sent | {"port": listener.getsockname()[1]}))
    assert torch.equal(dict(found)["large"], BUCKET[-1][1])
    assert len(seen) == 2


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ResourceError, match="cannot listen on 203"):
        TcpSender("203.0.113.1", 1.0)


def test_the_setting_makes_it() -> None:
    made = make_sender(load_settings(None, ["publish.engine=tcp"]).settings, "127.0.0.1", 0)
    assert isinstance(made, TcpSender)
    made.close()
