"""LlmJudge against a real vLLM server; the grades of a random model do not matter, the protocol does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rluf.models.hub import resolve_model
from rluf.objectives.llm_judge import LlmJudge

pytestmark = pytest.mark.nightly


@pytest.fixture
def vllm_url(tmp_path: Path) -> Iterator[str]:
    """URL of `vllm serve` with the embedded model tiny on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = resolve_model("tiny", tmp_path)
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "tiny", "--max-model-len", "2048", "--enforce-eager",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


async def test_a_vllm_server_is_asked_for_every_row(vllm_url: str, caplog: pytest.LogCaptureFixture) -> None:
    judge = LlmJudge(vllm_url, "tiny", max_attempts=2, concurrency=4)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}"}], "response": str(i)} for i in range(6)]
    grades = await judge(rows)
    assert len(grades) == 6
    assert all(0 <= grade <= 1 for grade in grades)
    # A random model writes noise: a row without a grade counts as 0, and each has a warning.
    warnings = [record for record in caplog.records if "is not a grade" in record.getMessage()]
    assert len(warnings) >= sum(grade == 0 for grade in grades) - 1
