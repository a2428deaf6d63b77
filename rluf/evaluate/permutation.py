"""Permutation tests of two policies: exact for any dependence between the features of a response.

Under the null hypothesis both policies write in the same way, so labels may be exchanged between the units (responses
or whole prompts) of a stratum. A block of features, such as one for every recurring phrase, is tested by its largest
z-score; the permutations give the distribution of that maximum too. Sources: Westfall, Young 1993 (maxima); Phipson,
Smyth 2010 (p-values of sampled permutations).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rluf.utils.stats import Bools, Floats, Ints

EXCEEDANCES = 4
"""Permutations beyond the observed value that a p-value at the smallest level is expected to rest on."""
CHUNK_PERMUTATIONS = 500


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """U units: `is_current` [U] marks those of the current policy, `strata` [U] numbers their strata."""

    is_current: Bools
    strata: Ints

    def standardize(self, features: Floats) -> Floats:
        """Features [U, K] scaled so that the sum over the current units is a z-score of the permutations.

        A stratum of n units, m of them current, has mean m * mean and variance m (n - m) / n * (sample variance).
        """
        strata, sizes = np.unique(self.strata, return_inverse=True, return_counts=True)[1:]
        current_counts = np.bincount(strata, weights=self.is_current)
        centered = features - sum_rows(features, strata)[strata] / sizes[strata, None]
        sample_variances = sum_rows(np.square(centered), strata) / np.maximum(sizes - 1, 1)[:, None]
        variance = (current_counts * (sizes - current_counts) / sizes) @ sample_variances
        # Rounding errors of a constant feature must not become a z-score.
        return np.asarray(centered / np.where(variance > 1e-12, np.sqrt(np.maximum(variance, 1e-12)), np.inf))

    def compute_p_values(self, scaled: Floats, block_starts: Ints, *, smallest_level: float, seed: int = 0) -> Floats:
        """One-sided p-values [M] of the largest z-score of each block; `block_starts` [M] are their first columns.

        `scaled` [U, K] is from `standardize`. `smallest_level` is the smallest that a p-value is compared with: it sets
        the number of permutations. Sampling stops as soon as no block can reach it (Besag, Clifford 1991).
        """
        rng = np.random.default_rng(seed)
        order = np.lexsort((~self.is_current, self.strata))
        # Sorted by stratum, current units first: a random order within each stratum then gives permuted labels.
        template, strata = self.is_current[order].astype(np.float32), self.strata[order].astype(np.float64)
        columns = scaled[order].astype(np.float32)
        # 32-bit sums differ in their last digits by order: a tie must count as reaching the observed value.
        observed = np.maximum.reduceat(template @ columns, block_starts) - 1e-3
        reached, permutation_count = np.zeros(len(block_starts), dtype=np.int64), 0
        while permutation_count * smallest_level < EXCEEDANCES and (reached <= EXCEEDANCES).any():
            # Random keys in [0, 1) plus the number of the stratum sort by stratum, and at random within one.
            random_order = np.argsort(rng.random((CHUNK_PERMUTATIONS, len(order))) + strata, axis=1)
            labels = np.empty(random_order.shape, dtype=np.float32)
            np.put_along_axis(labels, random_order, np.broadcast_to(template, labels.shape), axis=1)
            reached += (np.maximum.reduceat(labels @ columns, block_starts, axis=1) >= observed).sum(axis=0)
            permutation_count += CHUNK_PERMUTATIONS
        # The observed labels are one of the permutations, so a p-value is never 0 (Phipson, Smyth 2010).
        return np.asarray((1.0 + reached) / (1.0 + permutation_count), dtype=np.float64)


def sum_rows(values: Floats, groups: NDArray[np.intp]) -> Floats:
    """Sums [G, K] of the rows of `values` [N, K] by their group numbers [N]."""
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums
