"""Rules against bots, brigades and click farms: each gives every row a weight from MIN_ROW_WEIGHT to 1.

A rule is a function of an `AbuseLog` and an entry of ABUSE_RULES; the smallest weight of a row counts. A weight rather
than a filter: a row that is only unusual still counts a little, and no row is lost. The first line of a rule's
docstring appears on the page of the data card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rluf.prepare.joins import find_within_users
from rluf.utils.stats import Bools, Floats, Ints

MIN_ROW_WEIGHT = 0.01
"""Smallest weight of a row."""

TAIL_PROBABILITY_THRESHOLD = 0.01
"""Adjusted tail probability below which a love rate reduces the weight, to the probability over this threshold."""

MAX_RESPONSES_PER_MINUTE = 8
"""Responses per minute that a person can still read."""

MAX_PROMPT_REPEATS = 20
"""Near-duplicates of one prompt that count in full for a user."""

MIN_CROWD_USERS = 5
"""Number of users from which a shared prompt or response is tested as a group."""

USER_ROW_CAP = 200
"""Rows of a user that count in full; the rows of a user with more share this weight."""
MAX_USERS_PER_DEVICE = 3
"""Users of one device that count in full (a family)."""

MAX_NEWCOMER_ROWS = 5
"""Rows up to which a user is a newcomer: throw-away accounts have no more."""
MAX_NEWCOMER_RATIO = 2.0
"""Love rate of newcomers in multiples of that of the other users, above which it is excessive."""
MAX_ARRIVAL_ROWS = 20
"""Rows up to which users who arrive on one day are compared with others."""
MIN_DAY_ROWS = 50
"""Rows at the love rate of all days that are added to those of a day, so that a few rows say little."""
MIN_COMPARISON_ROWS = 200
"""Rows of users who are not newcomers that a comparison needs."""

MIN_TASTE_ROWS = 8
"""Loved rows, and other rows, that a user needs for a comparison with the taste of other users."""
FREQUENT_LOVE_RATIO = 2.0
"""Love rate in multiples of that of all rows from which a user loves often enough for that comparison."""
TASTE_MODEL_ROWS = 20_000
"""Most rows of either label, of other users, from which the taste is estimated."""

MINUTE_US = 60_000_000
DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class AbuseLog:
    """N rows: codes of user, near-duplicate prompt group, response text and device (-1: not in the log), time in
    microseconds, whether loved, and whether the user created the persona that replied. `load_responses` returns the
    texts of the responses at some indices [R].
    """

    user_code: Ints
    prompt_group: Ints
    response_code: Ints
    device_code: Ints
    time_us: Ints
    loved: Bools
    own_persona: Bools
    load_responses: Callable[[Ints], list[str]] | None = None


def _compute_beta_binomial_log_pmf(trials: Floats, hits: Floats, alpha: float, beta: float) -> Floats:
    """Log of the beta-binomial probability of `hits` in `trials`."""
    # Not scipy.stats.betabinom: its import takes seconds in each worker.
    from scipy.special import betaln

    log_combinations = -betaln(trials - hits + 1, hits + 1) - np.log(trials + 1)
    log_pmf: Floats = log_combinations + betaln(hits + alpha, trials - hits + beta) - betaln(alpha, beta)
    return log_pmf


def _compute_beta_binomial_upper_tail(trials: Ints, hits: Ints, alpha: float, beta: float) -> Floats:
    """Probability of `hits` or more in `trials` [M]."""
    # The sum from hits to trials of all M units, flattened into one array: `unit` is the unit of each term.
    term_count = trials - hits + 1
    unit = np.repeat(np.arange(len(trials)), term_count)
    term_hits = np.arange(term_count.sum()) - np.repeat(np.cumsum(term_count) - term_count, term_count) + hits[unit]
    log_pmf = _compute_beta_binomial_log_pmf(trials[unit].astype(np.float64), term_hits.astype(np.float64), alpha, beta)
    return np.minimum(np.bincount(unit, weights=np.exp(log_pmf), minlength=len(trials)), 1.0)


def _fit_beta_binomial(trials: Ints, hits: Ints, unit_counts: Floats) -> tuple[float, float]:
    """Alpha and beta by maximum likelihood over units with (trials, hits), each with `unit_counts` occurrences.

    A weak prior pulls the strength alpha + beta to about 20 where the data do not determine it.
    """
    from scipy.optimize import minimize

    mean = min(max(float((hits * unit_counts).sum() / (trials * unit_counts).sum()), 1e-4), 1 - 1e-4)
    n, k = trials.astype(np.float64), hits.astype(np.float64)

    def to_alpha_beta(theta: Floats) -> tuple[float, float]:
        # theta is (logit of the mean, log of the strength); the strength is bounded to avoid overflow.
        rate, strength = 1 / (1 + np.exp(-theta[0])), np.exp(min(theta[1], 12.0))
        return float(rate * strength) + 1e-9, float((1 - rate) * strength) + 1e-9

    def compute_penalized_loss(theta: Floats) -> float:
        log_likelihood = _compute_beta_binomial_log_pmf(n, k, *to_alpha_beta(theta))
        # exp(3) is about 20.
        return -float((log_likelihood * unit_counts).sum() / unit_counts.sum()) + 1e-4 * float(theta[1] - 3) ** 2

    start = np.array([np.log(mean / (1 - mean)), 3.0])
    options = {"xatol": 0.01, "fatol": 1e-7, "maxiter": 200}
    return to_alpha_beta(minimize(compute_penalized_loss, start, method="Nelder-Mead", options=options).x)


def fit_robust_beta_binomial(trials: Ints, hits: Ints) -> tuple[float, float] | None:
    """Alpha and beta of the beta-binomial of ordinary units [U]; None if nothing is loved, or everything.

    The fit starts without the sixth of units with the highest rates and then, in rounds, takes back all units that it
    finds not too unlikely (above 1 in 1,000). So a tenth of bots cannot stretch the fit to include themselves.
    """
    trials, hits = trials[trials > 0], hits[trials > 0]
    if not hits.any() or (hits == trials).all():
        return None
    # Many units have the same (trials, hits): fitting distinct pairs costs the same for any number of users.
    pairs, pair_counts = np.unique(np.stack([trials, hits], 1), axis=0, return_counts=True)
    n, k, unit_counts = pairs[:, 0], pairs[:, 1], pair_counts.astype(np.float64)
    mean = float(np.median(hits / trials)) or hits.sum() / trials.sum() / 2
    z_score = (k - n * mean) / np.sqrt(n * mean * (1 - mean) + 1e-9)
    is_ordinary = z_score <= np.quantile(np.repeat(z_score, pair_counts), 5 / 6)
    alpha_beta = (1.0, 1.0)
    for _ in range(6):
        if not (k[is_ordinary].any() and (k < n)[is_ordinary].any()):
            is_ordinary = np.ones(len(n), dtype=np.bool_)
        alpha_beta = _fit_beta_binomial(n[is_ordinary], k[is_ordinary], unit_counts[is_ordinary])
        previous = is_ordinary
        is_ordinary = _compute_beta_binomial_upper_tail(n, k, *alpha_beta) > 1e-3
        if np.array_equal(previous, is_ordinary):
            break
    return alpha_beta


def compute_adjusted_tail_probability(trials: Ints, hits: Ints, alpha_beta: tuple[float, float] | None) -> Floats:
    """Probability [U] of as many hits or more for each unit, adjusted for the number of units. All ones for None.

    The adjustment is Benjamini and Hochberg's (1995).
    """
    if alpha_beta is None or not len(trials):
        return np.ones(len(trials))
    rows = np.stack([trials, hits], 1)
    pairs, pair_index, pair_counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    probability = _compute_beta_binomial_upper_tail(pairs[:, 0], pairs[:, 1], *alpha_beta)
    order = np.argsort(probability)
    rank = np.cumsum(pair_counts[order])
    return _step_up(probability, order, len(trials) / rank)[pair_index.reshape(-1)]


def _step_up(probability: Floats, order: Ints, factor: Floats) -> Floats:
    """Probabilities [M] times the factors [M] of their order, monotone from the largest downwards."""
    adjusted = np.empty(len(probability))
    adjusted[order] = np.minimum(np.minimum.accumulate((probability[order] * factor)[::-1])[::-1], 1.0)
    return adjusted


def _count_user_rows(log: AbuseLog) -> tuple[Ints, Ints]:
    """Rows and loved rows of each user code [U]."""
    return np.bincount(log.user_code), np.bincount(log.user_code, weights=log.loved).astype(np.int64)


def _compute_love_rate_weight(log: AbuseLog) -> Floats:
    """Users who love a far larger share of their responses than ordinary users."""
    trials, hits = _count_user_rows(log)
    tail_probability = compute_adjusted_tail_probability(trials, hits, fit_robust_beta_binomial(trials, hits))
    return (tail_probability / TAIL_PROBABILITY_THRESHOLD)[log.user_code]


def _find_distinct_moments(log: AbuseLog) -> tuple[Ints, Ints, Ints]:
    """Row order by user and time, position in it of the first row of each moment, and each position's moment.

    Rows of one user at one time are one moment: some logs have a single time for a whole conversation.
    """
    order = np.lexsort((log.time_us, log.user_code))
    user_code, time_us = log.user_code[order], log.time_us[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (user_code[1:] != user_code[:-1]) | (time_us[1:] != time_us[:-1])
    return order, np.flatnonzero(is_first), np.cumsum(is_first) - 1


def _compute_burst_weight(log: AbuseLog) -> Floats:
    """Users who received more responses in a minute than a person can read, in the minute around each row."""
    order, first_rows, moment_index = _find_distinct_moments(log)
    user_code, time_us = log.user_code[order][first_rows], log.time_us[order][first_rows]
    window_end = find_within_users(user_code, time_us, time_us + MINUTE_US // 2, "right")
    window_start = find_within_users(user_code, time_us, time_us - MINUTE_US // 2, "left")
    moments_in_window = window_end - window_start
    weight = np.ones(len(log.user_code))
    weight[order] = np.minimum(1.0, (MAX_RESPONSES_PER_MINUTE / moments_in_window[moment_index]) ** 2)
    return weight


def _compute_timing_weight(log: AbuseLog) -> Floats:
    """Users with 20 or more distinct times at regular intervals: entropy of pauses in half octaves below 2 bits."""
    order, first_rows, _ = _find_distinct_moments(log)
    user_code, time_us = log.user_code[order][first_rows], log.time_us[order][first_rows]
    is_same_user = user_code[1:] == user_code[:-1]
    pause_us, pause_user = np.diff(time_us)[is_same_user], user_code[1:][is_same_user]
    if not len(pause_us):
        return np.ones(len(log.user_code))
    half_octave = np.floor(2 * np.log2(pause_us / 1e6 + 1e-6)).astype(np.int64)
    half_octave -= half_octave.min()
    # One number for each pair of user and half octave, to count pauses per pair.
    cells, cell_counts = np.unique(pause_user * (half_octave.max() + 1) + half_octave, return_counts=True)
    cell_user = cells // (half_octave.max() + 1)
    pauses_of_user = np.bincount(pause_user, minlength=int(log.user_code.max()) + 1)
    share = cell_counts / pauses_of_user[cell_user]
    entropy = np.bincount(cell_user, weights=-share * np.log2(share), minlength=len(pauses_of_user))
    # 19 pauses are 20 moments. The weight rises from 0 at 1 bit of entropy to 1 at 2 bits.
    weight = np.where(pauses_of_user >= 19, np.clip(entropy - 1.0, 0.0, 1.0), 1.0)
    return weight[log.user_code]


def _compute_copy_weight(log: AbuseLog) -> Floats:
    """Copy-paste: a prompt that a user repeats often, and prompts or responses that many users love in unison."""
    user_prompt = log.user_code * (int(log.prompt_group.max(initial=0)) + 1) + log.prompt_group
    _, pair_index, pair_counts = np.unique(user_prompt, return_inverse=True, return_counts=True)
    weight = np.minimum(1.0, MAX_PROMPT_REPEATS / pair_counts[pair_index])
    for text_code in (log.prompt_group, log.response_code):
        weight = np.where(log.loved, np.minimum(weight, _compute_crowd_weight(log, text_code)), weight)
    return weight


def _compute_crowd_weight(log: AbuseLog, text_code: Ints) -> Floats:
    """Weight [N] of rows whose text [N] many users share, by how much more often it is loved than others.

    If a tenth or more of the rows share texts, as where all users answer the same prompts, shared texts are compared
    with one another, since prompts differ. If sharing is rare, texts with common users form one linked group, which is
    compared with what users love in general.
    """
    trials, hits = np.bincount(text_code), np.bincount(text_code, weights=log.loved).astype(np.int64)
    user_count = int(log.user_code.max()) + 1
    users_of_text = np.bincount(np.unique(text_code * user_count + log.user_code) // user_count)
    crowd_codes = np.flatnonzero(users_of_text >= MIN_CROWD_USERS)
    if not len(crowd_codes):
        return np.ones(len(text_code))
    tail_probability = np.full(len(trials), TAIL_PROBABILITY_THRESHOLD)
    if trials[crowd_codes].sum() >= 0.1 * len(text_code):
        crowd_trials, crowd_hits = trials[crowd_codes], hits[crowd_codes]
        crowd_fit = fit_robust_beta_binomial(crowd_trials, crowd_hits)
        tail_probability[crowd_codes] = compute_adjusted_tail_probability(crowd_trials, crowd_hits, crowd_fit)
    else:
        group_ids = _assign_linked_groups(log.user_code, text_code, crowd_codes)
        group_trials = np.bincount(group_ids, weights=trials[crowd_codes]).astype(np.int64)
        group_hits = np.bincount(group_ids, weights=hits[crowd_codes]).astype(np.int64)
        user_fit = fit_robust_beta_binomial(*_count_user_rows(log))
        tail_probability[crowd_codes] = compute_adjusted_tail_probability(group_trials, group_hits, user_fit)[group_ids]
    return (tail_probability / TAIL_PROBABILITY_THRESHOLD)[text_code]


def _assign_linked_groups(user_code: Ints, text_code: Ints, crowd_codes: Ints) -> Ints:
    """Linked group, from 0, of each shared text [C]: texts that share a user are in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Bipartite graph of texts and users: nodes 0 to C - 1 are texts, users follow.
    text_node = np.full(int(text_code.max()) + 1, -1)
    text_node[crowd_codes] = np.arange(len(crowd_codes))
    rows = np.flatnonzero(text_node[text_code] >= 0)
    node_count = len(crowd_codes) + int(user_code.max()) + 1
    edges = text_node[text_code[rows]], len(crowd_codes) + user_code[rows]
    graph = coo_array((np.ones(len(rows), dtype=np.int8), edges), shape=(node_count, node_count))
    _, component = connected_components(graph, directed=False)
    group_ids: Ints = np.unique(component[: len(crowd_codes)], return_inverse=True)[1].astype(np.int64)
    return group_ids


def _compute_self_love_weight(log: AbuseLog) -> Floats:
    """Users who rate a persona that they created themselves."""
    return np.where(log.own_persona, 0.0, 1.0)


def _compute_shared_device_weight(log: AbuseLog) -> Floats:
    """Users of a device that more users share than a family has, and that loves far more often than ordinary users."""
    weight = np.ones(len(log.user_code))
    rows = np.flatnonzero(log.device_code >= 0)
    if not len(rows):
        return weight
    device_code = log.device_code[rows]
    pairs = np.unique(np.stack([device_code, log.user_code[rows]], 1), axis=0)
    users_of_device = np.bincount(pairs[:, 0])
    shared_codes = np.flatnonzero(users_of_device > MAX_USERS_PER_DEVICE)
    trials, hits = np.bincount(device_code), np.bincount(device_code, weights=log.loved[rows]).astype(np.int64)
    # Sharing alone is no abuse: a school or a library has one device for many users with ordinary love rates.
    user_fit = fit_robust_beta_binomial(*_count_user_rows(log))
    tail_probability = compute_adjusted_tail_probability(trials[shared_codes], hits[shared_codes], user_fit)
    device_weight = np.ones(len(users_of_device))
    device_weight[shared_codes] = np.maximum(
        (MAX_USERS_PER_DEVICE / users_of_device[shared_codes]) ** 2, tail_probability / TAIL_PROBABILITY_THRESHOLD
    )
    weight[rows] = np.minimum(1.0, device_weight[device_code])
    return weight


def _compute_newcomer_weight(log: AbuseLog) -> Floats:
    """Loved rows of users with few rows, where those with as many rows, or of one day, love far more often than others.

    Throw-away accounts have few rows each; those of one campaign often arrive together, on one day.
    """
    trials, hits = _count_user_rows(log)
    is_other = trials > MAX_NEWCOMER_ROWS
    other_rows, other_hits = int(trials[is_other].sum()), int(hits[is_other].sum())
    # A log in which hardly anybody returns has no users to compare with.
    if other_rows < max(MIN_COMPARISON_ROWS, 0.1 * trials[~is_other].sum()):
        return np.ones(len(log.user_code))
    rate = (other_hits + 1) / (other_rows + 1)
    row_day = log.time_us // DAY_US - log.time_us.min() // DAY_US
    first_day = np.full(len(trials), row_day.max())
    np.minimum.at(first_day, log.user_code, row_day)
    # A day on which everybody loves more is no campaign: its rate is that of users who came before.
    is_earlier = first_day[log.user_code] < row_day
    day_rows, day_hits = np.bincount(row_day, is_earlier), np.bincount(row_day, is_earlier & log.loved)
    day_rate = np.maximum(rate, (day_hits + MIN_DAY_ROWS * rate) / (day_rows + MIN_DAY_ROWS))
    is_arrival = trials <= MAX_ARRIVAL_ROWS
    is_crowd = np.bincount(first_day, is_arrival) >= MIN_CROWD_USERS
    by_day = _compute_group_weight(
        first_day, trials, hits, np.where(is_arrival & is_crowd[first_day], day_rate[first_day], 0.0)
    )
    # Users whom their day explains say nothing about those with as many rows.
    by_row_count = _compute_group_weight(trials, trials, hits, np.where(is_other | (by_day < 0.5), 0.0, rate))
    return np.where(log.loved, np.minimum(by_row_count, by_day)[log.user_code], 1.0)


def _compute_group_weight(group: Ints, trials: Ints, hits: Ints, rate: Floats) -> Floats:
    """Weight [U] of users by the hearts of their group [U] above the love rate [U] of others; 0: not compared."""
    is_compared = rate > 0
    loved = np.bincount(group, hits * is_compared)[group]
    expected = MAX_NEWCOMER_RATIO * np.bincount(group, trials * rate)[group]
    is_excessive = is_compared & (loved > expected + 4 * np.sqrt(expected))
    weight: Floats = np.where(is_excessive, expected / np.maximum(loved, 1.0), 1.0)
    return weight


def _compute_taste_weight(log: AbuseLog) -> Floats:
    """Users who love often, and what the other users love least: bots that praise bad responses at a human pace."""
    from scipy.special import ndtr

    trials, hits = _count_user_rows(log)
    weight, is_frequent = np.ones(len(log.user_code)), hits >= FREQUENT_LOVE_RATIO * log.loved.mean() * trials
    users = np.flatnonzero(is_frequent & (np.minimum(hits, trials - hits) >= MIN_TASTE_ROWS))
    is_user = np.isin(log.user_code, users)
    scores = predict_love(log, ~is_user, np.flatnonzero(is_user)) if len(users) else None
    if scores is None:
        return weight
    # Mann and Whitney's test of a user's loved rows against the others. A user whose love has nothing to do with the
    # taste of others has a probability below 0.01 by chance in 1 of 100 cases, and one who shares it far more rarely.
    row_users, loved = log.user_code[is_user], log.loved[is_user]
    order = np.lexsort((scores, row_users))
    row_rank = np.empty(len(scores))
    first_rows = np.searchsorted(row_users[order], users)
    row_rank[order] = np.arange(len(scores)) - first_rows[np.searchsorted(users, row_users[order])] + 1
    loved_rows, other_rows = hits[users].astype(np.float64), (trials - hits)[users].astype(np.float64)
    rank_sum = np.bincount(row_users[loved], weights=row_rank[loved], minlength=len(trials))[users]
    pair_count = loved_rows * other_rows
    preferred_pairs = rank_sum - loved_rows * (loved_rows + 1) / 2
    z_score = (preferred_pairs / pair_count - 0.5) / np.sqrt((loved_rows + other_rows + 1) / (12 * pair_count))
    probability, order = ndtr(z_score), np.argsort(z_score)
    adjusted = _step_up(probability, order, len(users) / np.arange(1, len(users) + 1))
    weight[is_user] = (adjusted / TAIL_PROBABILITY_THRESHOLD)[np.searchsorted(users, row_users)]
    return weight


def predict_love(log: AbuseLog, is_other: Bools, rows: Ints) -> Floats | None:
    """Score [R] of rows by a logistic regression on words of what other users love; None if they love too little."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    samples = [rng.permutation(np.flatnonzero(is_other & (log.loved == label)))[:TASTE_MODEL_ROWS] for label in (0, 1)]
    if log.load_responses is None or min(map(len, samples)) < MIN_COMPARISON_ROWS:
        return None
    sample_rows = np.concatenate(samples)
    words = HashingVectorizer(n_features=2**16, binary=True, norm=None, alternate_sign=False)
    texts = log.load_responses(np.concatenate([sample_rows, rows]))
    features = words.transform(texts)
    model = LogisticRegression(C=0.1, max_iter=200, class_weight="balanced")
    model.fit(features[: len(sample_rows)], log.loved[sample_rows])
    scores: Floats = model.decision_function(features[len(sample_rows) :])
    return scores


def _compute_user_cap_weight(log: AbuseLog) -> Floats:
    """Users with more rows than the cap: their total weight is the cap."""
    return np.minimum(1.0, USER_ROW_CAP / np.bincount(log.user_code)[log.user_code])


ABUSE_RULES: dict[str, Callable[[AbuseLog], Floats]] = {
    "rate": _compute_love_rate_weight, "burst": _compute_burst_weight, "timing": _compute_timing_weight,
    "copies": _compute_copy_weight, "self_love": _compute_self_love_weight, "device": _compute_shared_device_weight,
    "newcomers": _compute_newcomer_weight, "taste": _compute_taste_weight, "cap": _compute_user_cap_weight,
}  # fmt: skip
"""The rules by name."""


def compute_trust_weights(log: AbuseLog, rule_names: Sequence[str]) -> tuple[Floats, dict[str, NDArray[np.float32]]]:
    """Weight of each row [N] by all rules, and the weight [N] by each rule alone."""
    weight, weight_by_rule = np.ones(len(log.user_code)), {}
    for name in rule_names if len(log.user_code) else ():
        rule_weight = np.clip(ABUSE_RULES[name](log), MIN_ROW_WEIGHT, 1.0)
        weight = np.minimum(weight, rule_weight)
        # Single precision is enough for the sums on the card, and all rules of all rows are in memory at once.
        weight_by_rule[name] = rule_weight.astype(np.float32)
    return weight, weight_by_rule
