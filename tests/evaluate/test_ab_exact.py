"""Small counts against exact tests: one response per user, a few users, no event at all, tied values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rluf.evaluate.effects import UserTotals, estimate_ratio_effect, rerandomize_quantiles


def make_users(hits: int, users: int) -> UserTotals:
    """Users with one response each, `hits` of them with a heart."""
    return UserTotals.from_arrays(np.repeat([1, 0], [hits, users - hits]))


@pytest.mark.parametrize(
    ("control", "treatment"),
    [((10, 2000), (1, 20)), ((10, 2000), (0, 20)), ((5, 500), (2, 50)), ((3, 5), (0, 5)), ((30, 60), (15, 20))],
)
def test_rerandomized_p_is_fishers_where_users_have_one_response(
    control: tuple[int, int], treatment: tuple[int, int]
) -> None:
    """Many re-randomized arms tie with the observed one: all of them are as extreme, whatever their last digit."""
    pair = make_users(*control), make_users(*treatment)
    effect = estimate_ratio_effect(*pair, quantiles=rerandomize_quantiles([pair])[0])
    hearts = stats.hypergeom(control[1] + treatment[1], control[0] + treatment[0], treatment[1])
    exact = 2 * min(hearts.cdf(treatment[0]), hearts.sf(treatment[0] - 1))
    assert float(effect.p) == pytest.approx(min(1.0, exact), abs=0.03)
    assert (float(effect.low) > 0 or float(effect.high) < 0) == (float(effect.p) < 0.05)
