"""Minimal W&B server: accepts runs and artifacts and logs the requests. python wandb_server.py [LOG FILE]

Prints its port, then serves until it is killed.
"""

from __future__ import annotations

import http.server
import json
import sys
from pathlib import Path

BUCKET = {
    "id": "b", "name": "r", "displayName": "r", "description": None, "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": {"id": "p", "name": "rluf", "entity": {"id": "e", "name": "me"}},
}  # fmt: skip
ARTIFACT = {
    "id": "QXJ0aWZhY3Q6MQ==", "state": "COMMITTED", "digest": "d", "artifactSequence": {"id": "s", "name": "n"},
}  # fmt: skip
REPLIES = {
    "upsertBucket": {"upsertBucket": {"inserted": True, "bucket": BUCKET}},
    "viewer": {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
    "query ArtifactType": {"project": {"artifact": None}},
    "mutation CreateArtifact ": {"createArtifact": {"artifact": ARTIFACT}},
    "mutation UseArtifact ": {"useArtifact": {"artifact": ARTIFACT}},
}
"""Reply by a phrase of the request."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the reply of a known request, and an empty one for any other."""

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
        if len(sys.argv) > 1:
            with Path(sys.argv[1]).open("a") as log:
                log.write(json.dumps({"path": self.path, "request": request}) + "\n")
        data = next((reply for phrase, reply in REPLIES.items() if phrase in request), {})
        if "model(" in request and "upsertBucket" not in request:
            data = {"model": {"bucket": None}}
        if "mutation CreateRunFiles" in request:
            upload_url = f"http://{self.headers['Host']}/upload"
            files = [
                {"name": name, "uploadUrl": f"{upload_url}/{name}"}
                for name in json.loads(request)["variables"]["files"]
            ]
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 - names that http.server requires

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
