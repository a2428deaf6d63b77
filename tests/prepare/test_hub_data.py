"""Data sets by their name on the Hugging Face hub, from a local server with the hub's API; errors are one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.load import load_settings
from rluf.errors import DataError, SettingsError
from rluf.prepare.readers.sources import resolve_sources

COMMIT = "a" * 40


def build_parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": [[{"role": "user", "content": text}] for text in texts]}), buffer)
    return buffer.getvalue()


FILES = {
    "README.md": b"# prompts",
    "data/train-00000-of-00001.parquet": build_parquet([f"Why is number {i} odd or even?" for i in range(40)]),
    "data/test-00000-of-00001.parquet": build_parquet([f"What is {i} plus one?" for i in range(12)]),
    "model.bin": b"not data",
}


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's API that a snapshot needs, for the data set team/prompts."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.reply(with_body=False)

    def do_GET(self) -> None:
        self.reply(with_body=True)

    def reply(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        status, body, headers = 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        file_name = path.partition(f"/resolve/{COMMIT}/")[2].replace("%2F", "/")
        if path.startswith("/api/datasets/team/prompts/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            record = {"id": "team/prompts", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            status, body, headers = 200, json.dumps(record).encode(), {}
        elif path.startswith("/api/datasets/team/prompts/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in FILES.items()]
            status, body, headers = 200, json.dumps(tree).encode(), {}
        elif path.startswith("/datasets/team/prompts/resolve/") and file_name in FILES:
            body = FILES[file_name]
            status, headers = 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a process whose hub is the local server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    yield {
        **environment,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from pathlib import Path
from rluf.config.load import load_settings
from rluf.errors import RlufError
from rluf.prepare.readers.sources import resolve_sources

for entry in sys.argv[1:]:
    try:
        sources = resolve_sources(load_settings(None, [f"data.prompts={entry}"]).settings.data.prompts, "prompts")
        print(json.dumps([source.local_path.name for source in sources]))
    except RlufError as error:
        print(json.dumps(f"{error.exit_code} {error}"))
"""


def test_a_data_set_is_found_by_name_revision_and_pattern(hub: dict[str, str]) -> None:
    entries = [
        "hub:team/prompts", "hub:team/prompts/data/train-*", "hub:team/prompts@main/data", "hf://datasets/team/prompts",
        "{path: 'hub:team/prompts/data/test-*'}", "hub:team/missing",
    ]  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, *entries]
    completed = subprocess.run(command, env=hub, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr[-2000:]
    train, test = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"
    *found, missing = map(json.loads, completed.stdout.splitlines())
    assert found == [[test, train], [train], [test, train], [test, train], [test]]
    assert missing.startswith("3 data set 'team/missing' could not be downloaded from the hub")
    assert "\n" not in missing


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hub:prompts", "not a data set of the hub"),
        ("hub:team/", "not a data set of the hub"),
        ("hf://datasets/../etc", "not a data set of the hub"),
        ("hub:team/prompts", "could not be downloaded from the hub"),
        ("hf://datasets/team/prompts/data/*.parquet", "could not be downloaded from the hub"),
    ],
)
def test_every_hub_error_is_one_line(entry: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=message) as caught:
        resolve_sources(load_settings(None, [f"data.prompts={entry}"]).settings.data.prompts, "prompts")
    assert "\n" not in str(caught.value)


def test_a_reader_of_the_old_form_is_still_refused() -> None:
    with pytest.raises(SettingsError, match="reader: mt_bench"):
        load_settings(None, ["data.prompts=mt_bench:prompts.jsonl"])
