"""Combining objectives: by name, standardised on the reference policy."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import SettingsError
from rluf.objectives.aggregation import Standardiser, combine, signal
from rluf.types import Score

numbers = st.floats(-50, 50)


def test_signal_is_the_logit_of_a_model_and_the_value_of_a_judge() -> None:
    assert math.isclose(signal(Score("love", 0.05, -9.0)), math.log(0.05 / 0.95))
    assert signal(Score("safety", 1.0, 1.0, verdict=True)) == 1.0
    assert math.isclose(signal(Score("love", 0.5, 0.0, spread=0.2), 1.5), math.log(0.2 / 0.8))
    assert math.isfinite(signal(Score("love", 0.1, 0.0, spread=0.3), 1.0))
    assert math.isfinite(signal(Score("love", 0.0, -900.0)))
    assert math.isfinite(signal(Score("love", 1.0, 900.0)))


@given(st.lists(numbers, min_size=2, max_size=30))
def test_standardised_reference_has_mean_0_and_sd_1(values: list[float]) -> None:
    standardised = Standardiser.fit({"love": values}).apply("love", values)
    assert abs(fmean(standardised)) < 1e-6
    if pstdev(values) > 1e-6:
        assert math.isclose(pstdev(standardised), 1.0, rel_tol=1e-6)


@given(
    st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=20),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.permutations(["love", "helpfulness", "safety"]),
)
def test_objectives_combine_by_name_whatever_their_order(
    rows: list[tuple[float, float, float]], shares: tuple[float, float, float], order: list[str]
) -> None:
    names = ("love", "helpfulness", "safety")
    signals = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    weights = dict(zip(names, shares, strict=True))
    standardiser = Standardiser.fit(signals)
    turned = {name: signals[name] for name in order}
    assert combine(turned, weights, standardiser) == combine(signals, weights, standardiser)


@given(st.lists(numbers, min_size=2, max_size=20), st.floats(0.1, 5), numbers)
def test_scale_and_offset_of_an_objective_do_not_matter(values: list[float], scale: float, offset: float) -> None:
    if pstdev(values) < 1e-3:
        return
    moved = [scale * value + offset for value in values]
    one = combine({"love": values}, {"love": 1.0}, Standardiser.fit({"love": values}))
    two = combine({"love": moved}, {"love": 1.0}, Standardiser.fit({"love": moved}))
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(one, two, strict=True))


def test_worked_example() -> None:
    standardiser = Standardiser({"love": 1.0, "safety": 0.5}, {"love": 2.0, "safety": 0.5})
    total = combine({"love": [3.0, 1.0], "safety": [1.0, 0.0]}, {"love": 0.3, "safety": 0.7}, standardiser)
    assert total == pytest.approx([0.3 + 0.7, -0.7])


def test_an_objective_that_never_varies_adds_nothing() -> None:
    standardiser = Standardiser.fit({"safety": [1.0, 1.0]})
    assert combine({"safety": [1.0]}, {"safety": 1.0}, standardiser) == [0.0]


def test_mismatches_are_named() -> None:
    standardiser = Standardiser.fit({"love": [0.0, 1.0]})
    with pytest.raises(SettingsError, match="helpfulness"):
        combine({"love": [1.0]}, {"love": 0.5, "helpfulness": 0.5}, standardiser)
    with pytest.raises(SettingsError, match="safety"):
        combine({"love": [1.0], "safety": [1.0]}, {"love": 0.5}, standardiser)
    with pytest.raises(SettingsError, match="different numbers"):
        combine({"love": [1.0], "safety": []}, {"love": 0.5, "safety": 0.5}, standardiser)
    with pytest.raises(SettingsError, match="reference policy"):
        combine({"safety": [1.0]}, {"safety": 0.5}, standardiser)
    with pytest.raises(SettingsError, match="no scores"):
        Standardiser.fit({"love": []})
    assert combine({"love": [1.0]}, {"love": 1.0, "safety": 0.0}, standardiser) == [1.0]
