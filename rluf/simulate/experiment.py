"""A/B test in the simulated world: one population, a pre-period on the control, then the responses of each arm.

For testing the statistics on a log with known truth. The caller assigns every user to one arm.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rluf.simulate.ground_truth import Reader, ReaderInput
from rluf.simulate.log import ACTIVITY_SHAPE, FIRST_DAY, Row
from rluf.simulate.users import ResponseFeatures, SimulatedReactions, UserPopulation, simulate_reactions


def read_served_responses(log_path: Path, model_versions: Sequence[str]) -> list[list[Row]]:
    """Distinct responses of each model version in a gzipped feedback log, in order of first occurrence."""
    responses: dict[str, dict[tuple[str, str], Row]] = {version: {} for version in model_versions}
    with gzip.open(log_path, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            if row["model_version"] in responses:
                key = (row["messages"][-1]["content"], row["response"])
                responses[row["model_version"]].setdefault(key, row)
    return [list(rows.values()) for rows in responses.values()]


def simulate_experiment_rows(
    arm_responses: Mapping[str, Sequence[Row]],
    arm_of_user: NDArray[np.int64],
    *,
    user_ids: Sequence[str],
    days: int,
    pre_days: int,
    reads_per_day: float,
    seed: int,
    reader: Reader,
) -> list[Row]:
    """Simulate FeedbackRecord rows with an `arm`, in time order.

    `arm_responses` maps an arm to rows with messages, topic and response that its policy may serve; the first arm is
    the control. `arm_of_user` [U] are arm indices. In the first `pre_days` days all users read the control.
    """
    arm_names = list(arm_responses)
    rows = [row for name in arm_names for row in arm_responses[name]]
    truths = reader.score_responses([ReaderInput.from_row(row) for row in rows])
    features = ResponseFeatures.from_truths(truths, [row["topic"] for row in rows])
    ends = np.cumsum([len(arm_responses[name]) for name in arm_names])
    starts = ends - [len(arm_responses[name]) for name in arm_names]
    rng = np.random.default_rng([seed, 15_485_863])
    population = UserPopulation.sample(len(user_ids), rng)
    # A gamma rate and Poisson reads make counts negative binomial: some users read much more than others.
    activity = rng.gamma(ACTIVITY_SHAPE, reads_per_day / ACTIVITY_SHAPE, len(user_ids))
    read_counts = rng.poisson(activity[:, None], (len(user_ids), pre_days + days))
    user, day = (
        np.repeat(grid, read_counts.ravel()) for grid in np.divmod(np.arange(read_counts.size), pre_days + days)
    )
    seconds = day * 86_400 + rng.integers(0, 86_400, len(user))
    order = np.argsort(seconds, kind="stable")
    user, seconds = user[order], seconds[order]
    # In the pre-period all users read the control (arm 0).
    arm_index = np.where(seconds < pre_days * 86_400, 0, arm_of_user[user])
    # A uniform response of the arm: its rows are contiguous in `rows` from `starts`.
    item = starts[arm_index] + np.floor(rng.random(len(user)) * (ends - starts)[arm_index]).astype(np.int64)
    reactions = simulate_reactions(features, population, user, item, rng)
    return [
        _build_event_row(rows[item[n]], n, user_ids[user[n]], arm_names[arm_index[n]], int(seconds[n]), reactions)
        for n in range(len(user))
    ]


def _build_event_row(
    response: Row, index: int, user_id: str, arm: str, seconds: int, reactions: SimulatedReactions
) -> Row:
    return {
        "id": f"event-{index:07d}", "conversation_id": f"conversation-{index:07d}", "turn": 1, "user_id": user_id,
        "time": (FIRST_DAY + timedelta(seconds=seconds)).isoformat(), "model_version": response["model_version"],
        "arm": arm, "messages": response["messages"], "response": response["response"],
        "reaction": "love" if reactions.loved[index] else None, "continued": bool(reactions.continued[index]),
        "returned": bool(reactions.returned[index]), "topic": response["topic"], "locale": "en",
    }  # fmt: skip
