"""Verification of a weight sync: compare learner and engine logprobs of the same responses before and after it.

An engine differs from the learner by rounding even when its weights are right, and a failed sync can look much like
that: an engine with the previous weights differs by one small update. Hence three tests: whether the gap is above the
tolerance, whether it grew far beyond all earlier gaps, and whether the learner's logprobs moved while the engine's did
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

GAP_JUMP_FACTOR = 2.5
"""A gap above this multiple of the largest one so far is not rounding; runs of SmolLM2-135M stayed below 1.3."""
ROUNDING_GAP_NATS = 1e-3
"""Nats per token below which a gap is never called a jump."""
MIN_FOLLOW_SHARE = 0.1
"""An engine whose logprobs moved by less than this share of the learner's move has not followed it."""


@dataclass(frozen=True, slots=True)
class ProbeLogprobs:
    """Logprobs of the same response tokens (nats) by the learner and by one engine, at temperature 1."""

    learner_logprobs: tuple[float, ...]
    engine_logprobs: tuple[float, ...]

    @property
    def mean_gap(self) -> float:
        """Mean absolute difference per token in nats."""
        return compute_mean_gap(self.learner_logprobs, self.engine_logprobs)


def compute_mean_gap(first_logprobs: Sequence[float], second_logprobs: Sequence[float]) -> float:
    """Mean absolute difference per token in nats."""
    return fmean(abs(first - second) for first, second in zip(first_logprobs, second_logprobs, strict=True))


def find_sync_problem(before: ProbeLogprobs, after: ProbeLogprobs, worst_gap: float, tolerance: float) -> str | None:
    """Describe what is wrong with an engine after a weight sync; None if the checks pass.

    `before` was measured when the engine had the learner's weights of that time; `worst_gap` is the largest gap of any
    engine so far, `tolerance` the largest one allowed. Only the gaps are tested if the learner's logprobs did not
    change.
    """
    # Negated, so that a NaN gap fails too.
    if not after.mean_gap <= tolerance:
        return (
            f"mean |logprob difference| is {after.mean_gap:.4f} nats per token, above weight_sync.logprob_tolerance="
            f"{tolerance:g}; the engine has wrong weights, or the tolerance is too tight for this dtype"
        )
    max_gap = max(GAP_JUMP_FACTOR * worst_gap, ROUNDING_GAP_NATS)
    if after.mean_gap > max_gap:
        return (
            f"mean |logprob difference| jumped to {after.mean_gap:.4f} nats per token, from at most {worst_gap:.4f}; "
            "the engine has wrong weights"
        )
    learner_move = compute_mean_gap(before.learner_logprobs, after.learner_logprobs)
    engine_move = compute_mean_gap(before.engine_logprobs, after.engine_logprobs)
    if engine_move < MIN_FOLLOW_SHARE * learner_move:
        return (
            f"the learner's logprobs moved by {learner_move:.2g} nats per token and the engine's by {engine_move:.2g}; "
            "the engine still has its previous weights"
        )
    return None
