"""The main job as a user runs it: submitted to a Ray head, then again by hand, then interrupted. All parts are real."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = ["--config", "configs/tiny.yaml"]
SECRETS = {"HF_TOKEN": "hf_canaryone", "WANDB_API_KEY": "canarytwo" * 5, "AWS_SECRET_ACCESS_KEY": "canarythree"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> set[int]:
    """Process ids below `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: set[int] = set()
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


@dataclass(frozen=True)
class Place:
    """Folders and environment of the jobs of this module."""

    runs: Path
    env: dict[str, str]

    @property
    def latest(self) -> Path:
        return self.runs / "tiny" / "latest"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("job")
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RLUF_RUNS": str(base / "runs"),
        "RLUF_CACHE": str(base / "cache"),
        "RAY_AUTH_MODE": "token",
        **SECRETS,
    }
    env.pop("RAY_ADDRESS", None)
    return Place(base / "runs", env)


@pytest.fixture(scope="module")
def head(place: Place) -> Iterator[str]:
    """A Ray head with a dashboard of its own; yields the dashboard's address, which takes jobs."""
    dashboard = free_port()
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", "--object-store-memory=300000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "ray start did not open its dashboard within 60 s"
        time.sleep(0.5)
    yield f"http://127.0.0.1:{dashboard}"
    below = descendants(process.pid)
    for pid in (process.pid, *below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


@pytest.fixture(scope="module")
def submitted(place: Place, head: str) -> str:
    """Output of `ray job submit` of the tiny job, which must succeed."""
    command = [str(BIN / "ray"), "job", "submit", f"--address={head}", "--working-dir=.", "--"]
    command += ["python", "-m", "rluf.train", *SMALL, "--profile", "steps=3"]
    done = subprocess.run(command, env=place.env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_submitted_job_leaves_a_whole_run_folder(place: Place, submitted: str) -> None:
    assert "report: " in submitted
    assert {"config.json", "run.log", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"} <= {
        file.name for file in place.latest.iterdir()
    }
    told = re.findall(
        r"answers of the aligned policy: (\S+) s, the last (\S+) of them", (place.latest / "run.log").read_text()
    )
    assert [0.0 <= float(alone) <= float(all_of_it) for all_of_it, alone in told] == [True]
    summary = json.loads((place.latest / "summary.json").read_text())
    for key in ("love_rate", "helpfulness", "safety"):
        for arm in ("base", "aligned"):
            assert summary[key][arm]["low"] <= summary[key][arm]["mean"] <= summary[key][arm]["high"]
    assert summary["versions"]["weights"] == 2
    assert summary["samples"] == 16
    assert {name: one["reused"] for name, one in summary["reused"].items()} == {
        "data": False, "reward-love": False, "reward-helpfulness": False, "reward-safety": False,
    }  # fmt: skip
    rows = [json.loads(line) for line in (place.latest / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [1, 2]
    assert all(row["staleness"] == 0 for row in rows)
    assert all(0 < row["probe"] < 0.1 for row in rows)
    assert {file.name for file in (place.latest / "profile").iterdir()} == {"pumps.json.gz", "learner-0.json.gz"}
    pumps = json.loads(gzip.decompress((place.latest / "profile" / "pumps.json.gz").read_bytes()))["traceEvents"]
    assert {"generate", "score", "learn", "publish", "step 2", "idle: generate"} <= {event["name"] for event in pumps}


def test_the_dashboard_names_actors_and_tasks(head: str, submitted: str) -> None:
    """By role, objective, rank and weight version."""

    def listed(kind: str) -> set[str]:
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().read_text().strip()
        asked = urllib.request.Request(f"{head}/api/v0/{kind}?limit=10000")
        asked.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return {str(row["name"]) for row in json.load(answer)["data"]["result"]["result"]}

    assert {"rluf-rollout-0", "rluf-love-reward-0", "rluf-safety-reward-0", "rluf-learner-0"} <= listed("actors")
    assert {
        "rollout 0: generate v1", "love reward 0: score v1", "learner 0: step 2", "rollout 0: finish_update v2",
    } <= listed("tasks")  # fmt: skip


def test_policy_loads_in_plain_transformers_and_answers(place: Place, submitted: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = place.latest.resolve() / "policy"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        reply = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert reply.shape[1] > prompt["input_ids"].shape[1]


def test_no_secret_is_in_the_run_folder_or_the_output(place: Place, submitted: str) -> None:
    token = (Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()).read_text().strip()
    hidden = [secret.encode() for secret in (*SECRETS.values(), token)]
    assert all(len(secret) > 8 for secret in hidden)
    files = [file for file in place.latest.resolve().rglob("*") if file.is_file()]
    assert len(files) > 10
    for blob, name in [(submitted.encode(), "output"), *((file.read_bytes(), str(file)) for file in files)]:
        assert not [name for secret in hidden if secret in blob]


def test_a_stranger_without_the_token_is_turned_away(place: Place, head: str) -> None:
    env = {**place.env, "RAY_AUTH_MODE": "disabled"}
    command = [str(BIN / "ray"), "job", "list", f"--address={head}"]
    told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode != 0
    assert "authentication" in (told.stdout + told.stderr).lower()


def test_the_policy_folder_has_its_card(place: Place, submitted: str) -> None:
    text = (place.latest / "policy" / "README.md").read_text()
    assert "## Reward models" in text and "love: auroc" in text
    assert {f.stem for f in (place.latest / "policy" / "rluf").iterdir()} >= {"settings", "data", "love", "safety"}


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted: "),
        pytest.param(signal.SIGTERM, 143, "terminated: ", marks=pytest.mark.nightly),
    ],
)
def test_a_signal_in_the_loop_ends_everything(
    place: Place, submitted: str, sent: signal.Signals, code: int, word: str
) -> None:
    before = place.latest.resolve()
    command = [str(BIN / "python"), "-m", "rluf.train", *SMALL, "algorithm.steps=500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=place.env, cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if "align: 2/500" in line:
            break
    below = descendants(process.pid)
    assert len(below) > 5, "".join(seen)
    process.send_signal(sent)
    rest, _ = process.communicate(timeout=30)
    text = "".join(seen) + rest
    assert process.returncode == code, text
    assert text.count(word) == 1
    assert "Traceback" not in text
    assert sum("reused from" in line for line in seen) == 4
    deadline = time.monotonic() + 15
    while any(alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in below if alive(pid)]
    assert place.latest.resolve() != before
    assert not (place.latest / "summary.json").exists()
    assert not (place.latest / "policy").exists()
