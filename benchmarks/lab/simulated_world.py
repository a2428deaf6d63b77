"""One seed's whole story up to the policies: a log of simulated users, and the reward models that learn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from lab.composer import Composer, Signals, imitate
from lab.dataset import Town
from lab.experiment import Answers, answers, looks
from lab.features import Features, Judgement, Matrix, calibrated, fit, fit_pairs, sampled
from lab.replies import Truth, demonstrated, logged, texts
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import sparse

from rluf.reward.augment import SIGN_OFFS
from rluf.reward.calibration import Calibration, prior_shift
from rluf.simulate.users import Items, Population, act, love_logits
from rluf.simulate.world import WORLD, World

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
EVENTS, USERS, PAIRS, LABELS, DEMONSTRATIONS = 8_000, 2_000, 1_500, 1_200, 5_000
TEST_EVENTS = 2_500
MEMBERS = 5
DEV = 0.1
"""Share of the users whose rows choose the epoch and the calibration."""


@dataclass(frozen=True, slots=True)
class Log:
    """N served replies and what users did: `place`, `user` [N], `picks` [N, 5], `love` and `continued` [N] (0 or 1),
    `chance` [N] of a heart by the reader's own taste. Later rows are later in time."""

    place: Ints
    picks: Ints
    user: Ints
    love: Floats
    continued: Floats
    chance: Floats

    def rows(self, chosen: Ints | NDArray[np.bool_]) -> Log:
        """The rows chosen."""
        return Log(*(getattr(self, name)[chosen] for name in self.__slots__))


def served(
    town: Town,
    truth: Truth,
    places: Ints,
    picks: Ints,
    *,
    users: int,
    rng: np.random.Generator,
    shift: float = 0.0,
    world: World = WORLD,
) -> Log:
    """What new users do with the replies that `picks` make, each read once, in the order given."""
    items = Items.of(truth.of(places, picks), [town.places[one].topic for one in places.tolist()])
    people = Population.draw(users, rng, world)
    activity = rng.gamma(0.8, size=users)
    user = rng.choice(users, len(places), p=activity / activity.sum())
    index = np.arange(len(places))
    seen = act(items, people, user, index, rng, shift=shift, world=world)
    return Log(places, picks, user, seen.loved.astype(np.float64), seen.continued.astype(np.float64),
               1.0 / (1.0 + np.exp(-love_logits(items, people, user, index, world) - shift)))  # fmt: skip


class Village:
    """Everything of one seed that policies need. Parts are made when first asked for."""

    def __init__(self, town: Town, truth: Truth, seed: int, folder: Path) -> None:
        """Nothing is made yet; the log and what is learnt from it are kept in `folder`."""
        self.town, self.truth, self.seed, self.folder = town, truth, seed, folder
        self._control: dict[int, Answers] = {}
        self._looks: dict[str, float] = {}
        self.places, self.unseen = town.rows(unseen=False), town.rows(unseen=True)

    def rng(self, part: int) -> np.random.Generator:
        """The random numbers of one part of the story."""
        return np.random.default_rng([self.seed, part])

    def log(self, events: int = EVENTS, *, part: int = 1, unseen: bool = False, shift: float = 0.0,
            world: World = WORLD) -> Log:  # fmt: skip
        """A log of the served versions; `unseen`: on the prompts that nothing learns from, by other users."""
        rng = self.rng(part)
        places = rng.choice(self.unseen if unseen else self.places, events)
        picks = logged(self.town, places, rng)
        return served(self.town, self.truth, places, picks, users=USERS, rng=rng, shift=shift, world=world)

    @cached_property
    def feedback(self) -> Log:
        """The log that P[Love] learns from."""
        file = self.folder / "log.npz"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            made = self.log()
            np.savez(file, **{name: getattr(made, name) for name in Log.__slots__})
        with np.load(file) as kept:
            return Log(**{name: kept[name] for name in Log.__slots__})

    @cached_property
    def base(self) -> Composer:
        """The base policy: it imitates demonstrations of the plain and the cool version."""
        file = self.folder / "base.safetensors"
        if not file.is_file():
            save_file(dict(self.imitated(("plain", "cool"), part=2).state_dict()), file)
        policy = Composer(self.town)
        policy.load_state_dict(load_file(file))
        policy.eval()
        return policy

    def kept(self, name: str, make: Callable[[], Judgement]) -> Judgement:
        """A reward model made once and kept in the folder."""
        folder = self.folder / name
        if not folder.is_dir():
            made = make()
            folder.mkdir(parents=True)
            made.calibration.save(folder)
            np.save(folder / "weights.npy", made.weights)
        return Judgement(np.load(folder / "weights.npy"), Calibration.load(folder))

    def control(self, part: int, samples: int) -> Answers:
        """Replies of the base policy to the unseen prompts: what every candidate is compared with."""
        if part not in self._control:
            self._control[part] = answers(self.town, self.base, self.unseen, samples, seed=1_000 * self.seed + part)
        return self._control[part]

    def control_looks(self, base: Answers) -> dict[str, float]:
        """What the monitors see in the base policy's replies, looked at once."""
        if not self._looks:
            self._looks.update(looks(self.town, base))
        return dict(self._looks)

    def imitated(self, styles: Sequence[str], *, part: int, start: Composer | None = None) -> Composer:
        """A policy that imitates demonstrations of these versions."""
        rng = self.rng(part)
        places = rng.choice(self.places, DEMONSTRATIONS)
        picks = demonstrated(self.town, places, rng, styles=styles)
        return imitate(self.town, places, picks, seed=self.seed, start=start)

    @cached_property
    def features(self) -> Features:
        """What reward models see; the vocabulary is the log's."""
        return Features(self.town, texts(self.town, self.feedback.place, self.feedback.picks))

    def seen(self, places: Ints, picks: Ints) -> Matrix:
        """Features of the replies that `picks` make."""
        return self.features.of(places, texts(self.town, places, picks))

    @cached_property
    def love(self) -> Judgement:
        """P[Love], an ensemble of MEMBERS on rows drawn with replacement."""
        return self.kept("love", lambda: self.reader("love", self.feedback))

    @cached_property
    def onward(self) -> Judgement:
        """The chance that the user writes on, from the same log: a signal with a longer view."""
        return self.reader("continued", self.feedback)

    def reader(
        self, name: str, log: Log, *, members: int = MEMBERS, keep: NDArray[np.bool_] | None = None,
        counterfactual: float = 0.0, share: float = 0.1,
    ) -> Judgement:  # fmt: skip
        """A model of the chance of a reaction, learnt from `log`. `keep` [N] leaves out the rows of distrusted users,
        `counterfactual` is the share of rows that come again with a sign-off and the same label."""
        labels = log.love if name == "love" else log.continued
        said = texts(self.town, log.place, log.picks)
        features = self.features.of(log.place, said)
        dev = log.user % round(1 / DEV) == 0
        train = np.flatnonzero(~dev if keep is None else ~dev & keep)
        found, shift = [], 0.0
        for member in range(members):
            rng = self.rng(100 + member)
            rows, weights = sampled(labels[train], rng, share)
            shift = prior_shift(labels[train][rows], weights)
            rows = train[rows if members == 1 else rng.choice(rows, len(rows))]
            x, y = features[rows], labels[rows]
            if counterfactual:
                twice = rows[rng.random(len(rows)) < counterfactual]
                phrases = rng.choice(SIGN_OFFS, len(twice)).tolist()
                more = [f"{said[n]} {phrase}" for n, phrase in zip(twice.tolist(), phrases, strict=True)]
                x = sparse.vstack([x, self.features.of(log.place[twice], more)])
                y = np.concatenate([y, labels[twice]])
            found.append(fit(x, y))
        return calibrated(name, found, features[np.flatnonzero(dev)], labels[dev], shift)

    @cached_property
    def helpfulness(self) -> Judgement:
        """What raters prefer."""
        return self.kept("helpfulness", self._helpfulness)

    @cached_property
    def safety(self) -> Judgement:
        """What raters call safe."""
        return self.kept("safety", self._safety)

    def _helpfulness(self) -> Judgement:
        """Bradley-Terry on raters' preferences between two replies to a prompt."""
        rng = self.rng(4)
        places = rng.choice(self.places, PAIRS)
        sides = [logged(self.town, places, rng) for _ in range(2)]
        truths = [np.array([one.helpfulness for one in self.truth.of(places, side)]) for side in sides]
        chance = 1.0 / (1.0 + np.exp(-WORLD.rater_sharpness * (truths[0] - truths[1])))
        chance = chance * (1.0 - WORLD.rater_slip) + 0.5 * WORLD.rater_slip
        first, second = (self.seen(places, side) for side in sides)
        weights = fit_pairs(first, second, rng.random(PAIRS) < chance)
        return Judgement(weights[None], Calibration("helpfulness"))

    def _safety(self) -> Judgement:
        """Safe or not, as labelled; mostly on risky prompts, where both kinds occur."""
        rng = self.rng(5)
        risky = np.array([self.town.places[one].topic == "risky" for one in self.places])
        places = rng.choice(self.places, LABELS, p=np.where(risky, 0.65 / risky.sum(), 0.35 / (~risky).sum()))
        picks = logged(self.town, places, rng)
        safe = np.array([one.safety > 0.5 for one in self.truth.of(places, picks)])
        labels = (safe != (rng.random(LABELS) < WORLD.rater_slip)).astype(np.float64)
        features, size = self.seen(places, picks), round(0.9 * LABELS)
        return calibrated("safety", [fit(features[:size], labels[:size])], features[size:], labels[size:], 0.0)

    @cached_property
    def judgements(self) -> dict[str, Judgement]:
        """The three objectives."""
        return {"love": self.love, "helpfulness": self.helpfulness, "safety": self.safety}

    def signals(self, *, love: Judgement | None = None, pessimism: float = 0.0, onward: float = 0.0) -> Signals:
        """Logits of the three objectives, as rluf's combination takes them. `love` replaces P[Love], `pessimism` takes
        standard deviations over its members off, `onward` adds so many times the logit of writing on."""
        judged = {**self.judgements, **({} if love is None else {"love": love})}

        def found(places: Ints, said: Sequence[str]) -> Mapping[str, Floats]:
            features = self.features.of(places, said)
            signals = {name: one.logits(features) for name, one in judged.items()}
            if pessimism:
                signals["love"] = signals["love"] - pessimism * judged["love"].each(features).std(0)
            if onward:
                signals["love"] = signals["love"] + onward * self.onward.logits(features)
            return signals

        return found


def brigaded(world: World, *, hostile: float, sarcastic: float) -> World:
    """The world with other shares of users who love the worst, and of those who love failed answers as a joke."""
    return replace(world, hostile_share=hostile, sarcastic_share=sarcastic)
