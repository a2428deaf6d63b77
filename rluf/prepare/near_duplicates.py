"""Near-duplicate prompts: MinHash signatures of word pairs (rensa), and groups of prompts that share a band.

64 permutations in 8 bands of 8: two prompts whose word pairs have Jaccard similarity J share some band with probability
1 - (1 - J^8)^8, which is 0.99 at J = 0.9, 0.77 at 0.8, 0.03 at 0.5 (Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", section 3.4). Groups are transitive: the neighbor of a neighbor is in the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rluf.prepare.splits import HashKeys

PERMUTATION_COUNT, BAND_COUNT = 64, 8
MAX_CONTEXT_WORDS = 400
"""Words of a context that are compared, from its end."""


def build_shingles(text: str) -> list[str]:
    """Adjacent pairs of words; the word itself if there is only one."""
    words = text.split()[-MAX_CONTEXT_WORDS:]
    return [f"{first} {second}" for first, second in pairwise(words)] or words or [""]


def compute_band_hashes(texts: Sequence[str]) -> HashKeys:
    """Band hashes [N, BAND_COUNT] of N texts (already in lower case)."""
    import rensa

    if not texts:
        return np.empty((0, BAND_COUNT), dtype=np.uint64)
    shingles = [build_shingles(text) for text in texts]
    signatures = rensa.RMinHash.digest_matrix_from_token_sets(shingles, PERMUTATION_COUNT, 1).to_rows()
    bands = np.asarray(signatures, dtype=np.uint64).reshape(len(texts), BAND_COUNT, PERMUTATION_COUNT // BAND_COUNT)
    band_hashes = np.zeros((len(texts), BAND_COUNT), dtype=np.uint64)
    for index in range(bands.shape[2]):  # FNV-1a over the numbers of a band, then a shift to mix high bits down
        band_hashes = (band_hashes ^ bands[:, :, index]) * np.uint64(0x100000001B3)
        band_hashes ^= band_hashes >> np.uint64(29)
    # Equal signatures in different bands must not match: add the band's index.
    return band_hashes + np.arange(BAND_COUNT, dtype=np.uint64)


def group_near_duplicates(prompt_key: HashKeys, band_hashes: HashKeys) -> NDArray[np.int64]:
    """Group [N] of each row, from 0: rows with one prompt key or a common band hash [N, BAND_COUNT], transitively."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(prompt_key):
        return np.empty(0, dtype=np.int64)
    _, first_rows, unique_index = np.unique(prompt_key, return_index=True, return_inverse=True)
    unique_count = len(first_rows)
    left_nodes, right_nodes = [], []
    for band in range(band_hashes.shape[1]):
        values = band_hashes[first_rows, band]
        order = np.argsort(values, kind="stable")
        # Prompts that share a band are a chain in sorted order: n - 1 edges connect them, not n squared.
        same_as_next = np.flatnonzero(values[order][1:] == values[order][:-1])
        left_nodes.append(order[same_as_next])
        right_nodes.append(order[same_as_next + 1])
    edges = np.concatenate(left_nodes), np.concatenate(right_nodes)
    graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(unique_count, unique_count))
    _, component = connected_components(graph, directed=False)
    groups: NDArray[np.int64] = component.astype(np.int64)[unique_index]
    return groups
