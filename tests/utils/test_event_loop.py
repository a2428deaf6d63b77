"""Coroutines run to their end with or without a running loop, and cycles are collected rarely meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from rluf.utils.event_loop import RARE_COLLECTION_THRESHOLDS, collect_garbage_rarely, run_coroutine


async def return_value() -> int:
    await asyncio.sleep(0)
    return 7


def test_a_coroutine_runs_without_a_loop() -> None:
    assert run_coroutine(return_value()) == 7


async def test_a_coroutine_runs_next_to_a_running_loop() -> None:
    assert run_coroutine(return_value()) == 7


class Node:
    """An object that refers to itself, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_collections_are_rare_in_the_block_and_as_before_after_it() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ValueError, match="stop"), collect_garbage_rarely():
        assert gc.get_threshold() == RARE_COLLECTION_THRESHOLDS and gc.get_freeze_count() > frozen
        reference = weakref.ref(Node())
        gc.collect()
        assert reference() is None, "cycles made in the block are still collected"
        raise ValueError("stop")
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0
