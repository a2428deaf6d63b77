"""One point of a sweep's grid."""

from __future__ import annotations

from typing import NamedTuple


class GridPoint(NamedTuple):
    """Love weight and KL coefficient (None: unchanged), seed, and the overrides key=value of --grid."""

    love_weight: float | None
    kl_coef: float | None
    seed: int
    grid_overrides: tuple[str, ...] = ()

    @property
    def setting_name(self) -> str:
        """Name of the point without its seed: "love 0.1, KL 0.02, learner.learning_rate=1e-06"."""
        names = [] if self.love_weight is None else [f"love {self.love_weight:g}"]
        names += [] if self.kl_coef is None else [f"KL {self.kl_coef:g}"]
        return ", ".join([*names, *self.grid_overrides])
