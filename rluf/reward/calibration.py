"""From a model's raw logit to a probability at the natural rate.

Training may see only a share of the negatives; the prior correction puts the rest back. What is left of over- or
under-confidence is mended by two numbers fitted on dev users. Both live in calibration.json beside the weights, and
everything that loads the checkpoint applies them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rluf.errors import ModelError

Floats = NDArray[np.float64]
FILE = "calibration.json"
MIN_SCALE = 0.05
SHARE_SPREAD = 0.5
"""Standard deviation of the normal prior that holds members' weights (logits a standard deviation) to their mean."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibrated logit = scale * (raw + prior_shift) + offset; the value is its sigmoid.

    `method` says how scale and offset came about: identity, platt or temperature (labels), or centred (pairs: offset
    puts the mean logged response at 0.5). With method isotonic the calibrated logit runs through `knots` instead.
    `max_tokens` is the length that the model was trained to read.
    """

    objective: str = ""
    method: str = "identity"
    prior_shift: float = 0.0
    scale: float = 1.0
    offset: float = 0.0
    max_tokens: int = 512
    members: int = 1
    """Models in the folder; the raw logit is their mean, by `shares`."""
    shares: tuple[float, ...] = ()
    """How much each member counts in the mean; they sum to 1. Empty: all alike."""
    fused: bool = False
    """One head was fitted over all members: each one's logit alone means nothing, and there is no spread."""
    next_turn: bool = False
    """The text that the model reads ends with the opening of the user's next message."""
    response_alone: tuple[int, ...] = ()
    """Numbers of the members that read the response without the conversation."""
    backbone: str = ""
    """Hash of the backbone that this head shares with others (rluf.reward.shared_backbone); empty for a model alone."""
    knots: tuple[tuple[float, float], ...] = ()
    """Isotonic calibration: pairs (prior-corrected logit, calibrated logit), both rising."""

    def pooled(self, each: Floats) -> Floats:
        """Raw logits [N] of the members' own [members, N]."""
        return np.asarray(self.shares or (1 / len(each),) * len(each)) @ each

    def logits(self, raw: Sequence[float] | Floats) -> Floats:
        """Calibrated logits [N] of raw logits [N]."""
        shifted = np.asarray(raw, dtype=np.float64) + self.prior_shift
        return _through(self.knots, shifted) if self.knots else self.scale * shifted + self.offset

    def values(self, raw: Sequence[float] | Floats) -> Floats:
        """Calibrated probabilities [N] of raw logits [N]."""
        return sigmoid(self.logits(raw))

    def save(self, folder: Path) -> None:
        """Write calibration.json into a checkpoint folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Read calibration.json; raises ModelError when it is missing or not ours."""
        path = folder / FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            knots = tuple((float(x), float(y)) for x, y in stored.get("knots", ()))
            shares, alone = (tuple(stored.get(key, ())) for key in ("shares", "response_alone"))
            found = cls(**stored | {"knots": knots, "shares": shares, "response_alone": alone})
            if shares and len(shares) != found.members:
                raise ValueError(f"{len(shares)} shares for {found.members} members")
            return found
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); a reward model folder is written by python -m rluf.reward, "
                "train it again or name another folder"
            ) from error


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-z)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)), dtype=np.float64)


def logit(probability: float) -> float:
    """log(p / (1 - p)); p is clipped to [1e-12, 1 - 1e-12]."""
    clipped = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(clipped) - math.log1p(-clipped)


def prior_shift(labels: Sequence[int] | Floats, weights: Sequence[float] | Floats) -> float:
    """Shift that takes logits learnt on the sampled rows to the natural rate: logit(pi_true) - logit(pi_train).

    `weights` [N] are 1 / share kept, so their mean over labels is the natural rate. When a share w of the negatives
    was kept this is log w (He et al. 2014). Returns 0 when one class is missing.
    """
    y, w = np.asarray(labels, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if y.size == 0 or y.min() == y.max():
        return 0.0
    return logit(float((w * y).sum() / w.sum())) - logit(float(y.mean()))


def fit_platt(
    logits: Floats, labels: Floats, weights: Floats, *, ridge: float = 1.0, smooth: bool = True
) -> tuple[float, float]:
    """Scale and offset of sigmoid(scale * z + offset) by weighted maximum likelihood (Newton steps).

    With `smooth`, targets are Platt's (N+ + 1) / (N+ + 2) and 1 / (N- + 2). `ridge` pulls towards scale 1, offset 0
    as a normal prior of that precision, so that few positives cannot bend the curve. The scale stays above 0: a
    calibration never turns the ranking round. Source: Platt 1999.
    """
    positives, negatives = float((weights * labels).sum()), float((weights * (1 - labels)).sum())
    if positives <= 0 or negatives <= 0:
        return 1.0, 0.0
    high, low = ((positives + 1) / (positives + 2), 1 / (negatives + 2)) if smooth else (1.0, 0.0)
    targets = labels * high + (1 - labels) * low
    return _newton(np.stack([logits, np.ones_like(logits)], axis=1), targets, weights, np.array([1.0, 0.0]), ridge)


def fit_temperature(logits: Floats, labels: Floats, weights: Floats, *, ridge: float = 1.0) -> float:
    """Scale 1 / T of sigmoid(z / T) by weighted maximum likelihood; above 0. Source: Guo et al. 2017."""
    return _newton(logits[:, None], labels, weights, np.array([1.0]), ridge)[0]


def fit_isotonic(logits: Floats, labels: Floats, weights: Floats) -> tuple[tuple[float, float], ...]:
    """Knots of the weighted isotonic fit (pool adjacent violators): each block's mean logit and the logit of its rate.

    A block's rate is smoothed by one row of the natural rate, so that no knot is infinite. Empty without both labels.
    Source: Zadrozny and Elkan 2002.
    """
    from sklearn.isotonic import isotonic_regression

    if len(set(labels.tolist())) < 2:
        return ()
    order = np.argsort(logits, kind="stable")
    z, y, w = logits[order], labels[order], weights[order]
    block = np.unique(np.round(isotonic_regression(y, sample_weight=w), 12), return_inverse=True)[1]
    mass = np.bincount(block, w)
    rate, one = float(np.average(y, weights=w)), float(w.mean())
    values = (np.bincount(block, w * y) + one * rate) / (mass + one)
    centres = np.bincount(block, w * z) / mass
    knots = zip(centres.tolist(), np.maximum.accumulate(values).tolist(), strict=True)
    return tuple((centre, logit(value)) for centre, value in knots)


def _through(knots: Sequence[tuple[float, float]], z: Floats) -> Floats:
    """Straight lines between the knots and a slope of MIN_SCALE beyond them, so that the ranking is kept there."""
    x, y = (np.asarray(side) for side in zip(*knots, strict=True))
    beyond = np.minimum(z - x[0], 0) + np.maximum(z - x[-1], 0)
    return np.asarray(np.interp(z, x, y) + MIN_SCALE * beyond, dtype=np.float64)


def fit_scale(differences: Floats, weights: Floats, *, ridge: float = 1.0) -> float:
    """Scale a of P(chosen beats rejected) = sigmoid(a * difference), a temperature fitted on pairs; above 0."""
    if differences.size == 0:
        return 1.0
    signs = np.where(np.arange(differences.size) % 2 == 0, 1.0, -1.0)
    scale, _ = _newton((differences * signs)[:, None], (signs + 1) / 2, weights, np.array([1.0]), ridge)
    return scale


def fit_shares(members: Floats, labels: Floats, weights: Floats, *, pairs: bool) -> tuple[float, ...]:
    """How much each member of an ensemble counts, from logits [members, N] of rows that none of them was trained on.

    Stacking (Wolpert 1992): logistic regression of the labels on the members' logits (pairs: differences, no bias),
    none below 0, and a normal prior holds the weights together, so that on few rows members count nearly alike.
    Returned are shares of the logits as they are, which sum to 1; alike where the rows hold one label only.
    """
    from scipy.optimize import minimize

    count, spreads = len(members), members.std(axis=1)
    if count < 2 or spreads.min() <= 0 or (not pairs and np.ptp(labels) == 0):
        return (1 / count,) * count
    x = (members / spreads[:, None]).T

    def objective(point: Floats) -> tuple[float, Floats]:
        w, z = point[:-1], x @ point[:-1] + point[-1]
        apart = (w - w.mean()) / SHARE_SPREAD**2
        slope = weights * (sigmoid(z) - labels)
        loss = float(weights @ (np.logaddexp(0, z) - labels * z)) + 0.5 * float(apart @ (w - w.mean()))
        return loss, np.append(slope @ x + apart, 0.0 if pairs else slope.sum())

    start = np.append(np.full(count, 1 / count), 0.0)
    solved = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * count + [(None, None)])
    found = np.asarray(solved.x[:-1], dtype=np.float64) / spreads
    return tuple((found / found.sum()).tolist()) if found.sum() > 0 else (1 / count,) * count


def _newton(features: Floats, targets: Floats, weights: Floats, prior: Floats, ridge: float) -> tuple[float, float]:
    """Weighted logistic regression with a normal prior around `prior`; returns (scale, offset or 0)."""
    beta = prior.copy()

    def objective(candidate: Floats) -> float:
        z = features @ candidate
        losses = np.logaddexp(0.0, z) - targets * z
        return float((weights * losses).sum() + 0.5 * ridge * ((candidate - prior) ** 2).sum())

    value = objective(beta)
    for _ in range(100):
        p = sigmoid(features @ beta)
        gradient = features.T @ (weights * (p - targets)) + ridge * (beta - prior)
        hessian = (features * (weights * p * (1 - p))[:, None]).T @ features + (ridge + 1e-9) * np.eye(beta.size)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while objective(beta - size * step) > value and size > 1e-6:
            size /= 2
        beta = beta - size * step
        previous, value = value, objective(beta)
        if previous - value < 1e-12 * max(1.0, abs(value)):
            break
    return max(float(beta[0]), MIN_SCALE), float(beta[1]) if beta.size > 1 else 0.0
