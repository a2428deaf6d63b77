"""Encoded splits: the rows of a prepared split as token ids, with labels, weights and clusters.

Pairs whose responses are equal as the model reads them weigh nothing, and the limit of tokens can follow from the rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.config.reward import MAX_AUTO_TOKENS, MIN_AUTO_TOKENS
from rluf.errors import DataError
from rluf.reward.text import EncodedItem, TextEncoder, is_truncated, report_rejected_rows
from rluf.types import ScoringItem
from rluf.utils.stats import Floats

logger = logging.getLogger(__name__)

RowKeys = NDArray[np.uint64]

_TOKEN_STEP = 16
"""Limits of tokens that are derived from rows are multiples of this number."""


@dataclass(frozen=True)
class EncodedSplit:
    """One encoded split. For pairs, `sequences` are all N chosen, then all N rejected responses."""

    is_pairwise: bool
    sequences: list[EncodedItem]
    labels: Floats
    """[N] 0 or 1; for pairs 1 (chosen won): readers drop ties."""
    weights: Floats
    """[N] 1 / sampling rate, so that weighted metrics are at the natural rate."""
    clusters: list[str]
    """[N] user or prompt group: rows of one cluster are not independent."""
    response_lengths: Floats
    """Characters of the response of each sequence."""
    row_keys: RowKeys = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """[N] keys of the rows, equal on every rank and in every run; empty: the row indices."""
    loss_factors: Floats = field(default_factory=lambda: np.empty(0))
    """[N] factors on the weights that apply to the loss only (propensities); empty: 1."""
    logit_offsets: Floats = field(default_factory=lambda: np.empty(0))
    """Added to each sequence's logit in training, not in scoring: effects of length and user (rluf.reward.debias).
    Empty: none."""
    context_columns: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """[N, K] covariates of the fitted head and of its calibration (rluf.reward.debias.encode_context); empty: none."""
    copy_sources: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The last rows are copies: the index of the row that each was made from. First those with a sign-off and the same
    label (rluf.reward.debias), then `counterfactual_count` that are worse (rluf.reward.counterfactuals)."""
    counterfactual_count: int = 0

    def __post_init__(self) -> None:
        """Use the row indices as keys if there are none."""
        if not self.row_keys.size:
            object.__setattr__(self, "row_keys", np.arange(len(self.labels), dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.labels)

    def list_sequence_indices(self, row_indices: Sequence[int]) -> list[int]:
        """Indices of the sequences of these rows: chosen, then rejected for pairs."""
        return [*row_indices, *(row + len(self) for row in row_indices)] if self.is_pairwise else list(row_indices)

    @property
    def original_count(self) -> int:
        """Number of rows of the log: the first ones, in front of the copies."""
        return len(self) - len(self.copy_sources)

    def select_originals(self) -> EncodedSplit:
        """The split without its copies."""
        return self.select_rows(range(self.original_count))

    def select_rows(self, row_indices: Sequence[int]) -> EncodedSplit:
        """Some rows of the split, as rows without copies among them."""
        rows, sequences = list(row_indices), self.list_sequence_indices(row_indices)
        return EncodedSplit(
            self.is_pairwise,
            [self.sequences[index] for index in sequences],
            self.labels[rows],
            self.weights[rows],
            [self.clusters[index] for index in rows],
            self.response_lengths[sequences],
            self.row_keys[rows],
            self.loss_factors[rows] if self.loss_factors.size else self.loss_factors,
            self.logit_offsets[sequences] if self.logit_offsets.size else self.logit_offsets,
            self.context_columns[rows] if self.context_columns.size else self.context_columns,
        )

    def find_contrasts(self, row_indices: Sequence[int]) -> list[tuple[int, int]]:
        """(position among `row_indices`, source row) of the counterfactual copies of a labeled split.

        Empty for pairs, whose loss compares the copy with its source already.
        """
        first_copy = len(self) - self.counterfactual_count
        return [
            (position, int(self.copy_sources[row - self.original_count]))
            for position, row in enumerate(row_indices)
            if row >= first_copy and not self.is_pairwise
        ]

    @property
    def source_ids(self) -> NDArray[np.int64]:
        """[N] the same number for a row and its copies."""
        return np.concatenate([np.arange(self.original_count), self.copy_sources])

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """[N] the same number for rows of identical text (many reactions to one response)."""
        first_row_by_text: dict[EncodedItem, int] = {}
        text_ids = [first_row_by_text.setdefault(self.sequences[row], row) for row in range(len(self))]
        return np.asarray(text_ids, dtype=np.int64)

    @property
    def is_equal_pair(self) -> NDArray[np.bool_]:
        """[N] whether the model reads the same for both responses of a pair, which differ in what was cut."""
        if not self.is_pairwise:
            return np.zeros(len(self), dtype=np.bool_)
        pairs = zip(self.sequences[: len(self)], self.sequences[len(self) :], strict=True)
        return np.asarray([chosen == rejected for chosen, rejected in pairs], dtype=np.bool_)

    def drop_equal_pairs(self, source_name: str, max_tokens: int) -> EncodedSplit:
        """Give weight 0 to pairs that are equal as the model reads them; logs their number.

        They stay in place, since all ranks must have as many rows. Raises DataError if no other pair is left.
        """
        is_equal = self.is_equal_pair
        if not is_equal.any():
            return self
        if is_equal.all():
            raise DataError(
                f"{source_name}: chosen and rejected are equal in all {len(self)} pairs after cutting to max_tokens="
                f"{max_tokens}; raise it"
            )
        logger.warning(
            "%s: left out %d of %d pairs, as chosen and rejected are equal after cutting to max_tokens=%d; raise it",
            source_name, int(is_equal.sum()), len(self), max_tokens,
        )  # fmt: skip
        return replace(self, weights=np.where(is_equal, 0.0, self.weights))

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def loss_weights(self) -> Floats:
        """Weights with a mean of 1 in each class, so the class balance is the sample's; a copy has that of its source.

        The prior correction restores the sampling factor; otherwise a few heavily weighted rows would dominate.
        """
        all_weights = self.weights * self.loss_factors if self.loss_factors.size else self.weights
        weights, labels = all_weights[: self.original_count], self.labels[: self.original_count]
        class_means = {label: weights[labels == label].mean() for label in np.unique(labels)}
        row_weights = (weights / np.asarray([class_means[label] for label in labels]))[self.source_ids]
        return row_weights * (self.weights > 0)


def encode_split(
    records: Sequence[Mapping[str, Any]], encoder: TextEncoder, *, is_pairwise: bool, source_name: str
) -> EncodedSplit:
    """Encode the rows of a prepared split (see rluf.prepare). Raises DataError if it is empty or lacks a column."""
    if not records:
        raise DataError(f"{source_name} has no rows; run rluf.prepare on a larger log")
    text_columns = ("chosen", "rejected") if is_pairwise else ("response",)
    cluster_column = "user_id" if "user_id" in records[0] else "group"
    required_columns = ("messages", "weight", cluster_column, *text_columns)
    missing_columns = [column for column in required_columns if column not in records[0]]
    if missing_columns or (not is_pairwise and "label" not in records[0]):
        raise DataError(
            f"{source_name} lacks the columns {', '.join(missing_columns) or 'label'}; run rluf.prepare again"
        )
    items = [
        ScoringItem(list(row["messages"]), str(row[column]), is_truncated(row, column))
        for column in text_columns
        for row in records
    ]
    labels = np.ones(len(records)) if is_pairwise else np.asarray([float(row["label"]) for row in records])
    # The text is part of the key: rows without an id, and copies with a sign-off, get keys of their own.
    key_texts = (str(row.get("id", "")) + "\n" + "\n".join(str(row[key]) for key in text_columns) for row in records)
    sequences = encoder.encode(items)
    report_rejected_rows(sequences, [str(row.get("id", "")) for row in records], source_name)
    split = EncodedSplit(
        is_pairwise=is_pairwise,
        sequences=sequences,
        labels=labels,
        weights=np.asarray([float(row["weight"]) for row in records]),
        clusters=[str(row[cluster_column]) for row in records],
        response_lengths=np.asarray([float(len(item.response)) for item in items]),
        row_keys=np.asarray([_hash_row_key(text) for text in key_texts], dtype=np.uint64),
    )
    return split.drop_equal_pairs(source_name, encoder.max_tokens)


def _hash_row_key(text: str) -> int:
    # surrogatepass: logs contain unpaired surrogates, which plain UTF-8 cannot encode.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def choose_token_limit(records: Sequence[Mapping[str, Any]], encoder: TextEncoder) -> tuple[int, int]:
    """The tokens that 95% of the rows have at most, each with its longest response; and the limit to read them with.

    The limit is the first number rounded up, between MIN_AUTO_TOKENS and MAX_AUTO_TOKENS. `encoder` should have none.
    """
    columns = [name for name in ("response", "chosen", "rejected") if name in records[0]]
    items = [ScoringItem(list(row["messages"]), str(row[column])) for column in columns for row in records]
    lengths = [len(row) + row.dropped_prompt_tokens + row.dropped_response_tokens for row in encoder.encode(items)]
    row_lengths = np.asarray(lengths).reshape(len(columns), -1).max(0)
    high_length = int(np.quantile(row_lengths, 0.95, method="higher"))
    return high_length, min(max(-(-high_length // _TOKEN_STEP) * _TOKEN_STEP, MIN_AUTO_TOKENS), MAX_AUTO_TOKENS)
