"""Sums and means over the responses of a packed micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sums(values: Tensor, sequences: Tensor) -> Tensor:
    """Sum of `values` [K] over each token's own response, given at every token [K]; `sequences` [K] are its numbers."""
    count = int(sequences.max()) + 1 if len(sequences) else 0
    return values.new_zeros(count).index_add(0, sequences, values)[sequences]


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """Mean of `values` [K] over each token's own response, given at every token [K]."""
    return sequence_sums(values, sequences) / sequence_sums(torch.ones_like(values), sequences)


def still_to_come(values: Tensor, sequences: Tensor) -> Tensor:
    """Sum of `values` [K] from each token to the end of its response, itself included [K].

    Tokens of a response follow one another. In float64, since it takes differences of sums over the micro-batch.
    """
    values = values.double()
    before = values.cumsum(0) - values
    first = torch.ones_like(sequences, dtype=torch.bool)
    first[1:] = sequences[1:] != sequences[:-1]
    start = before[first][first.cumsum(0) - 1] if len(values) else before
    return sequence_sums(values, sequences) - (before - start)
