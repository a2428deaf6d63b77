"""What the user did next: reactions that were logged apart, next turns, and coming back. Arrays in, arrays out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

HOUR = 3_600_000_000
"""An hour in microseconds, the unit of all times here."""

_APART = 6 * HOUR
"""A user who is seen again only after this has come back; before it the visit goes on."""


@dataclass(frozen=True, slots=True)
class Events:
    """E reaction events in the order of the log: keys of event and response, time, code of the name, retracted."""

    event: Keys
    response: Keys
    time: Ints
    name: Ints
    retracted: Bools


@dataclass(frozen=True, slots=True)
class Attributed:
    """Reactions that hold and reactions that were taken back, as rows and names of equal length, and the events' fates.

    `fate` counts every event but those that hold.
    """

    row: Ints
    name: Ints
    back_row: Ints
    back_name: Ints
    fate: Counter[str]


def attribute(events: Events, response: Keys, time: Ints, window: int) -> Attributed:
    """Which reactions hold for the rows, whose `response` keys and `time` are [N].

    Of events with one id the first counts; an event before its response or more than `window` microseconds after it
    does not; of the events of one response and name the latest says whether the reaction holds (a retraction ends it;
    at one instant the retraction is the later).
    """
    fate: Counter[str] = Counter()
    _, first = np.unique(events.event, return_index=True)
    fate["duplicate event"] = len(events.event) - len(first)
    if not len(response):
        fate["no such response"] = len(first)
        none = np.empty(0, dtype=np.int64)
        return Attributed(none, none, none, none, fate)
    order = np.argsort(response, kind="stable")
    place = np.minimum(np.searchsorted(response[order], events.response[first]), len(order) - 1)
    row = order[place]
    known = response[row] == events.response[first]
    fate["no such response"] = int((~known).sum())
    first, row = first[known], row[known]
    lag = events.time[first] - time[row]
    inside = (lag >= 0) & (lag <= window)
    fate["outside the attribution window"] = int((~inside).sum())
    first, row = first[inside], row[inside]
    name, gone = events.name[first], events.retracted[first]
    late = np.lexsort((gone, events.time[first], name, row))
    row, name, gone = row[late], name[late], gone[late]
    last = np.ones(len(row), dtype=np.bool_)
    last[:-1] = (row[1:] != row[:-1]) | (name[1:] != name[:-1])
    fate["superseded by a later event"] = int((~last).sum())
    fate["retracted"] = int((last & gone).sum())
    hold, back = last & ~gone, last & gone
    return Attributed(row[hold], name[hold], row[back], name[back], fate)


def written_on(conversation: Keys, turn: Ints, time: Ints) -> tuple[Bools, Bools]:
    """Whether a later row of the conversation follows [N], and whether the log can tell [N].

    A log in which every conversation has one row tells nothing; nor does the end of the log, where the answer may yet
    come (the last six hours).
    """
    order = np.lexsort((time, turn, conversation))
    follows = np.zeros(len(turn), dtype=np.bool_)
    same = conversation[order][1:] == conversation[order][:-1]
    follows[order[:-1]] = same & (turn[order][1:] > turn[order][:-1])
    tells = np.full(len(turn), bool(same.any())) & ((time <= (time.max(initial=0) - _APART)) | follows)
    return follows, tells


def came_back(user: Ints, time: Ints, days: float) -> tuple[Bools, Bools]:
    """Whether the user is seen again six hours to `days` later [N], and whether the log can tell [N]."""
    span = int(days * 24 * HOUR)
    order = np.lexsort((time, user))
    who, when = user[order], time[order]
    offset = np.int64(when.max(initial=0) - when.min(initial=0) + span + 2 * _APART)
    line = who * offset + (when - when.min(initial=0))  # one axis on which users do not overlap
    next_one = np.searchsorted(line, line + _APART, side="left")
    back = np.zeros(len(user), dtype=np.bool_)
    there = next_one < len(line)
    back[order[there]] = line[next_one[there]] <= line[there] + span
    return back, back | (time + span <= time.max(initial=0))
