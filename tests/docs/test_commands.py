"""Every command of the docs is run: by the test named for it in WHERE, or here, on small models, in the docs' order.

What needs GPUs, a cloud, an account or data that is not shipped is marked so in WHERE and on its page.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import ray


def beside(name: str) -> ModuleType:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = beside("test_docs")
ROOT: Path = docs.ROOT
HERE = "tests/docs/test_commands.py::test_commands_run"
JOB = "tests/e2e/test_job.py"
WHERE = (
    (r"make (setup|check|test)\b", ".ci/run"),
    (r"make quickstart", f"{JOB}::test_submitted_job_leaves_a_whole_run_folder"),  # the same job, on small models
    (r"make docs", "tests/docs/test_docs.py::test_the_site_builds_without_a_warning"),
    (r"make format", ".ci/run"),  # make check runs the same two programs, without writing
    (r"make bench\b", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"source \.venv/bin/activate|export ", JOB),
    (r"ray start --head", JOB),
    (r"ray job submit .*-\d+gpu\.yaml", "not run: needs GPUs"),
    (r"ray job submit .*configs/(tiny|human)\.yaml", f"{JOB}::test_submitted_job_leaves_a_whole_run_folder"),
    (r"ray stop", "not run: ends every Ray of the machine"),
    (r"(nohup )?python -m rluf\.(serve|prepare|reward|train) .*(loop|live)\.yaml", "tests/e2e/test_loop.py"),
    (r"curl .*localhost:8000/(healthz|v1/models)", "tests/e2e/test_loop.py"),
    (r"python -m rluf\.train .*--dry-run", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"python -m rluf\.train .*--profile", f"{JOB}::test_submitted_job_leaves_a_whole_run_folder"),
    (r"python -m rluf\.train .*algorithm\.name=winner", "tests/docs/test_extend.py::test_a_job_runs_with_all_of_them"),
    (r"python -m rluf\.train\b(?!.*-(human|gpu))", HERE),
    (r"python -m rluf\.(reward|prepare)\b(?!.*-human)", HERE),
    (r"python -m rluf\.report \S+( --wandb --dry-run)?$", HERE),
    (r"python -m rluf\.report \S+ --wandb$", "not run: needs a W&B account"),
    (r"wandb sync", "tests/tracking/test_wandb.py::test_the_server_is_told_what_a_run_took_and_what_it_gave"),
    (r"cp rluf/tracking/grafana\.json", "tests/tracking/test_gauges.py::test_rays_grafana_finds_in_it"),
    (r"python -m vllm\.entrypoints", HERE),
    (r"python -m rluf\.serve", "tests/serve/test_serve.py"),
    (r"curl localhost:8000/v1/score", "tests/serve/test_serve.py::test_served_scores_equal_the_offline_scorer"),
    (r"python -m rluf\.(evaluate )?correlate", "tests/evaluate/test_correlation.py::test_the_command_reads_rows"),
    (
        r"python -m rluf\.(evaluate )?abtest .*--simulate",
        "tests/evaluate/test_abtest.py::test_a_simulated_experiment_can_be",
    ),
    (
        r"python -m rluf\.(evaluate )?abtest .*--(data|plan)",
        "tests/evaluate/test_abtest.py::test_the_command_tells_a_table",
    ),
    (r"python -m rluf\.sweep", "tests/e2e/test_sweep.py"),
    (r"python -m rluf\.evaluate score", "tests/evaluate/test_score.py::test_the_command_prints_figures_last"),
    (r"python -m rluf\.\w+ .*-human", "not run: needs data of real people"),
    (r"python benchmarks/", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"(kubectl|helm|docker|kind) ", "not run: needs a cluster"),
    (r".*(-gpu|EXTRA=gpu|\[gpu\])", "not run: needs GPUs"),
)
"""(what the command looks like, the file or test that runs it or why none does); the first that fits counts."""
MARKS = {
    "needs a W&B account": r"needs a W&B account",
    "needs data of real people": r"RLUF_DATA|real people",
    "needs GPUs": r"GPUs?",
    "needs a cluster": r"cluster|Kubernetes",
}
"""What the page of a command that is not run says."""
TINY = ("model.dtype=float32", "reward.dtype=float32")


def where(line: str) -> str:
    """The entry of WHERE for a command; empty for one that has none."""
    return next((place for pattern, place in WHERE if re.match(pattern, line)), "")


@pytest.mark.parametrize(("page", "line"), docs.ALL)
def test_each_command_has_a_test_that_runs_it_or_a_mark(page: str, line: str) -> None:
    place = where(re.sub(r"^(\w+=\S+ )+", "", line))
    assert place, f"{page}: say in WHERE of tests/docs/test_commands.py which test runs: {line}"
    if place.startswith("not run: "):
        mark = MARKS.get(place.removeprefix("not run: "), "")
        assert re.search(mark, (ROOT / page).read_text("utf-8")), f"{page} does not say that it {place[9:]}: {line}"
        return
    path, _, name = place.partition("::")
    assert (ROOT / path).is_file()
    functions = [node.name for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))) if
                 isinstance(node, ast.FunctionDef)] if name else []  # fmt: skip
    assert not name or any(function.startswith(name) for function in functions), place


def small(line: str) -> list[str]:
    """The words of a command on small models and a little data; what it is about is kept."""
    words = shlex.split(line, comments=True)
    words[0] = sys.executable
    if docs.MINE in words:
        return [*words, *TINY]
    if words[2] in ("rluf.train", "rluf.reward"):
        kept = [word for word in words[3:] if word != "--config" and not word.endswith(".yaml")]
        trains = words[2] == "rluf.train"
        name = (
            [] if any(word.startswith("name=") for word in kept) else [f"name={'quickstart' if trains else 'reward'}"]
        )
        only = [] if trains else ['reward.only=["love"]']
        return [*words[:3], "--config", "configs/tiny.yaml", "tracking.wandb=offline", *TINY, *only, *name, *kept]
    return [word.replace("USER", "someone").replace("/data/feedback/", "logs/") for word in words]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A folder like the repository's, with a log; a Ray that all commands share."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "rluf").symlink_to(ROOT / "rluf")
    shutil.copytree(ROOT / "configs", folder / "configs")
    mine = docs.own_config(folder / "configs", f"{folder}/logs/*.jsonl.gz").replace("quickstart.yaml", "tiny.yaml")
    (folder / "configs" / "mine.yaml").write_text(mine, "utf-8")
    (folder / "logs").mkdir()
    sample = gzip.decompress((ROOT / "rluf/simulate/sample/feedback.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in sample[:400]]
    someone = rows[0]["user_id"]
    with gzip.open(folder / "logs" / "part.jsonl.gz", "wt") as log:
        log.writelines(json.dumps({**row, "user_id": "someone" if row["user_id"] == someone else row["user_id"]}) + "\n"
                       for row in rows)  # fmt: skip
    return folder


def run(words: list[str], folder: Path, **more: str) -> str:
    """Output of a command that must succeed."""
    shell = " ".join(word if "*" in word and "=" not in word else shlex.quote(word) for word in words)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RLUF_RUNS": str(folder / "runs"),
                   "RLUF_CACHE": str(folder / "cache"), **more}  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", shell], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{shell}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def answered(words: list[str], folder: Path) -> None:
    """vLLM's server comes up with the trained policy and answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*words, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    body = json.dumps({"model": words[words.index("--model") + 1], "max_tokens": 4,
                       "messages": [{"role": "user", "content": "hi"}]}).encode()  # fmt: skip
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    asked.add_header("Content-Type", "application/json")
    log = folder / "server.log"
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out) as server:
        deadline = time.monotonic() + 200
        try:
            while True:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        assert json.load(answer)["usage"]["completion_tokens"] > 0
                        return
                except OSError:
                    time.sleep(1.0)
        finally:
            server.terminate()


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_commands_run(sandbox: Path) -> None:
    lines = list(dict.fromkeys(line for _, line in docs.ALL if where(line) == HERE))
    trained = [line for line in lines if "rluf.train" in line]
    for line in [*trained, *(line for line in lines if line not in trained)]:
        words = small(line)
        if "vllm.entrypoints" in line:
            answered(words, sandbox)
        else:
            run(words, sandbox)
    assert {path.name for path in (sandbox / "runs").iterdir()} >= {
        "quickstart",
        "mine",
        "love-low",
        "love-high",
        "data",
    }
    assert (sandbox / "runs" / "quickstart" / "latest" / "wandb-report.json").is_file()
