"""Fit of the reader's probes and heads, with out-of-fold figures: every score is of rows whose group was left out.

Probes are ridge-regularized logistic regressions on standardized hidden states. Heads are linear in the features and
fitted by one penalized likelihood to several sets at once, with bounds on the signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from rluf.simulate.reader_features import FEATURE_NAMES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FOLD_COUNT = 5
NON_NEGATIVE = frozenset({
    "specificity", "specificity_per_token", "end_of_turn", "taste", "refusal_of_harm", "approval",
})  # fmt: skip
NON_POSITIVE = frozenset({
    "repetition", "echo", "unfinished", "no_sentence_end", "signoff", "stock", "misfit", "offense", "comply",
    "false_refusal",
})  # fmt: skip
"""Signs of the weights: a response is not better for fitting the prompt less, or for being cut."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Linear probe on hidden states: log-odds = x @ weights + bias."""

    weights: Floats
    bias: float

    def apply(self, hidden: Floats) -> Floats:
        """Log-odds [N] for hidden states [N, H]."""
        return hidden @ self.weights + self.bias


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of one set for fitting a head: differences of pairs [N, F] (label 1), or features with labels [N].

    `row_weights` [N] are relative within the set, `set_weight` is that of its mean log-likelihood.
    """

    features: Floats
    labels: Floats | None
    set_weight: float
    row_weights: Floats


def fit_probe(hidden: Floats, labels: Floats, strength: float) -> Probe:
    """Fit on hidden states [N, H] with the inverse ridge penalty `strength`; classes count equally."""
    scaler = StandardScaler().fit(hidden)
    model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")
    model.fit(scaler.transform(hidden), labels)
    weights = model.coef_[0] / scaler.scale_
    return Probe(weights, float(model.intercept_[0] - scaler.mean_ @ weights))


def split_groups(groups: Sequence[str]) -> NDArray[np.int64]:
    """Fold [N] of each row; rows of one group share a fold."""
    fold = np.zeros(len(groups), dtype=np.int64)
    splits = GroupKFold(FOLD_COUNT, shuffle=True, random_state=0).split(fold, groups=np.asarray(groups))
    for index, (_, test) in enumerate(splits):
        fold[test] = index
    return fold


def split_together(group_lists: Sequence[Sequence[str]]) -> list[Ints]:
    """Folds of the rows of several sets; a group that occurs in more than one set has one fold."""
    folds = split_groups([group for groups in group_lists for group in groups])
    return np.split(folds, np.cumsum([len(groups) for groups in group_lists])[:-1])


def probe_out_of_fold(hidden: Floats, labels: Floats, fold: NDArray[np.int64], strength: float) -> Floats:
    """Log-odds [N] of each row from the probe fitted without its fold."""
    scores = np.zeros(len(labels))
    for index in np.unique(fold):
        test = fold == index
        scores[test] = fit_probe(hidden[~test], labels[~test], strength).apply(hidden[test])
    return scores


def fit_head(sets: Sequence[HeadRows], ridge: float, excluded: frozenset[str] = frozenset()) -> tuple[Floats, Floats]:
    """Weights [F] and biases [sets with labels] of a head on the features; `excluded` features get weight 0."""
    bounds: list[tuple[float | None, float | None]] = []
    for name in FEATURE_NAMES:
        upper = 0.0 if name in NON_POSITIVE or name in excluded else None
        lower = 0.0 if name in NON_NEGATIVE or name in excluded else None
        bounds.append((lower, upper))
    return fit_sets(sets, ridge, bounds)


def fit_sets(
    sets: Sequence[HeadRows], ridge: float, bounds: Sequence[tuple[float | None, float | None]] | None = None
) -> tuple[Floats, Floats]:
    """Weights [F] and biases [sets with labels] that maximize the weighted mean log-likelihood of the sets.

    Features are standardized by the rows of the sets together, and the ridge penalty is on standardized weights.
    """
    means = [np.zeros(rows.features.shape[1]) if rows.labels is None else rows.features.mean(0) for rows in sets]
    centered = [rows.features - mean for rows, mean in zip(sets, means, strict=True)]
    scale = np.maximum(np.sqrt(np.mean([(features**2).mean(0) for features in centered], axis=0)), 1e-6)
    labeled = [index for index, rows in enumerate(sets) if rows.labels is not None]
    feature_count = len(scale)

    def loss_and_gradient(parameters: Floats) -> tuple[float, Floats]:
        weights, biases = parameters[:feature_count], parameters[feature_count:]
        loss, gradient = 0.5 * ridge * float(weights @ weights), np.concatenate([ridge * weights, 0 * biases])
        for index, rows in enumerate(sets):
            scaled = centered[index] / scale
            bias = biases[labeled.index(index)] if index in labeled else 0.0
            signs = np.ones(len(scaled)) if rows.labels is None else 2 * rows.labels - 1
            margins = signs * (scaled @ weights + bias)
            shares = rows.set_weight * rows.row_weights / rows.row_weights.sum()
            loss -= float(shares @ log_expit(margins))
            pull = -shares * signs * expit(-margins)
            gradient[:feature_count] += scaled.T @ pull
            if index in labeled:
                gradient[feature_count + labeled.index(index)] += pull.sum()
        return loss, gradient

    all_bounds = None if bounds is None else [*bounds, *[(None, None)] * len(labeled)]
    start = np.zeros(feature_count + len(labeled))
    result = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=all_bounds)
    weights = result.x[:feature_count] / scale
    biases = [result.x[feature_count + n] - means[index] @ weights for n, index in enumerate(labeled)]
    return weights, np.array(biases)


def describe_weights(weights: Floats) -> Mapping[str, float]:
    """Weights by feature, rounded to 4 significant digits."""
    return {name: float(f"{weight:.4g}") for name, weight in zip(FEATURE_NAMES, weights, strict=True)}
