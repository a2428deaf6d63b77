"""Each abuse rule reduces the weight of its target only; formulas agree with scipy and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom
from sklearn.linear_model import LogisticRegression

from rluf.prepare.abuse import (
    ABUSE_RULES,
    MIN_ROW_WEIGHT,
    AbuseLog,
    _compute_beta_binomial_log_pmf,
    _compute_beta_binomial_upper_tail,
    compute_adjusted_tail_probability,
    compute_trust_weights,
    fit_robust_beta_binomial,
)
from rluf.prepare.joins import bin_by_octave, estimate_propensity
from rluf.utils.stats import fit_logistic

SECOND_US = 1_000_000


def build_ordinary_log(user_count: int, seed: int = 1) -> AbuseLog:
    """Users with 1 to 39 rows each over a month, 8% loved, no shared texts or devices."""
    rng = np.random.default_rng(seed)
    user_code = np.repeat(np.arange(user_count), rng.integers(1, 40, user_count))
    love_rate = rng.beta(2, 23, user_count)
    row_count = len(user_code)
    return AbuseLog(
        user_code=user_code,
        prompt_group=np.arange(row_count),
        response_code=np.arange(row_count),
        device_code=np.full(row_count, -1),
        time_us=rng.integers(0, 28 * 86400, row_count) * SECOND_US,
        loved=rng.random(row_count) < love_rate[user_code],
        own_persona=np.zeros(row_count, dtype=np.bool_),
    )


def add_user(log: AbuseLog, row_count: int, **columns: object) -> tuple[AbuseLog, np.ndarray]:
    """The log with `row_count` rows of one more user, some columns overridden; and the mask of these rows."""
    old_count = len(log.user_code)
    time_us = np.sort(np.random.default_rng(3).integers(0, 28 * 86400, row_count)) * SECOND_US
    new_columns: dict[str, object] = {
        "user_code": np.full(row_count, log.user_code.max() + 1),
        "prompt_group": old_count + np.arange(row_count),
        "response_code": old_count + np.arange(row_count),
        "device_code": np.full(row_count, -1),
        "time_us": time_us,
        "loved": np.arange(row_count) % 12 == 0,
        "own_persona": np.zeros(row_count, dtype=np.bool_),
        **columns,
    }
    joined = {
        name: np.concatenate([getattr(log, name), np.broadcast_to(values, row_count)])
        for name, values in new_columns.items()
    }
    return replace(log, **joined), np.arange(old_count + row_count) >= old_count


def test_ordinary_users_lose_no_weight() -> None:
    weight, weight_by_rule = compute_trust_weights(build_ordinary_log(2000), list(ABUSE_RULES))
    lost_weight = {name: float((1 - values).sum()) for name, values in weight_by_rule.items()}
    assert not any(lost_weight.values())
    assert (weight == 1).all()


ABUSIVE_COLUMNS = {
    "rate": {"loved": np.arange(50) % 10 != 0},
    "burst": {"time_us": np.arange(50) * SECOND_US},
    "timing": {"time_us": np.arange(50) * 3600 * SECOND_US},
    "copies": {"prompt_group": 5},
    "self_love": {"own_persona": True},
}


@pytest.mark.parametrize("rule", list(ABUSIVE_COLUMNS))
def test_an_abusive_user_is_detected_and_no_other(rule: str) -> None:
    log, is_abusive = add_user(build_ordinary_log(500), 50, **ABUSIVE_COLUMNS[rule])
    weight, _ = compute_trust_weights(log, [rule])
    assert weight[is_abusive].mean() < 0.5
    assert (weight[~is_abusive] == 1).mean() > 0.999


def test_a_farm_is_detected_by_its_device_and_by_its_copied_prompts() -> None:
    log = build_ordinary_log(800)
    ordinary_rows = len(log.user_code)
    prompt_group = 10**5 + np.arange(15)
    for _ in range(10):
        log, _ = add_user(log, 15, device_code=7, prompt_group=prompt_group, loved=np.arange(15) % 4 != 0)
    is_farm = np.arange(len(log.user_code)) >= ordinary_rows
    assert is_farm.sum() == 150
    for rule in ("device", "copies"):
        weight, _ = compute_trust_weights(log, [rule])
        assert weight[is_farm & log.loved].mean() < 0.5
        assert (weight[~is_farm] == 1).all()


def test_prompts_that_all_users_share_are_compared_with_one_another() -> None:
    rng = np.random.default_rng(2)
    log = build_ordinary_log(1500)
    love_rate = rng.beta(1.5, 15, 60)  # some prompts are loved four times as often as others
    prompt_group = rng.integers(0, 60, len(log.user_code))
    shared_log = replace(log, prompt_group=prompt_group, loved=rng.random(len(prompt_group)) < love_rate[prompt_group])
    assert (compute_trust_weights(shared_log, ["copies"])[0] == 1).mean() > 0.99


def build_taste_log(agreements: list[float], seed: int = 1) -> tuple[AbuseLog, np.ndarray]:
    """An ordinary log whose users love by words, and frequent lovers whose love depends on them by a factor each.

    Returns the log and the user codes of the frequent lovers.
    """
    rng = np.random.default_rng(seed)
    log = build_ordinary_log(800, seed)
    for _ in agreements:
        log, _ = add_user(log, 40)
    first_user = log.user_code.max() + 1 - len(agreements)
    agreement = np.array([*[1.5] * first_user, *agreements])[log.user_code]
    word_merit = rng.normal(0, 0.5, 60)
    word_merit -= word_merit.mean()
    word_index = rng.integers(0, 60, (len(log.user_code), 15))
    offset = np.where(log.user_code >= first_user, -0.5, -4.0)
    loved = rng.random(len(offset)) < 1 / (1 + np.exp(-(agreement * word_merit[word_index].sum(1) + offset)))
    responses = [" ".join(f"word{index}" for index in row) for row in word_index.tolist()]
    load_responses = lambda rows: [responses[row] for row in rows.tolist()]  # noqa: E731
    return replace(log, loved=loved, load_responses=load_responses), np.arange(first_user, first_user + len(agreements))


@pytest.mark.parametrize("seed", [1, 3])
def test_lovers_of_what_others_love_least_lose_weight_and_other_tastes_do_not(seed: int) -> None:
    log, lovers = build_taste_log([-2.0] * 6 + [0.0] * 20 + [1.5] * 6, seed)
    weight, _ = compute_trust_weights(log, ["taste"])
    mean_weight = np.array([weight[log.user_code == user].mean() for user in lovers])
    assert (mean_weight[:6] < 0.5).sum() >= 5 and (mean_weight[6:] == 1).all()
    assert (weight[log.user_code < lovers[0]] == 1).all()


def test_the_taste_rule_needs_texts_and_rows() -> None:
    log, _ = build_taste_log([-2.0] * 6)
    few_rows = build_ordinary_log(5)
    for other_log in (replace(log, load_responses=None), few_rows, replace(log, loved=np.zeros_like(log.loved))):
        assert (compute_trust_weights(other_log, ["taste"])[0] == 1).all()


@pytest.mark.parametrize("row_count", [1, 2, 3, 4, 5])
def test_throw_away_accounts_lose_weight_by_their_number_of_rows(row_count: int) -> None:
    log = build_ordinary_log(800)
    first_user = log.user_code.max() + 1
    for user in range(300):
        log, _ = add_user(log, row_count, loved=np.arange(row_count) < max(1, row_count // 2 + user % 2))
    weight, _ = compute_trust_weights(log, ["newcomers"])
    assert weight[(log.user_code >= first_user) & log.loved].mean() < 0.5
    assert (weight[log.user_code < first_user] < 1).mean() < 0.02


def test_the_cap_bounds_the_total_weight_of_a_user() -> None:
    log, is_new_user = add_user(build_ordinary_log(50), 500)
    assert compute_trust_weights(log, ["cap"])[0][is_new_user].sum() == pytest.approx(200)


def test_a_tenth_of_bots_cannot_hide_by_stretching_the_fit() -> None:
    rng = np.random.default_rng(4)
    trials = rng.integers(20, 60, 1000)
    is_bot = np.arange(1000) < 100
    hits = np.where(is_bot, rng.binomial(trials, 0.8), rng.binomial(trials, rng.beta(2, 30, 1000)))
    probability = compute_adjusted_tail_probability(trials, hits, fit_robust_beta_binomial(trials, hits))
    assert (probability[is_bot] < 1e-4).all()
    assert (probability[~is_bot] < 0.01).sum() <= 3


@given(st.integers(1, 200), st.data(), st.floats(0.1, 50), st.floats(0.1, 50))
def test_beta_binomial_agrees_with_scipy(trials: int, data: st.DataObject, alpha: float, beta: float) -> None:
    hits = data.draw(st.integers(0, trials))
    n, k = np.array([trials]), np.array([hits])
    assert _compute_beta_binomial_log_pmf(n, k, alpha, beta)[0] == pytest.approx(
        betabinom.logpmf(hits, trials, alpha, beta), abs=1e-6
    )
    assert _compute_beta_binomial_upper_tail(n, k, alpha, beta)[0] == pytest.approx(
        betabinom.sf(hits - 1, trials, alpha, beta), abs=1e-6
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 100), st.booleans()), max_size=40))
@settings(max_examples=60)
def test_weights_are_in_range_for_any_log(rows: list[tuple[int, int, int, bool]]) -> None:
    user_code, text_code, time_us, loved = (
        (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        if rows
        else (np.empty(0, dtype=np.int64),) * 4
    )
    log = AbuseLog(
        user_code, text_code, text_code, text_code - 1, time_us * SECOND_US, loved.astype(np.bool_), loved == 2
    )
    weight, _ = compute_trust_weights(log, list(ABUSE_RULES))
    assert ((weight >= MIN_ROW_WEIGHT) & (weight <= 1)).all() and len(weight) == len(rows)


def test_the_logistic_regression_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    design_matrix = np.eye(6)[rng.integers(0, 6, 40)]
    hits, misses = rng.integers(0, 30, 40).astype(float), rng.integers(1, 90, 40).astype(float)
    solution = fit_logistic(design_matrix, hits / (hits + misses), hits + misses, 1.0)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000)
    labels, weights = [1] * 40 + [0] * 40, np.concatenate([hits, misses])
    reference.fit(np.concatenate([design_matrix, design_matrix]), labels, sample_weight=weights)
    assert solution[:-1] == pytest.approx(reference.coef_[0], abs=2e-3)
    assert design_matrix @ solution[:-1] + solution[-1] == pytest.approx(
        reference.decision_function(design_matrix), abs=2e-3
    )


def test_propensity_recovers_the_true_probabilities() -> None:
    rng = np.random.default_rng(1)
    turn, locale = rng.integers(0, 4, 20_000), rng.integers(0, 2, 20_000)
    true_rate = 1 / (1 + np.exp(-(-3 + 0.5 * turn + 1.0 * locale)))
    propensity, coefficients = estimate_propensity({"turn": turn, "locale": locale}, rng.random(20_000) < true_rate)
    assert np.corrcoef(propensity, true_rate)[0, 1] > 0.99
    assert abs(propensity - true_rate).max() < 0.05
    assert set(coefficients) == {"turn", "locale"}
    assert estimate_propensity({"turn": turn[:3]}, np.ones(3, dtype=np.bool_))[0].tolist() == [1, 1, 1]
    assert bin_by_octave(np.array([0, 1, 2, 3, 4, 1000])).tolist() == [0, 0, 1, 1, 2, 9]


def add_accounts(log: AbuseLog, users: int, rows_each: int, love_rate: float, device: int = -1) -> AbuseLog:
    """The log with accounts of a few rows each."""
    rng = np.random.default_rng(5)
    count = users * rows_each
    new_columns = {
        "user_code": log.user_code.max() + 1 + np.repeat(np.arange(users), rows_each),
        "prompt_group": 10**6 + np.arange(count), "response_code": 10**6 + np.arange(count),
        "device_code": np.full(count, device), "time_us": rng.integers(0, 28 * 86400, count) * SECOND_US,
        "loved": rng.random(count) < love_rate, "own_persona": np.zeros(count, dtype=np.bool_),
    }  # fmt: skip
    return replace(log, **{name: np.concatenate([getattr(log, name), values]) for name, values in new_columns.items()})


def test_a_device_that_many_users_share_loses_no_weight_for_ordinary_rates() -> None:
    log = add_accounts(build_ordinary_log(800), 30, 6, 0.08, device=7)
    assert (compute_trust_weights(log, list(ABUSE_RULES))[0][-180:] == 1).all()
    farm = add_accounts(build_ordinary_log(800), 30, 6, 0.7, device=7)
    assert compute_trust_weights(farm, ["device"])[0][-180:].max() < 0.1


@pytest.mark.parametrize("rows_each, love_rate, is_detected", [(1, 1.0, True), (2, 0.9, True), (1, 0.08, False)])
def test_throw_away_accounts_are_detected_together(rows_each: int, love_rate: float, is_detected: bool) -> None:
    ordinary_log = build_ordinary_log(1000)
    log = add_accounts(ordinary_log, 300, rows_each, love_rate)
    weight = compute_trust_weights(log, ["newcomers"])[0]
    new_loved = log.loved & (np.arange(len(weight)) >= len(ordinary_log.user_code))
    assert (weight[new_loved].mean() < 0.5) == is_detected
    assert (weight[~log.loved] == 1).all()


def test_a_log_of_users_with_one_row_each_has_no_newcomers() -> None:
    log = add_accounts(build_ordinary_log(1), 500, 1, 0.9)
    assert (compute_trust_weights(log, ["newcomers"])[0] == 1).all()


def build_visits(user_count: int, row_probability: float) -> AbuseLog:
    """An ordinary log in which most users have few rows."""
    rng = np.random.default_rng(1)
    user_code = np.repeat(np.arange(user_count), rng.geometric(row_probability, user_count))
    log = build_ordinary_log(1)
    rows = np.arange(len(user_code))
    return replace(
        log, user_code=user_code, prompt_group=rows, response_code=rows, device_code=rows * 0 - 1,
        time_us=rng.integers(0, 28 * 86400, len(rows)) * SECOND_US, own_persona=np.zeros(len(rows), dtype=np.bool_),
        loved=rng.random(len(rows)) < rng.beta(1.2, 12, user_count)[user_code],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row_probability", "users", "rows_each", "love_rate", "is_detected"),
    [(0.5, 300, 1, 1.0, True), (0.4, 150, 2, 0.9, True), (0.15, 100, 6, 0.8, True), (0.3, 500, 2, 0.09, False),
     (0.3, 500, 1, 0.12, False), (0.15, 60, 10, 0.1, False)],
)  # fmt: skip
def test_accounts_that_arrive_together_are_compared_with_others(
    row_probability: float, users: int, rows_each: int, love_rate: float, is_detected: bool
) -> None:
    ordinary_log = build_visits(3000, row_probability)
    log = add_accounts(ordinary_log, users, rows_each, love_rate)
    is_new = np.arange(len(log.user_code)) >= len(ordinary_log.user_code)
    seconds = np.random.default_rng(6).integers(0, 3600, len(is_new))
    log = replace(log, time_us=np.where(is_new, (10 * 86400 + 36_000 + seconds) * SECOND_US, log.time_us))
    weight = compute_trust_weights(log, ["newcomers"])[0]
    assert (weight[is_new & log.loved].mean() < 0.5) == is_detected
    if not is_detected:
        assert (weight == 1).all()
    assert (weight[~is_new] == 1).mean() > 0.99


def test_a_day_on_which_all_users_love_more_is_no_campaign() -> None:
    log = build_visits(3000, 0.15)
    is_good_day = log.time_us // (86400 * SECOND_US) == 12
    log = replace(log, loved=log.loved | (is_good_day & (np.random.default_rng(2).random(len(is_good_day)) < 0.3)))
    assert (compute_trust_weights(log, ["newcomers"])[0] == 1).all()
