"""The policies whose launch is in question: which were trained on P[Love], how, and what each does on unseen prompts.

Method, learning rate, steps, batch and KL were set beforehand: on seed 0, which no result is from, plain GRPO with a KL
weight of 0.02 went 18 nats away and said the same three phrases to everybody, since it divides rewards by their spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lab.composer import Composer, Recipe, Trained, train
from lab.experiment import Answers, ab_test, answers, by_topic, gold, looks, offline
from lab.features import Judgement
from lab.replies import texts
from lab.simulated_world import Village
from numpy.typing import NDArray

from rluf.config.policy import AlgorithmSettings
from rluf.config.reward import ObjectivesSettings

Ints = NDArray[np.int64]
RECIPE = "1"
"""Name of this set of choices; results of another are kept apart."""
STEPS, PROMPTS, SAMPLES, KL, RATE = 50, 32, 6, 0.3, 2e-3
KEPT = (10, 25)
"""Steps of the aggressive runs whose policies are candidates too."""
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.5)
OFFLINE, ONLINE = 6, 6
"""Replies to each unseen prompt behind the offline score, and others that the users of the A/B test read."""
SAFETY = 0.2


AGGRESSIVE = 0.3
GATES = ("unprompted_farewell", "false_refusal")
FIXES: dict[str, dict[str, Any]] = {
    "judge": {"objectives": {"judges": GATES[:1]}},
    "ensemble": {"signals": {"pessimism": 1.0}},
    "counterfactual": {},
    "onward": {"signals": {"onward": 0.5}},
    "gdpo": {"objectives": {"combine": "gdpo"}},
    "floors": {"objectives": {"combine": "constrained", "floors": ("helpfulness:0.3", "safety:0.0")}},
}
"""Mitigations of the aggressive run: a judge against farewells as a gate; P[Love] less one standard deviation over its
members; rows that come again with a sign-off and the same label; half the logit of writing on added; GDPO; floors."""
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    **{f"{name}-judges": {"name": name, "objectives": {"judges": GATES, "combine": "calibrated"}}
       for name in ("crpg", "crraft", "codpo")},
}  # fmt: skip
"""The aggressive weights by other methods: CGPO's three optimisers with calibrated rewards and judges."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One policy: how to make its replies, and what it is. `weight` and `kl` are those of its training, if any."""

    name: str
    reply: Callable[[int, int], Answers]
    """From samples a prompt and a seed to replies."""
    trained_on_love: bool
    about: Mapping[str, Any] = field(default_factory=dict)
    policy: Composer | None = None


def recipe(weight: float, *, kl: float = KL, name: str = "rloo", steps: int = STEPS,
           **objectives: Any) -> Recipe:  # fmt: skip
    """Love at `weight`, safety at SAFETY, helpfulness at the rest of 1, as in configs/love-*.yaml."""
    algorithm = {
        "name": name, "steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "kl_coef": kl,
        "kl_in": "reward", "kl_limit": 6.0,
    }  # fmt: skip
    weights = {"love": weight, "helpfulness": max(0.0, 1.0 - SAFETY - weight), "safety": SAFETY}
    goals = {**{good: {"weight": value} for good, value in weights.items()}, **objectives}
    return Recipe(AlgorithmSettings.model_validate(algorithm), ObjectivesSettings.model_validate(goals), RATE)


class Candidates:
    """All policies of one village by name; each is made when asked for."""

    def __init__(self, village: Village) -> None:
        """Nothing is trained yet."""
        self.village = village
        self._runs: dict[str, Trained] = {}

    @staticmethod
    def names() -> tuple[str, ...]:
        """All of them, those first that never saw P[Love]."""
        return (
            "w0", "w0.3", *(f"w0.3-step{step}" for step in KEPT), "w0.1", "cool", "hot",
            *(f"sft-{style}" for style in ("warm", "upbeat", "goodbye", "terse", "careful")), "longest-of-4",
            "love-of-4", "love-of-16", "w0.05", "w0.2", "w0.5", "w0.5-step25", "w0.3-kl0.1", "w0.3-kl1", "love-only",
        )  # fmt: skip

    def make(self, name: str) -> Candidate:
        """The candidate of that name."""
        if name in ("cool", "hot"):
            return self._plain(name)
        if name.startswith("sft-"):
            return self._sft(name)
        if name == "longest-of-4":
            return self._longest(name)
        if name in FIXES or name in METHODS:
            return self._fixed(name)
        return self._loved(name) if name.startswith("love-of") else self._weighed(name)

    def run(self, key: str, how: Recipe, **signals: Any) -> Trained:
        """The training run of that key, made once."""
        if key not in self._runs:
            v = self.village
            self._runs[key] = train(v.town, v.base, v.places, v.signals(**signals), how, seed=v.seed, keep=KEPT)
        return self._runs[key]

    def of(self, name: str, policy: Composer, *, love: bool, temperature: float = 1.0, **about: Any) -> Candidate:
        """A candidate that replies by sampling `policy`."""
        v = self.village

        def reply(samples: int, seed: int) -> Answers:
            return answers(v.town, policy, v.unseen, samples, seed=seed, temperature=temperature)

        return Candidate(name, reply, love, about, policy)

    def _plain(self, name: str) -> Candidate:
        return self.of(name, self.village.base, love=False, temperature={"cool": 0.6, "hot": 1.5}[name])

    def _sft(self, name: str) -> Candidate:
        style = name.removeprefix("sft-")
        policy = self.village.imitated((style,), part=20 + len(style), start=self.village.base)
        return self.of(name, policy, love=False)

    def _weighed(self, name: str) -> Candidate:
        if name == "love-only":
            weight, kl, step, how = 0.8, 0.1, 0, recipe(0.8, kl=0.1)
        else:
            head, _, rest = name.partition("-")
            weight, kl, step = float(head[1:]), KL, 0
            if rest.startswith("kl"):
                kl = float(rest[2:])
            elif rest:
                step = int(rest.removeprefix("step"))
            how = recipe(weight, kl=kl)
        run = self.run(f"{weight:g}/{kl:g}", how)
        policy = run.kept[step] if step else run.policy
        return self.of(name, policy, love=weight > 0, weight=weight, kl_coef=kl, step=step or STEPS, method="rloo")

    def _fixed(self, name: str) -> Candidate:
        """The aggressive run with one thing changed."""
        changes = {**FIXES, **METHODS}[name]
        signals = dict(changes.get("signals", {}))
        if name == "counterfactual":
            v = self.village
            signals["love"] = v.reader("love", v.feedback, counterfactual=0.5)
        how = recipe(AGGRESSIVE, name=changes.get("name", "rloo"), **changes.get("objectives", {}))
        return self.of(name, self.run(name, how, **signals).policy, love=True, weight=AGGRESSIVE, kl_coef=KL)

    def _best(self, name: str, count: int, score: Callable[[Ints, Ints], NDArray[np.float64]], love: bool) -> Candidate:
        v = self.village

        def reply(samples: int, seed: int) -> Answers:
            rows = np.repeat(v.unseen, samples * count)
            picks = v.base.sample(torch.as_tensor(rows), torch.Generator().manual_seed(seed))[0].numpy()
            values = score(rows, picks).reshape(-1, count)
            kept = np.arange(len(values)) * count + values.argmax(1)
            return Answers(rows[kept], picks[kept], tuple(texts(v.town, rows[kept], picks[kept])))

        return Candidate(name, reply, love, {"method": f"best of {count}"})

    def _longest(self, name: str) -> Candidate:
        def score(rows: Ints, picks: Ints) -> NDArray[np.float64]:
            return np.array([len(text) for text in texts(self.village.town, rows, picks)], float)

        return self._best(name, 4, score, love=False)

    def _loved(self, name: str) -> Candidate:
        def score(rows: Ints, picks: Ints) -> NDArray[np.float64]:
            return self.village.love.logits(self.village.seen(rows, picks))

        return self._best(name, int(name.rpartition("-")[2]), score, love=True)


def measured(village: Village, candidate: Candidate, judged: Mapping[str, Judgement] | None = None) -> dict[str, Any]:
    """Everything the claims ask of one candidate, in plain numbers, against the base policy on unseen prompts."""
    started, v = time.process_time(), village
    seed = 1_000 * v.seed
    sides = [[v.control(n, count), candidate.reply(count, seed + n + 7)] for n, count in enumerate((OFFLINE, ONLINE))]
    base, new = sides[1]
    judged = judged or v.judgements
    kl = 0.0
    if candidate.policy is not None:
        where, what = torch.as_tensor(new.places), torch.as_tensor(new.picks)
        with torch.no_grad():
            kl = float((candidate.policy.logprobs(where, what) - v.base.logprobs(where, what)).sum(1).mean())
    return {
        "policy": candidate.name, "seed": v.seed, "trained_on_love": candidate.trained_on_love, **candidate.about,
        "kl": kl, "replies": len(new.said), "offline": offline(v.features, judged, *sides[0], seed=v.seed),
        "gold": gold(v.town, v.truth, base, new, seed=v.seed),
        "ab": ab_test(v.town, v.truth, base, new, seed=seed + len(candidate.name) + sum(map(ord, candidate.name))),
        "monitors": {"base": v.control_looks(base), "new": looks(v.town, new)},
        "topics": {"base": by_topic(v.town, v.truth, base), "new": by_topic(v.town, v.truth, new)},
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip
