"""The HTTP server of the gateway: bind, serve and hand over a port; and the weight buckets of a policy folder."""

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

from rluf.backends.weight_transfer.base import WeightManifest
from rluf.config.settings import Settings
from rluf.errors import ModelError, ResourceError
from rluf.models.hub import resolve_model
from rluf.serve.app import make_app
from rluf.serve.listener import HttpServer
from rluf.serve.policy_deployment import check_same_shapes, iter_weight_buckets
from rluf.utils.paths import resolve_cache_folder
from tests.serve.conftest import LocalBackend, find_free_port


async def is_healthy(port: int) -> bool:
    async with httpx.AsyncClient() as http_client:
        response = await http_client.get(f"http://127.0.0.1:{port}/healthz", headers={"host": "testserver"})
    return response.status_code == 200 and "server" not in response.headers


async def test_a_second_server_waits_until_the_port_is_released(backend: LocalBackend) -> None:
    port, app = find_free_port(), make_app(backend)
    first, second = HttpServer("127.0.0.1", port), HttpServer("127.0.0.1", port)
    await first.start(app, 1)
    assert await is_healthy(port)
    start_task = asyncio.create_task(second.start(app, 20))
    await asyncio.sleep(0.3)
    assert not start_task.done()
    await first.close()
    await start_task
    assert await is_healthy(port)
    await second.close()
    with pytest.raises(httpx.ConnectError):
        await is_healthy(port)


async def test_a_port_that_stays_in_use_is_named_in_the_error(backend: LocalBackend) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupying_socket:
        port = occupying_socket.getsockname()[1]
        with pytest.raises(ResourceError, match=f"{port}.*serve.port"):
            await HttpServer("127.0.0.1", port).start(make_app(backend), 0.2)


@pytest.mark.parametrize("is_socket_closed", [True, False])
async def test_a_server_that_stops_before_it_accepts_requests_is_an_error(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, is_socket_closed: bool
) -> None:
    port = find_free_port()
    failing_server = HttpServer("127.0.0.1", port)
    if is_socket_closed:

        async def open_closed_socket(_: float) -> socket.socket:
            closed_socket = socket.create_server(("127.0.0.1", port))
            closed_socket.close()
            return closed_socket

        monkeypatch.setattr(failing_server, "_open_socket", open_closed_socket)
    else:

        async def startup(server: uvicorn.Server, **_: object) -> None:
            server.should_exit = True

        monkeypatch.setattr("uvicorn.Server.startup", startup)
    with pytest.raises(ResourceError, match=f"127.0.0.1:{port} stopped before it accepted requests"):
        await failing_server.start(make_app(backend), 0.2)
    await failing_server.close()
    monkeypatch.undo()
    next_server = HttpServer("127.0.0.1", port)
    await next_server.start(make_app(backend), 1)
    assert await is_healthy(port)
    await next_server.close()


def test_weight_buckets_are_complete_and_only_the_same_shapes_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("tiny", resolve_cache_folder(Settings()))
    stored_weights, manifest = load_file(folder / "model.safetensors"), WeightManifest(folder, has_tied_embeddings=True)
    monkeypatch.setattr("rluf.serve.policy_deployment.BUCKET_BYTES", 100_000)
    buckets = list(iter_weight_buckets(folder, manifest))
    assert len(buckets) > 1
    sent_weights = dict(pair for bucket in buckets for pair in bucket)
    assert sent_weights.keys() - {"lm_head.weight"} == stored_weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(sent_weights[name], tensor) for name, tensor in stored_weights.items())
    check_same_shapes(manifest.expected_shapes, manifest.expected_shapes, folder)
    other_folder = shutil.copytree(folder, tmp_path / "other")
    name = max(stored_weights, key=lambda key: stored_weights[key].numel())
    save_file(
        {**stored_weights, name: stored_weights[name][:-1].contiguous()},
        other_folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"has shape \(258, 128\), expected \(259, 128\)"):
        check_same_shapes(
            manifest.expected_shapes,
            WeightManifest(other_folder, has_tied_embeddings=True).expected_shapes,
            other_folder,
        )
