"""What a reward should not be paid for is taken out of training: who reacts, how long a response is, sign-offs.

- `sign_offs`: rows come again with a farewell or an affectionate close and the same label (rluf.reward.augment).
- `propensity`: a reaction from where few react tells more than one from where everybody does, so it weighs more.
- `length`, `users`: what length alone, and each user's own readiness to react, explain of the labels is fitted first
  and added to the logits in training; the model learns the rest, and scores without it. A user's readiness is added
  to each row as the user's rows of other texts tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rluf.reward.calibration import Floats, sigmoid

LOWEST = 0.1
"""Propensities below this share of the highest count as this share, so that no row outweighs ten others."""
ROUNDS = 40
SPREAD = 0.5
"""First guess of the users' standard deviation in log-odds; it is fitted too."""


def propensity_weights(propensity: Floats, labels: Floats, *, reacted: bool = False) -> Floats:
    """Factors [N] on the weights: 1 / theta for rows with a reaction, theta being propensity [N] over its highest.

    The unbiased loss is (Y / theta) l(1) + (1 - Y / theta) l(0) (Saito et al. 2020, arXiv 1909.03601). Its second
    factor may be negative, and the loss then has no lower bound; (1 - Y) in its place differs by less than the rate of
    reactions, which are rare. With `reacted` all rows are reactions (up or down) and each weighs 1 / theta.
    """
    theta = np.maximum(propensity / max(float(propensity.max()), 1e-12), LOWEST)
    return np.asarray(1 / theta if reacted else np.where(labels > 0.5, 1 / theta, 1.0), dtype=np.float64)


@dataclass(frozen=True)
class Nuisance:
    """What length and user explain, in log-odds: slope * (log(1 + characters) - centre) / scale + the user's own."""

    slope: float = 0.0
    centre: float = 0.0
    scale: float = 1.0
    level: float = 0.0
    """Log-odds of a response of average length shown to an average user."""
    users: dict[str, tuple[float, float]] | None = None
    """Each user's own log-odds, and how sharply the fit bends there (the inverse of its variance)."""

    def of_length(self, lengths: Floats) -> Floats:
        """Log-odds [N] of responses of `lengths` [N] characters, over those of the average."""
        return np.asarray(self.slope * (np.log1p(lengths) - self.centre) / self.scale, dtype=np.float64)

    def offsets(
        self, labels: Floats, weights: Floats, lengths: Floats, users: Sequence[str], texts: NDArray[np.int64]
    ) -> Floats:
        """Log-odds [N] of rows that were fitted, the user's own as it is without the labels of the row's own text.

        A row's label is a good part of what is known of a user with two or three rows, so with it left in, offsets
        would tell the labels and the model would learn to disbelieve the text.
        A user's rows with one of `texts` [N] read alike and go together. One Newton step from the fit, which is
        close: the prior keeps it from moving far.
        """
        length = self.of_length(lengths)
        if self.users is None:
            return length
        own, bend = np.asarray([self.users[user] for user in users]).T
        p = sigmoid(self.level + length + own)
        _, user = np.unique(np.asarray(users, dtype=str), return_inverse=True)
        _, code = np.unique(np.stack([user, texts]), axis=1, return_inverse=True)
        slope, curvature = (np.bincount(code, part)[code] for part in (weights * (labels - p), weights * p * (1 - p)))
        return np.asarray(length + own - slope / np.maximum(bend - curvature, 1e-9), dtype=np.float64)


def fit_labels(
    labels: Floats, weights: Floats, lengths: Floats, users: Sequence[str], *, length: bool, user: bool
) -> Nuisance:
    """Logistic regression of labels [N] on length and user, without the text.

    Users' log-odds are shrunk as draws from a normal distribution whose variance is fitted as well (EM with Laplace's
    approximation, as in Breslow and Clayton 1993), so a user with three rows stays near 0.
    """
    x = np.log1p(lengths)
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    columns = [np.ones(len(labels)), (x - centre) / scale] if length else [np.ones(len(labels))]
    design, beta = np.stack(columns, axis=1), np.zeros(len(columns))
    names, code = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    own: Floats = np.zeros(len(names))
    bend: Floats = np.ones(len(names))
    variance = SPREAD**2
    for _ in range(ROUNDS):
        p = sigmoid(design @ beta + own[code])
        curvature = (design * (weights * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(len(beta))
        beta = beta + np.clip(np.linalg.solve(curvature, design.T @ (weights * (labels - p))), -3, 3)
        if user:
            p = sigmoid(design @ beta + own[code])
            slope = np.bincount(code, weights * (labels - p), minlength=len(names)) - own / variance
            bend = np.bincount(code, weights * p * (1 - p), minlength=len(names)).astype(np.float64) + 1 / variance
            own = own + np.clip(slope / bend, -2, 2)
            variance = max(float((own**2 + 1 / bend).mean()), 1e-4)
    found = dict(zip(names.tolist(), zip(own.tolist(), bend.tolist(), strict=True), strict=True)) if user else None
    return Nuisance(float(beta[1]) if length else 0.0, centre, scale, float(beta[0]), found)


def fit_pairs(lengths: Floats, weights: Floats) -> Nuisance:
    """Bradley-Terry of pairs on length alone; `lengths` [2N] are those of all chosen, then all rejected responses."""
    x = np.log1p(lengths)
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    chosen, rejected = np.split((x - centre) / scale, 2)
    difference, slope = chosen - rejected, 0.0
    for _ in range(ROUNDS):
        p = sigmoid(slope * difference)
        curvature = float((weights * p * (1 - p) * difference**2).sum()) + 1e-9
        slope += float(np.clip((weights * (1 - p) * difference).sum() / curvature, -3, 3))
    return Nuisance(slope, centre, scale)
