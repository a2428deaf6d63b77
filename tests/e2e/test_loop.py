"""Chat, react, prepare, reward, train, publish: the commands of docs/howto/loop.md, as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from tests.e2e.test_job import descendants

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
URL = "http://localhost:8000"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the page's commands, in order."""
    page = (ROOT / "docs" / "howto" / "loop.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that sees the repository's configurations; what the commands start there is ended with it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    yield tmp_path
    with contextlib.suppress(FileNotFoundError):
        pid = int((tmp_path / "serve.pid").read_text())
        for one in (pid, *descendants(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


def run(place: Path, language: str, text: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RLUF_CACHE": str(place / "c")}
    for name in ("RAY_ADDRESS", "RLUF_SERVE_TOKEN", "RLUF_RUNS"):
        env.pop(name, None)
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    with (place / "out.log").open("w+") as stream:  # a file: a pipe would stay open with the service
        done = subprocess.run(command, env=env, cwd=place, stdout=stream, stderr=subprocess.STDOUT, timeout=500)
        stream.seek(0)
        told = stream.read()
    log = place / "serve.log"
    assert done.returncode == 0, told[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    return told


def versions() -> dict[str, str]:
    return {model["id"]: model["version"] for model in httpx.get(f"{URL}/v1/models").json()["data"]}


def said() -> str:
    """Version of the policy that answers now."""
    chat = openai.OpenAI(base_url=f"{URL}/v1", api_key="none").chat.completions
    return str(chat.create(model="policy", messages=[{"role": "user", "content": "Hi"}]).system_fingerprint)


def test_the_loop_closes_with_the_commands_of_the_page(place: Path) -> None:
    serve, visit, learn, publish, end = blocks()
    run(place, *serve)
    first = versions()
    assert said() == first["policy"]
    told = re.search(r"(\d+) hearts, policy (\w+)", run(place, *visit))
    assert told is not None
    assert int(told[1]) > 20
    assert told[2] == first["policy"]
    run(place, *learn)
    rows = [row for file in (place / "runs/live/feedback").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 181
    assert sum(row["reaction"] == "love" for row in rows) == int(told[1])
    assert {row["model_version"] for row in rows} == {first["policy"]}
    pid = int((place / "serve.pid").read_text())
    engines = {one for one in descendants(pid) if b"EngineCore" in Path(f"/proc/{one}/cmdline").read_bytes()}
    run(place, *publish)
    deadline = time.monotonic() + 120
    while said() == first["policy"] or versions()["reward-live"] == first["reward-live"]:
        assert time.monotonic() < deadline, (place / "serve.log").read_text()[-3000:]
        time.sleep(0.5)
    assert said() == versions()["policy"]
    assert {one for one in descendants(pid) if one in engines} == engines  # new weights, the same engine
    run(place, *end)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}").exists()
