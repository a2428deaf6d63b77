"""Detection rate and false alarms of the weight sync check, with faults injected into real weight syncs.

A real vLLM engine and a real learner of SmolLM2-135M-Instruct (or the model named by the first argument) in bfloat16.
Each trial takes one optimizer step, syncs the weights with a fault in what the learner sends, and counts whether the
sync was refused; then it syncs again without the fault, which must pass. Faults: stale (the old weights), permuted
(rows of one matrix rolled by one), scaled (one matrix doubled), missing (one tensor never sent). The last line is JSON.
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
from cluster.placement import actor_options
from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import build_learner_inputs
from rluf.config.settings import Settings
from rluf.errors import WeightSyncError
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_calls import ActorGroups, ActorRef
from rluf.train.weight_sync import WeightSync
from rluf.types import Group, Message, Prompt
from rluf.utils.paths import resolve_cache_folder

FAULTS = ("stale", "permuted", "scaled", "missing")
PROMPT_TOKENS, RESPONSE_TOKENS = 20, 12


class FaultyLearner(LearnerActor):
    """A learner that injects a fault into the weights it sends."""

    def set_fault(self, fault: str | None, seed: int) -> None:
        """Select the fault of the next weight sync; stale saves a copy of the current weights."""
        named_parameters = list(self.engine.module.named_parameters(remove_duplicate=False))
        self._fault, self._stale_weights = (
            fault,
            {name: parameter.detach().clone() for name, parameter in named_parameters} if fault == "stale" else {},
        )
        self._faulty_tensor = random.Random(seed).choice(
            [name for name, parameter in named_parameters if parameter.dim() == 2]
        )

    def next_weight_bucket(self) -> dict[str, Any] | None:
        """The next bucket, with the fault injected."""
        bucket = next(self._weight_buckets, None)
        if bucket is None or self._weight_sender is None:
            return None
        faulty_bucket: list[tuple[str, torch.Tensor]] = []
        for name, tensor in bucket:
            if self._fault == "stale":
                faulty_bucket.append((name, self._stale_weights[name]))
            elif name != self._faulty_tensor or self._fault is None:
                faulty_bucket.append((name, tensor))
            elif self._fault != "missing":
                faulty_bucket.append((name, tensor.roll(1, dims=0) if self._fault == "permuted" else tensor * 2))
        return self._weight_sender.send_bucket(faulty_bucket)


def start_actors(settings: Settings, model: Path) -> ActorGroups:
    """Start one engine and one faulty learner."""
    settings_json = settings.model_dump_json()
    engine_class = ray.remote(concurrency_groups={"health": 1})(RolloutActor)
    learner_class = ray.remote(concurrency_groups={"health": 1})(FaultyLearner)
    rollout = engine_class.options(**actor_options(settings, "rollout")).remote(0, settings_json, str(model))
    learner = learner_class.options(**actor_options(settings, "learner")).remote(0, 1, settings_json, str(model))
    ray.get(learner.setup.remote(*ray.get(learner.rendezvous_address.remote())))
    ray.get(rollout.ready.remote())
    return ActorGroups([ActorRef("rollout", 0, rollout)], {}, [ActorRef("learner", 0, learner)])


def train_one_step(settings: Settings, actor_groups: ActorGroups, vocabulary_size: int, seed: int) -> None:
    """Take one small optimizer step on random tokens."""
    groups = workload.random_groups(vocabulary_size, 1, 4, PROMPT_TOKENS, RESPONSE_TOKENS, seed=seed)
    plan = plan_micro_batches([PROMPT_TOKENS], [[RESPONSE_TOKENS] * 4], world_size=1, token_budget=1024)
    advantage_inputs = AdvantageInputs([[1.0, -1.0, 0.5, -0.5]], [[RESPONSE_TOKENS] * 4])
    learner_inputs = build_learner_inputs(
        settings.algorithm, advantage_inputs, max_response_tokens=RESPONSE_TOKENS, kl_coef=0.02
    )
    ray.get(
        actor_groups.learner_actors[0].handle.train_step.remote([ray.put(groups[0])], learner_inputs, plan[0], seed)
    )


async def is_sync_refused(weight_sync: WeightSync, version: int) -> bool:
    """Whether a weight sync is refused."""
    try:
        await weight_sync.sync(version)
    except WeightSyncError:
        return True
    return False


async def run_trials(settings: Settings, actor_groups: ActorGroups, model: Path, trial_count: int) -> dict[str, Any]:
    """Detected faults by kind, and correct syncs that were refused."""
    vocabulary_size = json.loads((model / "config.json").read_text())["vocab_size"]
    messages = (Message(role="user", content="Why is the sea salty? Tell me in a few words."),)
    prompt = Prompt("probe", messages, render_prompt(load_tokenizer(model), messages), "", "train")
    rollout, learner, version = actor_groups.rollout_actors[0].handle, actor_groups.learner_actors[0].handle, 0
    group: Group = (await asyncio.gather(*rollout.generate_group.options(num_returns=2).remote(prompt, 2, 1)))[0]
    weight_sync = WeightSync(settings, actor_groups)
    await weight_sync.prepare_probe(ray.put(group))
    detected, false_alarms = dict.fromkeys(FAULTS, 0), 0
    for trial in range(trial_count):
        for fault in FAULTS:
            await learner.set_fault.remote(fault, trial)
            train_one_step(settings, actor_groups, vocabulary_size, version)
            detected[fault] += await is_sync_refused(weight_sync, version := version + 1)
            # Repair the engine, so that the next fault starts from correct weights.
            await learner.set_fault.remote(None, trial)
            false_alarms += await is_sync_refused(weight_sync, version := version + 1)
    return {"trials": trial_count, "detected": detected, "false_alarms": false_alarms, "correct_syncs": 4 * trial_count}


def main() -> None:
    """Run the trials and write the JSON line."""
    model_name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    settings = Settings.model_validate({"name": "probe", "model": {"path": model_name}, "learner": {"warmup_steps": 0}})
    model = resolve_model(model_name, resolve_cache_folder(settings))
    python_path = os.pathsep.join(str(Path(__file__).parents[depth]) for depth in (0, 1))
    runtime_env = {"env_vars": {"PYTHONPATH": python_path}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    try:
        actor_groups = start_actors(settings, model)
        result = asyncio.run(run_trials(settings, actor_groups, model, int(sys.argv[2]) if len(sys.argv) > 2 else 10))
        ray.get([actor.handle.shutdown.remote() for actor in actor_groups.all_actors])
    finally:
        ray.shutdown()
    sys.stdout.write(json.dumps({"benchmark": "probe", "model": model_name, **result}) + "\n")


if __name__ == "__main__":
    main()
