"""An estimate with its 95% interval. The interval of a comparison of policies is computed in two_way.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class IntervalEstimate:
    """A point estimate with its interval; `low` <= `mean` <= `high`."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, as written to summary.json."""
        return asdict(self)
