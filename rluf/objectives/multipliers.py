"""PID multipliers: how hard each floor pushes, given how far the policy is below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PROPORTIONAL = 1.0
INTEGRAL = 0.5
DERIVATIVE = 0.5


@dataclass(slots=True)
class Multipliers:
    """Lagrange multipliers of floors on mean scores, each moved by a PID controller.

    With d = floor - mean (positive below the floor): I = max(0, I + d), and the multiplier is
    max(0, 1.0 d + 0.5 I + 0.5 max(0, d - previous d)). The integral alone is the usual gradient ascent on the
    multiplier; the other two terms damp its oscillation. Source: Stooke et al., arXiv 2007.03964, algorithm 2.
    """

    floors: Mapping[str, float]
    """Floor of an objective's mean, by objective."""
    values: dict[str, float] = field(default_factory=dict)
    """The multipliers now, by objective."""
    integral: dict[str, float] = field(default_factory=dict)
    """Accumulated shortfall, by objective."""
    previous: dict[str, float] = field(default_factory=dict)
    """The last step's shortfall, by objective."""

    def update(self, means: Mapping[str, float]) -> dict[str, float]:
        """Move each multiplier by the step's mean of its objective; an objective without a mean keeps its own."""
        for name, floor in self.floors.items():
            if name not in means:
                self.values.setdefault(name, 0.0)
                continue
            below = floor - means[name]
            rise = max(0.0, below - self.previous.get(name, below))
            self.integral[name] = max(0.0, self.integral.get(name, 0.0) + below)
            self.previous[name] = below
            self.values[name] = max(0.0, PROPORTIONAL * below + INTEGRAL * self.integral[name] + DERIVATIVE * rise)
        return dict(self.values)
