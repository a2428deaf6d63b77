"""A small run of benchmarks/ceiling.py: P[Love] on a log whose chance of a heart is known for each row."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ceiling
from rluf.config.load import load_settings


@pytest.mark.slow
def test_a_small_log_is_learnt_near_its_ceiling_calibrated_and_without_the_farewells(tmp_path: Path) -> None:
    """A fifteenth of the benchmark's rows at five times its rate of hearts, so the bounds are wider."""
    settings = load_settings(None, ceiling.DEFAULTS).settings
    found = ceiling.run(4000, 1, settings, tmp_path, rate=0.05)
    assert 0.6 < found["ceiling_without_farewells"] <= found["ceiling"] < 0.9
    assert found["gap"] < 0.08
    assert found["ece"] < 0.03
    assert abs(found["score_length_r"]) < 0.25
    assert all(abs(shift) < 0.35 for shift in found["sign_off_shift_sd"].values())
