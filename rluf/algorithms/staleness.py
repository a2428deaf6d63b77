"""How many prompt groups may be sent out now, given how old a batch is allowed to be when it is learnt from."""

from __future__ import annotations


def capacity(*, concurrency: int, running: int, accepted: int, version: int, batch: int, staleness: int) -> int:
    """Groups that may start now: min(concurrency - running, (staleness + version + 1) * batch - (accepted + running)).

    `concurrency` is how many groups the engines take at once, `running` how many are being generated or scored,
    `accepted` how many finished since the run began, `version` the optimiser steps done, `batch` the groups a step
    takes. A group that starts now is learnt from at version (accepted + running) // batch; the second term keeps that
    within `staleness` versions of now. Staleness 0 is synchronous: nothing of the next batch starts before this
    version exists. Never negative. Source: AReaL, arXiv 2505.24298, section 5.1.
    """
    free = concurrency - running
    fresh = (staleness + version + 1) * batch - (accepted + running)
    return max(0, min(free, fresh))
