"""Whether a publish arrived: what the learner and an engine say of the same responses, before it and after it.

An engine differs from the learner by rounding even when its weights are right, and a wrong sync can look much like
that: an engine that kept its old weights is off by one small update only. So there are three questions. Are they
further apart than allowed? Are they suddenly much further apart than they ever were? Did the learner move while the
engine stood still?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

JUMP = 2.5
"""How many times the largest gap seen so far is no rounding any more; runs of SmolLM2-135M stayed below 1.3."""
ROUNDING = 1e-3
"""Nats a token below which a gap is never called a jump."""
STILL = 0.1
"""An engine that moved less than this share of the learner's move stood still."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Logprobs of the same response tokens (nats) by the learner and by one engine, at temperature 1."""

    learner: tuple[float, ...]
    engine: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Mean absolute difference a token."""
        return distance(self.learner, self.engine)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference a token in nats."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def sync_problem(before: Reading, after: Reading, worst: float, tolerance: float) -> str | None:
    """What is wrong with an engine after a publish, in words; None if nothing shows.

    `before` was read when the engine held the weights that the learner had then; `worst` is the largest gap of any
    engine so far, `tolerance` the largest one allowed. A learner whose logprobs did not change can prove nothing.
    """
    if not after.gap <= tolerance:
        return (
            f"mean |logprob difference| is {after.gap:.4f} nats a token, publish.probe_tolerance is {tolerance:g}; the "
            "engine holds wrong weights, or the tolerance is too tight for this dtype"
        )
    limit = max(JUMP * worst, ROUNDING)
    if after.gap > limit:
        return (
            f"mean |logprob difference| jumped to {after.gap:.4f} nats a token, having been at most {worst:.4f}; the "
            "engine holds wrong weights"
        )
    moved, followed = distance(before.learner, after.learner), distance(before.engine, after.engine)
    if followed < STILL * moved:
        return (
            f"the learner's logprobs moved by {moved:.2g} nats a token and the engine's by {followed:.2g}; the engine "
            "kept its old weights"
        )
    return None
