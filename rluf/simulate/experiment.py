"""An A/B test in the simulated world: one population, a pre-period on the control, then each arm's own responses.

For trying the statistics on a log whose truth is known. Every user is split by the caller and stays in one arm.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.simulate.ground_truth import Gold, judge
from rluf.simulate.log import ACTIVITY_SHAPE, FIRST_DAY, Row
from rluf.simulate.users import Items, Population, Reactions, act

ENDINGS = (".", "!", "?", '"', "”")


def read_served(log: Path, versions: Sequence[str]) -> list[list[Row]]:
    """Each model version's distinct responses in a gzipped feedback log, in the order they came."""
    served: dict[str, dict[tuple[str, str], Row]] = {version: {} for version in versions}
    with gzip.open(log, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            if row["model_version"] in served:
                served[row["model_version"]].setdefault((row["messages"][-1]["content"], row["response"]), row)
    return [list(rows.values()) for rows in served.values()]


def gold_of(row: Mapping[str, Any]) -> Gold:
    """Hidden truth about a logged row (messages, topic, response).

    The log does not say whether a response was cut, so one that ends no sentence counts as cut.
    """
    return judge(row["messages"], row["topic"], row["response"], row["response"].endswith(ENDINGS))


def experiment_rows(
    served: Mapping[str, Sequence[Row]],
    arm_of: NDArray[np.int64],
    *,
    names: Sequence[str],
    days: int,
    pre_days: int,
    reads_per_day: float,
    seed: int,
) -> list[Row]:
    """FeedbackRecord rows with an `arm`, in the order of time.

    `served` maps an arm to rows with messages, topic and response that its policy may serve; the first arm is the
    control. `names` are the users, `arm_of` [U] their arms. In the first `pre_days` days everyone reads the control.
    """
    labels = list(served)
    rows = [row for label in labels for row in served[label]]
    golds = [gold_of(row) for row in rows]
    items = Items.of(golds, [row["topic"] for row in rows])
    ends = np.cumsum([len(served[label]) for label in labels])
    starts = ends - [len(served[label]) for label in labels]
    rng = np.random.default_rng([seed, 15_485_863])
    people = Population.draw(len(names), rng)
    activity = rng.gamma(ACTIVITY_SHAPE, reads_per_day / ACTIVITY_SHAPE, len(names))
    count = rng.poisson(activity[:, None], (len(names), pre_days + days))
    user, day = (np.repeat(grid, count.ravel()) for grid in np.divmod(np.arange(count.size), pre_days + days))
    seconds = day * 86_400 + rng.integers(0, 86_400, len(user))
    order = np.argsort(seconds, kind="stable")
    user, seconds = user[order], seconds[order]
    arm = np.where(seconds < pre_days * 86_400, 0, arm_of[user])
    item = starts[arm] + np.floor(rng.random(len(user)) * (ends - starts)[arm]).astype(np.int64)
    seen = act(items, people, user, item, rng)
    return [_row(rows[item[n]], n, names[user[n]], labels[arm[n]], int(seconds[n]), seen) for n in range(len(user))]


def _row(response: Row, n: int, user: str, arm: str, seconds: int, seen: Reactions) -> Row:
    return {
        "id": f"event-{n:07d}",
        "conversation_id": f"conversation-{n:07d}",
        "turn": 1,
        "user_id": user,
        "time": (FIRST_DAY + timedelta(seconds=seconds)).isoformat(),
        "model_version": response["model_version"],
        "arm": arm,
        "messages": response["messages"],
        "response": response["response"],
        "reaction": "love" if seen.loved[n] else None,
        "continued": bool(seen.continued[n]),
        "returned": bool(seen.returned[n]),
        "topic": response["topic"],
        "locale": "en",
    }
