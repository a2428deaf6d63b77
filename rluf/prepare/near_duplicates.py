"""Near-duplicate prompts: MinHash signatures of word pairs (rensa), and groups of prompts that share a band.

64 permutations in 8 bands of 8: two prompts whose word pairs overlap by a Jaccard share J meet in some band with chance
1 - (1 - J^8)^8, which is 0.99 at J = 0.9, 0.77 at 0.8, 0.03 at 0.5 (Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", section 3.4). Groups are closed under that relation: the neighbour of a neighbour is in the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS, BANDS = 64, 8
MAX_WORDS = 400
"""Words of a context that are looked at, from its end."""

Keys = NDArray[np.uint64]


def shingles(text: str) -> list[str]:
    """Neighbouring pairs of words, in lower case; the words themselves where there is one only."""
    words = text.split()[-MAX_WORDS:]
    return [f"{one} {two}" for one, two in pairwise(words)] or words or [""]


def bands(texts: Sequence[str]) -> Keys:
    """Band hashes [N, BANDS] of N texts (already in lower case)."""
    import rensa

    if not texts:
        return np.empty((0, BANDS), dtype=np.uint64)
    rows = rensa.RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], PERMUTATIONS, 1).to_rows()
    signature = np.asarray(rows, dtype=np.uint64).reshape(len(texts), BANDS, PERMUTATIONS // BANDS)
    mixed = np.zeros((len(texts), BANDS), dtype=np.uint64)
    for index in range(signature.shape[2]):  # FNV-1a over the numbers of a band, then a shift to mix high bits down
        mixed = (mixed ^ signature[:, :, index]) * np.uint64(0x100000001B3)
        mixed ^= mixed >> np.uint64(29)
    return mixed + np.arange(BANDS, dtype=np.uint64)


def groups(prompt: Keys, band: Keys) -> NDArray[np.int64]:
    """Group [N] of each row, numbered from 0: rows of one prompt key or that share a band [N, BANDS], transitively."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(prompt):
        return np.empty(0, dtype=np.int64)
    _, first, mine = np.unique(prompt, return_index=True, return_inverse=True)
    count = len(first)
    left, right = [], []
    for column in range(band.shape[1]):
        values = band[first, column]
        order = np.argsort(values, kind="stable")
        same = np.flatnonzero(values[order][1:] == values[order][:-1])
        left.append(order[same])
        right.append(order[same + 1])
    ends = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    found: NDArray[np.int64] = label.astype(np.int64)[mine]
    return found
