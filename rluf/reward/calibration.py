"""Map a reward model's raw logit to a probability at the natural base rate.

Training may see only a share of the negatives; the prior correction restores the natural rate. The remaining over- or
under-confidence is removed by two parameters fitted on dev users. Both are stored in calibration.json next to the
weights, and every loader of the checkpoint applies them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rluf.config.reward import Pooling
from rluf.errors import ModelError
from rluf.utils.stats import Floats, logit, sigmoid

CALIBRATION_FILE = "calibration.json"
CARD_FILE = "reward_card.json"
"""Card of a reward model that rluf trained, in its folder."""
EXTERNAL_MAX_TOKENS = 8192
"""Longest input of a model that rluf did not train, if its tokenizer and positions allow as much."""
MIN_SCALE = 0.05
"""Smallest fitted scale. It is positive, so calibration never reverses the ranking."""
MEMBER_WEIGHT_PRIOR_SD = 0.5
"""Standard deviation of the normal prior that pulls the ensemble members' weights (per SD of a logit) to their mean."""
RENAMED_FIELDS: Mapping[str, str] = {
    "members": "member_count", "shares": "member_weights", "fused": "shared_head", "next_turn": "read_at_next_turn",
    "response_alone": "response_only_members", "backbone": "backbone_hash",
}  # fmt: skip
"""Keys that calibration.json had in earlier releases, old to new; both are read."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibrated logit = scale * (raw + prior_shift) + offset; the value is its sigmoid.

    `method` is how scale and offset were fitted: identity, platt (labels), or centered (pairs: offset puts the mean
    logged response at 0.5). `max_tokens` is the sequence length that the model was trained on.
    """

    objective: str = ""
    method: str = "identity"
    prior_shift: float = 0.0
    scale: float = 1.0
    offset: float = 0.0
    max_tokens: int = 512
    member_count: int = 1
    """Models in the folder; the raw logit is their mean, weighted by `member_weights`."""
    member_weights: tuple[float, ...] = ()
    """Weight of each member in the mean; they sum to 1. Empty: equal weights."""
    shared_head: bool = False
    """One head was fitted over all members: a single member's logit has no meaning, and there is no spread."""
    read_at_next_turn: bool = False
    """The model's input ends with the header of the user's next message."""
    mark_truncated: bool = False
    """Cut responses are encoded without the end marker: the model saw such rows in training."""
    response_only_members: tuple[int, ...] = ()
    """Indices of the members that read the response without the conversation."""
    member_poolings: tuple[Pooling, ...] = ()
    """Tokens that each member's head reads (rluf.config.reward); empty: the last one, for all members."""
    backbone_hash: str = ""
    """Hash of the backbone shared with other heads (see rluf.reward.shared_backbone); empty for a separate model."""
    is_external: bool = False
    """The model was not trained by rluf: identity calibration, and rewards use its logit as it is."""

    def pool_members(self, member_logits: Floats) -> Floats:
        """Raw logits [N] from the members' logits [members, N]."""
        return np.asarray(self.member_weights or (1 / len(member_logits),) * len(member_logits)) @ member_logits

    def calibrate_logits(self, raw_logits: Sequence[float] | Floats) -> Floats:
        """Calibrated logits [N] from raw logits [N]."""
        shifted = np.asarray(raw_logits, dtype=np.float64) + self.prior_shift
        return np.asarray(self.scale * shifted + self.offset)

    def compute_probabilities(self, raw_logits: Sequence[float] | Floats) -> Floats:
        """Calibrated probabilities [N] from raw logits [N]."""
        return sigmoid(self.calibrate_logits(raw_logits))

    def save(self, folder: Path) -> None:
        """Write calibration.json into a checkpoint folder."""
        (folder / CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Read calibration.json; the identity for a model that rluf did not train.

        Raises ModelError for unexpected content, and for a missing file next to a reward card.
        """
        path = folder / CALIBRATION_FILE
        if not path.exists() and (folder / "config.json").is_file() and not (folder / CARD_FILE).exists():
            return cls(max_tokens=EXTERNAL_MAX_TOKENS, is_external=True)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            fields: dict[str, Any] = {RENAMED_FIELDS.get(key, key): value for key, value in content.items()}
            if fields.get("method") == "centred":  # spelling of earlier releases
                fields["method"] = "centered"
            if fields.pop("knots", ()):
                raise ValueError("isotonic calibration of an earlier release")
            member_weights = tuple(fields.get("member_weights", ()))
            member_lists = ("response_only_members", "member_poolings")
            tuples = {name: tuple(fields.get(name, ())) for name in member_lists} | {"member_weights": member_weights}
            if unknown := set(tuples["member_poolings"]) - set(get_args(Pooling)):
                raise ValueError(f"unknown pooling {sorted(unknown)} in member_poolings")
            calibration = cls(**fields | tuples)
            if member_weights and len(member_weights) != calibration.member_count:
                raise ValueError(f"{len(member_weights)} member weights for {calibration.member_count} members")
            return calibration
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); a reward model folder is written by python -m rluf.reward, "
                "train it again or name another folder"
            ) from error


def compute_prior_shift(labels: Sequence[int] | Floats, weights: Sequence[float] | Floats) -> float:
    """Shift from logits of the sampled rows to the natural rate: logit(pi_true) - logit(pi_train).

    `weights` [N] are 1 / sampling rate, so their mean over labels is the natural rate. When a share w of the negatives
    was sampled this is log w (He et al. 2014). Returns 0 when one class is missing.
    """
    y, w = np.asarray(labels, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if y.size == 0 or y.min() == y.max():
        return 0.0
    return logit(float((w * y).sum() / w.sum())) - logit(float(y.mean()))


def fit_platt(
    logits: Floats,
    labels: Floats,
    weights: Floats,
    *,
    ridge: float = 1.0,
    smooth_targets: bool = True,
    covariates: Floats | None = None,
) -> tuple[float, float]:
    """Scale and offset of sigmoid(scale * z + offset) by weighted maximum likelihood (Newton steps).

    With `smooth_targets`, targets are Platt's (N+ + 1) / (N+ + 2) and 1 / (N- + 2). `ridge` is the precision of a
    normal prior around the identity, so that few positives cannot bend the curve: on the scale (weaker where the logits
    vary by less than 1) and on the calibrated logit of the mean row. The scale stays positive, so the ranking is never
    reversed. Source: Platt 1999.

    `covariates` [N, K] are fitted with the logit, so the scale is that of responses served in equal contexts. The
    offset then makes the mean probability the mean label, whatever the contexts.
    """
    positives, negatives = float((weights * labels).sum()), float((weights * (1 - labels)).sum())
    if positives <= 0 or negatives <= 0:
        return 1.0, 0.0
    high, low = ((positives + 1) / (positives + 2), 1 / (negatives + 2)) if smooth_targets else (1.0, 0.0)
    targets = labels * high + (1 - labels) * low
    # Around their mean, or a scale far from 1 would need an offset that the prior forbids.
    mean = float(np.average(logits, weights=weights))
    columns, prior_mean = [logits - mean, np.ones_like(logits)], np.array([1.0, mean])
    if covariates is None or not covariates.size:
        scale, mean_logit = _fit_by_newton(np.stack(columns, axis=1), targets, weights, prior_mean, ridge)
        return scale, mean_logit - scale * mean
    from scipy.optimize import brentq

    standardized = (covariates - covariates.mean(0)) / (covariates.std(0) + 1e-6)
    design, prior_mean = np.column_stack([*columns, standardized]), np.append(prior_mean, np.zeros(len(covariates.T)))
    scale, _ = _fit_by_newton(design, targets, weights, prior_mean, ridge)
    rate, bound = np.average(labels, weights=weights), 40 + scale * np.abs(logits).max()
    offset = brentq(lambda b: np.average(sigmoid(scale * logits + b), weights=weights) - rate, -bound, bound)
    return scale, float(offset)


def fit_pair_scale(differences: Floats, weights: Floats, *, ridge: float = 1.0) -> float:
    """Scale a of P(chosen beats rejected) = sigmoid(a * difference), a temperature fitted on pairs; positive."""
    if differences.size == 0:
        return 1.0
    # Swapping the sides of a pair together with its label leaves the likelihood unchanged, so the signs are free.
    # Alternating them turns the pairs into ordinary logistic regression data with both labels.
    signs = np.where(np.arange(differences.size) % 2 == 0, 1.0, -1.0)
    scale, _ = _fit_by_newton((differences * signs)[:, None], (signs + 1) / 2, weights, np.array([1.0]), ridge)
    return scale


def fit_member_weights(
    member_logits: Floats, labels: Floats, weights: Floats, *, is_pairwise: bool
) -> tuple[float, ...]:
    """Weights of an ensemble's members, fitted on logits [members, N] of rows that no member was trained on.

    Stacking (Wolpert 1992): logistic regression of the labels on the members' logits (pairs: differences, no bias),
    with no weight below 0 and a normal prior that pulls the weights together, so that on few rows members count nearly
    equally. The weights apply to the logits as they are and sum to 1; they are equal if the rows have only one label.
    """
    from scipy.optimize import minimize

    count, spreads = len(member_logits), member_logits.std(axis=1)
    if count < 2 or spreads.min() <= 0 or (not is_pairwise and np.ptp(labels) == 0):
        return (1 / count,) * count
    # Fit on logits of unit spread, so that the prior treats members of different scale equally.
    x = (member_logits / spreads[:, None]).T

    def compute_penalized_loss(parameters: Floats) -> tuple[float, Floats]:
        w, z = parameters[:-1], x @ parameters[:-1] + parameters[-1]
        prior_gradient = (w - w.mean()) / MEMBER_WEIGHT_PRIOR_SD**2
        residuals = weights * (sigmoid(z) - labels)
        loss = float(weights @ (np.logaddexp(0, z) - labels * z)) + 0.5 * float(prior_gradient @ (w - w.mean()))
        return loss, np.append(residuals @ x + prior_gradient, 0.0 if is_pairwise else residuals.sum())

    start = np.append(np.full(count, 1 / count), 0.0)
    bounds = [(0, None)] * count + [(None, None)]
    solution = minimize(compute_penalized_loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    member_weights = np.asarray(solution.x[:-1], dtype=np.float64) / spreads
    total = member_weights.sum()
    return tuple((member_weights / total).tolist()) if total > 0 else (1 / count,) * count


def _compute_ridge_factor(logits: Floats, weights: Floats) -> float:
    """Variance of the logits, at most 1: the prior of a scale in units of their standard deviation.

    A model that trained little ranks responses by tiny differences. A prior around scale 1 in units of the logits
    would keep them tiny whatever the labels say, and the objective would have no weight in the reward.
    """
    mean = np.average(logits, weights=weights)
    return min(1.0, float(np.average((logits - mean) ** 2, weights=weights)))


def _fit_by_newton(
    features: Floats, targets: Floats, weights: Floats, prior_mean: Floats, ridge: float
) -> tuple[float, float]:
    """Weighted logistic regression with a normal prior around `prior_mean`; returns (scale, offset or 0)."""
    beta = prior_mean.copy()
    ridges = np.full(beta.size, ridge)
    ridges[0] *= _compute_ridge_factor(features[:, 0], weights)

    def compute_penalized_loss(coefficients: Floats) -> float:
        z = features @ coefficients
        losses = np.logaddexp(0.0, z) - targets * z
        return float((weights * losses).sum() + 0.5 * (ridges * (coefficients - prior_mean) ** 2).sum())

    loss = compute_penalized_loss(beta)
    for _ in range(100):
        p = sigmoid(features @ beta)
        gradient = features.T @ (weights * (p - targets)) + ridges * (beta - prior_mean)
        hessian = (features * (weights * p * (1 - p))[:, None]).T @ features + np.diag(ridges + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        # A full Newton step overshoots where the sigmoid saturates: halve it until the loss does not increase.
        step_size = 1.0
        while compute_penalized_loss(beta - step_size * step) > loss and step_size > 1e-6:
            step_size /= 2
        beta = beta - step_size * step
        previous_loss, loss = loss, compute_penalized_loss(beta)
        if previous_loss - loss < 1e-12 * max(1.0, abs(loss)):
            break
    return max(float(beta[0]), MIN_SCALE), float(beta[1]) if beta.size > 1 else 0.0
