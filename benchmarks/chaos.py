"""Does a run survive what clusters do: kill -9 of a rollout, reward or learner actor, or of the driver, at random.

Tiny real actors, synchronous, run.deterministic=true. Each trial must end with every step once, every sample once, and
the weights of an undisturbed run, bit for bit. The last line is JSON.

    python benchmarks/chaos.py --trials 20 --steps 30
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = {"rollout": "ray::RolloutActor", "reward": "ray::RewardActor", "learner": "ray::LearnerActor", "driver": ""}
QUESTIONS = 24


def make_inputs(base: Path) -> None:
    """A prompt set and a random reward model, so that a trial needs no training."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from rluf.models import resolve_model
    from rluf.objectives.backbone import encoder_for, load_classifier
    from rluf.objectives.calibration import Calibration

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
        "cluster.restarts_per_hour=50", "evaluate.prompts=4",
    ]  # fmt: skip
    return load_settings(ROOT / "configs" / "tiny.yaml", [*told, *overrides]).settings


def run_here(base: Path, folder: Path, overrides: list[str]) -> None:
    """The loop alone, in this process: no preparation, no reward training, no report."""
    from actors.alignment import align
    from cluster.connect import connected
    from rluf.models import resolve_model
    from rluf.tracking.console import setup_logging
    from rluf.tracking.wandb import Tracker

    settings = settings_of(*overrides)
    setup_logging(folder / "run.log")
    model = resolve_model("tiny", base / "cache")
    with connected(settings), Tracker(settings, folder) as tracker:
        outcome = asyncio.run(align(settings, folder, model, base / "data", {"love": base / "love"}, tracker))
    (folder / "outcome.json").write_text(json.dumps({"base": len(outcome.base), "aligned": len(outcome.aligned)}))


def start(base: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`run_here` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", str(base), str(folder), *overrides]
    env = {**os.environ, "RAY_AUTH_MODE": "token", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.pop("RAY_ADDRESS", None)
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


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int, seconds: float = 300.0) -> None:
    """Until `step` steps are in the metrics. Raises RuntimeError when the run ends before or is too slow."""
    deadline = time.monotonic() + seconds
    while len(rows(folder)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"step {step} never came:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.05)


def strike(process: subprocess.Popen[str], kind: str) -> None:
    """kill -9 one process of a kind."""
    if kind == "driver":
        children = below(process.pid)
        process.kill()
        process.wait(30)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        return
    victims = [pid for pid, command in below(process.pid).items() if command.startswith(KINDS[kind])]
    os.kill(random.choice(victims), signal.SIGKILL)


def trial(base: Path, folder: Path, kind: str, at: float, steps: int, *overrides: str) -> dict[str, Any]:
    """One run of `steps` steps in which a process of `kind` is killed after `at` steps (the fraction is seconds)."""
    told = [f"algorithm.steps={steps}", *overrides]
    process = start(base, folder, *told)
    try:
        wait_for_step(process, folder, int(at))
        time.sleep(at % 1)
        done, struck = len(rows(folder)), time.monotonic()
        strike(process, kind)
        if kind == "driver":
            process = start(base, folder, *told, f"run.resume={folder}")
            time.sleep(1)
        while process.poll() is None and (not rows(folder) or rows(folder)[-1]["step"] <= done):
            time.sleep(0.05)
        recovery = time.monotonic() - struck
        code = process.wait(300)
    finally:
        process.kill()
    found = rows(folder)
    return {
        "kind": kind,
        "at": round(at, 2),
        "code": code,
        "recovery_s": round(recovery, 1),
        "steps": [row["step"] for row in found] == list(range(1, steps + 1)),
        "samples": sum(row["samples"] for row in found),
        "weights": digest(folder) if code == 0 else "",
    }


def main() -> None:
    """Run the trials and print one line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", nargs=2, metavar=("BASE", "FOLDER"), help=argparse.SUPPRESS)
    given, overrides = parser.parse_known_args()
    if given.run:
        from rluf.config.cli import guard

        guard(lambda: run_here(Path(given.run[0]), Path(given.run[1]), overrides))
        return
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        make_inputs(base)
        process = start(base, base / "calm", f"algorithm.steps={given.steps}")
        if process.wait(900):
            sys.exit((base / "calm" / "output.txt").read_text()[-3000:])
        truth, samples = digest(base / "calm"), sum(row["samples"] for row in rows(base / "calm"))
        print(f"undisturbed: weights {truth}, {samples} samples", flush=True)
        found = []
        for number in range(given.trials):
            kind = list(KINDS)[number % len(KINDS)]
            one = trial(base, base / f"trial{number}", kind, random.uniform(0, given.steps - 1), given.steps)
            one |= {"right": one["steps"] and one["samples"] == samples, "same_bits": one["weights"] == truth}
            found.append(one)
            print(json.dumps(one), flush=True)
    recovery = {kind: [one["recovery_s"] for one in found if one["kind"] == kind] for kind in KINDS}
    print(
        json.dumps(
            {
                "trials": len(found),
                "ended_right": sum(one["right"] for one in found),
                "same_bits": sum(one["same_bits"] for one in found),
                "median_recovery_s": {k: statistics.median(v) for k, v in recovery.items() if v},
            }
        )
    )


if __name__ == "__main__":
    main()
