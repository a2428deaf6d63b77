"""Train, dev and test: assignment by hash, near-duplicate prompts, leaking rows, and sampling of training rows.

The split is a pure function of a hash of the user or prompt group, so it needs no table, is equal on every machine, and
is stable as the log grows: no user or prompt ever moves from test to train. The run's seed plays no part in it.

Loved rows are rare, so unloved training rows are dropped at random. A sampled row weighs one over the share of its
class that was sampled: the weighted mean of the labels is then exactly the rate before sampling, and a loss or a
calibration with these weights estimates the natural one (King and Zeng 2001, "Logistic regression in rare events data",
weighting).

Near-duplicate prompts go to one split. They are found by MinHash signatures of word pairs (rensa), 64 permutations in 8
bands of 8: two prompts whose word pairs have Jaccard similarity J share some band with probability 1 - (1 - J^8)^8,
which is 0.99 at J = 0.9, 0.77 at 0.8, 0.03 at 0.5 (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section
3.4). Groups are transitive: the neighbor of a neighbor is in the group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rluf.utils.hashing import hash_to_unit_interval
from rluf.utils.stats import Bools, Floats, Ints

HashKeys = NDArray[np.uint64]

TRAIN_CODE, DEV_CODE, TEST_CODE = 0, 1, 2
"""Codes of the splits: positions in `schema.SPLIT_NAMES`."""

ROW_KEY_SALT = "rluf-place"
"""Salt of a row id's hash: the key of joins and duplicates, and the row's position in the prepared files.

Positions are a random order that is the same however work is divided, and a bucket of rows is a range of positions.
"""


def to_unit_interval(hashes: HashKeys) -> Floats:
    """`hash_to_unit_interval` of keys [N] from their `hash64`."""
    points: Floats = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return points


def assign_split(key: str, *, dev_share: float, test_share: float) -> str:
    """Split (train, dev or test) of a user id or prompt group; shares are of users or groups, not of rows."""
    point = hash_to_unit_interval(key, "rluf-split")
    # Test is the lowest interval, so that smaller shares never move a user into test.
    if point < test_share:
        return "test"
    return "dev" if point < test_share + dev_share else "train"


def normalize_context(messages: Iterable[tuple[str, str]]) -> str:
    """A context as one text, equal for contexts that differ only in case and white space; messages are (role, text)."""
    return "\x1f".join(f"{role} {' '.join(content.casefold().split())}" for role, content in messages)


def _find_group_ranges(group_code: Ints, values: Ints) -> tuple[Ints, Ints]:
    """Smallest and largest value of each row's group [N]."""
    group_count = int(group_code.max(initial=-1)) + 1
    lowest = np.full(group_count, np.iinfo(np.int64).max)
    highest = np.full(group_count, np.iinfo(np.int64).min)
    np.minimum.at(lowest, group_code, values)
    np.maximum.at(highest, group_code, values)
    return lowest[group_code], highest[group_code]


def find_duplicate_rows(row_key: HashKeys, content_key: HashKeys, time_us: Ints, position: Ints) -> tuple[Bools, Bools]:
    """Rows [N] that a later version of the same row replaces, and rows [N] whose id (`row_key`) another row has.

    The content (response, or pair) of the first row of an id in the log is that of the id. Of the rows with this id and
    content the latest counts, as in a log that is written again when a reaction arrives. `position` is that in the log.
    """
    order = np.lexsort((position, row_key))
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = row_key[order][1:] != row_key[order][:-1]
    if is_first.all():
        return ~is_first, ~is_first
    is_version = np.empty(len(order), dtype=np.bool_)
    is_version[order] = content_key[order] == content_key[order][is_first][np.cumsum(is_first) - 1]
    order = np.lexsort((position, time_us, is_version, row_key))
    is_latest = np.ones(len(order), dtype=np.bool_)
    is_latest[order[:-1]] = row_key[order][1:] != row_key[order][:-1]
    return is_version & ~is_latest, ~is_version


USER_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd number that spreads codes of users over all 64 bits of a key: 2**64 over the golden ratio."""


def assign_conversation_keys(conversation_key: HashKeys, opening_key: HashKeys, user_code: Ints) -> HashKeys:
    """Conversation key [N] of each row: one for each user where users share an id, but not the first message.

    Some products number conversations within a user (1, 2, default). A chat that users really share begins with the
    same message for all of them.
    """
    _, conversation = np.unique(conversation_key, return_inverse=True)
    has_several = []
    for values in (user_code.astype(np.uint64), opening_key):
        order = np.lexsort((values, conversation))
        differs = (conversation[order][1:] == conversation[order][:-1]) & (values[order][1:] != values[order][:-1])
        has_several.append(np.bincount(conversation[order][1:], weights=differs, minlength=len(conversation)) > 0)
    is_reused = (has_several[0] & has_several[1])[conversation]
    user_keys = (user_code.astype(np.uint64) + np.uint64(1)) * USER_MULTIPLIER
    keys: HashKeys = np.where(is_reused, conversation_key ^ user_keys, conversation_key)
    return keys


def find_conversation_leaks(conversation_key: HashKeys, split_code: Ints, time_us: Ints) -> Bools:
    """Rows [N] to drop because their conversation, shared by users, belongs to the split of its first row."""
    order = np.lexsort((time_us, conversation_key))
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = conversation_key[order][1:] != conversation_key[order][:-1]
    first_split = split_code[order][is_first][np.cumsum(is_first) - 1]
    is_leak = np.zeros(len(order), dtype=np.bool_)
    is_leak[order] = split_code[order] != first_split
    return is_leak


def find_time_leaks(
    conversation_key: HashKeys, split_code: Ints, time_us: Ints, test_share: float
) -> tuple[Bools, Bools, int]:
    """Rows [N] to drop so that test is strictly later: (late train or dev rows, early test rows, the split time).

    Twice `test_share` of all rows are after the split time: test then keeps about 2 x test_share of its rows, train
    1 - 2 x test_share. A conversation that spans the split time is dropped as a whole.
    """
    _, conversation_code = np.unique(conversation_key, return_inverse=True)
    begin, end = _find_group_ranges(conversation_code, time_us)
    split_time = int(np.quantile(time_us, 1 - min(2 * test_share, 0.5), method="higher"))
    is_test = split_code == TEST_CODE
    return ~is_test & (end >= split_time), is_test & (begin < split_time), split_time


def find_near_duplicate_leaks(
    prompt_group: Ints, prompt_key: HashKeys, split_code: Ints, test_groups: Ints, dev_share: float, test_share: float
) -> Bools:
    """Rows [N] to drop so that each group of near-duplicate prompts is in one split.

    A group in several splits goes where the hash of its lowest prompt key says. One in `test_groups` (test prompts of
    data.prompts) goes to test, and its other rows are dropped even where it is in one split only.
    """
    lowest_split, highest_split = _find_group_ranges(prompt_group, split_code)
    group_count = int(prompt_group.max(initial=-1)) + 1
    lowest_key = np.full(group_count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest_key, prompt_group, prompt_key)
    point = to_unit_interval(lowest_key)[prompt_group]
    # Four rules, later ones win: hash of the lowest prompt key; the only split present; a split that has a row (else
    # the group would lose all its rows); test prompts.
    target_code = np.where(point < test_share + dev_share, DEV_CODE, TRAIN_CODE)
    target_code = np.where(point < test_share, TEST_CODE, target_code)
    target_code = np.where(lowest_split == highest_split, split_code, target_code)
    target_code = np.where(_has_row_in_target_split(prompt_group, split_code, target_code), target_code, lowest_split)
    target_code = np.where(np.isin(prompt_group, test_groups), TEST_CODE, target_code)
    is_leak: Bools = split_code != target_code
    return is_leak


def _has_row_in_target_split(prompt_group: Ints, split_code: Ints, target_code: Ints) -> Bools:
    """Whether some row of the group [N] is in its target split."""
    # group * 4 + code is one number for each pair of group and split, since there are three splits.
    has_split: Bools = np.isin(prompt_group * 4 + target_code, prompt_group * 4 + split_code)
    return has_split


@dataclass(frozen=True, slots=True)
class SamplingQuota:
    """Rows of each class before and after sampling."""

    positives: int
    negatives: int
    sampled_positives: int
    sampled_negatives: int

    @property
    def positive_weight(self) -> float:
        """Weight of a sampled positive row: one over the share of positives sampled (0 if there are none)."""
        return self.positives / self.sampled_positives if self.sampled_positives else 0.0

    @property
    def negative_weight(self) -> float:
        """Weight of a sampled negative row: one over the share of negatives sampled (0 if there are none)."""
        return self.negatives / self.sampled_negatives if self.sampled_negatives else 0.0


def compute_quota(
    positives: int, negatives: int, *, positive_share: float | None, max_rows: int | None
) -> SamplingQuota:
    """Number of rows of each class to sample.

    Negatives are cut until positives are `positive_share` of the rows. Positives are not cut for this: where they are
    more frequent already, all rows stay (None leaves the classes as they are). Above `max_rows` both classes are cut
    in proportion, and at least one row of a class that had any is sampled.
    """
    sampled_negatives = negatives
    if positive_share is not None and positives:
        sampled_negatives = min(negatives, max(1, round(positives * (1 - positive_share) / positive_share)))
    sampled_positives, total = positives, positives + sampled_negatives
    if max_rows is not None and total > max_rows:
        lowest, highest = min(1, positives), max_rows - min(1, sampled_negatives)
        sampled_positives = min(max(round(positives * max_rows / total), lowest), highest)
        sampled_negatives = max_rows - sampled_positives
    return SamplingQuota(positives, negatives, sampled_positives, sampled_negatives)


def derive_sampling_salt(seed: int) -> str:
    """Salt of the hash of row ids that ranks rows for sampling."""
    return f"sample-{seed % 10**9}"


def compute_sampling_weights(rank: Floats, is_positive: Bools, quota: SamplingQuota) -> Floats:
    """Weight of each row [N], 0 for a dropped one. Rows of the lowest rank [N] in their class are sampled.

    With the hash of the row's id as rank, the sample depends on ids and seed alone, not on the order of rows.
    """
    weight = np.zeros(len(rank), dtype=np.float64)
    for class_mask, sampled_count, class_weight in (
        (is_positive, quota.sampled_positives, quota.positive_weight),
        (~is_positive, quota.sampled_negatives, quota.negative_weight),
    ):
        rows = np.flatnonzero(class_mask)
        if sampled_count:
            weight[rows[np.argpartition(rank[rows], sampled_count - 1)[:sampled_count]]] = class_weight
    return weight


def find_repeats(group: Ints, order: Ints) -> Bools:
    """Rows [N] whose group [N] another row has that comes before them in `order`, which may leave rows out."""
    _, first_positions = np.unique(group[order], return_index=True)
    is_repeat = np.zeros(len(group), dtype=np.bool_)
    is_repeat[np.delete(order, first_positions)] = True
    return is_repeat


def choose_sample_rows(row_key: HashKeys, cell: Ints, rows: Ints, count: int) -> Ints:
    """Up to `count` of the `rows` of each cell [N], those of the lowest keys [N]: a stable random sample."""
    order = rows[np.lexsort((row_key[rows], cell[rows]))]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = cell[order][1:] != cell[order][:-1]
    first_position = np.flatnonzero(is_first)[np.cumsum(is_first) - 1] if len(order) else order
    return order[np.arange(len(order)) - first_position < count]


PERMUTATION_COUNT, BAND_COUNT = 64, 8
MAX_CONTEXT_WORDS = 400
"""Words of a context that are compared, from its end."""


MAX_UNSPACED_CHARS = 1600
"""Characters that are compared of a text in a script without spaces, from its end."""

ROW_BAND_COUNT, _ROW_PERMUTATIONS_PER_BAND = 6, 12
"""Bands of the texts of a row, and numbers in each."""

_MIN_ROW_SHINGLES = 20
"""Shingles of a text from which it can nearly repeat another; one word more or less is much of a shorter one."""

_UNSPACED_PATTERN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""A letter of Thai, Lao, Burmese, Khmer, Japanese or Chinese, whose words have no spaces between them."""


def build_shingles(text: str) -> list[str]:
    """Adjacent pairs of words, or four adjacent characters where words have no spaces; at least one."""
    if not text.isascii() and _UNSPACED_PATTERN.search(text):
        chars = "".join(text.split())[-MAX_UNSPACED_CHARS:]
        return [chars[start : start + 4] for start in range(max(1, len(chars) - 3))]
    words = text.split()[-MAX_CONTEXT_WORDS:]
    return [f"{first} {second}" for first, second in pairwise(words)] or words or [""]


def compute_band_hashes(texts: Sequence[str]) -> HashKeys:
    """Band hashes [N, BAND_COUNT] of N texts (already in lower case)."""
    return _hash_bands([build_shingles(text) for text in texts], BAND_COUNT, PERMUTATION_COUNT // BAND_COUNT)


def compute_row_band_hashes(rows: Sequence[Sequence[str]]) -> HashKeys:
    """Band hashes [N, ROW_BAND_COUNT] of N rows of as many texts each (prompt, response), all of which must be similar.

    Two rows whose texts have Jaccard similarities with the product J share some band with probability
    1 - (1 - J^12)^6: 0.99 at 0.95, 0.86 at 0.9, 0.08 at 0.7, 0.001 at 0.5. Short texts must be equal.
    """
    row_hashes = np.zeros((len(rows), ROW_BAND_COUNT), dtype=np.uint64)
    for texts in zip(*rows, strict=True):
        unique_texts, unique_index = np.unique(
            np.array([text.casefold() for text in texts], object), return_inverse=True
        )
        shingles = [build_shingles(text) for text in unique_texts]
        shingles = [
            values if len(values) >= _MIN_ROW_SHINGLES else [" ".join(text.split())]
            for values, text in zip(shingles, unique_texts, strict=True)
        ]
        text_hashes = _hash_bands(shingles, ROW_BAND_COUNT, _ROW_PERMUTATIONS_PER_BAND)
        row_hashes = row_hashes * USER_MULTIPLIER + text_hashes[unique_index]
    return row_hashes


def _hash_bands(shingles: Sequence[list[str]], band_count: int, permutations_per_band: int) -> HashKeys:
    import rensa

    if not shingles:
        return np.empty((0, band_count), dtype=np.uint64)
    minhash, permutation_count = rensa.RMinHash, band_count * permutations_per_band
    signatures = minhash.digest_matrix_from_token_sets(shingles, permutation_count, 1).to_rows()
    bands = np.asarray(signatures, dtype=np.uint64).reshape(len(shingles), band_count, permutations_per_band)
    band_hashes = np.zeros((len(shingles), band_count), dtype=np.uint64)
    for index in range(bands.shape[2]):  # FNV-1a over the numbers of a band, then a shift to mix high bits down
        band_hashes = (band_hashes ^ bands[:, :, index]) * np.uint64(0x100000001B3)
        band_hashes ^= band_hashes >> np.uint64(29)
    # Equal signatures in different bands must not match: add the band's index.
    return band_hashes + np.arange(band_count, dtype=np.uint64)


def group_near_duplicates(prompt_key: HashKeys, bands: Iterable[HashKeys]) -> Ints:
    """Group [N] of each row, from 0: rows with one prompt key or a common hash in a band [N], transitively.

    The bands are read one at a time: at ten million rows all eight would take 640 MB.
    """
    _, first_rows, unique_index = np.unique(prompt_key, return_index=True, return_inverse=True)
    groups: Ints = group_by_bands(len(first_rows), (band[first_rows] for band in bands))[unique_index]
    return groups


def group_by_bands(prompt_count: int, bands: Iterable[HashKeys]) -> Ints:
    """Group [P] of P different prompts, from 0: those that share a hash in a band [P], transitively."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups: Ints = np.arange(prompt_count)
    if not prompt_count:
        return groups
    # Band by band, on the groups so far: the hashes and edges of all bands at once would take 24 times the memory.
    for values in bands:
        order = np.argsort(values, kind="stable")
        # Prompts that share a band are a chain in sorted order: n - 1 edges connect them, not n squared.
        same_as_next = np.flatnonzero(values[order][1:] == values[order][:-1])
        edges = groups[order[same_as_next]], groups[order[same_as_next + 1]]
        group_count = int(groups.max()) + 1
        graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(group_count, group_count))
        _, component = connected_components(graph, directed=False)
        groups = component.astype(np.int64)[groups]
    return groups
