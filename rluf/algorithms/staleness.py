"""Admission of prompt groups: how many may start now, given the staleness allowed when a batch is trained on."""

from __future__ import annotations


def compute_admission_capacity(
    *,
    concurrency: int,
    running_groups: int,
    accepted_groups: int,
    weight_version: int,
    groups_per_step: int,
    max_staleness: int,
) -> int:
    """Groups that may start now: min(concurrency - running, (staleness + version + 1) * batch - (accepted + running)).

    `concurrency` is the number of groups the engines run at once, `running_groups` those being generated or scored,
    `accepted_groups` those finished since the run began, `weight_version` the optimizer steps done, `groups_per_step`
    the groups of a step. Never negative. Source: AReaL, arXiv 2505.24298, section 5.1.
    """
    free_slots = concurrency - running_groups
    # A group that starts now is trained on at version (accepted + running) // batch; this bound keeps that within
    # max_staleness versions of now. With 0 nothing of the next batch starts before this version exists (synchronous).
    allowed_by_staleness = (max_staleness + weight_version + 1) * groups_per_step - (accepted_groups + running_groups)
    return max(0, min(free_slots, allowed_by_staleness))
