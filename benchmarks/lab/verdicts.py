"""Verdicts over seeds: pass, undecided or fail by the interval of the mean over seeds, and the table of one claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from rluf.evaluate.intervals import CONFIDENCE_LEVEL, IntervalEstimate

Verdict = Literal["pass", "undecided", "fail"]
MIN_SEEDS = 4
"""With fewer seeds no claim is decided."""


def average_seeds(values: Sequence[float], *, comparisons: int = 1) -> IntervalEstimate:
    """Mean over seeds with its 95% interval (Student's t); `comparisons` widens it by Bonferroni's correction."""
    if not values:
        return IntervalEstimate(math.nan, -math.inf, math.inf)
    mean = float(np.mean(values))
    if len(values) < 2:
        return IntervalEstimate(mean, -math.inf, math.inf)
    quantile = float(stats.t.ppf(1.0 - (1.0 - CONFIDENCE_LEVEL) / 2.0 / comparisons, len(values) - 1))
    margin = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return IntervalEstimate(mean, mean - margin, mean + margin)


def average_ratios(ratios: Iterable[float], *, comparisons: int = 1) -> IntervalEstimate:
    """Geometric mean over seeds of positive ratios, as a relative change, with its interval."""
    estimate = average_seeds([math.log(ratio) for ratio in ratios], comparisons=comparisons)
    # numpy's expm1, unlike that of math, allows infinite limits.
    return IntervalEstimate(*np.expm1((estimate.mean, estimate.low, estimate.high)).tolist())


@dataclass(frozen=True, slots=True)
class Check:
    """One condition: the estimate over `seed_count` seeds must be at least `bound`, or at most if `is_upper`."""

    label: str
    estimate: IntervalEstimate
    bound: float
    seed_count: int
    is_upper: bool = False
    is_percent: bool = True

    @property
    def verdict(self) -> Verdict:
        """Pass if the whole interval meets the bound, fail if none of it does."""
        if self.seed_count < MIN_SEEDS:
            return "undecided"
        low, high, bound = self.estimate.low, self.estimate.high, self.bound
        if self.is_upper:
            low, high, bound = -high, -low, -bound
        return "pass" if low >= bound else "fail" if high < bound else "undecided"

    def format_row(self) -> list[str]:
        """Cells: condition, estimate, verdict."""
        relation = "at most" if self.is_upper else "at least"
        bound = f"{self.bound:+.0%}" if self.is_percent else f"{self.bound:g}"
        return [f"{self.label} {relation} {bound}", format_estimate(self.estimate, self.is_percent), self.verdict]


def combine_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """All must pass (intersection-union test): fail if any fails."""
    return "fail" if "fail" in verdicts else "undecided" if "undecided" in verdicts or not verdicts else "pass"


def combine_alternatives(verdicts: Sequence[Verdict]) -> Verdict:
    """One must pass: fail only if all fail. Their intervals must be corrected for the number of alternatives."""
    return "pass" if "pass" in verdicts else "undecided" if "undecided" in verdicts or not verdicts else "fail"


def format_estimate(estimate: IntervalEstimate, is_percent: bool = True) -> str:
    """Estimate with its interval."""
    numbers = (estimate.mean, estimate.low, estimate.high)
    mean, low, high = (f"{number:+.1%}" if is_percent else f"{number:+.3f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim over seeds: its conditions, further rows of a table, and remarks."""

    title: str
    checks: Sequence[Check] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()
    decided: Verdict | None = None
    """The verdict where it is not that of `checks`."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of the claim."""
        return self.decided or combine_verdicts([check.verdict for check in self.checks])
