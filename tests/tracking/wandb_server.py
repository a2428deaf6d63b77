"""The least of a W&B server: takes runs and artifacts, keeps what it was asked. python wandb_server.py [LOG FILE]

Prints its port, then serves until it is ended.
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
ANSWERS = {
    "upsertBucket": {"upsertBucket": {"inserted": True, "bucket": BUCKET}},
    "viewer": {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
    "query ArtifactType": {"project": {"artifact": None}},
    "mutation CreateArtifact ": {"createArtifact": {"artifact": ARTIFACT}},
    "mutation UseArtifact ": {"useArtifact": {"artifact": ARTIFACT}},
}
"""Answer by a word of the question."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every question that it knows, and any other with nothing."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
        if len(sys.argv) > 1:
            with Path(sys.argv[1]).open("a") as log:
                log.write(json.dumps({"path": self.path, "asked": asked}) + "\n")
        data = next((answer for word, answer in ANSWERS.items() if word in asked), {})
        if "model(" in asked and "upsertBucket" not in asked:
            data = {"model": {"bucket": None}}
        if "mutation CreateRunFiles" in asked:
            place = f"http://{self.headers['Host']}/upload"
            files = [{"name": name, "uploadUrl": f"{place}/{name}"} for name in json.loads(asked)["variables"]["files"]]
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 - names that http.server looks for

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
