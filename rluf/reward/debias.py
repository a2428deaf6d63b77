"""Remove nuisance effects from reward training: who reacts, response length, and sign-offs.

- `sign_offs`: rows are duplicated with a farewell or an affectionate close and the same label (rluf.reward.augment).
- `propensity`: a reaction is weighted by the inverse of how often comparable responses get one.
- `length`, `users`: the effects of response length and of each user's own reaction rate on the labels are fitted first
  and added to the logits in training only; the model learns the rest and scores without them. Per-user offsets are
  estimated leave-one-text-out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rluf.utils.stats import Floats, sigmoid

MIN_PROPENSITY_RATIO = 0.1
"""Propensities below this share of the highest are raised to it, so that no row outweighs ten others."""
FIT_ITERATIONS = 40
INITIAL_USER_SD = 0.5
"""Starting value of the users' standard deviation in log-odds, which is fitted too."""


def compute_propensity_weights(propensity: Floats, labels: Floats, *, all_reacted: bool = False) -> Floats:
    """Factors [N] on the row weights: 1 / theta for rows with a reaction, theta = propensity [N] / highest propensity.

    The unbiased loss is (Y / theta) l(1) + (1 - Y / theta) l(0) (Saito et al. 2020, arXiv 1909.03601). Its second
    factor can be negative, which leaves the loss without a lower bound; (1 - Y) in its place differs by less than the
    reaction rate, which is small. With `all_reacted` every row is a reaction (up or down) and weighs 1 / theta.
    """
    theta = np.maximum(propensity / max(float(propensity.max()), 1e-12), MIN_PROPENSITY_RATIO)
    return np.asarray(1 / theta if all_reacted else np.where(labels > 0.5, 1 / theta, 1.0), dtype=np.float64)


@dataclass(frozen=True)
class NuisanceModel:
    """Log-odds explained by length and user: slope * (log(1 + characters) - center) / scale + the user's effect."""

    length_slope: float = 0.0
    length_center: float = 0.0
    length_scale: float = 1.0
    intercept: float = 0.0
    """Log-odds of a response of average length served to an average user."""
    user_effects: dict[str, tuple[float, float]] | None = None
    """Each user's effect in log-odds, and the curvature of the fit there (the inverse of its variance)."""

    def compute_length_offsets(self, lengths: Floats) -> Floats:
        """Log-odds [N] of responses of `lengths` [N] characters relative to the average length."""
        return np.asarray(
            self.length_slope * (np.log1p(lengths) - self.length_center) / self.length_scale, dtype=np.float64
        )

    def compute_row_offsets(
        self, labels: Floats, weights: Floats, lengths: Floats, user_ids: Sequence[str], text_ids: NDArray[np.int64]
    ) -> Floats:
        """Log-odds [N] of the fitted rows, with each user effect estimated without the labels of the row's own text.

        For a user with two or three rows, the row's own label dominates the user effect. With it left in, the offsets
        would leak the labels, and the model would learn to discount the text. Rows of a user with equal `text_ids` [N]
        have identical inputs and are left out together.
        """
        length_offsets = self.compute_length_offsets(lengths)
        if self.user_effects is None:
            return length_offsets
        effects, curvatures = np.asarray([self.user_effects[user] for user in user_ids]).T
        p = sigmoid(self.intercept + length_offsets + effects)
        _, user_index = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
        _, group = np.unique(np.stack([user_index, text_ids]), axis=1, return_inverse=True)
        gradient, curvature = (
            np.bincount(group, terms)[group] for terms in (weights * (labels - p), weights * p * (1 - p))
        )
        # One Newton step from the full fit replaces a refit per row: removing a text removes its gradient and
        # curvature, and the prior prevents the effect from moving far.
        return np.asarray(
            length_offsets + effects - gradient / np.maximum(curvatures - curvature, 1e-9), dtype=np.float64
        )


def fit_label_nuisance(
    labels: Floats, weights: Floats, lengths: Floats, user_ids: Sequence[str], *, fit_length: bool, fit_users: bool
) -> NuisanceModel:
    """Logistic regression of labels [N] on length and user, without the text.

    User effects are random effects: a normal prior shrinks them, and its variance is fitted too (EM with Laplace's
    approximation, as in Breslow and Clayton 1993), so a user with three rows stays near 0.
    """
    x = np.log1p(lengths)
    center, scale = float(x.mean()), float(x.std()) or 1.0
    columns = [np.ones(len(labels)), (x - center) / scale] if fit_length else [np.ones(len(labels))]
    design, beta = np.stack(columns, axis=1), np.zeros(len(columns))
    user_names, user_index = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
    effects: Floats = np.zeros(len(user_names))
    curvatures: Floats = np.ones(len(user_names))
    variance = INITIAL_USER_SD**2
    for _ in range(FIT_ITERATIONS):
        # Alternate Newton steps for the fixed effects and for the users: the joint Hessian would be users x users.
        p = sigmoid(design @ beta + effects[user_index])
        hessian = (design * (weights * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(len(beta))
        # Steps are clipped because the sigmoid saturates: far from the optimum a Newton step can diverge.
        beta = beta + np.clip(np.linalg.solve(hessian, design.T @ (weights * (labels - p))), -3, 3)
        if fit_users:
            p = sigmoid(design @ beta + effects[user_index])
            gradient = np.bincount(user_index, weights * (labels - p), minlength=len(user_names)) - effects / variance
            information = np.bincount(user_index, weights * p * (1 - p), minlength=len(user_names))
            curvatures = information.astype(np.float64) + 1 / variance
            effects = effects + np.clip(gradient / curvatures, -2, 2)
            # EM update: the expected square of an effect is its estimate squared plus its posterior variance.
            variance = max(float((effects**2 + 1 / curvatures).mean()), 1e-4)
    user_effects = None
    if fit_users:
        user_effects = dict(
            zip(user_names.tolist(), zip(effects.tolist(), curvatures.tolist(), strict=True), strict=True)
        )
    return NuisanceModel(float(beta[1]) if fit_length else 0.0, center, scale, float(beta[0]), user_effects)


def fit_pair_nuisance(lengths: Floats, weights: Floats) -> NuisanceModel:
    """Bradley-Terry model of pairs on length only; `lengths` [2N] are all chosen, then all rejected responses."""
    x = np.log1p(lengths)
    center, scale = float(x.mean()), float(x.std()) or 1.0
    chosen, rejected = np.split((x - center) / scale, 2)
    difference, slope = chosen - rejected, 0.0
    for _ in range(FIT_ITERATIONS):
        p = sigmoid(slope * difference)
        curvature = float((weights * p * (1 - p) * difference**2).sum()) + 1e-9
        slope += float(np.clip((weights * (1 - p) * difference).sum() / curvature, -3, 3))
    return NuisanceModel(slope, center, scale)
