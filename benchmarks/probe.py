"""Does the probe find every wrong sync of a real engine, and never call a right one wrong?

A real vLLM engine and a real learner of SmolLM2-135M-Instruct (or the model named by the first argument) in bfloat16.
Each trial takes one optimiser step, publishes with a fault in what the learner sends, and counts whether the publish
was refused; then it publishes again without the fault, which must pass. Faults: stale (the old weights), permuted (rows
of one matrix rolled by one), scaled (one matrix doubled), missing (one tensor never sent). The last line is JSON.
Usage: python benchmarks/probe.py [model] [trials]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")

import learner as workload
import ray
import torch

from actors.learner import LearnerActor
from actors.rollout import RolloutActor
from cluster.placement import role_options
from rluf.algorithms.advantages import Outcomes
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import make_lesson
from rluf.config.settings import Settings
from rluf.errors import SyncError
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_groups import Crew, Member
from rluf.train.weight_sync import Publisher
from rluf.types import Group, Message, Prompt
from rluf.utils.paths import cache_dir

FAULTS = ("stale", "permuted", "scaled", "missing")
PROMPT, RESPONSE = 20, 12


class Faulty(LearnerActor):
    """A learner that spoils what it sends, when told to."""

    def spoil(self, fault: str | None, seed: int) -> None:
        """Choose the fault of the next publish; stale keeps a copy of the weights as they are now."""
        named = list(self.engine.module.named_parameters(remove_duplicate=False))
        self._fault, self._kept = fault, {name: p.detach().clone() for name, p in named} if fault == "stale" else {}
        self._victim = random.Random(seed).choice([name for name, p in named if p.dim() == 2])

    def next_bucket(self) -> dict[str, Any] | None:
        """The next bucket, with the fault in it."""
        bucket = next(self._buckets, None)
        if bucket is None or self._sender is None:
            return None
        sent: list[tuple[str, torch.Tensor]] = []
        for name, tensor in bucket:
            if self._fault == "stale":
                sent.append((name, self._kept[name]))
            elif name != self._victim or self._fault is None:
                sent.append((name, tensor))
            elif self._fault != "missing":
                sent.append((name, tensor.roll(1, dims=0) if self._fault == "permuted" else tensor * 2))
        return self._sender.send(sent)


def start(settings: Settings, model: Path) -> Crew:
    """One engine and one faulty learner, ready."""
    blob = settings.model_dump_json()
    engine = ray.remote(concurrency_groups={"health": 1})(RolloutActor)
    ranks = ray.remote(concurrency_groups={"health": 1})(Faulty)
    rollout = engine.options(**role_options(settings, "rollout")).remote(0, blob, str(model))
    first = ranks.options(**role_options(settings, "learner")).remote(0, 1, blob, str(model))
    ray.get(first.setup.remote(*ray.get(first.address.remote())))
    ray.get(rollout.ready.remote())
    return Crew([Member("rollout", 0, rollout)], {}, [Member("learner", 0, first)])


def step(settings: Settings, crew: Crew, vocabulary: int, seed: int) -> None:
    """One small optimiser step on random tokens."""
    groups = workload.random_groups(vocabulary, 1, 4, PROMPT, RESPONSE, seed=seed)
    plan = plan_micro_batches([PROMPT], [[RESPONSE] * 4], ranks=1, token_budget=1024)
    outcomes = Outcomes([[1.0, -1.0, 0.5, -0.5]], [[RESPONSE] * 4])
    lesson = make_lesson(settings.algorithm, outcomes, longest=RESPONSE, kl_coef=0.02)
    ray.get(crew.learners[0].handle.step.remote([ray.put(groups[0])], lesson, plan[0], seed))


async def refused(publisher: Publisher, version: int) -> bool:
    """Whether a publish was refused."""
    try:
        await publisher.publish(version)
    except SyncError:
        return True
    return False


async def trials(settings: Settings, crew: Crew, model: Path, count: int) -> dict[str, Any]:
    """Faults found, by kind, and right publishes that were refused."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    messages = (Message(role="user", content="Why is the sea salty? Tell me in a few words."),)
    prompt = Prompt("probe", messages, render_prompt(load_tokenizer(model), messages), "", "train")
    rollout, ranks, version = crew.rollouts[0].handle, crew.learners[0].handle, 0
    group: Group = (await asyncio.gather(*rollout.generate.options(num_returns=2).remote(prompt, 2, 1)))[0]
    publisher = Publisher(settings, crew)
    await publisher.prepare(ray.put(group))
    found, false_alarms = dict.fromkeys(FAULTS, 0), 0
    for trial in range(count):
        for fault in FAULTS:
            await ranks.spoil.remote(fault, trial)
            step(settings, crew, vocabulary, version)
            found[fault] += await refused(publisher, version := version + 1)
            await ranks.spoil.remote(None, trial)
            false_alarms += await refused(publisher, version := version + 1)
    return {"trials": count, "found": found, "false_alarms": false_alarms, "right_publishes": 4 * count}


def main() -> None:
    """Run the trials and write the JSON line."""
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    settings = Settings.model_validate({"name": "probe", "model": {"path": name}, "learner": {"warmup_steps": 0}})
    model = resolve_model(name, cache_dir(settings))
    paths = os.pathsep.join(str(Path(__file__).parents[depth]) for depth in (0, 1))
    environment = {"env_vars": {"PYTHONPATH": paths}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        crew = start(settings, model)
        found = asyncio.run(trials(settings, crew, model, int(sys.argv[2]) if len(sys.argv) > 2 else 10))
        ray.get([member.handle.shutdown.remote() for member in crew.members])
    finally:
        ray.shutdown()
    sys.stdout.write(json.dumps({"benchmark": "probe", "model": name, **found}) + "\n")


if __name__ == "__main__":
    main()
