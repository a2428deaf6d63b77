"""z scores of two samples: agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rluf.evaluate.intervals import two_proportion_z, welch_z


def test_z_statistics() -> None:
    base, aligned = np.repeat([1, 0], [7, 993]), np.repeat([1, 0], [28, 972])
    table = stats.contingency.chi2_contingency([[7, 993], [28, 972]], correction=False)
    assert two_proportion_z(base, aligned) ** 2 == pytest.approx(table.statistic, rel=1e-9)
    assert two_proportion_z([0, 0], [0, 0]) == 0.0
    rng = np.random.default_rng(4)
    first, second = rng.normal(0, 1, 50), rng.normal(1, 2, 70)
    assert welch_z(first, second) == pytest.approx(stats.ttest_ind(second, first, equal_var=False).statistic, rel=1e-9)
    assert welch_z([1.0], [2.0]) == 0.0
