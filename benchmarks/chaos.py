"""Does a run survive what clusters do: kill -9 of a rollout, reward or learner actor, or of the driver, at random.

Tiny real actors, synchronous, run.deterministic=true. A trial is a run in which one process of each kind is killed. It
must end with every step once, every sample once, and the weights of an undisturbed run, bit for bit. The trials share
one Ray head, as jobs on a cluster do; each starts actors of its own. With --state, finished trials are kept in a folder
and a later call goes on after them; --minutes bounds one call. The last line is JSON.

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
KINDS = {"rollout": "ray::RolloutActor", "reward": "ray::RewardActor", "learner": "ray::LearnerActor", "driver": ""}
QUESTIONS = 24
HEAD_ATTEMPTS = 4


@dataclass(frozen=True)
class Head:
    """A Ray head: its process id and where it answers."""

    pid: int
    address: str


def make_inputs(base: Path) -> None:
    """A prompt set and a random reward model, so that a trial needs no training."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from rluf.models.hub import resolve_model
    from rluf.reward.backbone import encoder_for, load_classifier
    from rluf.reward.calibration import Calibration

    (base / "data" / "prompts").mkdir(parents=True)
    for split, count in (("train", QUESTIONS), ("test", 4)):
        rows = [
            {"id": f"{split}{i}", "topic": "chat", "messages": [{"role": "user", "content": f"Question {i}?"}]}
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), base / "data" / "prompts" / f"{split}.parquet")
    resolve_model("tiny", base / "cache")
    backbone = resolve_model("tiny-encoder", base / "cache")
    model = load_classifier(backbone, trained=False, seed=1)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    encoder_for(model, backbone, 96).tokenizer.save_pretrained(str(base / "love"))
    model.save_pretrained(str(base / "love"))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 96).save(base / "love")


def settings_of(*overrides: str) -> Any:
    """Settings of a small synchronous run that is the same bit for bit each time."""
    from rluf.config.load import load_settings

    told = [
        "run.deterministic=true", "learner.learning_rate=1e-3", "learner.save_every=3",
        "objectives.love.weight=1", "objectives.helpfulness.weight=0", "objectives.safety.weight=0",
        "algorithm.demonstrations=0", "algorithm.prompts_per_step=3", "rollout.max_prompt_tokens=256",
        "rollout.max_response_tokens=12", "cluster.heartbeat_s=2", "cluster.start_deadline_s=600", "cluster.threads=1",
        "cluster.restarts_per_hour=50", "evaluate.prompts=4", "model.dtype=float32", "reward.dtype=float32",
    ]  # fmt: skip
    return load_settings(ROOT / "configs" / "tiny.yaml", [*told, *overrides]).settings


def run_here(base: Path, folder: Path, overrides: list[str]) -> None:
    """The loop alone, in this process: no preparation, no reward training, no report."""
    from cluster.connect import connected
    from rluf.models.hub import resolve_model
    from rluf.tracking.console import setup_logging
    from rluf.tracking.wandb import Tracker
    from rluf.train.loop import align

    settings = settings_of(*overrides)
    setup_logging(folder / "run.log")
    model = resolve_model("tiny", base / "cache")
    with connected(settings), Tracker(settings, folder) as tracker:
        outcome = asyncio.run(align(settings, folder, model, base / "data", {"love": base / "love"}, tracker))
    (folder / "outcome.json").write_text(json.dumps({"base": len(outcome.base), "aligned": len(outcome.aligned)}))


def environment() -> dict[str, str]:
    """Of a head and of the runs on it."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.pop("RAY_ADDRESS", None)
    return env


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def head() -> Iterator[Head]:
    """A Ray of this machine for several runs, ended with everything that it started.

    `ray start` gives its own node 30 s; on a machine that is busy it may need another attempt.
    """
    for _ in range(HEAD_ATTEMPTS):
        port, client = free_port(), free_port()
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=4", "--disable-usage-stats"]
        command += [f"--object-store-memory={256 << 20}", f"--ray-client-server-port={client}"]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
            try:
                if started(process, output):
                    yield Head(process.pid, f"127.0.0.1:{port}")
                    return
            finally:
                for pid in (process.pid, *below(process.pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(30)
    raise RuntimeError(f"no Ray in {HEAD_ATTEMPTS} attempts; is the machine too busy?")


def started(process: subprocess.Popen[bytes], output: IO[str]) -> bool:
    """Whether `ray start` says that its node runs; False when it ends before."""
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        if "Ray runtime started" in os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace"):
            return True
        time.sleep(0.2)
    return False


def start(base: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`run_here` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", str(base), str(folder), *overrides]
    env = environment()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def below(pid: int) -> dict[int, str]:
    """Processes below `pid`: id to command line."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = (parent, (entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue
    wanted, grown = {pid}, {pid}
    while grown:
        grown = {child for child, (parent, _) in found.items() if parent in wanted} - wanted
        wanted |= grown
    return {child: found[child][1] for child in wanted - {pid} if child in found}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics so far; a line half-written is left out."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def digest(folder: Path) -> str:
    """Of the final weights."""
    return hashlib.sha256((folder / "policy" / "model.safetensors").read_bytes()).hexdigest()[:16]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int, seconds: float = 600.0) -> None:
    """Until `step` steps are in the metrics. Raises RuntimeError when the run ends before or is too slow."""
    deadline = time.monotonic() + seconds
    while len(rows(folder)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"step {step} never came:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.05)


def strike(process: subprocess.Popen[str], kind: str, above: int) -> None:
    """kill -9 one process of a kind; actors are below process `above`."""
    if kind == "driver":
        victims = actors_below(above, *filter(None, KINDS.values()))
        process.kill()
        process.wait(30)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in victims) and time.monotonic() < deadline:
            time.sleep(0.1)
        return
    deadline = time.monotonic() + 30
    while not (victims := actors_below(above, KINDS[kind])):  # a title is empty while Ray writes another into it
        if time.monotonic() > deadline:
            raise RuntimeError(f"no process is called {KINDS[kind]}, to be killed")
        time.sleep(0.01)
    os.kill(random.choice(victims), signal.SIGKILL)


def actors_below(pid: int, *names: str) -> list[int]:
    """Processes below `pid` whose command line begins with one of `names`."""
    return [child for child, command in below(pid).items() if command.startswith(names)]


def wait_for_moment(process: subprocess.Popen[str], folder: Path, ray: Head, kind: str, at: float) -> None:
    """Until `at` steps are done; below 1 until this share of 20 s has passed since the actor to kill is there."""
    wait_for_step(process, folder, int(at))
    if at >= 1:
        time.sleep(at % 1 * rows(folder)[-1]["step_s"])
        return
    while process.poll() is None and not actors_below(ray.pid, KINDS[kind] or KINDS["learner"]):
        time.sleep(0.1)
    time.sleep(at * 20)


def trial(base: Path, folder: Path, ray: Head, kills: Sequence[tuple[str, float]], steps: int) -> dict[str, Any]:
    """One run of `steps` steps in which a process of each kind in `kills` is killed after so many steps."""
    told = [f"algorithm.steps={steps}", f"cluster.address={ray.address}"]
    begun, recovery = time.monotonic(), []
    process = start(base, folder, *told)
    try:
        for kind, at in kills:
            wait_for_moment(process, folder, ray, kind, at)
            done, struck = len(rows(folder)), time.monotonic()
            strike(process, kind, ray.pid)
            if kind == "driver":
                process = start(base, folder, *told, f"run.resume={folder}")
            while process.poll() is None and (not rows(folder) or rows(folder)[-1]["step"] <= done):
                time.sleep(0.05)
            recovery.append(round(time.monotonic() - struck, 1))
        code = process.wait(600)
    finally:
        process.kill()
    found = rows(folder)
    return {
        "kills": [[kind, round(at, 2)] for kind, at in kills],
        "code": code,
        "recovery_s": recovery,
        "seconds": round(time.monotonic() - begun, 1),
        "steps": [row["step"] for row in found] == list(range(1, steps + 1)),
        "samples": sum(row["samples"] for row in found),
        "weights": digest(folder) if code == 0 else "",
    }


def points(trials: int, kills: int, steps: int, seed: int) -> list[list[tuple[str, float]]]:
    """What is killed when in each trial: the kinds in turn, each after another random number of steps."""
    dice, turn = random.Random(seed), itertools.cycle(KINDS)
    found = []
    for _ in range(trials):
        kinds = [next(turn) for _ in range(kills)]
        dice.shuffle(kinds)
        found.append(
            [(k, n + dice.random()) for k, n in zip(kinds, sorted(dice.sample(range(steps - 2), kills)), strict=True)]
        )
    return found


def calm(base: Path, ray: Head, steps: int) -> dict[str, Any]:
    """A run that nothing happens to."""
    begun = time.monotonic()
    process = start(base, base / "calm", f"algorithm.steps={steps}", f"cluster.address={ray.address}")
    if process.wait(900):
        sys.exit((base / "calm" / "output.txt").read_text()[-3000:])
    samples = sum(row["samples"] for row in rows(base / "calm"))
    seconds = round(time.monotonic() - begun, 1)
    return {"weights": digest(base / "calm"), "samples": samples, "seconds": seconds}


def go(base: Path, plan: Sequence[Sequence[tuple[str, float]]], steps: int, minutes: float) -> dict[str, Any]:
    """Trials that are not in <base>/trials.json yet, as many as begin within `minutes`; returns all of them."""
    file, deadline = base / "trials.json", time.monotonic() + 60 * minutes
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"trials": []}
    if not (base / "data").exists():
        make_inputs(base)
    with head() as ray:
        if "calm" not in state:
            state["calm"] = calm(base, ray, steps)
            file.write_text(json.dumps(state))
            print(f"undisturbed: {json.dumps(state['calm'])}", flush=True)
        truth = state["calm"]
        longest = max(one["seconds"] for one in (truth, *state["trials"]))
        for number, kills in enumerate(plan):
            if number < len(state["trials"]) or time.monotonic() + longest > deadline:
                continue
            place = base / f"trial{number}-{time.time_ns()}"
            one = trial(base, place, ray, kills, steps)
            one |= {"right": one["steps"] and one["samples"] == truth["samples"], "folder": place.name}
            one["same_bits"] = one["weights"] == truth["weights"]
            state["trials"].append(one)
            file.write_text(json.dumps(state))
            print(json.dumps(one), flush=True)
    return state


def main() -> None:
    """Run the trials and print one line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4, help="in each trial, the kinds in turn")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", help="folder of finished trials, to go on after them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial that would end later")
    parser.add_argument("--run", nargs=2, metavar=("BASE", "FOLDER"), help=argparse.SUPPRESS)
    given, overrides = parser.parse_known_args()
    if given.run:
        from rluf.config.cli import guard

        guard(lambda: run_here(Path(given.run[0]), Path(given.run[1]), overrides))
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the head and the run are ended
    with contextlib.ExitStack() as stack:
        base = Path(given.state or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        base.mkdir(exist_ok=True)
        state = go(base, points(given.trials, given.kills, given.steps, given.seed), given.steps, given.minutes)
    found = state["trials"]
    recovery: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for one in found:
        for (kind, _), seconds in zip(one["kills"], one["recovery_s"], strict=True):
            recovery[kind].append(seconds)
    print(
        json.dumps(
            {
                "trials": len(found),
                "wanted": given.trials,
                "kills": sum(map(len, recovery.values())),
                "ended_right": sum(one["right"] for one in found),
                "same_bits": sum(one["same_bits"] for one in found),
                "median_recovery_s": {kind: statistics.median(found) for kind, found in recovery.items() if found},
                "longest_recovery_s": {kind: max(found) for kind, found in recovery.items() if found},
            }
        )
    )


if __name__ == "__main__":
    main()
