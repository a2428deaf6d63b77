"""Publishing weights over TCP: buckets in safetensors' format, fetched by engines on any host of the cluster.

The learner listens, engines fetch: a broken connection is made anew, and a host that is cut off costs its engine and
nothing else. Whoever connects must first show a token, which travels over Ray (which authenticates). Like NCCL's, the
bytes are not encrypted: the network between the hosts must be the cluster's own.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import socketserver
import struct
import threading
import time
from typing import Any, cast

import torch

from rluf.backends.weight_transfer.base import Bucket
from rluf.errors import LostError, ResourceError, SyncError

TOKEN_BYTES = 16
LENGTH = struct.Struct("!Q")
"""A bucket's number in a request, and its size in bytes before it in the answer; 0 when it is not there."""
CHUNK = 1 << 20
ATTEMPTS = 3
"""Times that an engine asks for a bucket before it gives up, within its deadline."""


class _Server(socketserver.ThreadingTCPServer):
    """Holds the bucket of the moment and hands it to whoever has the token."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, token: bytes, seconds: float) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, 0), _Handler)
        self.token, self.seconds = token, seconds
        self.held: tuple[int, bytes] = (0, b"")

    def handle_error(self, request: Any, _client: Any) -> None:
        """A connection that breaks is the engine's to tell."""


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = cast(_Server, self.server)
        self.request.settimeout(server.seconds)
        asked = _receive(self.request, TOKEN_BYTES + LENGTH.size)
        if not hmac.compare_digest(asked[:TOKEN_BYTES], server.token):
            return
        number, content = server.held
        if LENGTH.unpack(asked[TOKEN_BYTES:])[0] != number:
            content = b""
        self.request.sendall(LENGTH.pack(len(content)))
        self.request.sendall(content)


class TcpSender:
    """Sends through a socket of the learner's host; a bucket stays in memory until the next one, twice its size."""

    def __init__(self, host: str, deadline_s: float) -> None:
        """Listen at a free port of `host`. Raises ResourceError when that is not possible."""
        self._token, self._number = secrets.token_bytes(TOKEN_BYTES), 0
        try:
            self._server = _Server(host, self._token, deadline_s)
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {host} for publishing weights: {error}; is this the address of a network interface "
                "here (ray start --node-ip-address)?"
            ) from error
        self._deadline = deadline_s
        threading.Thread(target=self._server.serve_forever, name="rluf-publish", daemon=True).start()

    def offer(self, version: int) -> dict[str, Any]:
        """Where buckets can be fetched."""
        host, port = self._server.server_address[:2]
        return {"engine": "tcp", "version": version, "host": str(host), "port": int(port)}

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Hold `bucket` ready; returns where it is, the token, its number, names and shapes, and seconds to get it."""
        from safetensors.torch import save

        self._number += 1
        self._server.held = (self._number, b"")
        content = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in bucket})
        self._server.held = (self._number, content)
        host, port = self._server.server_address[:2]
        return {
            "host": str(host),
            "port": int(port),
            "token": self._token.hex(),
            "number": self._number,
            "seconds": self._deadline,
            "entries": [[name, list(tensor.shape)] for name, tensor in bucket],
        }

    def finish(self) -> None:
        """Forget the last bucket: every engine has it."""
        self._server.held = (self._number, b"")

    def close(self) -> None:
        """Stop listening. Closing twice is harmless."""
        self._server.shutdown()
        self._server.server_close()


def fetch(
    host: str, port: int, token: str, number: int, seconds: float, device: torch.device | str = "cpu"
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of bucket `number` that TcpSender holds at host:port, on `device`.

    A connection that breaks is made anew, ATTEMPTS times within 80% of `seconds`, so that this message comes before the
    publish's own deadline. Raises LostError naming the learner's address, SyncError when what came is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    deadline = time.monotonic() + 0.8 * seconds
    problem: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            content = _ask(host, port, bytes.fromhex(token), number, deadline)
        except OSError as error:
            problem = error
            time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            continue
        try:
            return [(name, tensor.to(device)) for name, tensor in load(content).items()]
        except SafetensorError as error:
            raise SyncError(f"bucket {number} from the learner at {host}:{port} is not whole: {error}") from error
    raise LostError(
        f"could not fetch bucket {number} from the learner at {host}:{port} within {0.8 * seconds:g} s ({problem}); do "
        "the hosts reach each other, with no firewall between their ports?"
    )


def _ask(host: str, port: int, token: bytes, number: int, deadline: float) -> bytes:
    """One request. Raises OSError when the connection breaks, or the learner has no such bucket any more."""
    with socket.create_connection((host, port), timeout=_left(deadline)) as connection:
        connection.sendall(token + LENGTH.pack(number))
        connection.settimeout(_left(deadline))
        size = LENGTH.unpack(_receive(connection, LENGTH.size))[0]
        if size == 0:
            raise ConnectionError("the learner holds another bucket by now")
        return bytes(_receive(connection, size, deadline))


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _receive(connection: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """Exactly `size` bytes. Raises ConnectionError when the other side ends before, TimeoutError past `deadline`."""
    content = bytearray(size)
    view, got = memoryview(content), 0
    while got < size:
        if deadline is not None:
            connection.settimeout(_left(deadline))
        count = connection.recv_into(view[got : got + CHUNK])
        if count == 0:
            raise ConnectionError(f"the connection ended after {got} of {size} bytes")
        got += count
    return content
