"""A head fitted on a frozen backbone: L2 logistic regression on what the head reads, in closed numbers, no epochs.

With a thousand labels this ranks better than a head drawn at random and trained by gradient steps, and where training
goes on from there it distorts the backbone's features less (Kumar et al. 2022, "Fine-tuning can distort pretrained
features and underperform out-of-distribution"). How strongly to regularise is chosen on held-out clusters of the
training split.
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
from rluf.reward.backbone import hidden_of, layer_list
from rluf.reward.calibration import Floats, fit_platt, fit_scale, sigmoid
from rluf.reward.metrics import log_loss
from rluf.reward.splits import folds

STRENGTHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Inverse regularisation strengths tried in turn, on standardised features; scikit-learn's C."""
PATIENCE = 2
"""Strengths in a row without a better held-out loss after which no weaker regularisation is tried."""
INVARIANCE = 1.0
"""Weight of the mean square that sign-offs move the logit by, beside the mean log-loss."""
FOLDS = 4
HEADS = ("score", "classifier")
"""Names of the linear head in models for sequence classification."""
Matrix = NDArray[np.float64]


def linear_head(model: nn.Module) -> nn.Linear:
    """The model's linear head, a row a logit. Raises ModelError when its head is another kind of module."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    raise ModelError(f"{type(model).__name__} has no linear head, so no probe can be fitted on it; set probe=false")


class HeadInput:
    """What the head reads at the last token (decoders) or from the pooler (encoders), caught during forward passes.

    With `depths`, what it would read were only so many of the lowest layers kept: one pass serves an ensemble.
    """

    def __init__(self, model: PreTrainedModel, depths: Sequence[int] = ()) -> None:
        """Raises ModelError when the model has no linear head, or `depths` are asked of one that cannot tell."""
        self.caught: list[torch.Tensor] = []
        self._ends: Any = None
        self._hooks = [linear_head(model).register_forward_pre_hook(self._catch)] if not depths else []
        if depths:
            self._ends = read_out(model)
            if self._ends is None:
                raise ModelError(
                    f"{type(model).__name__} has neither a last norm nor a pooler, so one pass cannot "
                    "read it at several depths; give one number in layers"
                )
            stack = layer_list(model)
            self._hooks = [stack[depth - 1].register_forward_hook(self._catch_layer) for depth in sorted(depths)]

    def _catch(self, _module: nn.Module, args: Any) -> None:
        self.caught.append(args[0].detach())

    def _catch_layer(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.caught.append(self._ends(hidden_of(output)).detach())

    def take(self, places: Sequence[tuple[int, int]]) -> Floats:
        """Features [depths, N, H] of the last forward pass at (row, position) pairs; an encoder has one a row."""
        rows, positions = (torch.tensor(side) for side in zip(*places, strict=True))
        found = [hidden[rows, positions] if hidden.dim() == 3 else hidden[rows] for hidden in self.caught]
        self.caught.clear()
        return torch.stack(found).float().cpu().numpy().astype(np.float64)

    def close(self) -> None:
        """Stop catching."""
        for hook in self._hooks:
            hook.remove()


def read_out(model: PreTrainedModel) -> nn.Module | None:
    """What stands between the last layer and the head: a decoder's last norm, an encoder's pooler; None if neither."""
    for name in ("norm", "pooler"):
        found = getattr(model.base_model, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def fit_probe(
    features: Matrix,
    labels: Floats,
    weights: Floats,
    clusters: Sequence[str],
    *,
    pairs: bool,
    seed: int = 0,
    offsets: Floats | None = None,
    drift: Matrix | None = None,
) -> tuple[Floats, float, float]:
    """Weights [H], bias and the chosen strength C of a logit on features [N, H] (pairs: [2N, H], chosen first).

    Pairs: logistic regression of the difference chosen - rejected, which is Bradley-Terry with a normal prior; no bias.
    `offsets` (one a row of features) are added to the logits in the fit and left out of what comes back: what a user or
    a length explains (rluf.reward.debias). `drift` [H, H] is the mean of d d^T over changes d of the features that
    are to earn nothing (a sign-off): the mean square by which they move the logit is held down with the loss.
    """
    offsets = np.zeros(len(features)) if offsets is None else offsets
    if not pairs:
        features, labels, weights, clusters, offsets = _merged(features, labels, weights, clusters, offsets)
    count = len(labels)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / spread
    drift = np.zeros((0, 0)) if drift is None or not drift.any() else INVARIANCE * drift / np.outer(spread, spread)
    if pairs:
        z, offsets = z[:count] - z[count:], offsets[:count] - offsets[count:]
    parts = folds(clusters, FOLDS, seed=seed)
    used = [part for part in range(FOLDS) if _can_fit(parts == part, labels, pairs=pairs)]
    found: dict[int, Floats] = {}
    best, strength, since = np.inf, STRENGTHS[0], 0
    for candidate in STRENGTHS:
        held_out = np.full(count, np.nan)
        for part in used:
            held = parts == part
            known = (z[~held], labels[~held], weights[~held], offsets[~held], drift)
            found[part] = _fit(*known, candidate, bias=not pairs, start=found.get(part))
            held_out[held] = z[held] @ found[part][:-1] + found[part][-1]
        seen = ~np.isnan(held_out)
        loss = _calibrated_loss(held_out[seen], labels[seen], weights[seen], pairs=pairs) if seen.any() else np.inf
        since = 0 if loss < best else since + 1
        if loss < best:
            best, strength = loss, candidate
        if since >= PATIENCE:
            break
    whole = _fit(z, labels, weights, offsets, drift, strength, bias=not pairs)
    head = whole[:-1] / spread
    return head, 0.0 if pairs else float(whole[-1] - mean @ head), strength


def _can_fit(held: NDArray[np.bool_], labels: Floats, *, pairs: bool) -> bool:
    """Whether a head can be fitted without the held-out rows, and there are such rows."""
    return bool(held.any() and not held.all() and (pairs or len(set(labels[~held])) > 1))


def _merged(
    features: Matrix, labels: Floats, weights: Floats, clusters: Sequence[str], offsets: Floats
) -> tuple[Matrix, Floats, Floats, list[str], Floats]:
    """Rows that agree in all but weight as one row with the sum: the same solution from fewer rows.

    A response with many reactions comes as many such rows.
    """
    first: dict[tuple[bytes, float, str, float], int] = {}
    place = [
        first.setdefault((features[i].tobytes(), float(labels[i]), clusters[i], float(offsets[i])), len(first))
        for i in range(len(labels))
    ]
    kept = np.zeros(len(first), dtype=np.int64)
    kept[place[::-1]] = np.arange(len(labels))[::-1]
    total = np.bincount(place, weights).astype(np.float64)
    return features[kept], labels[kept], total, [clusters[i] for i in kept.tolist()], offsets[kept]


def _calibrated_loss(logits: Floats, labels: Floats, weights: Floats, *, pairs: bool) -> float:
    """Log-loss after calibration on the same rows: what calibration will undo must not choose the strength."""
    if pairs:
        return log_loss(sigmoid(fit_scale(logits, weights) * logits), labels, weights)
    scale, offset = fit_platt(logits, labels, weights)
    return log_loss(sigmoid(scale * logits + offset), labels, weights)


def _fit(
    x: Matrix,
    y: Floats,
    weights: Floats,
    offsets: Floats,
    drift: Matrix,
    strength: float,
    *,
    bias: bool,
    start: Floats | None = None,
) -> Floats:
    """Weights and, last, the bias [H + 1] of L2 logistic regression of y [N] in [0, 1] on x [N, H].

    The mean loss is scikit-learn's objective over the rows' weight, plus half of w^T drift w (more where the weights
    are held small anyway); its LogisticRegression takes neither that, nor offsets, nor a tie (y = 0.5). `start` is a
    solution nearby.
    """
    from scipy.optimize import minimize

    total = float(weights.sum())
    ridge = 1 / (strength * total)
    drift = (1 + ridge) * drift

    def objective(point: Floats) -> tuple[float, Floats]:
        w, z = point[:-1], x @ point[:-1] + point[-1] + offsets
        held = ridge * w + (drift @ w if drift.size else 0.0)
        slope = weights * (sigmoid(z) - y) / total
        loss = float(weights @ (np.logaddexp(0, z) - y * z)) / total + 0.5 * float(w @ held)
        return loss, np.append(slope @ x + held, slope.sum() if bias else 0.0)

    start = np.zeros(x.shape[1] + 1) if start is None else start
    solved = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-5})
    return np.asarray(solved.x, dtype=np.float64)


def fold_bias(features: Matrix, head: Floats, bias: float) -> tuple[Floats, float]:
    """Head and bias with the bias moved into the weights, for a model whose head has none.

    A decoder's features have directions that hardly vary: u with mean u.x = 1 and least variance, (C + ridge)^-1 m
    scaled, reads as the constant 1, so head + bias * u is the same logit. Where u varies so much that a tenth of the
    logit's spread were lost, the bias stays out, for the calibration to find.
    """
    mean, covariance = features.mean(0), np.cov(features.T)
    ridge = 0.1 * np.trace(covariance) / len(mean) + 1e-12
    u = np.linalg.solve(covariance + ridge * np.eye(len(mean)), mean)
    scale = float(mean @ u)
    if scale <= 1e-12 or abs(bias) * (features @ u).std() / scale > 0.1 * (features @ head).std():
        return head, bias
    return head + bias * u / scale, 0.0


@torch.no_grad()
def set_head(model: nn.Module, weights: Floats, bias: float, row: int = 0) -> dict[str, torch.Tensor]:
    """Write the probe into row `row` of the model's head; returns the head's weights by name, in float32.

    A head without a bias leaves what is left of it (see fold_bias) to the calibration's offset.
    """
    head = linear_head(model)
    name = next(name for name, module in model.named_modules() if module is head)
    head.weight[row] = torch.tensor(weights, dtype=head.weight.dtype)
    if head.bias is not None:
        head.bias[row] = bias
    return {f"{name}.{key}": tensor.float().cpu().clone() for key, tensor in head.named_parameters()}
