"""Linear probe: fit a head on a frozen backbone by L2 logistic regression on its features, without gradient epochs.

With a thousand labels this ranks better than a randomly initialized head trained by gradient steps, and training that
starts from it distorts the backbone's features less (Kumar et al. 2022, "Fine-tuning can distort pretrained features
and underperform out-of-distribution"). The regularization strength is chosen on held-out clusters of the training
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from rluf.errors import ModelError
from rluf.reward.backbone import final_norm_or_pooler, get_hidden_states, get_layer_list, get_linear_head
from rluf.reward.calibration import fit_pair_scale, fit_platt
from rluf.reward.metrics import log_loss
from rluf.utils.stats import Floats, sigmoid

INVERSE_STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Inverse regularization strengths tried in turn, on standardized features; C of scikit-learn."""
STRENGTH_PATIENCE = 2
"""Strengths in a row without a better held-out loss after which no weaker regularization is tried."""
INVARIANCE_WEIGHT = 1.0
"""Weight, relative to the mean log-loss, of the mean squared change of the logit caused by sign-offs."""
FOLD_COUNT = 4
FloatMatrix = NDArray[np.float64]


class HeadInputCapture:
    """Capture the input of the head during forward passes: the last token (decoders) or the pooler (encoders).

    With `depths`, capture what the head would read if only so many of the lowest layers existed, so that one pass
    serves several members of an ensemble.
    """

    def __init__(self, model: PreTrainedModel, depths: Sequence[int] = ()) -> None:
        """Raises ModelError when the model has no linear head, or `depths` are given and it cannot be read at them."""
        self.captured_states: list[torch.Tensor] = []
        self._final_module: Any = None
        # Without depths the hook on the head sees exactly what the head reads. With depths the head is not involved:
        # each layer's output goes through the final norm or pooler here, as in a model truncated after that layer.
        self._hooks = [get_linear_head(model).register_forward_pre_hook(self._capture_head_input)] if not depths else []
        if depths:
            self._final_module = final_norm_or_pooler(model)
            if self._final_module is None:
                raise ModelError(
                    f"{type(model).__name__} has neither a last norm nor a pooler, so one pass cannot "
                    "read it at several depths; set a single entry in members"
                )
            layers = get_layer_list(model)
            # Layers run lowest first, so the captured states are in ascending order of depth.
            self._hooks = [
                layers[depth - 1].register_forward_hook(self._capture_layer_output) for depth in sorted(depths)
            ]

    def _capture_head_input(self, _module: nn.Module, args: Any) -> None:
        self.captured_states.append(args[0].detach())

    def _capture_layer_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.captured_states.append(self._final_module(get_hidden_states(output)).detach())

    def take_features(self, row_positions: Sequence[tuple[int, int]]) -> Floats:
        """Features [depths, N, H] of the last forward pass at (row, position) pairs; encoders have one per row."""
        rows, positions = (torch.tensor(column) for column in zip(*row_positions, strict=True))
        # Decoders apply the head to every token [B, T, H], encoders to the pooled output [B, H].
        features = [states[rows, positions] if states.dim() == 3 else states[rows] for states in self.captured_states]
        self.captured_states.clear()
        return torch.stack(features).float().cpu().numpy().astype(np.float64)

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


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
) -> tuple[Floats, float, float]:
    """Weights [H], bias and the chosen strength C of a logit on features [N, H] (pairs: [2N, H], chosen first).

    Pairs: logistic regression on the difference chosen - rejected, which is Bradley-Terry with a normal prior; no bias.
    `logit_offsets` (one per row of features) are added to the logits during the fit and are not part of the result: the
    effect of a user or of length (rluf.reward.debias). `change_moment` [H, H] is the mean of d d^T over changes d of
    the features that must earn nothing (a sign-off): the mean squared change of the logit is penalized in the fit.
    """
    logit_offsets = np.zeros(len(features)) if logit_offsets is None else logit_offsets
    if not is_pairwise:
        features, labels, weights, clusters, logit_offsets = _merge_equal_rows(
            features, labels, weights, clusters, logit_offsets
        )
    count = len(labels)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / spread
    if change_moment is None or not change_moment.any():
        change_moment = np.zeros((0, 0))
    else:
        change_moment = INVARIANCE_WEIGHT * change_moment / np.outer(spread, spread)
    if is_pairwise:
        z, logit_offsets = z[:count] - z[count:], logit_offsets[:count] - logit_offsets[count:]
    strength = _choose_strength(
        (z, labels, weights, logit_offsets, change_moment), clusters, is_pairwise=is_pairwise, seed=seed
    )
    solution = _fit_logistic(z, labels, weights, logit_offsets, change_moment, strength, fit_bias=not is_pairwise)
    # Undo the standardization, so that the head applies to the features as the backbone gives them.
    head_weights = solution[:-1] / spread
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
            solutions[fold] = _fit_logistic(
                z[is_train], labels[is_train], weights[is_train], logit_offsets[is_train], change_moment, strength,
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


def _fit_logistic(
    x: FloatMatrix,
    y: Floats,
    weights: Floats,
    logit_offsets: Floats,
    change_moment: FloatMatrix,
    strength: float,
    *,
    fit_bias: bool,
    initial_solution: Floats | None = None,
) -> Floats:
    """Weights and, last, the bias [H + 1] of L2 logistic regression of y [N] in [0, 1] on x [N, H].

    The mean loss is scikit-learn's objective divided by the total weight, plus half of w^T change_moment w. The latter,
    offsets and ties (y = 0.5) are not supported by its LogisticRegression. `initial_solution` is a warm start.
    """
    from scipy.optimize import minimize

    total_weight = float(weights.sum())
    ridge = 1 / (strength * total_weight)
    # Scaled with the ridge: where strong regularization shrinks the weights, the invariance term must not vanish.
    change_moment = (1 + ridge) * change_moment

    def penalized_loss(parameters: Floats) -> tuple[float, Floats]:
        w, z = parameters[:-1], x @ parameters[:-1] + parameters[-1] + logit_offsets
        penalty_gradient = ridge * w + (change_moment @ w if change_moment.size else 0.0)
        residuals = weights * (sigmoid(z) - y) / total_weight
        loss = float(weights @ (np.logaddexp(0, z) - y * z)) / total_weight + 0.5 * float(w @ penalty_gradient)
        return loss, np.append(residuals @ x + penalty_gradient, residuals.sum() if fit_bias else 0.0)

    start = np.zeros(x.shape[1] + 1) if initial_solution is None else initial_solution
    options = {"maxiter": 500, "gtol": 1e-5}
    solution = minimize(penalized_loss, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(solution.x, dtype=np.float64)


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
