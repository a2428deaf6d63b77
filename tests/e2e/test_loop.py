"""The commands of docs/howto/loop.md, executed as written: chat, react, prepare, reward, train, deploy."""

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

from rluf.prepare.readers.feedback_folder import list_row_files
from tests.e2e.test_job import descendant_pids

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
URL = "http://localhost:8000"


def read_code_blocks() -> list[tuple[str, str]]:
    """Language and text of the page's code blocks, in order."""
    page = (ROOT / "docs" / "howto" / "loop.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def work_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the repository's configurations; processes started there are ended with it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    yield tmp_path
    with contextlib.suppress(FileNotFoundError):
        pid = int((tmp_path / "serve.pid").read_text())
        for process_id in (pid, *descendant_pids(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


def run_block(work_folder: Path, language: str, text: str) -> str:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RLUF_CACHE": str(work_folder / "c"),
    }
    for name in ("RAY_ADDRESS", "RLUF_SERVE_TOKEN", "RLUF_RUNS"):
        env.pop(name, None)
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    with (work_folder / "out.log").open("w+") as stream:  # not a pipe: it would stay open with the service
        process = subprocess.run(
            command, env=env, cwd=work_folder, stdout=stream, stderr=subprocess.STDOUT, timeout=500
        )
        stream.seek(0)
        output = stream.read()
    log = work_folder / "serve.log"
    assert process.returncode == 0, output[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    return output


def get_model_versions() -> dict[str, str]:
    return {model["id"]: model["version"] for model in httpx.get(f"{URL}/v1/models").json()["data"]}


def get_answering_version() -> str:
    """Version of the policy that responds now."""
    chat = openai.OpenAI(base_url=f"{URL}/v1", api_key="none").chat.completions
    return str(chat.create(model="policy", messages=[{"role": "user", "content": "Hi"}]).system_fingerprint)


def test_the_commands_of_the_page_close_the_loop(work_folder: Path) -> None:
    serve, visit, learn, publish, end = read_code_blocks()
    run_block(work_folder, *serve)
    first_versions = get_model_versions()
    assert get_answering_version() == first_versions["policy"]
    visit_output = re.search(r"(\d+) hearts, policy (\w+)", run_block(work_folder, *visit))
    assert visit_output is not None
    assert int(visit_output[1]) > 20
    assert visit_output[2] == first_versions["policy"]
    run_block(work_folder, *learn)
    rows = [
        row for file in list_row_files(work_folder / "runs/live/feedback") for row in pq.read_table(file).to_pylist()
    ]
    assert len(rows) == 181
    assert sum(row["reaction"] == "love" for row in rows) == int(visit_output[1])
    assert {row["model_version"] for row in rows} == {first_versions["policy"]}
    pid = int((work_folder / "serve.pid").read_text())
    engines = {child for child in descendant_pids(pid) if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()}
    run_block(work_folder, *publish)
    deadline = time.monotonic() + 120
    while (
        get_answering_version() == first_versions["policy"]
        or get_model_versions()["reward-live"] == first_versions["reward-live"]
    ):
        assert time.monotonic() < deadline, (work_folder / "serve.log").read_text()[-3000:]
        time.sleep(0.5)
    assert get_answering_version() == get_model_versions()["policy"]
    assert {child for child in descendant_pids(pid) if child in engines} == engines  # new weights, the same engine
    run_block(work_folder, *end)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}").exists()
