"""Policies before users: the offline score on a fixed set of unseen prompts, and an A/B test with new simulated users.

The A/B test goes through rluf's own analysis, as a real event log would: users split by hash, a pre-period on the
control, delta method by user, CUPED, sample ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab.composer import Composer
from lab.dataset import Town
from lab.features import Features, Judgement
from lab.replies import Truth, texts
from numpy.typing import NDArray

from rluf.evaluate.ab_analysis import Design, analyse
from rluf.evaluate.events import Events, assigned
from rluf.evaluate.intervals import paired_bootstrap
from rluf.evaluate.monitors import MONITORS, Reply, measure, words
from rluf.objectives.judges import JUDGES, failed
from rluf.simulate.users import Items, Population, act, expected_love
from rluf.simulate.world import WORLD, World

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SHOWN = ("love", "continued", "returned", "helpful", "safe")
DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Answers:
    """Replies of one policy to the unseen prompts: places [N], picks [N, 5], texts [N]."""

    places: Ints
    picks: Ints
    said: tuple[str, ...]


def answers(
    town: Town, policy: Composer, places: Ints, samples: int, *, seed: int, temperature: float = 1.0
) -> Answers:
    """`samples` replies of `policy` to each of `places`."""
    rows = np.repeat(places, samples)
    picks = policy.sample(torch.as_tensor(rows), torch.Generator().manual_seed(seed), temperature)[0].numpy()
    return Answers(rows, picks, tuple(texts(town, rows, picks)))


def offline(
    features: Features, judgements: Mapping[str, Judgement], base: Answers, new: Answers, *, seed: int
) -> dict[str, dict[str, float]]:
    """Change of each objective's mean calibrated probability from the base, with its interval over prompts."""
    found, read = {}, [features.of(given.places, given.said) for given in (base, new)]
    for name, one in judgements.items():
        values = [_chance(one.logits(part)) for part in read]
        pair = paired_bootstrap(values[0], base.places, values[1], new.places, resamples=400, seed=seed)
        found[name] = pair.difference.as_dict() | {"base": pair.base.mean, "new": pair.aligned.mean}
    return found


def _chance(logits: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def looks(town: Town, given: Answers) -> dict[str, float]:
    """Mean of every reward-hacking monitor over the replies, and the share that each rule judge objects to."""
    replies = [
        Reply(str(place), town.places[place].messages, text, round(1.3 * len(words(text))), town.places[place].topic)
        for place, text in zip(given.places.tolist(), given.said, strict=True)
    ]
    objections = Counter(name for reply in replies for name in failed(reply.messages, reply.text))
    shares = {name: objections[name] / len(replies) for name in JUDGES}
    return shares | {name: float(values.mean()) for name, values in measure(replies).items() if name in MONITORS}


def gold(town: Town, truth: Truth, base: Answers, new: Answers, *, seed: int) -> dict[str, dict[str, float]]:
    """Relative change of gold helpfulness, safety, warmth, satisfaction and sign-off, with intervals over prompts."""
    known = truth.of(base.places, base.picks), truth.of(new.places, new.picks)
    found = {}
    for name in ("helpfulness", "safety", "warmth", "satisfaction", "signoff"):
        values = [[getattr(one, name) for one in side] for side in known]
        pair = paired_bootstrap(values[0], base.places, values[1], new.places, resamples=400, seed=seed)
        lift = None if pair.lift is None else pair.lift.as_dict()
        found[name] = {"base": pair.base.mean, "new": pair.aligned.mean, **({} if lift is None else lift)}
    return found


def ab_test(
    town: Town,
    truth: Truth,
    base: Answers,
    new: Answers,
    *,
    seed: int,
    users: int = 10_000,
    reads: float = 8.0,
    world: World = WORLD,
) -> dict[str, Any]:
    """Lifts with intervals of an A/B test of `users` new users, each reading about `reads` replies after as many of the
    control's in a pre-period."""
    rng = np.random.default_rng([seed, 104_651])
    people = Population.draw(users, rng, world)
    names = tuple(f"user-{seed}-{n}" for n in range(users))
    arm_of = assigned(names, f"claims-{seed}", (0.5, 0.5))
    golds = [*truth.of(base.places, base.picks), *truth.of(new.places, new.picks)]
    topics = [town.places[place].topic for place in (*base.places.tolist(), *new.places.tolist())]
    items = Items.of(golds, topics)
    user = np.repeat(np.arange(users), rng.poisson(2 * rng.gamma(2.0, reads / 2.0, users)))
    time = np.sort(rng.random(len(user))) * 28 * DAY
    user = rng.permutation(user)
    arm = np.where(time < 14 * DAY, 0, arm_of[user])
    start, size = np.where(arm == 0, 0, len(base.said)), np.where(arm == 0, len(base.said), len(new.said))
    item = start + np.floor(rng.random(len(user)) * size).astype(np.int64)
    seen = act(items, people, user, item, rng, world=world)
    values = {"love": seen.loved, "continued": seen.continued, "returned": seen.returned, "helpful": seen.helpful,
              "safe": seen.safe}  # fmt: skip
    events = Events(
        user=user, conversation=np.arange(len(user)), arm=arm, arms=("control", "treatment"), users=names, time=time,
        values={name: np.asarray(one, np.float64) for name, one in values.items()}, duplicates=0,
    )  # fmt: skip
    result = analyse(events, Design("control", "treatment", start=14 * DAY, metrics=SHOWN, looks=1))
    return {"users": result["users"], "srm": result["srm"]["p"],
            **{name: _lift(result["metrics"][name]) for name in SHOWN}}  # fmt: skip


def _lift(metric: dict[str, Any]) -> dict[str, float]:
    effect = metric["cuped"] or metric["effect"]
    return {"lift": effect["lift"], "low": effect["lift_low"], "high": effect["lift_high"], "p": effect["p"],
            "control": metric["effect"]["control"], "treatment": metric["effect"]["treatment"],
            "error": effect["error"]}  # fmt: skip


def by_topic(town: Town, truth: Truth, given: Answers) -> dict[str, float]:
    """True chance of a heart, mean over the replies of each topic."""
    topics = [town.places[place].topic for place in given.places.tolist()]
    chances = expected_love(truth.of(given.places, given.picks), topics, users=100)
    return {topic: float(chances[np.array(topics) == topic].mean()) for topic in sorted(set(topics))}
