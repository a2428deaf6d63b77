"""Linear probe: fit a head on a frozen backbone by L2 logistic regression on its features, without gradient epochs.

With a thousand labels this ranks better than a randomly initialized head trained by gradient steps, and training that
starts from it distorts the backbone's features less (Kumar et al. 2022, "Fine-tuning can distort pretrained features
and underperform out-of-distribution"). The regularization strength is chosen on held-out clusters of the training
split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rluf.reward.backbone import get_linear_head
from rluf.reward.calibration import fit_pair_scale, fit_platt
from rluf.reward.metrics import log_loss
from rluf.utils.stats import Floats, fit_logistic, sigmoid

INVERSE_STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Inverse regularization strengths tried in turn, on standardized features; C of scikit-learn."""
STRENGTH_PATIENCE = 2
"""Strengths in a row without a better held-out loss after which no weaker regularization is tried."""
INVARIANCE_WEIGHT = 1.0
"""Weight, relative to the mean log-loss, of the mean squared change of the logit caused by sign-offs."""
COVARIATE_SCALE = 30.0
"""Factor on standardized covariates: a factor of 30 makes their regularization 900 times weaker than the features'."""
FOLD_COUNT = 4
FloatMatrix = NDArray[np.float64]


def assign_folds(clusters: Sequence[str], fold_count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0 to fold_count - 1 of each row [N]; rows of one cluster (user or prompt group) share a fold.

    Clusters are shuffled by `seed`, sorted by size, and each is assigned to the smallest fold.
    """
    names, cluster_index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sizes = np.bincount(cluster_index, minlength=len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    # Largest first keeps the folds even; the stable sort preserves the shuffled order among clusters of equal size.
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of_cluster, fold_sizes = np.zeros(len(names), dtype=np.int64), np.zeros(fold_count, dtype=np.int64)
    for cluster in order:
        fold_of_cluster[cluster] = int(fold_sizes.argmin())
        fold_sizes[fold_of_cluster[cluster]] += sizes[cluster]
    return np.asarray(fold_of_cluster[cluster_index], dtype=np.int64)


def fit_probe(
    features: FloatMatrix,
    labels: Floats,
    weights: Floats,
    clusters: Sequence[str],
    *,
    is_pairwise: bool,
    seed: int = 0,
    logit_offsets: Floats | None = None,
    change_moment: FloatMatrix | None = None,
    covariates: FloatMatrix | None = None,
) -> tuple[Floats, float, float]:
    """Weights [H], bias and the chosen strength C of a logit on features [N, H] (pairs: [2N, H], chosen first).

    Pairs: logistic regression on the difference chosen - rejected, which is Bradley-Terry with a normal prior; no bias.
    `logit_offsets` (one per row of features) are added to the logits during the fit and are not part of the result: the
    effect of a user or of length (rluf.reward.debias). `change_moment` [H, H] is the mean of d d^T over changes d of
    the features that must earn nothing (a sign-off): the mean squared change of the logit is penalized in the fit.
    `covariates` [N, K] of labeled rows are fitted together with the features and hardly regularized; the result is the
    logit at their means.
    """
    feature_count = features.shape[1]
    if covariates is not None and covariates.size:
        features = np.concatenate([features, covariates], axis=1)
    logit_offsets = np.zeros(len(features)) if logit_offsets is None else logit_offsets
    if not is_pairwise:
        features, labels, weights, clusters, logit_offsets = _merge_equal_rows(
            features, labels, weights, clusters, logit_offsets
        )
    count = len(labels)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / spread
    z[:, feature_count:] *= COVARIATE_SCALE
    mean, spread = mean[:feature_count], spread[:feature_count]
    if change_moment is None or not change_moment.any():
        change_moment = np.zeros((0, 0))
    else:
        change_moment = INVARIANCE_WEIGHT * change_moment / np.outer(spread, spread)
        change_moment = np.pad(change_moment, (0, z.shape[1] - feature_count))
    if is_pairwise:
        z, logit_offsets = z[:count] - z[count:], logit_offsets[:count] - logit_offsets[count:]
    strength = _choose_strength(
        (z, labels, weights, logit_offsets, change_moment), clusters, is_pairwise=is_pairwise, seed=seed
    )
    solution = fit_logistic(
        z, labels, weights, strength,
        logit_offsets=logit_offsets, quadratic_penalty=change_moment, fit_bias=not is_pairwise,
    )  # fmt: skip
    # Undo the standardization, so that the head applies to the features as the backbone gives them.
    head_weights = solution[:feature_count] / spread
    return head_weights, 0.0 if is_pairwise else float(solution[-1] - mean @ head_weights), strength


def _choose_strength(
    data: tuple[FloatMatrix, Floats, Floats, Floats, FloatMatrix],
    clusters: Sequence[str],
    *,
    is_pairwise: bool,
    seed: int,
) -> float:
    """Inverse regularization strength with the lowest calibrated loss on held-out folds of clusters."""
    z, labels, weights, logit_offsets, change_moment = data
    folds = assign_folds(clusters, FOLD_COUNT, seed=seed)
    usable_folds = [fold for fold in range(FOLD_COUNT) if _can_fit(folds == fold, labels, is_pairwise=is_pairwise)]
    solutions: dict[int, Floats] = {}
    best_loss, best_strength, rounds_without_gain = np.inf, INVERSE_STRENGTHS[0], 0
    # Strongest regularization first: neighboring solutions are close, so each one is a warm start for the next.
    for strength in INVERSE_STRENGTHS:
        heldout_logits = np.full(len(labels), np.nan)
        for fold in usable_folds:
            is_held_out = folds == fold
            is_train = ~is_held_out
            solutions[fold] = fit_logistic(
                z[is_train], labels[is_train], weights[is_train], strength,
                logit_offsets=logit_offsets[is_train], quadratic_penalty=change_moment,
                fit_bias=not is_pairwise, initial_solution=solutions.get(fold),
            )  # fmt: skip
            heldout_logits[is_held_out] = z[is_held_out] @ solutions[fold][:-1] + solutions[fold][-1]
        is_scored = ~np.isnan(heldout_logits)
        loss = np.inf
        if is_scored.any():
            loss = _compute_calibrated_loss(
                heldout_logits[is_scored], labels[is_scored], weights[is_scored], is_pairwise=is_pairwise
            )
        rounds_without_gain = 0 if loss < best_loss else rounds_without_gain + 1
        if loss < best_loss:
            best_loss, best_strength = loss, strength
        if rounds_without_gain >= STRENGTH_PATIENCE:
            break
    return best_strength


def _can_fit(is_held_out: NDArray[np.bool_], labels: Floats, *, is_pairwise: bool) -> bool:
    """Whether there are held-out rows, and the other rows suffice to fit a head."""
    has_both_labels = is_pairwise or len(set(labels[~is_held_out])) > 1
    return bool(is_held_out.any() and not is_held_out.all() and has_both_labels)


def _merge_equal_rows(
    features: FloatMatrix, labels: Floats, weights: Floats, clusters: Sequence[str], logit_offsets: Floats
) -> tuple[FloatMatrix, Floats, Floats, list[str], Floats]:
    """Merge rows that differ only in weight and sum their weights: the same solution from fewer rows.

    A response with many reactions yields many such rows.
    """
    merged_index_by_row: dict[tuple[bytes, float, str, float], int] = {}
    merged_index = [
        merged_index_by_row.setdefault(
            (features[i].tobytes(), float(labels[i]), clusters[i], float(logit_offsets[i])), len(merged_index_by_row)
        )
        for i in range(len(labels))
    ]
    first_rows = np.zeros(len(merged_index_by_row), dtype=np.int64)
    # Assigned in reverse, so that the first of several equal rows is the one that stays.
    first_rows[merged_index[::-1]] = np.arange(len(labels))[::-1]
    total_weights = np.bincount(merged_index, weights).astype(np.float64)
    merged_clusters = [clusters[i] for i in first_rows.tolist()]
    return features[first_rows], labels[first_rows], total_weights, merged_clusters, logit_offsets[first_rows]


def _compute_calibrated_loss(logits: Floats, labels: Floats, weights: Floats, *, is_pairwise: bool) -> float:
    """Log-loss after calibration on the same rows: what calibration will correct must not affect the choice."""
    if is_pairwise:
        return log_loss(sigmoid(fit_pair_scale(logits, weights) * logits), labels, weights)
    scale, offset = fit_platt(logits, labels, weights)
    return log_loss(sigmoid(scale * logits + offset), labels, weights)


def fold_bias_into_weights(features: FloatMatrix, head_weights: Floats, bias: float) -> tuple[Floats, float]:
    """Move the bias into the weights, for a model whose head has no bias; returns the weights and the remaining bias.

    A decoder's features have directions that hardly vary: u with mean u.x = 1 and least variance, (C + ridge)^-1 m
    scaled, reads as the constant 1, so weights + bias * u give the same logit. If u varies so much that a tenth of the
    logit's spread would be lost, the bias is left to the calibration.
    """
    mean, covariance = features.mean(0), np.cov(features.T)
    ridge = 0.1 * np.trace(covariance) / len(mean) + 1e-12
    u = np.linalg.solve(covariance + ridge * np.eye(len(mean)), mean)
    scale = float(mean @ u)
    if scale <= 1e-12 or abs(bias) * (features @ u).std() / scale > 0.1 * (features @ head_weights).std():
        return head_weights, bias
    return head_weights + bias * u / scale, 0.0


@torch.no_grad()
def set_head_weights(model: nn.Module, weights: Floats, bias: float, head_index: int = 0) -> dict[str, torch.Tensor]:
    """Write a fitted probe into row `head_index` of the model's head; returns the head's weights by name, in float32.

    If the head has no bias, a remaining bias (see fold_bias_into_weights) is left to the calibration's offset.
    """
    head = get_linear_head(model)
    head_name = next(name for name, module in model.named_modules() if module is head)
    head.weight[head_index] = torch.tensor(weights, dtype=head.weight.dtype)
    if head.bias is not None:
        head.bias[head_index] = bias
    return {f"{head_name}.{name}": tensor.float().cpu().clone() for name, tensor in head.named_parameters()}
