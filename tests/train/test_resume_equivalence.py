"""2N steps equal N steps and N resumed ones, bit for bit, for each algorithm.

Loop, checkpoints and learner are the real ones. They run in this process, since twelve algorithms times three starts of
engines would take an hour; in place of the engine a sampler calls the learner, so that its choices and
log-probabilities follow the weights. Killed and resumed runs with engines are in test_fault_tolerance.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import LearnerActor
from rluf.algorithms.registry import ALGORITHMS, find_algorithm
from rluf.backends import deepspeed as ds
from rluf.backends.vllm.engine import derive_sample_seed
from rluf.checkpoint.format import RunCheckpoint
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_calls import ActorGroups, ActorRef
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.checkpoint_manager import CheckpointManager
from rluf.train.controller import TrainController
from rluf.train.offline import OfflineTrainer, ReactionGroups
from rluf.types import Group, GroupInfo, Message, Prompt, Sample, Score

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

HALF_STEPS = 3
BASE_OVERRIDES = (
    "model.path=tiny", "model.dtype=float32", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=12",
    "algorithm.prompts_per_step=3", "algorithm.samples_per_prompt=4", "learner.warmup_steps=4",
    "learner.learning_rate=1e-3", "algorithm.kl_target=0.05", "algorithm.topic_weights={}",
    "algorithm.demonstrations=1", f"algorithm.steps={2 * HALF_STEPS}", "learner.keep_checkpoints=0",
    "objectives.helpfulness.weight=0.5", "objectives.safety.weight=0.2",
)  # fmt: skip
ALGORITHM_OVERRIDES = {
    "ppo": ["algorithm.kl_penalty=reward"],
    "rloo": ["algorithm.kl_penalty=reward"],
    **{name: ["aggregation.method=calibrated"] for name in ("crpg", "crraft", "codpo")},
    **{name: ["algorithm.kl_target=null"] for name in ("kto", "dpo", "sft")},
    "grpo": ["aggregation.method=constrained", "aggregation.floors={safety: 0}"],
}


@dataclass
class LocalRef:
    """Stands for a Ray reference to a value of this process; may be awaited any number of times."""

    value: Any

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self.value


@dataclass
class LocalMethod:
    """A method called as an actor's: references among its arguments are replaced by their values."""

    method: Any

    def options(self, **_: Any) -> LocalMethod:
        return self

    def remote(self, *arguments: Any, **keywords: Any) -> Any:
        def resolve(value: Any) -> Any:
            if isinstance(value, list):
                return [resolve(item) for item in value]
            return value.value if isinstance(value, LocalRef) else value

        result = self.method(*map(resolve, arguments), **keywords)
        if isinstance(result, tuple) and isinstance(result[0], Group):
            return tuple(map(LocalRef, result))
        return LocalRef(result)


@dataclass
class LocalHandle:
    """An object of this process with the interface of an actor's handle."""

    target: Any

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(getattr(self.target, name))


@dataclass
class Sampler:
    """Stands for an engine with the learner's weights: takes the most likely of three random responses."""

    learner: LearnerActor
    version: int = 0

    def generate_group(
        self, prompt: Prompt, sample_count: int, seed: int, temperature: float | None = None
    ) -> tuple[Group, GroupInfo]:
        samples = []
        for index in range(sample_count):
            generator = random.Random(derive_sample_seed(seed, prompt.id, index))
            drafts = [[generator.randrange(5, 250) for _ in range(generator.randint(2, 12))] for _ in range(3)]
            rows = self.learner.probe_logprobs(list(prompt.token_ids), drafts)
            logprobs, ids = max(zip(rows, drafts, strict=True), key=lambda pair: sum(pair[0]) / len(pair[0]))
            spans = ((0, self.version),)
            samples.append(Sample(prompt.id, prompt.token_ids, tuple(ids), tuple(logprobs), spans, "stop", ""))
        group = Group(prompt, tuple(samples), self.version)
        return group, group.info

    def probe_logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        return self.learner.probe_logprobs(prompt_ids, [response_ids])[0]

    def begin_weight_update(self, transfer_info: dict[str, Any]) -> None:
        """Nothing to open."""

    def load_weight_bucket(self, bucket: dict[str, Any]) -> None:
        """The weights are the learner's."""

    def finish_weight_update(self, version: int) -> None:
        self.version = version


@dataclass
class TokenScorer:
    """Scores that depend on every token."""

    objective: str

    def score_group(self, group: Group) -> dict[str, list[Score]]:
        values = [random.Random(f"{self.objective} {sample.response_ids}").random() for sample in group.samples]
        return {self.objective: [Score(self.objective, value, 2 * value - 1) for value in values]}


@dataclass
class LocalRun:
    """A run in this process."""

    settings: Settings
    model_path: Path
    folder: Path
    prompts: list[Prompt]
    checkpoint: RunCheckpoint | None = None
    metric_rows: list[dict[str, float]] = field(default_factory=list)

    def __enter__(self) -> LocalRun:
        checkpoint_path = None if self.checkpoint is None else str(self.checkpoint.folder)
        # Processes start with the same random state; a resumed one must take that of the checkpoint instead of its own.
        torch.manual_seed(0 if self.checkpoint is None else 99)
        self.learner = LearnerActor(0, 1, self.settings.model_dump_json(), str(self.model_path), checkpoint_path)
        self.learner.setup("127.0.0.1", 0)
        return self

    def __exit__(self, *_: object) -> None:
        del self.learner

    async def run(self, last_step: int) -> CheckpointManager:
        """Steps up to `last_step`, and a checkpoint after it."""
        supervisor = ActorSupervisor(self.settings, self.model_path, {}, with_learners=True, checkpoint=self.checkpoint)
        sampler = Sampler(self.learner, 0 if self.checkpoint is None else self.checkpoint.step)
        reward_pools = {
            name: [ActorRef("reward", 0, LocalHandle(TokenScorer(name)), name)]  # type: ignore[arg-type]
            for name in self.settings.objectives.by_objective
        }
        supervisor.actor_groups = ActorGroups(
            [ActorRef("rollout", 0, LocalHandle(sampler))],  # type: ignore[arg-type]
            reward_pools,
            [ActorRef("learner", 0, LocalHandle(self.learner))],  # type: ignore[arg-type]
        )
        logged = [make_demonstration(prompt) for prompt in self.prompts]
        controller, run_step = TrainController(self.settings, supervisor, self.prompts, logged[:2]), None
        if find_algorithm(self.settings.algorithm.name).offline:
            run_step = OfflineTrainer(controller, ReactionGroups(logged[:3], logged[3:])).run_step
        checkpoints, steps_done = CheckpointManager(self.settings, self.folder, self.prompts), 0
        if self.checkpoint is not None:
            state = self.checkpoint.read_state()
            controller.restore(state.controller_state, state.step)
            self.metric_rows, steps_done = [dict(row) for row in state.step_metrics], state.step
        for step in range(steps_done + 1, last_step + 1):
            self.metric_rows.append(await (run_step or controller.run_step)(step))
        await checkpoints.save_checkpoint(controller, last_step, self.metric_rows)
        await controller.close()
        return checkpoints


def make_demonstration(prompt: Prompt) -> Group:
    return Group(prompt, (Sample(prompt.id, prompt.token_ids, (70, 71, 2), (), (), "stop", "FG"),), 0)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


def make_prompts(model_path: Path) -> list[Prompt]:
    tokenizer = load_tokenizer(model_path)
    words = ("sea", "cat", "rain", "moon", "bread", "snow")
    conversations = [(Message(role="user", content=f"{word}?"),) for word in words]
    return [
        Prompt(str(index), messages, render_prompt(tokenizer, messages)[:64], "", "train")
        for index, messages in enumerate(conversations)
    ]


def digest_tensors(folder: Path) -> dict[str, str]:
    """Digests of all weights and optimizer states in a checkpoint."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def without_timings(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    name: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rluf.train.policy_update.put_object", LocalRef)
    monkeypatch.setattr("rluf.train.offline.put_object", LocalRef)
    monkeypatch.setattr(ds, "join_process_group", lambda **_: None)
    overrides = [*BASE_OVERRIDES, f"algorithm.name={name}", *ALGORITHM_OVERRIDES.get(name, [])]
    settings = load_settings(None, overrides).settings
    prompts = make_prompts(model_path)
    with LocalRun(settings, model_path, tmp_path / "uninterrupted", prompts) as uninterrupted:
        asyncio.run(uninterrupted.run(2 * HALF_STEPS))
    with LocalRun(settings, model_path, tmp_path / "resumed", prompts) as first_half:
        checkpoints = asyncio.run(first_half.run(HALF_STEPS))
    newest = checkpoints.load_newest()
    assert newest is not None and newest[0].step == HALF_STEPS
    with LocalRun(settings, model_path, tmp_path / "resumed", prompts, newest[0]) as second_half:
        asyncio.run(second_half.run(2 * HALF_STEPS))
    assert without_timings(second_half.metric_rows) == without_timings(uninterrupted.metric_rows)
    expected, resumed = (
        digest_tensors(tmp_path / run / "checkpoints" / f"step-{2 * HALF_STEPS}")
        for run in ("uninterrupted", "resumed")
    )
    assert resumed == expected
    middle = digest_tensors(newest[0].folder)
    assert all(middle[file] != expected[file] for file in middle)
    assert len(middle) == (3 if name == "ppo" else 2)
