"""Every method learns: a table policy over short responses, whose best answer is known, reaches 95% of the optimum."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from torch import Tensor

from rluf.algorithms.advantages import Outcomes
from rluf.algorithms.advantages.gae import gae, moments, token_rewards, whitened
from rluf.algorithms.batch import Batch
from rluf.algorithms.critic import value_loss
from rluf.algorithms.losses import LossResult, drifts_of, policy_loss
from rluf.algorithms.packing import pack
from rluf.algorithms.registry import METHODS, Lesson, make_lesson
from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import ObjectivesSettings
from rluf.objectives.aggregator import Combiner, Opinions
from rluf.types import Group, Prompt, Sample

PROMPTS, LENGTH, VOCABULARY, SAMPLES = 2, 3, 6, 8
MEMBERS = [(g, s) for g in range(2 * PROMPTS) for s in range(SAMPLES)]
SEEDS = (1, 2, 3)
STEPS, RATE = 60, 0.3
Signals = Callable[[int, Sequence[int]], dict[str, float]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class World:
    """A policy that is a table of logits [prompts, positions, tokens], and what its responses are worth."""

    seed: int
    rate: float = RATE

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.table = torch.zeros(PROMPTS, LENGTH, VOCABULARY, requires_grad=True)
        self.values = torch.zeros(PROMPTS, LENGTH, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.table, self.values], lr=self.rate)

    def sample(self) -> dict[int, Group]:
        logprobs = self.table.detach().log_softmax(-1)
        groups = {}
        for index in range(2 * PROMPTS):
            prompt = index % PROMPTS
            tokens = torch.multinomial(logprobs[prompt].exp(), SAMPLES, replacement=True).t()
            chosen = logprobs[prompt][torch.arange(LENGTH), tokens]
            samples = tuple(
                Sample(str(index), (prompt,), tuple(ids), tuple(lps), ((0, 0),), "stop", "")
                for ids, lps in zip(tokens.tolist(), chosen.tolist(), strict=True)
            )
            groups[index] = Group(Prompt(str(index), (), (prompt,), "", "train"), samples, 0)
        return groups

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompt and place of each response token."""
        return batch.input_ids[0][batch.rows[batch.sequences, 0]], batch.position_ids[0][batch.keep]

    def logprobs(self, batch: Batch) -> Tensor:
        prompt, place = self.places(batch)
        return self.table.log_softmax(-1)[prompt, place, batch.targets]

    def learn(self, algorithm: AlgorithmSettings, groups: dict[int, Group], lesson: Lesson) -> LossResult:
        batch = pack(MEMBERS, groups, lesson.advantages, lesson.weights)
        critic = torch.zeros(())
        if lesson.critic:
            values = self.values[self.places(batch)]
            drift = batch.rollout_logprobs - reference(batch)
            rewards = token_rewards(batch.advantages, drift, batch.sequences, lesson.reward_kl)
            gains = gae(rewards, values.detach(), batch.sequences, algorithm.gae_lambda)
            critic = value_loss(values, gains + values.detach(), batch.loss_weights)
            everything = torch.ones_like(gains, dtype=torch.bool)
            batch = dataclasses.replace(batch, advantages=whitened(gains, moments(gains, everything)))
        result = policy_loss(
            self.logprobs(batch),
            reference(batch),
            batch,
            algorithm,
            loss=lesson.loss,
            kl_coef=lesson.kl_coef,
            slope=lesson.slope,
        )
        self.optimizer.zero_grad()
        (result.loss + critic).backward()
        self.optimizer.step()
        return result


def reference(batch: Batch) -> Tensor:
    return torch.full_like(batch.rollout_logprobs, -torch.log(torch.tensor(float(VOCABULARY))).item())


def train(
    world: World, algorithm: AlgorithmSettings, combiner: Combiner, signals: Signals, steps: int
) -> list[dict[str, float]]:
    """Mean signals of each step's samples, by objective."""
    history = []
    for _ in range(steps):
        groups = world.sample()
        scored = [[signals(g.samples[0].prompt_ids[0], s.response_ids) for s in g.samples] for g in groups.values()]
        rows = [
            Opinions(group.prompt.id, "", {name: [one[name] for one in row] for name in row[0]})
            for group, row in zip(groups.values(), scored, strict=True)
        ]
        combined = combiner.combine(rows)
        lengths = [[LENGTH] * SAMPLES] * len(groups)
        blank = [[0.0] * SAMPLES] * len(groups)
        batch = pack(MEMBERS, groups, blank, blank)
        drifts = drifts_of(reference(batch), batch)
        outcomes = Outcomes(
            combined.rewards,
            lengths,
            [drifts[i : i + SAMPLES] for i in range(0, len(drifts), SAMPLES)],
            parts=combined.parts,
            weights=combined.weights,
            kl_coef=algorithm.kl_coef if algorithm.kl_in == "reward" else 0.0,
            kl_limit=algorithm.kl_limit,
        )
        lesson = make_lesson(
            algorithm,
            outcomes,
            longest=LENGTH,
            kl_coef=algorithm.kl_coef,
            by_objective=combiner.objectives.combine == "gdpo",
        )
        world.learn(algorithm, groups, lesson)
        history.append({name: fmean(one[name] for row in scored for one in row) for name in scored[0][0]})
    return history


def objectives(combine: str, love: float, safety: float, floors: Sequence[str] = ()) -> Combiner:
    shares = {"love": {"weight": love}, "helpfulness": {"weight": 0.0}, "safety": {"weight": safety}}
    return Combiner(ObjectivesSettings.model_validate({"combine": combine, "floors": floors, **shares}))


def wanted(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Love is the share of positions with the one wanted token of that place; nothing else is told apart."""
    hits = sum(token == (prompt + 2 * place) % VOCABULARY for place, token in enumerate(tokens))
    return {"love": hits / LENGTH, "helpfulness": 0.0, "safety": 0.0}


CASES = [
    *(
        (name, None, "calibrated" if METHODS[name].drifts else "linear", "loss")
        for name in METHODS
        if not METHODS[name].logged
    ),
    *((name, loss, "linear", "loss") for name in ("grpo", "dr_grpo") for loss in ("gspo", "cispo", "reinforce")),
    ("grpo", None, "gdpo", "loss"),
    ("rloo", None, "linear", "reward"),
    ("ppo", None, "linear", "reward"),
    ("reinforce_pp", None, "linear", "reward"),
]


@pytest.mark.parametrize(("name", "loss", "combine", "kl_in"), CASES)
def test_each_method_reaches_95_per_cent_of_the_optimum(name: str, loss: str | None, combine: str, kl_in: str) -> None:
    algorithm = AlgorithmSettings.model_validate(
        {"name": name, "loss": loss, "kl_in": kl_in, "kl_coef": 0.001, "kl_limit": 100.0}
    )
    reached = {}
    for seed in SEEDS:
        history = train(World(seed), algorithm, objectives(combine, 1.0, 0.0), wanted, STEPS)
        reached[seed] = fmean(step["love"] for step in history[-10:])
    assert all(value >= 0.95 for value in reached.values()), reached


def tempting(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Token 0 is loved most and unsafe; token 1 is loved a little less and safe; the rest is neither."""
    del prompt
    return {
        "love": fmean({0: 3.0, 1: 2.0}.get(token, 0.0) for token in tokens),
        "helpfulness": 0.0,
        "safety": fmean({0: -2.0, 1: 0.3}.get(token, 0.0) for token in tokens),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_floors_hold_where_a_weighted_sum_breaks_them(seed: int) -> None:
    """The floor is the reference policy's own mean; both runs have the same weights."""
    algorithm = AlgorithmSettings(kl_coef=0.001)
    ends = {}
    for combine, floors in (("linear", ()), ("constrained", ("safety:0",))):
        combiner = objectives(combine, 0.9, 0.1, floors)
        history = train(World(seed, rate=0.1), algorithm, combiner, tempting, 200)
        assert combiner.standardiser is not None
        for name in ("love", "safety"):
            scores = combiner.standardiser.apply(name, [step[name] for step in history[-40:]])
            ends[combine, name] = fmean(scores)
    assert ends["linear", "safety"] < -1.0, ends
    assert ends["constrained", "safety"] >= -0.05, ends
    assert ends["constrained", "love"] > 1.0, ends


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "reinforce"])
def test_learning_rate_zero_leaves_the_policy_as_it_is_and_the_ratio_at_one(loss: str) -> None:
    world = World(1, rate=0.0)
    with torch.no_grad():
        world.table.copy_(torch.randn_like(world.table))
    before, algorithm = world.table.detach().clone(), AlgorithmSettings()
    draw = random.Random(0)
    for _ in range(5):
        groups = world.sample()
        rewards = [[draw.random() for _ in range(SAMPLES)] for _ in groups]
        lesson = make_lesson(
            AlgorithmSettings.model_validate({"loss": loss}),
            Outcomes(rewards, [[LENGTH] * SAMPLES] * len(groups)),
            longest=LENGTH,
            kl_coef=0.02,
        )
        result = world.learn(algorithm, groups, lesson)
        assert result.peak.item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(world.table, before)
