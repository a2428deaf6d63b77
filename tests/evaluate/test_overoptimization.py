"""Overoptimization curve: exact data give exact parameters, and a turn is reported only if significant."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.overoptimization import best_of_n_kl, fit_curve, gold_score_curve

from rluf.errors import DataError


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_exact_data_give_exact_parameters(form: str) -> None:
    kl_values = np.linspace(0.5, 60, 12)
    curve = fit_curve(kl_values, gold_score_curve(np.sqrt(kl_values), 1.2, 0.25, form), form=form)  # type: ignore[arg-type]
    assert (curve.a, curve.b, curve.r2) == (pytest.approx(1.2), pytest.approx(0.25), pytest.approx(1.0))
    assert curve.peak == pytest.approx(np.exp(1.2 / 0.25 - 1) if form == "rl" else 1.2 / 0.5)


def test_the_peak_is_where_the_curve_is_highest() -> None:
    distance = np.linspace(0.1, 12, 20_000)
    curve = fit_curve(distance[::1000] ** 2, gold_score_curve(distance[::1000], 1.0, 0.6))
    assert curve.peak == pytest.approx(distance[np.argmax(gold_score_curve(distance, 1.0, 0.6))], abs=1e-3)
    assert curve.peak_kl == pytest.approx(curve.peak**2)
    assert curve.turned


def test_a_rising_curve_has_not_turned() -> None:
    rng = np.random.default_rng(0)
    kl_values = np.linspace(0.2, 4, 10)
    curve = fit_curve(
        kl_values,
        gold_score_curve(np.sqrt(kl_values), 1.0, 0.3) + rng.normal(0, 0.01, 10),
        standard_errors=np.full(10, 0.01),
    )
    assert not curve.turned
    assert abs(curve.b - 0.3) < 4 * curve.b_se


def test_standard_errors_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    kl_values = np.linspace(0.2, 30, 15)
    truth = gold_score_curve(np.sqrt(kl_values), 1.0, 0.4)
    curves = [
        fit_curve(kl_values, truth + rng.normal(0, 0.1, 15), standard_errors=np.full(15, 0.1)) for _ in range(300)
    ]
    assert np.mean([abs(curve.b - 0.4) < 1.96 * curve.b_se for curve in curves]) == pytest.approx(0.95, abs=0.04)


def test_best_of_n_kl_and_too_few_policies() -> None:
    assert best_of_n_kl([1, 4]).tolist() == pytest.approx([0.0, np.log(4) - 0.75])
    with pytest.raises(DataError, match="3 policies"):
        fit_curve([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="different KL"):
        fit_curve([1.0] * 5, [1.0] * 5)
