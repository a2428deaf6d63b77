"""Upload of a policy to the hub, by the real client against a local server that speaks the hub's HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest

from rluf.api import Report
from rluf.errors import DataError, ModelError
from rluf.report.__main__ import main
from rluf.report.hub_upload import upload_policy

POLICY_FILES = {
    "config.json": b"{}", "model.safetensors": b"\0" * 4000, "tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}",
    "README.md": b"---\nlibrary_name: transformers\n---\n\n# mine\n", "rluf/settings.json": b"{}",
}  # fmt: skip
PRIVATE_FILES = {"optimizer.pt": b"x", ".env": b"SECRET=1", "rluf/notes.bin": b"x", "modeling_custom.py": b"x"}


class HubServer:
    """The hub's endpoints of an upload. `repositories` has what was created, `files` what was committed, by path."""

    def __init__(self) -> None:
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large_objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.status = 200
        self.status_by_path: dict[str, int] = {}
        self.url = ""

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        """The JSON reply to one request; records its effects."""
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return {"url": f"{self.url}/{self.repositories[-1].get('organization', '')}/mine"}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            return {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs/"):
            self.large_objects[path.removeprefix("/lfs/")] = body
            return {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large_objects[value["oid"]]
            return {"commitUrl": f"{self.url}/me/mine/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        return {"id": "me/mine", "sha": "abc", "siblings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    hub_server = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub_server.tokens.add(self.headers.get("Authorization"))
            path = urlsplit(self.path).path
            status = hub_server.status_by_path.get(path, hub_server.status)
            reply = hub_server.reply(path, body) if status in (200, 409) else {"error": "no"}
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET  # noqa: N815 - names of http.server

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub_server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub_server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for name, content in (POLICY_FILES | PRIVATE_FILES).items():
        path = tmp_path / "run" / "policy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


def is_private(repository: dict[str, Any]) -> bool:
    """Whether a request to create a repository asks for a private one."""
    return repository.get("private") is True or repository.get("visibility") == "private"


def test_the_policy_and_its_card_are_uploaded_and_nothing_else(hub: HubServer, run_folder: Path) -> None:
    url = Report(run_folder).push_to_hub("me/mine")
    assert url == f"{hub.url}/me/mine"
    assert hub.files == POLICY_FILES
    assert hub.large_objects == {
        hashlib.sha256(POLICY_FILES["model.safetensors"]).hexdigest(): POLICY_FILES["model.safetensors"]
    }
    assert is_private(hub.repositories[0])
    assert hub.tokens <= {"Bearer hf_test", None} and "Bearer hf_test" in hub.tokens


def test_the_command_uploads_only_on_request_and_publicly_only_on_a_second_one(
    hub: HubServer, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), "--push-to-hub", "me/mine", "--public"]) == 0
    assert not is_private(hub.repositories[0])
    with pytest.raises(SystemExit):
        main([str(run_folder), "--public"])
    with pytest.raises(SystemExit):
        main([str(run_folder), "--push-to-hub", "me/mine", "--wandb"])
    assert len(hub.repositories) == 1


def test_a_repository_that_exists_gets_a_new_commit(hub: HubServer, run_folder: Path) -> None:
    hub.status_by_path["/api/repos/create"] = 409
    upload_policy(run_folder, "me/mine")
    assert hub.files == POLICY_FILES


@pytest.mark.parametrize("name", ["mine", "a/b/c", "", "https://huggingface.co/me/mine", "me/.."])
def test_a_bad_name_is_refused_before_anything_is_sent(hub: HubServer, run_folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="owner/name"):
        upload_policy(run_folder, name)
    assert not hub.repositories


def test_a_folder_without_a_policy_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="finished run"):
        upload_policy(tmp_path, "me/mine")
    assert not hub.repositories


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_what_the_hub_refuses_is_one_line_with_the_next_step(hub: HubServer, run_folder: Path, status: int) -> None:
    hub.status = status
    with pytest.raises(ModelError, match="hf auth login") as caught:
        upload_policy(run_folder, "me/mine")
    assert "me/mine" in str(caught.value) and "\n" not in str(caught.value)


def test_no_network_is_one_line(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"the upload to http://127\.0\.0\.1:9 failed"):
        upload_policy(run_folder, "me/mine")
