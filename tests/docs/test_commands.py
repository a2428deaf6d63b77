"""Every command of the docs is run: by the test named in TEST_BY_COMMAND, or here, on small models, in the docs' order.

Commands that need GPUs, a cloud, an account or data that is not shipped are marked in the table and on their page.
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


def load_sibling(name: str) -> ModuleType:
    """Load a module of this folder."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_module = load_sibling("test_docs")
ROOT: Path = docs_module.ROOT
THIS_TEST = "tests/docs/test_commands.py::test_commands_run"
JOB_TEST = "tests/e2e/test_job.py"
TEST_BY_COMMAND = (
    (r"make (setup|check|test)\b", ".ci/run"),
    (
        r"make quickstart",
        f"{JOB_TEST}::test_a_submitted_job_writes_a_complete_run_folder",
    ),  # the same job, on small models
    (r"make docs", "tests/docs/test_docs.py::test_the_site_builds_without_a_warning"),
    (r"make format", ".ci/run"),  # make check runs the same two programs, without writing
    (r"make gpu-check", "tests/backends/test_gpu_check.py"),
    (r"make bench\b", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"source \.venv/bin/activate|export ", JOB_TEST),
    (r"ray get-auth-token --generate", JOB_TEST),
    (r"ray start --head", JOB_TEST),
    (r"ray job submit .*-\d+gpu\.yaml", "not run: needs GPUs"),
    (r"ray job submit .*configs/(tiny|human)\.yaml", f"{JOB_TEST}::test_a_submitted_job_writes_a_complete_run_folder"),
    (r"ray job submit .*--metadata-json", "tests/tracking/test_run_files.py"),
    (r"ray stop", "not run: ends every Ray of the machine"),
    (r"(nohup )?python -m rluf\.(serve|prepare|reward|train) .*(loop|live)\.yaml", "tests/e2e/test_loop.py"),
    (r"curl .*localhost:8000/(healthz|v1/models)", "tests/e2e/test_loop.py"),
    (r"python -m rluf\.train .*--dry-run", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"python -m rluf\.train .*--profile", f"{JOB_TEST}::test_a_submitted_job_writes_a_complete_run_folder"),
    (r"python -m rluf\.train .*algorithm\.name=winner", "tests/docs/test_extend.py::test_a_job_runs_with_all_of_them"),
    (r"python -m rluf\.train\b(?!.*-(human|gpu))", THIS_TEST),
    (r"python -m rluf\.(reward|prepare)\b(?!.*-human)", THIS_TEST),
    (r"python -m rluf\.report \S+( --wandb --dry-run)?$", THIS_TEST),
    (
        r"python -m rluf\.evaluate rescore",
        "tests/evaluate/test_rescore.py::test_means_and_comparisons_are_those_of_the_model",
    ),
    (
        r"python -m rluf\.evaluate blind",
        "tests/evaluate/test_blind.py::test_readers_who_prefer_the_base_fail_the_gates",
    ),
    (r"python -m rluf\.report \S+ --wandb$", "not run: needs a W&B account"),
    (
        r"python -m rluf\.report \S+ --push-to-hub",
        "tests/report/test_hub_upload.py::test_the_policy_and_its_card_are_uploaded",
    ),
    (r"git clone .*llama\.cpp", "not run: needs another project's source"),
    (r"wandb sync", "tests/tracking/test_wandb.py::test_the_server_gets_the_inputs_and_outputs_of_a_run"),
    (
        r"cp rluf/tracking/grafana\.json",
        "tests/tracking/test_gauges.py::test_the_dashboard_has_the_format_of_rays_own_dashboards",
    ),
    (r"python -m vllm\.entrypoints", THIS_TEST),
    (r"python -m rluf\.serve", "tests/serve/test_serve.py"),
    (r"curl localhost:8000/v1/score", "tests/serve/test_serve.py::test_served_scores_equal_offline_scores"),
    (r"python -m rluf\.(evaluate )?correlate", "tests/evaluate/test_correlation.py::test_the_command_reads_rows"),
    (
        r"python -m rluf\.(evaluate )?abtest .*--simulate",
        "tests/evaluate/test_abtest.py::test_a_simulated_experiment_can_be",
    ),
    (
        r"python -m rluf\.(evaluate )?abtest .*--(data|plan)",
        "tests/evaluate/test_abtest.py::test_the_command_writes_a_table",
    ),
    (r"python -m rluf\.sweep", "tests/e2e/test_sweep.py"),
    (r"python -m rluf\.evaluate score", "tests/evaluate/test_score.py::test_the_command_prints_figures_last"),
    (
        r"python -m rluf\.simulate (rescore|--config)",
        "tests/simulate/test_log.py::test_a_log_is_written_from",
    ),
    (r"python -m rluf\.simulate judge", "tests/simulate/test_judge.py::test_the_command_prints_figures_last"),
    (r"python -m rluf\.\w+ .*-human", "not run: needs data of real people"),
    (r"python benchmarks/", "tests/docs/test_docs.py::test_a_command_parses"),
    (r"(kubectl|helm|docker|kind) ", "not run: needs a cluster"),
    (r".*(-gpu|EXTRA=gpu|\[gpu\])", "not run: needs GPUs"),
)
"""(pattern of the command, the file or test that runs it or the reason why none does); the first match counts."""
REQUIREMENT_PATTERNS = {
    "needs a W&B account": r"needs a W&B account",
    "needs data of real people": r"RLUF_DATA|real people",
    "needs GPUs": r"GPUs?",
    "needs another project's source": r"llama\.cpp's source, not of rluf",
    "needs a cluster": r"cluster|Kubernetes",
}
"""Text that the page of a command must contain, by the reason why it is not run."""
FLOAT32_OVERRIDES = ("model.dtype=float32",)


def find_test(line: str) -> str:
    """The test of a command; empty if there is none."""
    return next((test for pattern, test in TEST_BY_COMMAND if re.match(pattern, line)), "")


@pytest.mark.parametrize(("page", "line"), docs_module.ALL_COMMANDS)
def test_each_command_has_a_test_that_runs_it_or_a_mark(page: str, line: str) -> None:
    test = find_test(re.sub(r"^(\w+=\S+ )+", "", line))
    assert test, f"{page}: name the test in TEST_BY_COMMAND of tests/docs/test_commands.py for: {line}"
    if test.startswith("not run: "):
        requirement = REQUIREMENT_PATTERNS.get(test.removeprefix("not run: "), "")
        assert re.search(requirement, (ROOT / page).read_text("utf-8")), (
            f"{page} does not say that it {test[9:]}: {line}"
        )
        return
    path, _, name = test.partition("::")
    assert (ROOT / path).is_file()
    functions = [node.name for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))) if
                 isinstance(node, ast.FunctionDef)] if name else []  # fmt: skip
    assert not name or any(function.startswith(name) for function in functions), test


def shrink_command(line: str) -> list[str]:
    """The words of a command, changed to small models and little data."""
    words = shlex.split(line, comments=True)
    words[0] = sys.executable
    if docs_module.OWN_CONFIG in words:
        return [*words, *FLOAT32_OVERRIDES]
    if words[2] in ("rluf.train", "rluf.reward"):
        arguments = [word for word in words[3:] if word != "--config" and not word.endswith(".yaml")]
        is_training = words[2] == "rluf.train"
        name_override = (
            []
            if any(word.startswith("name=") for word in arguments)
            else [f"name={'quickstart' if is_training else 'reward'}"]
        )
        objective_override = [] if is_training else ['reward.objectives=["love"]']
        return [
            *words[:3],
            "--config",
            "configs/tiny.yaml",
            "tracking.wandb=offline",
            *FLOAT32_OVERRIDES,
            *objective_override,
            *name_override,
            *arguments,
        ]
    return [word.replace("USER", "someone").replace("/data/feedback/", "logs/") for word in words]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A folder like the repository's, with a log; all commands share one Ray."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "rluf").symlink_to(ROOT / "rluf")
    shutil.copytree(ROOT / "configs", folder / "configs")
    own_config = docs_module.read_own_config(folder / "configs", f"{folder}/logs/*.jsonl.gz").replace(
        "quickstart.yaml", "tiny.yaml"
    )
    (folder / "configs" / "mine.yaml").write_text(own_config, "utf-8")
    (folder / "logs").mkdir()
    sample_lines = gzip.decompress((ROOT / "rluf/simulate/sample/feedback.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in sample_lines[:400]]
    first_user = rows[0]["user_id"]
    with gzip.open(folder / "logs" / "part.jsonl.gz", "wt") as log:
        log.writelines(
            json.dumps({**row, "user_id": "someone" if row["user_id"] == first_user else row["user_id"]}) + "\n"
            for row in rows
        )
    return folder


def run_command(words: list[str], folder: Path, **variables: str) -> str:
    """Run a command that must succeed; returns its output."""
    command_line = " ".join(word if "*" in word and "=" not in word else shlex.quote(word) for word in words)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RLUF_RUNS": str(folder / "runs"),
                   "RLUF_CACHE": str(folder / "cache"), **variables}  # fmt: skip
    completed = subprocess.run(
        ["bash", "-c", command_line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, f"{command_line}\n{completed.stdout[-2000:]}{completed.stderr[-4000:]}"
    return completed.stdout + completed.stderr


def check_server_answers(words: list[str], folder: Path) -> None:
    """Start vLLM's server with the trained policy and send it a chat request."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [*words, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    body = json.dumps({"model": words[words.index("--model") + 1], "max_tokens": 4,
                       "messages": [{"role": "user", "content": "hi"}]}).encode()  # fmt: skip
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    request.add_header("Content-Type", "application/json")
    log_path = folder / "server.log"
    with (
        log_path.open("w") as stream,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream) as server,
    ):
        deadline = time.monotonic() + 200
        try:
            while True:
                assert server.poll() is None and time.monotonic() < deadline, log_path.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        assert json.load(response)["usage"]["completion_tokens"] > 0
                        return
                except OSError:
                    time.sleep(1.0)
        finally:
            server.terminate()


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_commands_run(sandbox: Path) -> None:
    lines = list(dict.fromkeys(line for _, line in docs_module.ALL_COMMANDS if find_test(line) == THIS_TEST))
    trained = [line for line in lines if "rluf.train" in line]
    for line in [*trained, *(line for line in lines if line not in trained)]:
        words = shrink_command(line)
        if "vllm.entrypoints" in line:
            check_server_answers(words, sandbox)
        else:
            run_command(words, sandbox)
    assert {path.name for path in (sandbox / "runs").iterdir()} >= {
        "quickstart",
        "mine",
        "love-low",
        "love-high",
        "data",
    }
    assert (sandbox / "runs" / "quickstart" / "latest" / "wandb-report.json").is_file()
