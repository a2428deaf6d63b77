"""The policy of the claims and how it learns: imitation first, then rluf's own combination, advantages and losses.

A network of some 100,000 weights that makes its five choices one after the other, each on what came before, so that a
reply has a probability, a KL to the reference, and gradients like a language model's, with five tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lab.dataset import Town
from lab.replies import BODY, SLOTS, texts
from numpy.typing import NDArray
from torch import Tensor, nn

from rluf.algorithms.advantages import Drift, Outcomes
from rluf.algorithms.batch import Batch
from rluf.algorithms.losses import policy_loss
from rluf.algorithms.registry import make_lesson, needs_drifts
from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import ObjectivesSettings
from rluf.objectives.aggregator import Combiner, Opinions
from rluf.objectives.judges import passes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Signals = Callable[[Ints, Sequence[str]], Mapping[str, Floats]]
"""From places [N] and texts [N] to each objective's signal [N]."""
WIDE = 64


class Composer(nn.Module):
    """pi(picks | place): one small network for each choice, on the sum of what prompt and earlier choices say."""

    def __init__(self, town: Town) -> None:
        """Random weights."""
        super().__init__()
        self.register_buffer("asked", torch.from_numpy(town.asked), persistent=False)
        self.register_buffer("said", torch.from_numpy(town.said), persistent=False)
        size = town.asked.shape[1]
        self.ask, self.hear, self.key = nn.Linear(size, WIDE), nn.Linear(size, WIDE), nn.Linear(size, WIDE)
        self.chosen = nn.ModuleList(nn.Embedding(count, WIDE) for count in SLOTS)
        self.think = nn.ModuleList(nn.Sequential(nn.GELU(), nn.Linear(WIDE, WIDE), nn.GELU()) for _ in SLOTS)
        self.choose = nn.ModuleList(nn.Linear(WIDE, WIDE if n == BODY else count) for n, count in enumerate(SLOTS))

    def _start(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        said = self.said[places]
        return self.ask(self.asked[places]) * 3.0, self.key(said) * 3.0, self.hear(said) * 3.0

    def _logits(self, slot: int, state: Tensor, keys: Tensor) -> Tensor:
        found: Tensor = self.choose[slot](self.think[slot](state))
        return torch.einsum("nd,nkd->nk", found, keys) / WIDE**0.5 if slot == BODY else found

    def _told(self, slot: int, picks: Tensor, heard: Tensor) -> Tensor:
        if slot == BODY:
            return heard[torch.arange(len(picks)), picks]
        found: Tensor = self.chosen[slot](picks)
        return found

    def logprobs(self, places: Tensor, picks: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability [N, 5] of each choice."""
        state, keys, heard = self._start(places)
        found = []
        for slot in range(len(SLOTS)):
            spread = torch.log_softmax(self._logits(slot, state, keys) / temperature, -1)
            found.append(spread.gather(1, picks[:, slot, None])[:, 0])
            state = state + self._told(slot, picks[:, slot], heard)
        return torch.stack(found, 1)

    @torch.no_grad()
    def sample(self, places: Tensor, generator: torch.Generator, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Choices [N, 5] and their log-probabilities [N, 5]."""
        state, keys, heard = self._start(places)
        picks, logprobs = [], []
        for slot in range(len(SLOTS)):
            spread = torch.log_softmax(self._logits(slot, state, keys) / temperature, -1)
            choice = torch.multinomial(spread.exp(), 1, generator=generator)[:, 0]
            picks.append(choice)
            logprobs.append(spread.gather(1, choice[:, None])[:, 0])
            state = state + self._told(slot, choice, heard)
        return torch.stack(picks, 1), torch.stack(logprobs, 1)


def imitate(
    town: Town, places: Ints, picks: Ints, *, seed: int, epochs: int = 6, start: Composer | None = None
) -> Composer:
    """A policy that imitates demonstrations `picks` [N, 5] at `places` [N] by maximum likelihood."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = Composer(town) if start is None else copy.deepcopy(start)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01)
        where, what = torch.as_tensor(places), torch.as_tensor(picks)
        for _ in range(epochs):
            for part in torch.randperm(len(where)).split(256):
                optimizer.zero_grad()
                (-policy.logprobs(where[part], what[part]).sum(1).mean()).backward()
                optimizer.step()
    policy.eval()
    return policy


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is trained: rluf's own settings of the algorithm and the objectives, and the learning rate."""

    algorithm: AlgorithmSettings
    objectives: ObjectivesSettings
    rate: float = 2e-3


@dataclass(slots=True)
class Trained:
    """The policy after the last step and after each step asked for, and each step's means."""

    policy: Composer
    kept: dict[int, Composer] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)


def train(
    town: Town, base: Composer, places: Ints, signals: Signals, recipe: Recipe, *, seed: int, keep: Sequence[int] = ()
) -> Trained:
    """Move a copy of `base` by policy gradients on `places`; `base` stays the reference."""
    algorithm, objectives = recipe.algorithm, recipe.objectives
    policy, combiner = copy.deepcopy(base).train(), Combiner(objectives)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe.rate, weight_decay=0.0)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng([seed, 7])
    size, found = algorithm.samples_per_prompt, Trained(policy)
    for step in range(1, algorithm.steps + 1):
        chosen = rng.choice(places, algorithm.prompts_per_step, replace=False)
        rows = np.repeat(chosen, size)
        where = torch.as_tensor(rows)
        picks, rollout = policy.sample(where, generator)
        said = texts(town, rows, picks.numpy())
        scores = signals(rows, said)
        with torch.no_grad():
            reference = base.logprobs(where, picks)
        drift = (rollout - reference).sum(1).reshape(-1, size).tolist()
        batch = []
        for group, place in enumerate(chosen.tolist()):
            part = slice(group * size, (group + 1) * size)
            told = [(town.places[place].messages, text) for text in said[part]]
            passed = passes(objectives.judges, told) if objectives.judges else ()
            batch.append(Opinions(str(place), town.places[place].topic,
                                  {name: one[part].tolist() for name, one in scores.items()}, passed))  # fmt: skip
        combined = combiner.combine(batch)
        outcomes = Outcomes(
            rewards=combined.rewards, lengths=[[len(SLOTS)] * size for _ in batch],
            drifts=[[Drift(value) for value in row] for row in drift] if needs_drifts(algorithm) else (),
            passed=[one.passed for one in batch] if objectives.judges else (), parts=combined.parts,
            weights=combined.weights, kl_coef=algorithm.kl_coef if algorithm.kl_in == "reward" else 0.0,
            kl_limit=algorithm.kl_limit,
        )  # fmt: skip
        lesson = make_lesson(algorithm, outcomes, longest=len(SLOTS), kl_coef=algorithm.kl_coef,
                             by_objective=objectives.combine == "gdpo")  # fmt: skip
        optimizer.zero_grad()
        loss = policy_loss(
            policy.logprobs(where, picks).reshape(-1), reference.reshape(-1), _batch(picks, rollout, lesson.advantages,
            lesson.weights), algorithm, loss=lesson.loss, kl_coef=lesson.kl_coef, slope=lesson.slope,
        ).loss  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        found.steps.append({name: float(one.mean()) for name, one in scores.items()}
                           | {"kl": float(np.mean(drift)), "reward": float(np.mean(combined.rewards))})  # fmt: skip
        if step in keep:
            found.kept[step] = copy.deepcopy(policy).eval()
    policy.eval()
    return found


def _batch(picks: Tensor, rollout: Tensor, gains: list[list[float]], weights: list[list[float]]) -> Batch:
    """The step as rluf's losses take it: five response tokens a reply, no prompt tokens."""
    count, slots = picks.shape
    flat, index = picks.reshape(-1), torch.arange(count * slots)

    def spread(rows: list[list[float]]) -> Tensor:
        return torch.tensor([value for row in rows for value in row]).repeat_interleave(slots)

    return Batch(
        input_ids=flat[None], position_ids=(index % slots)[None], rows=index.reshape(count, slots), places=index,
        keep=index, targets=flat, sequences=torch.arange(count).repeat_interleave(slots), advantages=spread(gains),
        loss_weights=spread(weights), rollout_logprobs=rollout.reshape(-1),
    )  # fmt: skip
