"""Folds by cluster: rows of one user or prompt group always lie in the same fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def folds(clusters: Sequence[str], count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0 to count - 1 of each row [N]. Clusters are shuffled by `seed`, then each goes to the smallest fold."""
    names, member = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sizes = np.bincount(member, minlength=len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    place, filled = np.zeros(len(names), dtype=np.int64), np.zeros(count, dtype=np.int64)
    for name in order:
        place[name] = int(filled.argmin())
        filled[place[name]] += sizes[name]
    return np.asarray(place[member], dtype=np.int64)
