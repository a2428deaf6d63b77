"""2N steps are N steps and N resumed ones, bit for bit, for each method.

The loop, the checkpoints and the learner are the real ones. They run in this process, since twelve methods times three
starts of engines would take an hour; in the engine's place a sampler asks the learner itself, so that its choices and
logprobs follow the weights. Runs with engines, killed and resumed, are in test_recovery.py.
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
from rluf.algorithms.registry import METHODS
from rluf.backends import deepspeed as ds
from rluf.backends.vllm.engine import sample_seed
from rluf.checkpoint.format import Checkpoint
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.train.actor_groups import Crew, Member, Supervisor
from rluf.train.checkpoint_manager import Keeper
from rluf.train.fault_tolerance import LastingPipeline
from rluf.train.prompts import Reactions
from rluf.types import Group, GroupInfo, Message, Prompt, Sample, Score

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

HALF = 3
BASE = (
    "model.path=tiny", "model.dtype=float32", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=12",
    "algorithm.prompts_per_step=3", "algorithm.samples_per_prompt=4", "learner.warmup_steps=4",
    "learner.learning_rate=1e-3", "algorithm.kl_target=0.05", "algorithm.mix=[]",
    "algorithm.demonstrations=1", f"algorithm.steps={2 * HALF}", "learner.keep_checkpoints=0",
    "objectives.helpfulness.weight=0.5", "objectives.safety.weight=0.2",
)  # fmt: skip
OWN = {
    "ppo": ["algorithm.kl_in=reward"],
    "rloo": ["algorithm.kl_in=reward"],
    **{name: ["objectives.combine=calibrated"] for name in ("crpg", "crraft", "codpo")},
    "grpo": ["objectives.combine=constrained", "objectives.floors=[safety:0]"],
}


@dataclass
class Here:
    """What a Ray reference stands for, here already; may be awaited any number of times."""

    value: Any

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self.value


@dataclass
class Call:
    """A method called as an actor's: references among its arguments are replaced by what they stand for."""

    method: Any

    def options(self, **_: Any) -> Call:
        return self

    def remote(self, *arguments: Any, **named: Any) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(one) for one in value]
            return value.value if isinstance(value, Here) else value

        found = self.method(*map(plain, arguments), **named)
        return tuple(map(Here, found)) if isinstance(found, tuple) and isinstance(found[0], Group) else Here(found)


@dataclass
class Local:
    """An object of this process with the face of an actor's handle."""

    held: Any

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self.held, name))


@dataclass
class Sampler:
    """Stands for an engine that holds the learner's weights: of three random responses it takes the likeliest."""

    learner: LearnerActor
    weights: int = 0

    def generate(self, prompt: Prompt, samples: int, seed: int) -> tuple[Group, GroupInfo]:
        found = []
        for index in range(samples):
            dice = random.Random(sample_seed(seed, prompt.id, index))
            drafts = [[dice.randrange(5, 250) for _ in range(dice.randint(2, 12))] for _ in range(3)]
            rows = self.learner.logprobs(list(prompt.token_ids), drafts)
            logprobs, ids = max(zip(rows, drafts, strict=True), key=lambda pair: sum(pair[0]) / len(pair[0]))
            spans = ((0, self.weights),)
            found.append(Sample(prompt.id, prompt.token_ids, tuple(ids), tuple(logprobs), spans, "stop", ""))
        group = Group(prompt, tuple(found), self.weights)
        return group, group.info

    def logprobs(self, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
        return self.learner.logprobs(prompt_ids, [response_ids])[0]

    def begin_update(self, init: dict[str, Any]) -> None:
        """Nothing to open."""

    def update(self, bucket: dict[str, Any]) -> None:
        """The weights are the learner's."""

    def finish_update(self, version: int) -> None:
        self.weights = version


@dataclass
class Scorer:
    """An opinion that depends on every token."""

    name: str

    def score(self, group: Group) -> dict[str, list[Score]]:
        values = [random.Random(f"{self.name} {s.response_ids}").random() for s in group.samples]
        return {self.name: [Score(self.name, value, 2 * value - 1) for value in values]}


@dataclass
class World:
    """A run in this process."""

    settings: Settings
    model: Path
    folder: Path
    prompts: list[Prompt]
    begin: Checkpoint | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    def __enter__(self) -> World:
        blob, start = self.settings.model_dump_json(), None if self.begin is None else str(self.begin.folder)
        torch.manual_seed(0 if self.begin is None else 99)  # processes begin alike, a checkpoint overrules it
        self.learner = LearnerActor(0, 1, blob, str(self.model), start)
        self.learner.setup("127.0.0.1", 0)
        return self

    def __exit__(self, *_: object) -> None:
        del self.learner

    async def run(self, last: int) -> Keeper:
        """Steps up to `last`, a checkpoint after it."""
        supervisor = Supervisor(self.settings, self.model, {}, learners=True, checkpoint=self.begin)
        engine = Sampler(self.learner, 0 if self.begin is None else self.begin.step)
        rewards = {name: [Member("reward", 0, Local(Scorer(name)), name)] for name in self.settings.objectives.named}
        supervisor.crew = Crew(
            [Member("rollout", 0, Local(engine))], rewards, [Member("learner", 0, Local(self.learner))]
        )
        shown = [demonstration(prompt) for prompt in self.prompts]
        pipeline = LastingPipeline(self.settings, supervisor, self.prompts, shown[:2], Reactions(shown[:3], shown[3:]))
        keeper, done = Keeper(self.settings, self.folder, self.prompts), 0
        if self.begin is not None:
            state = self.begin.state()
            pipeline.restore(state.pipeline, state.step)
            self.rows, done = [dict(row) for row in state.rows], state.step
        for number in range(done + 1, last + 1):
            self.rows.append(await pipeline.step(number))
        await keeper.save(pipeline, last, self.rows)
        await pipeline.close()
        return keeper


def demonstration(prompt: Prompt) -> Group:
    return Group(prompt, (Sample(prompt.id, prompt.token_ids, (70, 71, 2), (), (), "stop", "FG"),), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


def questions(model: Path) -> list[Prompt]:
    tokenizer = load_tokenizer(model)
    messages = [(Message(role="user", content=f"{word}?"),) for word in ("sea", "cat", "rain", "moon", "bread", "snow")]
    return [Prompt(str(n), m, render_prompt(tokenizer, m)[:64], "", "train") for n, m in enumerate(messages)]


def contents(folder: Path) -> dict[str, str]:
    """Digests of everything that a checkpoint holds of the weights and the optimiser."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def untimed(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


@pytest.mark.parametrize("name", METHODS)
def test_two_halves_are_the_whole(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.train.controller.kept", Here)
    monkeypatch.setattr(ds, "join_group", lambda **_: None)
    settings = load_settings(None, [*BASE, f"algorithm.name={name}", *OWN.get(name, [])]).settings
    prompts = questions(model)
    with World(settings, model, tmp_path / "whole", prompts) as whole:
        asyncio.run(whole.run(2 * HALF))
    with World(settings, model, tmp_path / "halves", prompts) as first:
        keeper = asyncio.run(first.run(HALF))
    found = keeper.newest()
    assert found is not None and found[0].step == HALF
    with World(settings, model, tmp_path / "halves", prompts, found[0]) as second:
        asyncio.run(second.run(2 * HALF))
    assert untimed(second.rows) == untimed(whole.rows)
    ends = [contents(tmp_path / which / "checkpoints" / f"step-{2 * HALF}") for which in ("whole", "halves")]
    assert ends[0] == ends[1]
    middle = contents(found[0].folder)
    assert all(middle[file] != ends[0][file] for file in middle)
    assert len(middle) == (3 if name == "ppo" else 2)
