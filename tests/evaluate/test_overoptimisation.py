"""The curve of gold against distance: exact data give exact numbers back, and the turn is told when it is sure."""

from __future__ import annotations

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.evaluate.overoptimisation import best_of_n_kl, fit, gold


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_exact_data_give_the_numbers_back(form: str) -> None:
    kl = np.linspace(0.5, 60, 12)
    found = fit(kl, gold(np.sqrt(kl), 1.2, 0.25, form), form=form)  # type: ignore[arg-type]
    assert (found.a, found.b, found.r2) == (pytest.approx(1.2), pytest.approx(0.25), pytest.approx(1.0))
    assert found.peak == pytest.approx(np.exp(1.2 / 0.25 - 1) if form == "rl" else 1.2 / 0.5)


def test_the_peak_is_where_the_curve_is_highest() -> None:
    d = np.linspace(0.1, 12, 20_000)
    found = fit(d[::1000] ** 2, gold(d[::1000], 1.0, 0.6))
    assert found.peak == pytest.approx(d[np.argmax(gold(d, 1.0, 0.6))], abs=1e-3)
    assert found.peak_kl == pytest.approx(found.peak**2)
    assert found.turned


def test_a_rising_curve_has_not_turned() -> None:
    rng = np.random.default_rng(0)
    kl = np.linspace(0.2, 4, 10)
    found = fit(kl, gold(np.sqrt(kl), 1.0, 0.3) + rng.normal(0, 0.01, 10), errors=np.full(10, 0.01))
    assert not found.turned
    assert abs(found.b - 0.3) < 4 * found.b_se


def test_standard_errors_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    kl = np.linspace(0.2, 30, 15)
    truth = gold(np.sqrt(kl), 1.0, 0.4)
    fits = [fit(kl, truth + rng.normal(0, 0.1, 15), errors=np.full(15, 0.1)) for _ in range(300)]
    assert np.mean([abs(one.b - 0.4) < 1.96 * one.b_se for one in fits]) == pytest.approx(0.95, abs=0.04)


def test_best_of_n_and_too_few_policies() -> None:
    assert best_of_n_kl([1, 4]).tolist() == pytest.approx([0.0, np.log(4) - 0.75])
    with pytest.raises(DataError, match="3 policies"):
        fit([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="different KL"):
        fit([1.0] * 5, [1.0] * 5)
