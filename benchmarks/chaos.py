"""Fault injection: kill -9 of a rollout, reward or learner actor, or of the driver, at random points of a run.

The runs use tiny real actors, synchronous, with run.deterministic=true. A trial is a run in which processes of the
given kinds are killed. It must end with every step once, every sample once, and bit for bit the weights of an
undisturbed run.
The trials share one Ray head, as jobs on a cluster do; each starts its own actors. With --state, finished trials are
saved in a folder and a later call resumes after them; --minutes limits one call. The last line is JSON.

    python benchmarks/chaos.py --trials 20 --steps 30
    python benchmarks/chaos.py --trials 20 --steps 30 --state chaos --minutes 9    # again, until all are done
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
TITLE_BY_KIND = {
    "rollout": "ray::RolloutActor",
    "reward": "ray::RewardActor",
    "learner": "ray::LearnerActor",
    "driver": "",
}
PROMPT_COUNT = 24
HEAD_START_ATTEMPTS = 4


@dataclass(frozen=True)
class RayHead:
    """A Ray head: process id and address."""

    pid: int
    address: str


def make_inputs(work_folder: Path) -> None:
    """Write a prompt set and a random reward model, so that a trial needs no reward training."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from rluf.models.hub import resolve_model
    from rluf.reward.backbone import build_text_encoder, load_classifier
    from rluf.reward.calibration import Calibration

    (work_folder / "data" / "prompts").mkdir(parents=True)
    for split, row_count in (("train", PROMPT_COUNT), ("test", 4)):
        prompt_rows = [
            {"id": f"{split}{index}", "topic": "chat", "messages": [{"role": "user", "content": f"Question {index}?"}]}
            for index in range(row_count)
        ]
        pq.write_table(pa.Table.from_pylist(prompt_rows), work_folder / "data" / "prompts" / f"{split}.parquet")
    resolve_model("tiny", work_folder / "cache")
    backbone = resolve_model("tiny-encoder", work_folder / "cache")
    model = load_classifier(backbone, require_all_weights=False, seed=1)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    build_text_encoder(model, backbone, 96).tokenizer.save_pretrained(str(work_folder / "love"))
    model.save_pretrained(str(work_folder / "love"))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 96).save(work_folder / "love")


def load_run_settings(*overrides: str) -> Any:
    """Settings of a small synchronous run that is bit-identical each time."""
    from rluf.config.load import load_settings

    base_overrides = [
        "run.deterministic=true",
        "learner.learning_rate=1e-3",
        "learner.checkpoint_every_steps=3",
        "objectives.love.weight=1",
        "objectives.helpfulness.weight=0",
        "objectives.safety.weight=0",
        "algorithm.demonstrations=0",
        "algorithm.prompts_per_step=3",
        "rollout.max_prompt_tokens=256",
        "rollout.max_response_tokens=12",
        "timeouts.actor_start_s=600",
        "cluster.threads_per_actor=1",
        "cluster.max_restarts_per_hour=50",
        "evaluate.prompts=4",
        "model.dtype=float32",
    ]
    return load_settings(ROOT / "configs" / "tiny.yaml", [*base_overrides, *overrides]).settings


def run_in_process(work_folder: Path, run_folder: Path, overrides: list[str]) -> None:
    """Run only the training loop in this process: no preparation, no reward training, no report."""
    from cluster.connect import ray_connection
    from rluf.models.hub import resolve_model
    from rluf.tracking.console import setup_logging
    from rluf.tracking.wandb import WandbTracker
    from rluf.train.loop import run_training

    settings = load_run_settings(*overrides)
    setup_logging(run_folder / "run.log")
    model = resolve_model("tiny", work_folder / "cache")
    with ray_connection(), WandbTracker(settings, run_folder) as tracker:
        result = asyncio.run(
            run_training(settings, run_folder, model, work_folder / "data", {"love": work_folder / "love"}, tracker)
        )
    (run_folder / "outcome.json").write_text(
        json.dumps({arm: sum(answer.arm == arm for answer in result.answers) for arm in ("base", "aligned")})
    )


def build_environment() -> dict[str, str]:
    """Environment of the Ray head and of the runs on it."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.pop("RAY_ADDRESS", None)
    return env


def find_free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def ray_head() -> Iterator[RayHead]:
    """Start a local Ray head for several runs; kills it with all its descendants at the end.

    `ray start` waits 30 s for its own node; on a loaded machine it may need another attempt.
    """
    for _ in range(HEAD_START_ATTEMPTS):
        port, client_port = find_free_port(), find_free_port()
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=4", "--disable-usage-stats"]
        command += [f"--object-store-memory={256 << 20}", f"--ray-client-server-port={client_port}"]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, env=build_environment(), stdout=output, stderr=subprocess.STDOUT)
            try:
                if wait_until_started(process, output):
                    yield RayHead(process.pid, f"127.0.0.1:{port}")
                    return
            finally:
                for pid in (process.pid, *descendant_processes(process.pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(30)
    raise RuntimeError(f"no Ray in {HEAD_START_ATTEMPTS} attempts; is the machine too busy?")


def wait_until_started(process: subprocess.Popen[bytes], output: IO[str]) -> bool:
    """Wait until `ray start` reports that its node runs; False if it exits before."""
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        if "Ray runtime started" in os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace"):
            return True
        time.sleep(0.2)
    return False


def start_run(work_folder: Path, run_folder: Path, ray_address: str, *overrides: str) -> subprocess.Popen[str]:
    """Start `run_in_process` in a separate process, on the Ray cluster at `ray_address`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", str(work_folder), str(run_folder), *overrides]
    env = {**build_environment(), "RAY_ADDRESS": ray_address}
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def descendant_processes(pid: int) -> dict[int, str]:
    """Descendant processes of `pid`: id to command line."""
    parent_and_command: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parent_and_command[int(entry.name)] = (parent, (entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue  # the process ended while it was read
    descendants, newest = {pid}, {pid}
    while newest:
        newest = {child for child, (parent, _) in parent_and_command.items() if parent in descendants} - descendants
        descendants |= newest
    return {child: parent_and_command[child][1] for child in descendants - {pid} if child in parent_and_command}


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Metric rows so far; an incomplete last line is ignored."""
    metrics_path = run_folder / "metrics.jsonl"
    text = metrics_path.read_text() if metrics_path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def hash_policy(run_folder: Path) -> str:
    """Hash of the final policy weights."""
    return hashlib.sha256((run_folder / "policy" / "model.safetensors").read_bytes()).hexdigest()[:16]


def wait_for_step(process: subprocess.Popen[str], run_folder: Path, step: int, timeout_s: float = 600.0) -> None:
    """Wait until `step` steps are in the metrics. Raises RuntimeError if the run ends before or is too slow."""
    deadline = time.monotonic() + timeout_s
    while len(read_metrics(run_folder)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"step {step} was not reached:\n{(run_folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.05)


def kill_process(process: subprocess.Popen[str], kind: str, ancestor_pid: int) -> None:
    """kill -9 one process of a kind; actors are descendants of `ancestor_pid`."""
    if kind == "driver":
        # Its actors end after it; the resumed run must not meet them.
        candidates = find_actors(ancestor_pid, *filter(None, TITLE_BY_KIND.values()))
        process.kill()
        process.wait(30)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in candidates) and time.monotonic() < deadline:
            time.sleep(0.1)
        return
    deadline = time.monotonic() + 30
    # Repeat: a process title is empty for a moment while Ray replaces it.
    while not (candidates := find_actors(ancestor_pid, TITLE_BY_KIND[kind])):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no process with the title {TITLE_BY_KIND[kind]} to kill after 30 s")
        time.sleep(0.01)
    os.kill(random.choice(candidates), signal.SIGKILL)


def find_actors(ancestor_pid: int, *titles: str) -> list[int]:
    """Descendants of `ancestor_pid` whose command line starts with one of `titles`."""
    return [pid for pid, command in descendant_processes(ancestor_pid).items() if command.startswith(titles)]


def wait_for_kill_time(
    process: subprocess.Popen[str], run_folder: Path, ray_head: RayHead, kind: str, kill_step: float
) -> None:
    """Wait until `kill_step` steps are done; below 1, this share of 20 s after the actor to kill has started."""
    wait_for_step(process, run_folder, int(kill_step))
    if kill_step >= 1:
        time.sleep(kill_step % 1 * read_metrics(run_folder)[-1]["step_s"])
        return
    while process.poll() is None and not find_actors(ray_head.pid, TITLE_BY_KIND[kind] or TITLE_BY_KIND["learner"]):
        time.sleep(0.1)
    time.sleep(kill_step * 20)


def run_trial(
    work_folder: Path, run_folder: Path, ray_head: RayHead, kills: Sequence[tuple[str, float]], steps: int
) -> dict[str, Any]:
    """Run `steps` steps and kill a process of each kind in `kills` after the given number of steps."""
    overrides = [f"algorithm.steps={steps}"]
    started, recovery_seconds = time.monotonic(), []
    process = start_run(work_folder, run_folder, ray_head.address, *overrides)
    try:
        for kind, kill_step in kills:
            wait_for_kill_time(process, run_folder, ray_head, kind, kill_step)
            steps_done, killed_at = len(read_metrics(run_folder)), time.monotonic()
            kill_process(process, kind, ray_head.pid)
            if kind == "driver":
                process = start_run(work_folder, run_folder, ray_head.address, *overrides, f"run.resume={run_folder}")
            while process.poll() is None and (
                not read_metrics(run_folder) or read_metrics(run_folder)[-1]["step"] <= steps_done
            ):
                time.sleep(0.05)
            recovery_seconds.append(round(time.monotonic() - killed_at, 1))
        exit_code = process.wait(600)
    finally:
        process.kill()
    metric_rows = read_metrics(run_folder)
    return {
        "kills": [[kind, round(kill_step, 2)] for kind, kill_step in kills],
        "code": exit_code,
        "recovery_s": recovery_seconds,
        "seconds": round(time.monotonic() - started, 1),
        "steps": [row["step"] for row in metric_rows] == list(range(1, steps + 1)),
        "samples": sum(row["samples"] for row in metric_rows),
        "weights": hash_policy(run_folder) if exit_code == 0 else "",
    }


def plan_kills(trials: int, kills_per_trial: int, steps: int, seed: int) -> list[list[tuple[str, float]]]:
    """Kinds and steps of the kills of each trial: kinds round-robin, each after a different random number of steps."""
    rng, kind_cycle = random.Random(seed), itertools.cycle(TITLE_BY_KIND)
    plan = []
    for _ in range(trials):
        trial_kinds = [next(kind_cycle) for _ in range(kills_per_trial)]
        rng.shuffle(trial_kinds)
        plan.append(
            [
                (kind, step + rng.random())
                for kind, step in zip(trial_kinds, sorted(rng.sample(range(steps - 2), kills_per_trial)), strict=True)
            ]
        )
    return plan


def run_undisturbed(work_folder: Path, ray_head: RayHead, steps: int) -> dict[str, Any]:
    """Run without kills, as the reference for weights and samples."""
    started = time.monotonic()
    process = start_run(work_folder, work_folder / "calm", ray_head.address, f"algorithm.steps={steps}")
    if process.wait(900):
        sys.exit((work_folder / "calm" / "output.txt").read_text()[-3000:])
    samples = sum(row["samples"] for row in read_metrics(work_folder / "calm"))
    seconds = round(time.monotonic() - started, 1)
    return {"weights": hash_policy(work_folder / "calm"), "samples": samples, "seconds": seconds}


def run_missing_trials(
    work_folder: Path, plan: Sequence[Sequence[tuple[str, float]]], steps: int, minutes: float
) -> dict[str, Any]:
    """Run trials that are not in <work_folder>/trials.json yet, within `minutes`; returns the state of all trials."""
    state_path, deadline = work_folder / "trials.json", time.monotonic() + 60 * minutes
    state: dict[str, Any] = json.loads(state_path.read_text()) if state_path.exists() else {"trials": []}
    if not (work_folder / "data").exists():
        make_inputs(work_folder)
    with ray_head() as ray:
        if "calm" not in state:
            state["calm"] = run_undisturbed(work_folder, ray, steps)
            state_path.write_text(json.dumps(state))
            print(f"undisturbed: {json.dumps(state['calm'])}", flush=True)
        undisturbed = state["calm"]
        longest_seconds = max(trial_result["seconds"] for trial_result in (undisturbed, *state["trials"]))
        for trial_index, kills in enumerate(plan):
            if trial_index < len(state["trials"]) or time.monotonic() + longest_seconds > deadline:
                continue
            trial_folder = work_folder / f"trial{trial_index}-{time.time_ns()}"
            trial_result = run_trial(work_folder, trial_folder, ray, kills, steps)
            trial_result |= {
                "correct": trial_result["steps"] and trial_result["samples"] == undisturbed["samples"],
                "folder": trial_folder.name,
            }
            trial_result["same_bits"] = trial_result["weights"] == undisturbed["weights"]
            state["trials"].append(trial_result)
            state_path.write_text(json.dumps(state))
            print(json.dumps(trial_result), flush=True)
    return state


def main() -> None:
    """Run the trials, print one line for each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4, help="kills per trial, kinds round-robin")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", help="folder of finished trials; resumes after them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial that would end later")
    parser.add_argument("--run", nargs=2, metavar=("BASE", "FOLDER"), help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.run:
        from rluf.config.cli import run_command

        run_command(lambda: run_in_process(Path(args.run[0]), Path(args.run[1]), overrides))
        return
    # Exit through the context managers, which kill the head and the run.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with contextlib.ExitStack() as stack:
        work_folder = Path(args.state or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        work_folder.mkdir(exist_ok=True)
        state = run_missing_trials(
            work_folder, plan_kills(args.trials, args.kills, args.steps, args.seed), args.steps, args.minutes
        )
    trials = state["trials"]
    recovery_by_kind: dict[str, list[float]] = {kind: [] for kind in TITLE_BY_KIND}
    for trial_result in trials:
        for (kind, _), recovery_seconds in zip(trial_result["kills"], trial_result["recovery_s"], strict=True):
            recovery_by_kind[kind].append(recovery_seconds)
    print(
        json.dumps(
            {
                "trials": len(trials),
                "wanted": args.trials,
                "kills": sum(map(len, recovery_by_kind.values())),
                "ended_correctly": sum(trial_result["correct"] for trial_result in trials),
                "same_bits": sum(trial_result["same_bits"] for trial_result in trials),
                "median_recovery_s": {
                    kind: statistics.median(values) for kind, values in recovery_by_kind.items() if values
                },
                "longest_recovery_s": {kind: max(values) for kind, values in recovery_by_kind.items() if values},
            }
        )
    )


if __name__ == "__main__":
    main()
