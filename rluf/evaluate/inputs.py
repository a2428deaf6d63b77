"""What a job that compares policies needs, checked before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rluf.artifacts import check_inputs
from rluf.errors import DataError

if TYPE_CHECKING:
    from rluf.config.settings import Settings


def check_comparison_inputs(settings: Settings, *, may_download: bool = False) -> None:
    """check_inputs, and the monitors and prompts of a comparison. Raises RlufError."""
    check_inputs(settings, may_download=may_download)
    if not settings.data.prompts:
        raise DataError("data.prompts is empty; name a file of prompts, on which policies are trained and compared")
    if settings.evaluate.monitors:  # scikit-learn, which monitors import, is slow to load
        from rluf.evaluate.monitors import add_monitors

        add_monitors(settings.evaluate.monitors)
