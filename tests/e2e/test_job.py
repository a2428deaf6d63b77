"""The training job as users run it: submitted to a Ray head, run again by hand, interrupted. All parts are real.

Its YAML file adds two objectives, one scored by a judge, one by a model trained on labeled rows, and trains the three
built-in ones on one backbone. The notebook in test_wheel.py trains them apart, as they are by default.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.model_cache import link_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = """
extends: {root}/configs/tiny.yaml
name: five
data: {{labels: {{warmth: sample:safety}}}}
objectives:
  brevity: {{source: judge, path: length, weight: 0.2}}
  warmth: {{weight: 0.1, gate: must_rise}}
reward:
  shared_backbone_heads: [love, helpfulness, safety]  # one actor for three objectives; a test starts all actors twice
  warmth: {{backbone: tiny-encoder, epochs: 1, max_tokens: 96}}
aggregation: {{topic_objectives: {{risky: warmth}}}}
algorithm: {{demonstrations: 1}}
"""
OBJECTIVES = ["love", "helpfulness", "safety", "brevity", "warmth"]
SECRETS = {"HF_TOKEN": "hf_canaryone", "WANDB_API_KEY": "canarytwo" * 5, "AWS_SECRET_ACCESS_KEY": "canarythree"}


def find_open_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def descendant_pids(pid: int) -> set[int]:
    """Ids of all descendant processes of `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    descendants: set[int] = set()
    generation = {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation} - descendants
        descendants |= generation
    return descendants


@dataclass(frozen=True)
class JobEnvironment:
    """Folders and environment variables of the jobs of this module."""

    runs_folder: Path
    config: Path
    env: dict[str, str]

    @property
    def latest_run(self) -> Path:
        return self.runs_folder / "five" / "latest"


@pytest.fixture(scope="module")
def job_env(tmp_path_factory: pytest.TempPathFactory) -> JobEnvironment:
    base = tmp_path_factory.mktemp("job")
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RLUF_RUNS": str(base / "runs"),
        "RLUF_CACHE": str(link_models(base / "cache")),
        "RAY_AUTH_MODE": "token",
        "HOME": str(base / "home"),
        **SECRETS,
    }
    env.pop("RAY_ADDRESS", None)
    # An empty home, as on a machine where Ray never ran: `ray start` finds no token there and creates none.
    (base / "home").mkdir()
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=60)
    (base / "five.yaml").write_text(CONFIG.format(root=ROOT))
    return JobEnvironment(base / "runs", base / "five.yaml", env)


@pytest.fixture(scope="module")
def ray_head(job_env: JobEnvironment) -> Iterator[str]:
    """A Ray head with a dashboard of its own; yields the dashboard's address, to which jobs are submitted."""
    dashboard_port = find_open_port()
    # Not in Ray's own folder, where it leaves its address: Ray Train's controllers in other tests would look for their
    # state on this cluster, and wait 12 s for it after it was killed. Short, as paths of sockets are limited.
    folder = tempfile.mkdtemp(prefix="ray-")
    command = [
        str(BIN / "ray"), "start", "--head", "--block",
        f"--port={find_open_port()}", f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={find_open_port()}", "--num-cpus=2", "--object-store-memory=300000000",
        "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=job_env.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", dashboard_port)) == 0:
                break
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "ray start did not open its dashboard within 60 s"
        time.sleep(0.5)
    yield f"http://127.0.0.1:{dashboard_port}"
    for pid in (process.pid, *descendant_pids(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def submit_output(job_env: JobEnvironment, ray_head: str) -> str:
    """Output of `ray job submit` of the job, which must succeed."""
    command = [str(BIN / "ray"), "job", "submit", f"--address={ray_head}", "--working-dir=.", "--"]
    command += ["python", "-m", "rluf.train", "--config", str(job_env.config), "--profile", "steps=3"]
    process = subprocess.run(command, env=job_env.env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def test_a_submitted_job_writes_a_complete_run_folder(job_env: JobEnvironment, submit_output: str) -> None:
    assert "report: " in submit_output
    assert {"config.json", "run.log", "metrics.jsonl", "answers.jsonl", "summary.json", "report.html", "blind"} <= {
        file.name for file in job_env.latest_run.iterdir()
    }
    log = (job_env.latest_run / "run.log").read_text()
    pattern = r"responses of aligned: seconds=(\S+) scoring_after_last_rollout=(\S+)"
    timings = re.findall(pattern, log)
    assert [0.0 <= float(scoring_s) <= float(total_s) for total_s, scoring_s in timings] == [True]
    summary = json.loads((job_env.latest_run / "summary.json").read_text())
    for key in ("love_rate", "helpfulness", "safety"):
        for arm in ("base", "aligned"):
            assert summary[key][arm]["low"] <= summary[key][arm]["mean"] <= summary[key][arm]["high"]
    assert summary["versions"]["weights"] == 2
    assert summary["samples"] == 16
    assert set(summary["reused"]) == {"data", "reward-love-helpfulness-safety", "reward-warmth"}
    assert not any(artifact["reused"] for artifact in summary["reused"].values())
    rows = [json.loads(line) for line in (job_env.latest_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [1, 2]
    assert all(row["staleness"] == 0 for row in rows)
    assert all(0 < row["sync_logprob_gap"] < 0.1 for row in rows)
    assert {file.name for file in (job_env.latest_run / "profile").iterdir()} == {
        "timeline.json.gz",
        "learner-0.json.gz",
    }
    timeline = gzip.decompress((job_env.latest_run / "profile" / "timeline.json.gz").read_bytes())
    names = {event["name"] for event in json.loads(timeline)["traceEvents"]}
    assert {"generate", "score", "learn", "weight_sync", "step 2", "idle: generate"} <= names


@pytest.mark.usefixtures("submit_output")
def test_objectives_by_yaml_alone_reach_metrics_gates_report_and_card(job_env: JobEnvironment) -> None:
    run_folder = job_env.latest_run
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert [key.removesuffix("_raw") for key in metrics if key.endswith("_raw")] == OBJECTIVES
        assert all(0.0 <= metrics[name] <= 1.0 for name in OBJECTIVES)

    summary = json.loads((run_folder / "summary.json").read_text())
    assert list(summary["offline"]) == ["p_love", *OBJECTIVES[1:]]
    checks = {check["name"]: check for check in summary["gates"]["checks"]}
    assert set(checks) == set(OBJECTIVES)
    assert {name: checks[name]["gate"] for name in OBJECTIVES[3:]} == {"brevity": "must_hold", "warmth": "must_rise"}
    assert {checks[name]["judged_by"] for name in OBJECTIVES[3:]} == {"reward models"}
    assert checks["safety"]["judged_by"] == "simulated users"
    assert set(summary["reward_cards"]) == {*OBJECTIVES[:3], "warmth"}  # a judge has no card

    card = json.loads((run_folder / "cards" / "warmth.json").read_text())
    assert card["objective"] == "warmth" and "auroc" in card
    data_card = json.loads((run_folder / "cards" / "data.json").read_text())
    assert data_card["splits"]["warmth"] == data_card["splits"]["safety"]

    report = (run_folder / "report.html").read_text("utf-8")
    for name in OBJECTIVES[3:]:
        assert f'"curve_{name}"' in report and f'"pareto_{name}"' in report and f'"arms_{name}"' in report
    assert '"reliability_warmth"' in report
    readme = (run_folder / "policy" / "README.md").read_text("utf-8")
    assert "brevity 0.2, warmth 0.1" in readme
    assert "- warmth: auroc" in readme and "brevity by the reward model on unseen prompts" in readme


@pytest.mark.usefixtures("submit_output")
def test_the_dashboard_names_actors_and_tasks(ray_head: str, job_env: JobEnvironment) -> None:
    """By role, objective, rank and weight version."""

    def list_names(kind: str) -> set[str]:
        token = (Path(job_env.env["HOME"]) / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(f"{ray_head}/api/v0/{kind}?limit=10000")
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=60) as response:
            return {str(row["name"]) for row in json.load(response)["data"]["result"]["result"]}

    assert {
        "rluf-rollout-0", "rluf-love-reward-0", "rluf-warmth-reward-0", "rluf-brevity-reward-0", "rluf-learner-0",
    } <= list_names("actors")  # fmt: skip
    assert {
        "rollout 0: generate v1", "love reward 0: score v1", "learner 0: step 2", "rollout 0: finish_weight_update v2",
    } <= list_names("tasks")  # fmt: skip


def test_the_policy_loads_in_plain_transformers_and_responds(job_env: JobEnvironment, submit_output: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy_path = job_env.latest_run.resolve() / "policy"
    tokenizer, model = AutoTokenizer.from_pretrained(policy_path), AutoModelForCausalLM.from_pretrained(policy_path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        reply = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert reply.shape[1] > prompt["input_ids"].shape[1]


def test_no_secret_is_in_the_run_folder_or_the_output(job_env: JobEnvironment, submit_output: str) -> None:
    token = (Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()).read_text().strip()
    secrets = [secret.encode() for secret in (*SECRETS.values(), token)]
    assert all(len(secret) > 8 for secret in secrets)
    files = [file for file in job_env.latest_run.resolve().rglob("*") if file.is_file()]
    assert len(files) > 10
    contents = {"output": submit_output.encode(), **{str(file): file.read_bytes() for file in files}}
    for name, content in contents.items():
        assert not [name for secret in secrets if secret in content]


def test_a_client_without_the_token_is_refused(job_env: JobEnvironment, ray_head: str) -> None:
    env = {**job_env.env, "RAY_AUTH_MODE": "disabled"}
    command = [str(BIN / "ray"), "job", "list", f"--address={ray_head}"]
    process = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode != 0
    assert "authentication" in (process.stdout + process.stderr).lower()


def test_the_policy_folder_has_its_card(job_env: JobEnvironment, submit_output: str) -> None:
    text = (job_env.latest_run / "policy" / "README.md").read_text()
    assert "## Reward models" in text and "love: auroc" in text
    assert {file.stem for file in (job_env.latest_run / "policy" / "rluf").iterdir()} >= {
        "settings",
        "data",
        "love",
        "safety",
    }


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("signal_number", "exit_code", "message"),
    [
        (signal.SIGINT, 130, "interrupted: "),
        pytest.param(signal.SIGTERM, 143, "terminated: ", marks=pytest.mark.nightly),
    ],
)
def test_a_signal_during_training_ends_every_process(
    job_env: JobEnvironment, submit_output: str, signal_number: signal.Signals, exit_code: int, message: str
) -> None:
    previous_run = job_env.latest_run.resolve()
    command = [str(BIN / "python"), "-m", "rluf.train", "--config", str(job_env.config), "algorithm.steps=500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=job_env.env, cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "train: 2/500" in line:
            break
    children = descendant_pids(process.pid)
    assert len(children) > 5, "".join(lines)
    process.send_signal(signal_number)
    rest, _ = process.communicate(timeout=30)
    output = "".join(lines) + rest
    assert process.returncode == exit_code, output
    assert output.count(message) == 1
    assert "Traceback" not in output
    assert sum("reused from" in line for line in lines) == 3  # the data and both backbones
    deadline = time.monotonic() + 15
    while any(is_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in children if is_alive(pid)]
    assert job_env.latest_run.resolve() != previous_run
    assert not (job_env.latest_run / "summary.json").exists()
    assert not (job_env.latest_run / "policy").exists()
