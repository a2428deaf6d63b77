"""Strict splits: what has to go so that no conversation, near-duplicate prompt or moment stands on two sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rluf.prepare.splits import units

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

TEST = 2
"""Code of the test side; train is 0, dev 1."""


def _spans(group: Ints, values: Ints) -> tuple[Ints, Ints]:
    """Smallest and largest value of each row's group [N]."""
    count = int(group.max(initial=-1)) + 1
    low = np.full(count, np.iinfo(np.int64).max)
    high = np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(low, group, values)
    np.maximum.at(high, group, values)
    return low[group], high[group]


def talk_apart(conversation: Keys, side: Ints, time: Ints) -> Bools:
    """Rows [N] to drop because their conversation, shared by users, stands on the side of its first row."""
    order = np.lexsort((time, conversation))
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = conversation[order][1:] != conversation[order][:-1]
    first = side[order][starts][np.cumsum(starts) - 1]
    away = np.zeros(len(order), dtype=np.bool_)
    away[order] = side[order] != first
    return away


def time_apart(conversation: Keys, side: Ints, time: Ints, test_share: float) -> tuple[Bools, Bools, int]:
    """Rows [N] to drop so that test is strictly later: (train or dev rows too late, test rows too early, the moment).

    The moment has twice `test_share` of all rows after it: test then keeps some 2 x test_share of its rows, train
    1 - 2 x test_share. A conversation that lasts across it goes whole.
    """
    _, talk = np.unique(conversation, return_inverse=True)
    begin, end = _spans(talk, time)
    moment = int(np.quantile(time, 1 - min(2 * test_share, 0.5), method="higher"))
    return (side != TEST) & (end >= moment), (side == TEST) & (begin < moment), moment


def prompts_apart(group: Ints, prompt: Keys, side: Ints, kept_out: Ints, dev_share: float, test_share: float) -> Bools:
    """Rows [N] to drop so that each group of near-duplicate prompts stands on one side.

    A group on several sides goes where the hash of its lowest prompt key says; one in `kept_out` (test prompts of
    data.prompts) goes to test, and its rows elsewhere are dropped even where it is on one side only.
    """
    low, high = _spans(group, side)
    count = int(group.max(initial=-1)) + 1
    lowest = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, group, prompt)
    point = units(lowest)[group]
    goal = np.where(point < test_share, TEST, np.where(point < test_share + dev_share, 1, 0))
    goal = np.where(low == high, side, goal)
    goal = np.where(_has(group, side, goal), goal, low)
    goal = np.where(np.isin(group, kept_out), TEST, goal)
    found: Bools = side != goal
    return found


def _has(group: Ints, side: Ints, goal: Ints) -> Bools:
    """Whether some row of the group [N] is on its goal's side: else the goal would empty the group."""
    found: Bools = np.isin(group * 4 + goal, group * 4 + side)
    return found
