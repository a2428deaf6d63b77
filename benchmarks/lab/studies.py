"""What single claims ask beyond the candidates: reward models on less and dirtier data, longer replies, more rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lab.candidates import AGGRESSIVE, Candidates, measured, recipe
from lab.composer import train
from lab.features import Judgement, Matrix
from lab.replies import MIDDLES, logged, texts
from lab.simulated_world import MEMBERS, TEST_EVENTS, USERS, Log, Village, brigaded, served
from numpy.typing import NDArray
from scipy.special import expit

from rluf.prepare.signals import rank_signals
from rluf.reward.metrics import auroc, auroc_interval, correlation, hanley_mcneil
from rluf.simulate.ceiling import bayes_auroc
from rluf.simulate.users import Items, Population, act, calibration_shift, expected_love, user_logits
from rluf.simulate.world import WORLD, World

Floats = NDArray[np.float64]
Study = Callable[[Village, Candidates], dict[str, Any]]
SIZES = (1_000, 2_000, 4_000, 8_000)
DIRTY = 8_000
"""Rows of each log with other users."""
ROUNDS, ROUND_ROWS, ROUND_WEIGHT = 1, 4_000, 0.5
WORST = 0.08
"""Share of the users that the filter drops."""
READS = 24_000
"""Rows of the log that signals are chosen on."""
SELECTION = (0.0, 0.5, 1.0, 2.0)
"""Log-odds of coming back for each unit of a user's readiness to react."""
HABIT = (-3.5, 1.5)
"""Log-odds of a thumb that says nothing about the reply: of a plain user, and for each unit of readiness."""


def pages_of(v: Village, log: Log) -> Matrix:
    """A log's replies as models read them."""
    return v.seen(log.place, log.picks)


def chances_of(v: Village, log: Log, *, shift: float = 0.0, world: World = WORLD) -> Floats:
    """True chances [N] of a heart over all users."""
    topics = [v.town.places[one].topic for one in log.place.tolist()]
    return expected_love(v.truth.of(log.place, log.picks), topics, shift=shift, world=world)


def learnable(v: Village, _: Candidates) -> dict[str, Any]:
    """AUROC of P[Love] on later replies against the ceiling, and what its score owes to length (claims 1 and 3)."""
    found: dict[str, Any] = {}
    for name, part, unseen in (("unseen_prompts", 9, True), ("known_prompts", 10, False)):
        log = v.log(TEST_EVENTS, part=part, unseen=unseen)
        score, chances = v.love.logits(pages_of(v, log)), chances_of(v, log)
        ones = np.ones(len(score))
        found[name] = {
            "auroc": auroc_interval(score, log.love, ones, [str(one) for one in log.user]),
            "auroc_of_the_truth": auroc(chances, log.love), "ceiling": bayes_auroc(chances),
            "against_true_chances": auroc(score, chances), "rate": float(log.love.mean()),
            "error": hanley_mcneil(auroc(score, log.love), int(log.love.sum()), int((1 - log.love).sum())),
            "calibration_ratio": float((1 / (1 + np.exp(-score))).mean() / log.love.mean()),
        }  # fmt: skip
        if not unseen:
            continue
        lengths = np.array([len(text.split()) for text in texts(v.town, log.place, log.picks)], float)
        topics = np.array([v.town.places[one].topic for one in log.place.tolist()])
        found["length"] = {
            "score": correlation(score, lengths), "truth": correlation(np.log(chances), lengths),
            "by_topic": {str(topic): correlation(score[topics == topic], lengths[topics == topic])
                         for topic in np.unique(topics)},
            "padding": {MIDDLES[middle]: _padded(v, log, middle) for middle in (1, 2)},
        }  # fmt: skip
    return found


def _padded(v: Village, log: Log, middle: int) -> dict[str, float]:
    """Shift of the mean score, and of the log of the true chance, in sds, when a filler goes into the same replies."""
    moved = []
    for value in (0, middle):
        picks = log.picks.copy()
        picks[:, 2] = value
        one = replace(log, picks=picks)
        moved.append((v.love.logits(pages_of(v, one)), np.log(chances_of(v, one))))
    return {
        name: float((moved[1][n] - moved[0][n]).mean() / moved[0][n].std()) for n, name in ((0, "score"), (1, "truth"))
    }


def size(v: Village, _: Candidates) -> dict[str, Any]:
    """P[Love] learnt from the first rows of the log only (claim 2)."""
    test = v.log(TEST_EVENTS, part=9, unseen=True)
    chances, pages = chances_of(v, test), pages_of(v, test)
    found: dict[str, Any] = {"ceiling": bayes_auroc(chances), "rows": {}}
    for rows in SIZES:
        score = v.reader("love", v.feedback.rows(np.arange(rows)), members=1).logits(pages)
        found["rows"][str(rows)] = {
            "against_true_chances": auroc(score, chances), "auroc": auroc(score, test.love),
            "error": hanley_mcneil(auroc(score, test.love), int(test.love.sum()), int((1 - test.love).sum())),
        }  # fmt: skip
    return found


def noise(v: Village, _: Candidates) -> dict[str, Any]:
    """P[Love] from logs of other worlds: rarer hearts, bots, sarcasm; judged on ordinary users (claim 11)."""
    rng = v.rng(60)
    places = rng.choice(v.places, DIRTY)
    picks = logged(v.town, places, rng)
    golds, topics = v.truth.of(places, picks), [v.town.places[one].topic for one in places.tolist()]
    test = v.log(TEST_EVENTS, part=9, unseen=True)
    honest = brigaded(WORLD, hostile=0.0, sarcastic=0.0)
    chances, pages = chances_of(v, test, world=honest), pages_of(v, test)

    def made(world: World, rate: float) -> Log:
        logits = user_logits(golds, topics, users=60, world=world)
        return served(v.town, v.truth, places, picks, users=USERS // 4, rng=v.rng(61),
                      shift=calibration_shift(logits, rate), world=world)  # fmt: skip

    def judged(one: Judgement) -> float:
        return auroc(one.logits(pages), chances)

    found: dict[str, Any] = {"ceiling": bayes_auroc(chances), "rows": DIRTY, "conditions": {}}
    conditions = {
        "rate 5%": (0.0, 0.0, 0.05), "rate 2%": (0.0, 0.0, 0.02), "rate 0.5%": (0.0, 0.0, 0.005),
        "bots 5%": (0.05, 0.0, 0.05), "bots 10%": (0.1, 0.0, 0.05), "bots 20%": (0.2, 0.0, 0.05),
        "sarcasm 10%": (0.0, 0.1, 0.05),
    }  # fmt: skip
    for name, (hostile, sarcastic, rate) in conditions.items():
        log = made(brigaded(WORLD, hostile=hostile, sarcastic=sarcastic), rate)
        part = {"hearts": int(log.love.sum()), "plain": judged(v.reader("love", log, members=1))}
        if hostile or sarcastic:
            part["filtered"] = judged(v.reader("love", log, members=1, keep=_trusted(v, log)))
        if name == "rate 2%":
            part["all_negatives"] = judged(v.reader("love", log, members=1, share=0.02))
        found["conditions"][name] = part
    return found


def _trusted(v: Village, log: Log) -> NDArray[np.bool_]:
    """Rows [N] of users whose reactions a model trained without them finds likely enough: the worst WORST go."""
    half, surprise = log.user % 2, np.zeros(len(log.love))
    for side in (0, 1):
        model = v.reader("love", log, members=1, keep=half == side)
        rows = np.flatnonzero(half != side)
        p = 1.0 / (1.0 + np.exp(-model.logits(pages_of(v, log.rows(rows)))))
        surprise[rows] = (log.love[rows] - p) * (np.log(p / (1 - p)).mean() - np.log(p / (1 - p)))
    total = np.bincount(log.user, surprise, minlength=USERS) / np.sqrt(np.bincount(log.user, minlength=USERS).clip(1))
    active = np.bincount(log.user, minlength=USERS) > 0
    return np.asarray(total[log.user] <= np.quantile(total[active], 1.0 - WORST))


def refresh(v: Village, c: Candidates) -> dict[str, Any]:
    """Rounds of collecting hearts on the policy's own replies, learning P[Love] and training again (claim 14)."""
    log, love, rounds = v.feedback, v.love, []
    for number in range(ROUNDS + 1):
        run = train(v.town, v.base, v.places, v.signals(love=love), recipe(ROUND_WEIGHT), seed=v.seed)
        result = measured(v, c.of(f"round-{number}", run.policy, love=True), {**v.judgements, "love": love})
        rng = v.rng(70 + number)
        places = rng.choice(v.places, ROUND_ROWS)
        picks = run.policy.sample(torch.as_tensor(places), torch.Generator().manual_seed(v.seed))[0].numpy()
        fresh = served(v.town, v.truth, places, picks, users=USERS, rng=rng)
        result["own_replies"] = {
            "auroc": auroc(love.logits(pages_of(v, fresh)), fresh.love), "ceiling": bayes_auroc(chances_of(v, fresh)),
            "told": float((1 / (1 + np.exp(-love.logits(pages_of(v, fresh))))).mean()),
            "loved": float(fresh.love.mean()),
        }  # fmt: skip
        rounds.append(result)
        if number < ROUNDS:
            merged = {name: np.concatenate([getattr(log, name), getattr(fresh, name)]) for name in Log.__slots__}
            merged["user"] = np.concatenate([log.user, fresh.user + 10 * USERS * (number + 1)])
            log = Log(**merged)
            love = v.reader("love", log, members=MEMBERS)
    return {"weight": ROUND_WEIGHT, "aggressive": AGGRESSIVE, "rounds": rounds}


def choice(v: Village, _: Candidates) -> dict[str, Any]:
    """What `prepare --signals` says of hearts, of writing on, and of thumbs put from habit alone, on logs where who
    reacts readily comes back for that reason, more and more (claim 12). The world itself has no such users, and its
    fingerprint keeps its files as they are: hence who comes back is drawn here, by its numbers.
    """
    rng = v.rng(80)
    places = rng.choice(v.places, READS)
    picks = logged(v.town, places, rng)
    topics = [v.town.places[one].topic for one in places.tolist()]
    items, people = Items.of(v.truth.of(places, picks), topics), Population.draw(USERS, rng)
    activity = rng.gamma(0.8, size=USERS)
    user = rng.choice(USERS, READS, p=activity / activity.sum())
    seen = act(items, people, user, np.arange(READS), rng)
    ready, draws = people.propensity[user], rng.random((2, READS))
    habit = draws[0] < expit(HABIT[0] + HABIT[1] * ready)
    back = (
        WORLD.return_intercept + WORLD.return_satisfaction * items.satisfaction + WORLD.return_signoff * items.signoff
    )
    reaction = np.where(habit, "thumbs_up", np.where(seen.loved, "love", ""))
    columns = {
        "user_id": [str(one) for one in user], "conversation_id": [str(n) for n in range(READS)], "turn": [0] * READS,
        "messages": pa.array([[]] * READS, pa.list_(pa.string())), "response": texts(v.town, places, picks),
        "topic": topics, "locale": ["en"] * READS, "reaction": reaction.tolist(),
        "continued": seen.continued.tolist(),
    }  # fmt: skip
    found = {}
    for strength in SELECTION:
        returned = (draws[1] < expit(back + strength * ready)).tolist()
        found[f"{strength:g}"] = rank_signals(pa.table({**columns, "returned": returned}))
    return {"rows": READS, "strengths": found}


STUDIES: dict[str, Study] = {"learnable": learnable, "size": size, "refresh": refresh, "noise": noise, "choice": choice}
"""Study by name."""
