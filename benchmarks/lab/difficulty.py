"""Bayes ceiling of predicting hearts from text, and worlds calibrated to a given ceiling.

Users differ in traits that no text shows, so even the true model cannot rank hearts without error. With p(y) the
probability of a heart on response y over all users, the score p(y) itself has the best possible AUROC (Neyman and
Pearson 1933): that of positives weighted by p and negatives weighted by 1 - p, which needs no labels. Calibration
scales the effects of the text (SimulatedWorld.love_sharpness) until the ceiling, at a given love rate, has the
requested value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.reward.metrics import auroc
from rluf.simulate.ground_truth import GroundTruth, ReaderInput, load_reader
from rluf.simulate.log import ACTIVITY_SHAPE
from rluf.simulate.users import (
    ResponseFeatures,
    UserPopulation,
    find_logit_shift,
    love_logits_by_user,
    simulate_reactions,
)
from rluf.simulate.world import WORLD, SimulatedWorld
from rluf.utils.paths import resolve_cache_folder

Floats = NDArray[np.float64]
MAX_SHARPNESS = 8.0
"""Maximum sharpness of the search."""
CEILING_TOLERANCE = 1e-4
"""Accepted distance from the requested ceiling."""


@dataclass(frozen=True, slots=True)
class CalibratedWorld:
    """A world of known difficulty.

    `logit_shift` is added to the log-odds of every heart to give the requested love rate; `love_probabilities` [I] are
    the true probabilities of the responses it was calibrated on, and `auroc_ceiling` is the best AUROC they allow.
    """

    world: SimulatedWorld
    logit_shift: float
    auroc_ceiling: float
    love_probabilities: Floats


def bayes_auroc(love_probabilities: Floats) -> float:
    """Best AUROC of any score of the text if response i is loved with probability `love_probabilities[i]` [I]."""
    return auroc(love_probabilities, love_probabilities)


def score_rows(rows: Sequence[Mapping[str, Any]]) -> list[GroundTruth]:
    """Ground truth of logged rows; the model reads those that are not in the sample log."""
    reader = load_reader(resolve_cache_folder(Settings()))
    return reader.score_responses([ReaderInput.from_row(row) for row in rows])


def calibrate_world(
    rows: Sequence[Mapping[str, Any]],
    *,
    love_rate: float,
    auroc_ceiling: float | None = None,
    world: SimulatedWorld = WORLD,
    user_count: int = 200,
    seed: int = 0,
) -> CalibratedWorld:
    """Calibrate the world so that `rows` (messages, topic, response) have this love rate and AUROC ceiling.

    Without `auroc_ceiling` the sharpness is unchanged, and the ceiling is only measured. DataError if no sharpness up
    to MAX_SHARPNESS reaches it on these rows.
    """
    truths, topics = score_rows(rows), [str(row["topic"]) for row in rows]

    def calibrate_at(sharpness: float) -> CalibratedWorld:
        candidate = replace(world, love_sharpness=sharpness)
        logits = love_logits_by_user(truths, topics, user_count=user_count, seed=seed, world=candidate)
        logit_shift = find_logit_shift(logits, love_rate)
        love_probabilities = expit(logits + logit_shift).mean(axis=0)
        return CalibratedWorld(candidate, logit_shift, bayes_auroc(love_probabilities), love_probabilities)

    if auroc_ceiling is None:
        return calibrate_at(world.love_sharpness)
    low, high = 0.0, MAX_SHARPNESS
    sharpest = calibrate_at(high)
    if not 0.5 < auroc_ceiling <= sharpest.auroc_ceiling:
        raise DataError(
            f"an AUROC ceiling of {auroc_ceiling:g} is out of reach on these rows; choose a value above 0.5 and up to "
            f"{sharpest.auroc_ceiling:.3f}"
        )
    # The ceiling rises with sharpness, so bisection applies.
    calibrated = sharpest
    while abs(calibrated.auroc_ceiling - auroc_ceiling) > CEILING_TOLERANCE and high - low > 1e-6:
        sharpness = (low + high) / 2
        calibrated = calibrate_at(sharpness)
        low, high = (sharpness, high) if calibrated.auroc_ceiling < auroc_ceiling else (low, sharpness)
    return calibrated


def relabel_rows(
    rows: Sequence[Mapping[str, Any]], calibrated: CalibratedWorld, *, user_count: int, seed: int
) -> list[dict[str, Any]]:
    """Copy `rows` with new users of the calibrated world: new user_id, reaction, continued and returned.

    Some users read much more than others. Equal arguments give equal rows.
    """
    rng = np.random.default_rng([seed, 32_452_843])
    features = ResponseFeatures.from_truths(score_rows(rows), [str(row["topic"]) for row in rows])
    population = UserPopulation.sample(user_count, rng, calibrated.world)
    activity = rng.gamma(ACTIVITY_SHAPE, size=user_count)
    user = rng.choice(user_count, len(rows), p=activity / activity.sum())
    reactions = simulate_reactions(
        features, population, user, np.arange(len(rows)), rng, shift=calibrated.logit_shift, world=calibrated.world
    )
    return [
        {
            **row,
            "user_id": f"user-{seed}-{user[n]}",
            "reaction": "love" if reactions.loved[n] else None,
            "continued": bool(reactions.continued[n]),
            "returned": bool(reactions.returned[n]),
        }
        for n, row in enumerate(rows)
    ]
