"""The listener in front of the app: a port taken, served, handed over; and policies' weights as they are published."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file

from rluf.backends.weight_transfer.manifest import Checklist
from rluf.config.settings import Settings
from rluf.errors import ModelError, ResourceError
from rluf.models.hub import resolve_model
from rluf.serve.app import make_app
from rluf.serve.policy_deployment import check_same_shape, weights
from rluf.serve.server import Listener
from rluf.utils.paths import cache_dir
from tests.serve.conftest import Here


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def healthy(port: int) -> bool:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://127.0.0.1:{port}/healthz", headers={"host": "testserver"})
    return answer.status_code == 200 and "server" not in answer.headers


async def test_a_successor_waits_for_the_port_and_gets_it(here: Here) -> None:
    port, app = free_port(), make_app(here)
    first, second = Listener("127.0.0.1", port), Listener("127.0.0.1", port)
    await first.start(app, 1)
    assert await healthy(port)
    coming = asyncio.create_task(second.start(app, 20))
    await asyncio.sleep(0.3)
    assert not coming.done()
    await first.close()
    await coming
    assert await healthy(port)
    await second.close()
    with pytest.raises(httpx.ConnectError):
        await healthy(port)


async def test_a_port_that_stays_taken_is_named(here: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"{port}.*serve.port"):
            await Listener("127.0.0.1", port).start(make_app(here), 0.2)


@pytest.mark.parametrize("killed", [True, False])
async def test_a_server_that_ends_before_it_serves_is_not_taken_for_one_that_does(
    here: Here, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    port = free_port()
    listener = Listener("127.0.0.1", port)
    if killed:  # by its socket

        async def opened(_: float) -> socket.socket:
            found = socket.create_server(("127.0.0.1", port))
            found.close()
            return found

        monkeypatch.setattr(listener, "_opened", opened)
    else:  # by a word to leave

        async def startup(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
            server.should_exit = True

        monkeypatch.setattr("uvicorn.Server.startup", startup)
    with pytest.raises(ResourceError, match=f"127.0.0.1:{port} ended before it served"):
        await listener.start(make_app(here), 0.2)
    await listener.close()
    monkeypatch.undo()
    again = Listener("127.0.0.1", port)
    await again.start(make_app(here), 1)
    assert await healthy(port)
    await again.close()


def test_a_policys_weights_come_whole_and_only_the_same_shape_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("tiny", cache_dir(Settings()))
    stored, ours = load_file(folder / "model.safetensors"), Checklist(folder, tied=True)
    monkeypatch.setattr("rluf.serve.policy_deployment.BUCKET_BYTES", 100_000)
    buckets = list(weights(folder, ours))
    assert len(buckets) > 1
    found = dict(pair for bucket in buckets for pair in bucket)
    assert found.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    check_same_shape(ours.expected, ours.expected, folder)
    other = shutil.copytree(folder, tmp_path / "other")
    name = max(stored, key=lambda one: stored[one].numel())
    save_file({**stored, name: stored[name][:-1].contiguous()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"is \(258, 128\), it was \(259, 128\)"):
        check_same_shape(ours.expected, Checklist(other, tied=True).expected, other)
