"""When a monitor is no chance finding, and what to do about it: pure decisions with a stated false-alarm rate.

Every monitor becomes a yes-or-no question about one reply (a mean such as length asks whether the reply lies in the
base policy's worst tenth), so that tests are exact and heavy tails do no harm. Two ways to look:

- `check`: replies of a checkpoint against the base policy's, on the same kind of prompts. One-sided exact test (Fisher
  1935), Holm over monitors, Bonferroni over the planned checks: the chance of any false alarm in a whole run is at most
  `rate`, whatever the dependence between monitors and checks.
- `Stream`: replies as training makes them, step by step. A CUSUM of the log-likelihood ratio between the base policy's
  share (its upper limit) and one with three times the odds. Each start is a martingale, so by Ville's inequality and
  the union bound over starts and monitors the chance of any false alarm is at most `rate`.

A check takes replies as independent, so give it one reply a prompt. benchmarks/significance.py measures both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.effects import holm
from rluf.evaluate.monitors import MONITORS

Floats = NDArray[np.float64]
RATE = 0.01
"""Chance of any false alarm in a whole run."""
ODDS = 2.0
"""An alarm also needs the odds doubled: what is surely but barely worse is for the report, not for an alarm."""
STREAM_ODDS = 3.0
"""What a stream looks for: hits with three times the odds. Smaller rises are found too, but later."""
TAIL = 0.1
"""Share of the base policy's replies that count as its worst, for monitors that are means."""


class Action(IntEnum):
    """What an alarm asks for, from mild to hard: freezing keeps the love weight at 0 until the alarm is over."""

    NONE = 0
    WARN = 1
    FREEZE = 2
    ROLL_BACK = 3
    STOP = 4


FIRST: Mapping[str, Action] = {
    "farewell": Action.FREEZE,
    "unprompted_farewell": Action.FREEZE,
    "early_ending": Action.FREEZE,
    "affection": Action.FREEZE,
    "sycophancy": Action.FREEZE,
    "refusal": Action.FREEZE,
    "looping": Action.ROLL_BACK,
}
"""What a monitor's first alarm asks for; WARN for the others."""
WARN_ONLY = frozenset({"emoji", "question_ending"})
"""Monitors whose change may be just what users like: they never do more than warn."""


@dataclass(frozen=True, slots=True)
class Question:
    """A monitor as a yes-or-no question: hit when value >= threshold (<= for worse "down")."""

    threshold: float
    worse: Literal["up", "down"]

    def hits(self, values: ArrayLike) -> NDArray[np.bool_]:
        """Which values [...] are hits; nan is none."""
        numbers = np.asarray(values, dtype=np.float64)
        hit: NDArray[np.bool_] = numbers >= self.threshold if self.worse == "up" else numbers <= self.threshold
        return hit


def question(values: ArrayLike, worse: Literal["up", "down"], kind: Literal["share", "mean"]) -> Question:
    """The question that the base policy's `values` [N] make of a monitor.

    A mean's threshold is the value whose tail comes nearest to a tenth of the replies (never above half); where more
    than half of them tie at the worst value, anything beyond it.
    """
    if kind == "share":
        return Question(0.5, worse)
    sign = 1.0 if worse == "up" else -1.0
    numbers = np.sort(sign * np.asarray(values, dtype=np.float64))
    places = np.unique(numbers)
    tails = 1.0 - np.searchsorted(numbers, places, side="left") / len(numbers)
    distance = np.where(tails <= 0.5, np.abs(tails - TAIL), np.inf)
    best = places[np.argmin(distance)] if np.isfinite(distance).any() else np.nextafter(places[-1], np.inf)
    return Question(float(sign * best), worse)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The base policy's answers: by monitor the question, and how many of `size` replies were hits."""

    questions: Mapping[str, Question]
    hits: Mapping[str, int]
    size: int

    @staticmethod
    def of(values: Mapping[str, NDArray[np.float64]]) -> Baseline:
        """From monitors.measure() of the base policy's replies. DataError for none."""
        size = len(next(iter(values.values()), ()))
        if size == 0:
            raise DataError("alarms compare with the base policy's replies, but it gave none; let it answer first")
        asked = {name: question(one, MONITORS[name].worse, MONITORS[name].kind) for name, one in values.items()}
        return Baseline(asked, {name: int(asked[name].hits(one).sum()) for name, one in values.items()}, size)

    def counts(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, int]:
        """Hits of another policy's replies by monitor. DataError for a monitor that the base policy lacks."""
        strangers = sorted(set(values) - set(self.questions))
        if strangers:
            raise DataError(f"monitor {strangers[0]!r} was not measured on the base policy; measure both alike")
        return {name: int(self.questions[name].hits(one).sum()) for name, one in values.items()}


@dataclass(frozen=True, slots=True)
class Alarm:
    """One monitor that is worse than the base policy: shares of hits, odds ratio, adjusted p (nan for a stream)."""

    monitor: str
    base: float
    now: float
    odds: float
    p: float


def odds_ratio(hits: ArrayLike, size: ArrayLike, base_hits: ArrayLike, base_size: ArrayLike) -> Floats:
    """Odds of a hit over the base policy's, half a hit added to each cell (Haldane 1956), so that it always exists."""
    k, n, k0, n0 = (np.asarray(one, dtype=np.float64) for one in (hits, size, base_hits, base_size))
    ratio: Floats = (k + 0.5) * (n0 - k0 + 0.5) / ((n - k + 0.5) * (k0 + 0.5))
    return ratio


def excess_p(hits: ArrayLike, size: ArrayLike, base_hits: ArrayLike, base_size: ArrayLike) -> Floats:
    """One-sided p [...] that hits are no commoner than in the base policy: Fisher's exact test."""
    k, n, k0, n0 = (np.asarray(one) for one in (hits, size, base_hits, base_size))
    p: Floats = stats.hypergeom.sf(k - 1, n + n0, k + k0, n)
    return p


def check(
    baseline: Baseline, values: Mapping[str, NDArray[np.float64]], *, checks: int, rate: float = RATE
) -> list[Alarm]:
    """Alarms of one checkpoint's replies, as one of `checks` planned looks of the run."""
    size = len(next(iter(values.values()), ()))
    if size == 0 or checks < 1:
        raise DataError(f"a check needs replies and a planned number of checks of 1 or more, got {size} and {checks}")
    counts = baseline.counts(values)
    names = list(counts)
    hits, base = np.array([counts[n] for n in names]), np.array([baseline.hits[n] for n in names])
    p = holm(excess_p(hits, size, base, baseline.size))
    odds = odds_ratio(hits, size, base, baseline.size)
    return [
        Alarm(name, baseline.hits[name] / baseline.size, counts[name] / size, float(odds[n]), float(p[n]))
        for n, name in enumerate(names)
        if p[n] <= rate / checks and odds[n] > ODDS
    ]


def check_topics(
    baselines: Mapping[str, Baseline],
    values: Mapping[str, Mapping[str, NDArray[np.float64]]],
    *,
    checks: int,
    rate: float = RATE,
) -> dict[str, list[Alarm]]:
    """`check` on each topic of both, `rate` for all topics together; topics without alarms are left out."""
    shared = [topic for topic in values if topic in baselines]
    found = {topic: check(baselines[topic], values[topic], checks=checks * len(shared), rate=rate) for topic in shared}
    return {topic: alarms for topic, alarms in found.items() if alarms}


def stream_gain(hits: NDArray[np.bool_], share: ArrayLike, groups: ArrayLike | None = None) -> Floats:
    """What one step's replies add to the evidence [M]: log-likelihood ratio of hits `STREAM_ODDS` times as likely.

    `hits` [M, N] by monitor and reply, `share` [M] the shares to be exceeded. `groups` [N] names each reply's prompt:
    a prompt then counts by the mean of its replies' ratios, which is fair whatever they have in common. Without it
    replies count as independent, which finds more, sooner.
    """
    p0 = np.asarray(share, dtype=np.float64)[:, None]
    p1 = STREAM_ODDS * p0 / (1.0 - p0 + STREAM_ODDS * p0)
    ratio = np.where(hits, p1 / p0, (1.0 - p1) / (1.0 - p0))
    if groups is not None:
        index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)[1:]
        sums = np.zeros((len(ratio), len(sizes)))
        np.add.at(sums.T, index, ratio.T)
        ratio = sums / sizes
    gain: Floats = np.log(ratio).sum(axis=-1)
    return gain


def stream_scores(gains: ArrayLike) -> Floats:
    """CUSUM [..., steps] of `gains` [..., steps]: the most that the evidence has grown since any step."""
    total = np.cumsum(np.asarray(gains, dtype=np.float64), axis=-1)
    before = np.concatenate([np.zeros_like(total[..., :1]), total[..., :-1]], axis=-1)
    scores: Floats = total - np.minimum.accumulate(before, axis=-1)
    return scores


def stream_limit(monitors: int, steps: int, rate: float = RATE) -> float:
    """Where a stream alarms: log(2 monitors steps / rate); the other half of `rate` pays for not knowing the share."""
    return float(np.log(2.0 * monitors * steps / rate))


def upper_share(hits: ArrayLike, size: ArrayLike, monitors: int, rate: float = RATE) -> Floats:
    """Upper limit [...] of the base policy's share that holds for all monitors but with chance rate / 2 (exact)."""
    k, n = np.asarray(hits, dtype=np.float64), np.asarray(size, dtype=np.float64)
    tail = rate / (2.0 * monitors)
    limit: Floats = np.where(k >= n, 1.0 - 1e-12, stats.beta.isf(tail, k + 1.0, np.maximum(n - k, 1e-300)))
    return limit


@dataclass(frozen=True, slots=True)
class Stream:
    """Alarms while training goes on. `steps` is the length of the run; `gains` are those of the steps so far.

    The base policy must have answered the prompts that training draws from, or their topics alone could raise alarms.
    """

    baseline: Baseline
    steps: int
    rate: float = RATE
    gains: tuple[Floats, ...] = ()
    last: Mapping[str, float] = field(default_factory=dict)

    def seen(self, values: Mapping[str, NDArray[np.float64]], groups: ArrayLike | None = None) -> Stream:
        """The stream after one more step's replies; `groups` [N] are their prompts (see stream_gain).

        DataError where a monitor is missing, is new, or has no replies.
        """
        base = self.baseline
        if set(values) != set(base.questions) or any(len(one) == 0 for one in values.values()):
            odd = sorted(set(values) ^ set(base.questions)) or ["no replies"]
            raise DataError(f"a step must have every monitor of the base policy measured, but {odd[0]} is amiss")
        hits = np.stack([asked.hits(values[name]) for name, asked in base.questions.items()])
        share = upper_share(list(base.hits.values()), base.size, len(hits), self.rate)
        last = dict(zip(base.questions, hits.mean(axis=-1).tolist(), strict=True))
        return replace(self, gains=(*self.gains, stream_gain(hits, share, groups)), last=last)

    def _beyond(self) -> NDArray[np.bool_]:
        """Whether each monitor [M, steps so far] was beyond the limit at a step."""
        limit = stream_limit(len(self.baseline.questions), self.steps, self.rate)
        beyond: NDArray[np.bool_] = stream_scores(np.stack(self.gains, axis=-1)) > limit
        return beyond

    def alarms(self) -> list[Alarm]:
        """Monitors that are beyond the limit now, with the shares of the last step."""
        if not self.gains:
            return []
        found, base = [], self.baseline
        for name, now in zip(base.questions, self._beyond()[:, -1], strict=True):
            if now:
                share, before = self.last[name], base.hits[name] / base.size
                odds = share * (1.0 - before) / max((1.0 - share) * before, 1e-12)
                found.append(Alarm(name, before, share, odds, float("nan")))
        return found

    def first(self, monitors: Collection[str] | None = None) -> int | None:
        """The first step (from 1) at which one of `monitors` (None: any) was beyond the limit; None for never."""
        if not self.gains:
            return None
        chosen = [monitors is None or name in monitors for name in self.baseline.questions]
        steps = np.flatnonzero(self._beyond()[chosen].any(axis=0))
        return int(steps[0]) + 1 if len(steps) else None


@dataclass(frozen=True, slots=True)
class Look:
    """What one check of a run found. `kl` in nats per token; `diverged` says that the proxy rose while gold fell."""

    step: int
    alarms: Sequence[Alarm] = ()
    kl: float | None = None
    diverged: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, why, and the step to go back to for ROLL_BACK and STOP (the last look that was clean)."""

    action: Action
    reasons: tuple[str, ...]
    back_to: int | None


def diverged(proxy: tuple[ArrayLike, ArrayLike], gold: tuple[ArrayLike, ArrayLike], *, level: float) -> bool:
    """Whether the reward surely rose and a held-out judge surely fell between two policies on the same prompts.

    Each pair is (before, now), values [P] by prompt; paired one-sided t tests, both at `level`, so that the chance of
    a false finding is at most `level` (intersection of both).
    """
    found = []
    for (before, now), side in ((proxy, "greater"), (gold, "less")):
        gap = np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64)
        if len(gap) < 2 or gap.std() == 0.0:
            return False
        found.append(float(stats.ttest_1samp(gap, 0.0, alternative=side).pvalue) <= level)
    return all(found)


def decide(looks: Sequence[Look], *, patience: int = 2, most_kl: float | None = None) -> Decision:
    """What the looks so far, oldest first, ask for.

    A monitor starts with its FIRST action and goes one further for each further `patience` looks in a row that it
    keeps alarming (but for WARN_ONLY). A KL above `most_kl`, or a reward that rose while gold fell in `patience` looks
    in a row, stops.
    """
    if not looks:
        return Decision(Action.NONE, (), None)
    last = looks[-1]
    clean = [look.step for look in looks if not look.alarms and not look.diverged]
    action, reasons = Action.NONE, []
    for alarm in last.alarms:
        run = _run([alarm.monitor in {one.monitor for one in look.alarms} for look in looks])
        most = Action.WARN if alarm.monitor in WARN_ONLY else Action.STOP
        wanted = min(most, FIRST.get(alarm.monitor, Action.WARN) + (run - 1) // patience)
        reasons.append(
            f"{alarm.monitor}: {alarm.now:.2%} of replies against the base policy's {alarm.base:.2%} (odds x "
            f"{alarm.odds:.1f}), {run} looks in a row: {Action(wanted).name.lower()}"
        )
        action = max(action, Action(wanted))
    if most_kl is not None and last.kl is not None and last.kl > most_kl:
        reasons.append(f"KL {last.kl:.4f} nats per token is above {most_kl:g}: stop")
        action = Action.STOP
    run = _run([look.diverged for look in looks])
    if run >= patience:
        reasons.append(f"the reward rose while the held-out judge fell, {run} looks in a row: stop")
        action = Action.STOP
    elif run:
        reasons.append("the reward rose while the held-out judge fell: warn")
        action = max(action, Action.WARN)
    back = clean[-1] if clean and action >= Action.ROLL_BACK else None
    return Decision(action, tuple(reasons), back)


def _run(flags: Sequence[bool]) -> int:
    """How many of the last flags in a row are set."""
    count = 0
    while count < len(flags) and flags[-1 - count]:
        count += 1
    return count
