"""Second pass of prepare: decide for every row of one kind whether it stays, in which split, and with which weight.

Duplicates, joins, splits, abuse weights, propensities and sampling are decided on the index of all rows, of which a few
columns at a time are in memory. The decisions are written next to the index, in the same order, for the third pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rluf.prepare import abuse, joins, splits
from rluf.prepare.joins import bin_by_octave, estimate_propensity
from rluf.prepare.labels import IGNORED, LOVED, NOT_LOVED, normalize_reaction
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.schema import LOVE_REACTION, SPLIT_NAMES, find_data_kind
from rluf.prepare.workspace import (
    IndexTable,
    RowCount,
    TableWriter,
    build_quarantine_table,
    encode_column,
    load_band_hashes,
    load_texts,
    read_column,
    write_table,
)
from rluf.utils.stats import Bools, Floats, Ints, compute_rate_with_interval

_SAMPLED_OUT = "sampled out of train"

SAMPLE_ROWS = 20
"""Training rows of each label and entry that the page of the data card shows."""

_NO_BANDS: splits.HashKeys = np.empty((0, splits.BAND_COUNT), dtype=np.uint64)

_NO_REACTION = -128
"""Label code of rows without a reaction, where codes are an array; null in the index."""


@dataclass(frozen=True, slots=True)
class AssignTask:
    """One kind and the settings that its decisions depend on. `has_reactions`: reactions are in files of their own."""

    work_folder: str
    kind_name: str
    has_reactions: bool
    strict_splits: bool
    dev_share: float
    test_share: float
    positive_share: float
    max_rows: int | None
    contradictions: str
    drop_duplicates: str
    reaction_window_hours: float
    return_window_days: float
    abuse_rules: Sequence[str]
    seed: int


class _RowDecisions:
    """Which rows are still included, and why the others are not."""

    def __init__(self, row_count: int) -> None:
        self.keep_mask = np.ones(row_count, dtype=np.bool_)
        self.drop_counts: Counter[str] = Counter()
        self.contradictory_rows = 0

    def drop_rows(self, row_mask: Bools, reason: str) -> None:
        """Drop the rows of a mask [N]; a row that was dropped before does not count again."""
        newly_dropped = row_mask & self.keep_mask
        self.keep_mask &= ~row_mask
        self.drop_counts[reason] += int(newly_dropped.sum())

    def drop_indices(self, row_indices: Ints, reason: str) -> None:
        """Drop rows by their indices."""
        row_mask = np.zeros(len(self.keep_mask), dtype=np.bool_)
        row_mask[row_indices] = True
        self.drop_rows(row_mask, reason)


def _group_prompts(
    task: AssignTask, prompt_key: splits.HashKeys, rows: Ints, other_bands: splits.HashKeys = _NO_BANDS
) -> Ints:
    """Group [R + P] of near-duplicate prompts with these keys: rows [R] of the index, and prompts of other hashes."""
    bands = (
        np.concatenate([load_band_hashes(task.work_folder, task.kind_name, rows, [band])[:, 0], other_bands[:, band]])
        for band in range(splits.BAND_COUNT)
    )
    return splits.group_near_duplicates(prompt_key, bands)


def _order_by_log_position(table: IndexTable) -> Ints:
    """Indices that sort the index by position in the log (its own order is by bucket)."""
    positions = [read_column(table, name) for name in ("item_index", "line_number", "source_index")]
    order: Ints = np.lexsort(positions)
    return order


def _find_duplicate_ids(table: IndexTable) -> tuple[Bools, Bools]:
    """Rows [N] that a later version of the same row replaces, and rows [N] whose id another row has."""
    position = np.empty(table.num_rows, dtype=np.int64)
    position[_order_by_log_position(table)] = np.arange(table.num_rows)
    time_us = read_column(table, "time") if "time" in table.column_names else position
    return splits.find_duplicate_rows(
        read_column(table, "row_key"), read_column(table, "response_key"), time_us, position
    )


def _quarantine_duplicates(
    task: AssignTask, table: IndexTable, is_duplicate: Bools, source_paths: Mapping[int, Sequence[str | None]]
) -> list[RowCount]:
    """Write duplicates to quarantine. The index has no raw bytes, so the logs with duplicates are read once more."""
    if not is_duplicate.any():
        return []
    duplicate_lines: dict[int, list[int]] = defaultdict(list)
    for source_index, line_number in zip(
        read_column(table, "source_index")[is_duplicate].tolist(),
        read_column(table, "line_number")[is_duplicate].tolist(),
        strict=True,
    ):
        duplicate_lines[source_index].append(line_number)
    row_counts = []
    for source_index, line_numbers in sorted(duplicate_lines.items()):
        source_path, format_name = str(source_paths[source_index][0]), source_paths[source_index][1]
        # One line may hold several duplicate items; each is a row of quarantine.
        duplicates_by_line, rows = Counter(line_numbers), []
        for batch in read_line_batches(source_path, format_name=format_name):
            for line in batch:
                duplicate_count = duplicates_by_line.get(line.line_number, 0)
                rows += [(line.line_number, "duplicate id", line.raw)] * duplicate_count
        path = Path(task.work_folder) / "quarantine" / f"{task.kind_name}-{source_index:05d}-duplicates.parquet"
        write_table(path, build_quarantine_table(task.kind_name, source_path, rows))
        example_location = f"{source_path}:{min(line_numbers)}"
        row_counts.append(
            RowCount(task.kind_name, "quarantined", len(line_numbers), "", "duplicate id", example_location)
        )
    return row_counts


def _load_test_prompts(work_folder: str) -> tuple[splits.HashKeys, splits.HashKeys]:
    """Prompt keys [P] and band hashes [P, BAND_COUNT] of the test prompts of data.prompts."""
    table = IndexTable(work_folder, "prompts")
    if not table.files:
        return np.empty(0, dtype=np.uint64), _NO_BANDS
    rows = np.flatnonzero(read_column(table, "split") == splits.TEST_CODE)
    return read_column(table, "prompt_key")[rows], load_band_hashes(
        work_folder, "prompts", rows, range(splits.BAND_COUNT)
    )


def _drop_split_leaks(
    task: AssignTask, table: IndexTable, split_code: Ints, decisions: _RowDecisions
) -> dict[str, Any]:
    """Drop rows that would put one conversation, prompt or (strict) time in two splits; returns card statistics."""
    prompt_key = read_column(table, "prompt_key")
    test_keys, test_bands = _load_test_prompts(task.work_folder)
    is_test_prompt = np.isin(prompt_key, test_keys)
    decisions.drop_rows((split_code != splits.TEST_CODE) & is_test_prompt, "context is a test prompt")
    statistics: dict[str, Any] = {}
    if task.kind_name == "feedback":
        conversation_key, time_us = read_column(table, "conversation_key"), read_column(table, "time")
        is_leak = splits.find_conversation_leaks(conversation_key, split_code, time_us)
        decisions.drop_rows(is_leak, "conversation is in another split")
        if task.strict_splits and decisions.keep_mask.any():
            rows = np.flatnonzero(decisions.keep_mask)
            late_mask, early_mask, split_time = splits.find_time_leaks(
                conversation_key[rows], split_code[rows], time_us[rows], task.test_share
            )
            decisions.drop_indices(rows[late_mask], "after the time split")
            decisions.drop_indices(rows[early_mask], "test row before the time split")
            statistics["time_split"] = split_time
    if task.strict_splits:
        rows = np.flatnonzero(decisions.keep_mask)
        # Test prompts are grouped together with the rows, so that a near-duplicate of one is recognized.
        prompt_group = _group_prompts(task, np.concatenate([prompt_key[rows], test_keys]), rows, test_bands)
        row_group, test_groups = prompt_group[: len(rows)], np.unique(prompt_group[len(rows) :])
        leak_mask = splits.find_near_duplicate_leaks(
            row_group, prompt_key[rows], split_code[rows], test_groups, task.dev_share, task.test_share
        )
        decisions.drop_indices(rows[leak_mask], "near-duplicate prompt is in another split")
    return statistics


def _drop_repeated_rows(task: AssignTask, table: IndexTable, decisions: _RowDecisions) -> dict[str, int]:
    """Count rows that repeat or contradict another one, and drop them if the settings say so; returns the counts."""
    order = _order_by_log_position(table)
    order = order[decisions.keep_mask[order]]
    prompt_key, content_key = read_column(table, "prompt_key"), read_column(table, "response_key")
    # Rows of feedback repeat those of the same user, labeled rows those of the same label; pairs any other.
    if task.kind_name == "feedback":
        unit = encode_column(table["user_id"])[0]
        # A log that is written again under new ids may have the reaction in the later row only.
        has_no_reaction = pc.is_null(table["reaction_label"]).to_numpy(zero_copy_only=False)
        order = order[np.argsort(has_no_reaction[order], kind="stable")]
    else:
        unit = read_column(table, "label") if "label" in table.column_names else np.zeros(table.num_rows, np.int64)
    unit_key = unit.astype(np.uint64) * splits.USER_MULTIPLIER
    # A sum of hashes stands for the texts; a chance collision has a probability of N squared over 2**64.
    content_ids = prompt_key + content_key * np.uint64(3)
    del unit, content_key  # two arrays of all rows
    _, content_group = np.unique(content_ids + unit_key, return_inverse=True)
    is_repeated = splits.find_repeats(content_group, order)
    rows = np.flatnonzero(decisions.keep_mask)
    bands = (
        load_band_hashes(task.work_folder, task.kind_name, rows, [band], "row_band_hashes")[:, 0] + unit_key[rows]
        for band in range(splits.ROW_BAND_COUNT)
    )
    near_group = np.zeros(table.num_rows, dtype=np.int64)
    near_group[rows] = splits.group_by_bands(len(rows), bands)
    is_near_repeated = splits.find_repeats(near_group, order) & ~is_repeated
    is_contradictory = np.zeros(table.num_rows, dtype=np.bool_)
    if "contrary_key" in table.column_names:
        contrary_key = read_column(table, "contrary_key")
        contrary_ids = prompt_key + contrary_key * np.uint64(3)
        is_contradictory = np.isin(contrary_ids, content_ids[decisions.keep_mask]) & decisions.keep_mask
        if task.contradictions == "ignored":
            decisions.drop_rows(is_contradictory, "contradicts another row")
    elif task.kind_name == "feedback":
        reaction_label = read_column(table, "reaction_label", _NO_REACTION)
        is_rated = np.isin(reaction_label, (LOVED, NOT_LOVED)) & decisions.keep_mask
        group_sizes, loved_sizes = (
            np.bincount(content_group[mask], minlength=int(content_group.max(initial=0)) + 1)
            for mask in (is_rated, is_rated & (reaction_label == LOVED))
        )
        is_mixed = (loved_sizes > 0) & (loved_sizes < group_sizes)
        is_contradictory = is_rated & is_mixed[content_group]
        if task.contradictions == "ignored":
            decisions.drop_rows(is_contradictory, "contradicts another row")
    if task.drop_duplicates != "none":
        decisions.drop_rows(is_repeated, "repeats another row")
    if task.drop_duplicates == "near":
        decisions.drop_rows(is_near_repeated, "nearly repeats another row")
    return {
        "exact": int(is_repeated.sum()), "near": int(is_near_repeated.sum()),
        "contradictory": int(is_contradictory.sum()), "rows": len(order),
    }  # fmt: skip


def _list_sample_keys(
    table: IndexTable, label: Ints, is_train: Bools, source_paths: Mapping[int, Sequence[str | None]]
) -> dict[str, list[int]]:
    """Row keys of SAMPLE_ROWS training rows of each label, by the path of the entry that they come from."""
    entry_paths, entry_of_source = np.unique(
        [str(source_paths[index][2]) for index in sorted(source_paths)], return_inverse=True
    )
    entry = entry_of_source[np.searchsorted(sorted(source_paths), read_column(table, "source_index"))]
    row_key = read_column(table, "row_key")
    rows = splits.choose_sample_rows(row_key, entry * 2 + label, np.flatnonzero(is_train), SAMPLE_ROWS)
    return {
        str(entry_paths[code]): row_key[rows[entry[rows] == code]].tolist() for code in np.unique(entry[rows]).tolist()
    }


def _join_user_actions(task: AssignTask, table: IndexTable, decisions: _RowDecisions) -> list[RowCount]:
    """Join reactions, and fill in `continued` and `returned` where the log does not state them."""
    time_us = read_column(table, "time")
    continued = joins.detect_continued(
        read_column(table, "conversation_key"), read_column(table, "turn").astype(np.int64), time_us
    )
    returned = joins.detect_returned(encode_column(table["user_id"])[0], time_us, task.return_window_days)
    for name, (values, is_known) in (("continued", continued), ("returned", returned)):
        detected = pa.array(values, mask=~is_known)
        table.set_column(name, pc.coalesce(table[name], detected))
    row_counts: list[RowCount] = []
    if task.has_reactions:
        event_table = IndexTable(task.work_folder, "reactions")
        if event_table.files:
            drop_counts, joined_rows = _apply_reactions(task, table, event_table, decisions)
            dropped = [(reason, rows) for reason, rows in drop_counts.items() if rows]
            row_counts += [RowCount("reactions", "dropped", rows, reason=reason) for reason, rows in dropped]
            row_counts.append(RowCount("reactions", "joined", joined_rows))
    return row_counts


def _apply_reactions(
    task: AssignTask, table: IndexTable, event_table: IndexTable, decisions: _RowDecisions
) -> tuple[Counter[str], int]:
    """Join reaction events to their rows. Returns dropped events by reason, and the number joined."""
    event_name, event_names = encode_column(event_table["reaction"])
    name_code, own_names = encode_column(table["reaction"])
    # The names of events and rows in one list; the code of a row without a reaction stays -1.
    name_code = np.where(name_code < 0, -1, name_code + len(event_names))
    names = pa.concat_arrays([event_names, own_names])
    _, family_code = np.unique([normalize_reaction(name) for name in names.to_pylist()], return_inverse=True)
    order = _order_by_log_position(event_table)
    is_reaction = pc.is_valid(event_table["reaction_label"]).to_numpy(zero_copy_only=False)[order]
    order = order[is_reaction]
    event_name = event_name[order]
    events = joins.ReactionEvents(
        event_key=read_column(event_table, "event_key")[order],
        response_key=read_column(event_table, "row_key")[order],
        time_us=read_column(event_table, "time")[order],
        reaction_code=family_code[event_name],
        retracted=read_column(event_table, "retracted")[order],
    )
    event_label = event_table["reaction_label"].take(pa.array(order)).to_numpy().astype(np.int64)
    rows = np.flatnonzero(decisions.keep_mask)
    attributed = joins.attribute_reactions(
        events, read_column(table, "row_key")[rows], read_column(table, "time")[rows],
        joins.to_microseconds(task.reaction_window_hours),
    )  # fmt: skip
    label = read_column(table, "reaction_label", _NO_REACTION).astype(np.int64)
    # A retraction clears only the reaction that it names, not another one that the row has.
    retracted_rows = rows[attributed.retracted_rows]
    retracted_family = family_code[event_name[attributed.retracted_events]]
    is_named = (name_code[retracted_rows] >= 0) & (family_code[name_code[retracted_rows]] == retracted_family)
    label[retracted_rows[is_named]] = _NO_REACTION
    # A reaction in the row itself has no time of its own; it counts as older than any event.
    own_rows = np.flatnonzero((label != _NO_REACTION) & np.isin(np.arange(len(label)), rows[attributed.active_rows]))
    own_time = np.full(len(own_rows), np.iinfo(np.int64).min)
    active_rows = np.concatenate([own_rows, rows[attributed.active_rows]])
    active_names = np.concatenate([name_code[own_rows], event_name[attributed.active_events]])
    active_labels = np.concatenate([label[own_rows], event_label[attributed.active_events]])
    active_times = np.concatenate([own_time, events.time_us[attributed.active_events]])
    chosen, is_contradictory = joins.choose_active_reactions(
        active_rows, active_times, active_labels, len(label), task.contradictions
    )
    has_reaction = chosen >= 0
    label[has_reaction] = active_labels[chosen[has_reaction]]
    name_code[has_reaction] = active_names[chosen[has_reaction]]
    if task.contradictions == "ignored":
        label[is_contradictory] = IGNORED
    decisions.contradictory_rows = int(is_contradictory.sum())
    table.set_column("reaction", names.take(pa.array(name_code, mask=name_code < 0)))
    table.set_column("reaction_label", pa.array(label.astype(np.int8), mask=label == _NO_REACTION))
    attributed.drop_counts["no reaction"] += int((~is_reaction).sum())
    return attributed.drop_counts, len(attributed.active_rows)


def _name_loved_reactions(table: IndexTable) -> None:
    """Set `love` as the reaction of loved rows, and none where a value says that there is none."""
    label, name = table["reaction_label"], table["reaction"]
    loved = pc.fill_null(pc.equal(label, LOVED), False)
    column = pc.if_else(loved, LOVE_REACTION, pc.if_else(pc.is_valid(label), name, pa.scalar(None, pa.string())))
    table.set_column("reaction", column)


def _is_loved(table: IndexTable) -> Bools:
    """Whether each row [N] is loved, after `_name_loved_reactions`."""
    loved: Bools = pc.fill_null(pc.equal(table["reaction"], LOVE_REACTION), False).to_numpy(zero_copy_only=False)
    return loved


def _assign_conversation_keys(table: IndexTable) -> int:
    """Set a conversation key of each user where users share an id but not the chat; returns the rows so changed."""
    conversation_key, opening_key = read_column(table, "conversation_key"), read_column(table, "opening_key")
    keys = splits.assign_conversation_keys(conversation_key, opening_key, encode_column(table["user_id"])[0])
    table.set_column("conversation_key", pa.array(keys, pa.uint64()))
    return int((keys != conversation_key).sum())


def _build_abuse_log(task: AssignTask, table: IndexTable, loved: Bools, rows: Ints) -> abuse.AbuseLog:
    """Log of the rules, of the rows of the index that `table` has."""
    user_code, _ = encode_column(table["user_id"])
    device_code, _ = encode_column(table["device"])
    own_persona = pc.fill_null(pc.equal(table["author"], table["user_id"]), False)
    _, response_code = np.unique(read_column(table, "response_key"), return_inverse=True)
    # Grouping is the expensive part, and only this rule reads the groups.
    if "copies" in task.abuse_rules:
        prompt_group = _group_prompts(task, read_column(table, "prompt_key"), rows)
    else:
        prompt_group = np.zeros(len(user_code), dtype=np.int64)
    return abuse.AbuseLog(
        user_code=user_code, prompt_group=prompt_group, response_code=response_code.astype(np.int64),
        device_code=device_code, time_us=read_column(table, "time"), loved=loved,
        own_persona=own_persona.to_numpy(zero_copy_only=False),
        load_responses=lambda indices: load_texts(task.work_folder, task.kind_name, rows[indices], "response"),
    )  # fmt: skip


def _build_feedback_columns(
    task: AssignTask, table: IndexTable, split_code: Ints, decisions: _RowDecisions, statistics: dict[str, Any]
) -> dict[str, Any]:
    """Decision columns that only feedback has: trust, propensity, and the joined columns. Adds to `statistics`."""
    rows = np.flatnonzero(decisions.keep_mask)
    kept_table = table.take(rows)
    loved = _is_loved(kept_table)
    abuse_log = _build_abuse_log(task, kept_table, loved, rows)
    trust_weight, rule_weights = abuse.compute_trust_weights(abuse_log, task.abuse_rules)
    user_code = abuse_log.user_code
    del abuse_log  # five arrays of all rows
    # No feature comes from the response's text: the propensity must not depend on what a loss wants to learn.
    features = {
        "turn": bin_by_octave(read_column(kept_table, "turn").astype(np.int64) + 1),
        "locale": encode_column(kept_table["locale"])[0],
        "interface": encode_column(kept_table["interface"])[0],
        "activity": bin_by_octave(np.bincount(user_code)[user_code]) if len(user_code) else user_code,
    }
    has_reaction = pc.is_valid(kept_table["reaction"]).to_numpy(zero_copy_only=False)
    statistics["rated_share"] = float(has_reaction.mean()) if len(rows) else 0.0
    propensity, _ = estimate_propensity(features, has_reaction)
    del features  # four arrays of all rows
    columns: dict[str, Any] = {}
    for name, values in (("trust", trust_weight), ("propensity", propensity)):
        columns[name] = np.ones(table.num_rows)
        columns[name][rows] = values
    statistics |= compute_love_statistics(kept_table, loved, user_code, split_code[rows], trust_weight, rule_weights)
    return columns | {name: table[name] for name in ("reaction", "continued", "returned")}


def assign_rows(task: AssignTask, source_paths: Mapping[int, Sequence[str | None]]) -> dict[str, Any]:
    """Run the second pass on one kind and return counts and statistics.

    `source_paths` are file, format and the entry's path, by index.
    """
    kind = find_data_kind(task.kind_name)
    table = IndexTable(task.work_folder, task.kind_name)
    if not table.files:
        return {"row_counts": [], "splits": [], "statistics": {}}
    decisions = _RowDecisions(table.num_rows)
    statistics: dict[str, Any] = {}
    is_replaced, is_duplicate = _find_duplicate_ids(table)
    decisions.drop_rows(is_replaced, "replaced by a later row of the same id")
    decisions.keep_mask &= ~is_duplicate
    row_counts = _quarantine_duplicates(task, table, is_duplicate, source_paths)
    feedback_columns: dict[str, Any] = {}
    split_code = read_column(table, "split").astype(np.int64)
    # Joins come before leaks are dropped: an event of a row that is dropped later still counts as joined.
    if task.kind_name == "feedback":
        statistics["rows_of_reused_conversation_ids"] = _assign_conversation_keys(table)
        row_counts += _join_user_actions(task, table, decisions)
        statistics["contradictory_rows"] = decisions.contradictory_rows
        reaction_label = read_column(table, "reaction_label", _NO_REACTION)
        decisions.drop_rows((reaction_label < 0) & (reaction_label != _NO_REACTION), "reaction is ignored")
        _name_loved_reactions(table)
    if task.kind_name != "prompts":
        statistics["duplicates"] = _drop_repeated_rows(task, table, decisions)
    statistics |= _drop_split_leaks(task, table, split_code, decisions)
    if task.kind_name == "feedback":
        feedback_columns = _build_feedback_columns(task, table, split_code, decisions, statistics)
        label = _is_loved(table).astype(np.int64)
    elif "label" in table.column_names:
        label = read_column(table, "label")
    else:
        label = np.ones(table.num_rows, dtype=np.int64)
    if "label" in table.column_names:
        labels, label_rows = np.unique(label[decisions.keep_mask], return_counts=True)
        statistics["labels"] = dict(zip(map(str, labels.tolist()), label_rows.tolist(), strict=True))
    statistics["topics"] = count_rows_by_topic(table, decisions.keep_mask)
    statistics["finish_reasons"] = finish_statistics(table, decisions.keep_mask)
    sampling, split_summaries = _sample_rows(task, table, split_code, label, decisions)
    if task.kind_name != "prompts":
        is_train = decisions.keep_mask & (sampling > 0) & (split_code == splits.TRAIN_CODE)
        statistics["samples"] = _list_sample_keys(table, label, is_train, source_paths)
    decision_table = pa.table({
        "row_key": table["row_key"],
        "split": np.where(decisions.keep_mask, split_code, -1).astype(np.int8), "label": label, "sampling": sampling,
        **feedback_columns,
    })  # fmt: skip
    first_row = 0
    for file, batch_rows in zip(table.files, table.batch_rows, strict=True):
        writer = TableWriter(Path(task.work_folder) / "decisions" / task.kind_name / file.name, decision_table.schema)
        # The same record batches as in the index and row files: the third pass reads one bucket at a time.
        for row_count in batch_rows:
            writer.write(decision_table.slice(first_row, row_count).combine_chunks())
            first_row += row_count
        writer.close()
    row_counts += [
        RowCount(task.kind_name, "dropped", rows, reason=reason)
        for reason, rows in decisions.drop_counts.items()
        if rows
    ]
    return {"row_counts": row_counts, "splits": split_summaries, "statistics": {kind.name: statistics}}


def _sample_rows(
    task: AssignTask, table: IndexTable, split_code: Ints, label: Ints, decisions: _RowDecisions
) -> tuple[Floats, list[dict[str, Any]]]:
    """Sampling weight of each row [N] (0 if dropped); and each split's quota, number of users or groups, and labels."""
    kind = find_data_kind(task.kind_name)
    sampling = np.zeros(table.num_rows)
    split_summaries = []
    for code, split in enumerate(SPLIT_NAMES):
        if split not in kind.split_names:
            continue
        rows = np.flatnonzero(decisions.keep_mask & (split_code == code))
        is_positive = label[rows] == 1
        positives = int(is_positive.sum())
        negatives = len(rows) - positives
        quota = splits.SamplingQuota(positives, negatives, positives, negatives)
        sampling[rows] = 1.0
        # Dev and test are never sampled: evaluation and calibration see the natural rate.
        if split == "train" and kind.name != "prompts" and len(rows):
            positive_share = task.positive_share if kind.name == "feedback" else None
            quota = splits.compute_quota(positives, negatives, positive_share=positive_share, max_rows=task.max_rows)
            rank = splits.to_unit_interval(read_column(table, "sampling_hash")[rows])
            sampling[rows] = splits.compute_sampling_weights(rank, is_positive, quota)
            # What the share of positives leaves out comes first; `max_rows` cuts the rest, loved rows too.
            by_share = splits.compute_quota(positives, negatives, positive_share=positive_share, max_rows=None)
            decisions.drop_indices(rows[sampling[rows] == 0], _SAMPLED_OUT)
            by_max_rows = by_share.sampled_positives + by_share.sampled_negatives - int((sampling[rows] > 0).sum())
            decisions.drop_counts[_SAMPLED_OUT] -= by_max_rows
            decisions.drop_counts["above prepare.max_rows"] += by_max_rows
        unit_column = {"feedback": "user_id", "prompts": "row_key"}.get(kind.name, "group")
        units = table[unit_column].filter(pa.array(decisions.keep_mask & (split_code == code)))
        split_summaries.append({
            "kind": kind.name, "split": split, "units": pc.count_distinct(units).as_py(),
            "rows_before_sampling": len(rows), "labels": sorted({*label[rows].tolist()}), "quota": quota,
        })  # fmt: skip
    return sampling, split_summaries


_MAX_LEVELS = 50
"""Most frequent topics, versions and locales that the card lists."""

_MAX_DAYS = 400
"""Latest days that the card lists."""


def _compute_love_rate(loved: Bools) -> dict[str, float]:
    return compute_rate_with_interval(int(loved.sum()), len(loved))


def _compute_love_rate_by_value(values: pa.ChunkedArray, loved: Bools, max_values: int) -> dict[str, dict[str, float]]:
    """Love rate by value, the most frequent first."""
    table = pa.table({"value": values, "loved": pa.array(loved).cast(pa.int64())})
    rows = table.group_by("value").aggregate([("loved", "count"), ("loved", "sum")]).to_pylist()
    rows.sort(key=lambda row: (-row["loved_count"], row["value"]))
    return {row["value"]: compute_rate_with_interval(row["loved_sum"], row["loved_count"]) for row in rows[:max_values]}


def _format_time(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat()


def compute_love_statistics(
    table: IndexTable,
    loved: Bools,
    user_code: Ints,
    split_code: Ints,
    trust_weight: Floats,
    rule_weights: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """Natural love rates before sampling, and the weight removed by each abuse rule. Arrays [N] omit dropped rows."""
    time_us = table["time"].cast(pa.int64()).to_numpy()
    split_masks = {split: split_code == code for code, split in enumerate(SPLIT_NAMES)}
    days = table["time"].cast(pa.date32(), safe=False).cast(pa.string())
    rate_by_day = _compute_love_rate_by_value(days, loved, 10**6)
    split_times = {split: time_us[mask] for split, mask in split_masks.items()}
    time_ranges = {
        split: [_format_time(times.min()), _format_time(times.max())] if len(times) else None
        for split, times in split_times.items()
    }
    has_both = len(split_times["train"]) and len(split_times["test"])
    return {
        "base_rate": _compute_love_rate(loved),
        "base_rate_trusted": float((trust_weight * loved).sum() / trust_weight.sum()) if len(loved) else 0.0,
        "base_rate_by_split": {split: _compute_love_rate(loved[mask]) for split, mask in split_masks.items()},
        "base_rate_by_topic": _compute_love_rate_by_value(table["topic"], loved, _MAX_LEVELS),
        "base_rate_by_model": _compute_love_rate_by_value(table["model_version"], loved, _MAX_LEVELS),
        "base_rate_by_locale": _compute_love_rate_by_value(table["locale"], loved, _MAX_LEVELS),
        "base_rate_by_day": {day: rate_by_day[day] for day in sorted(rate_by_day)[-_MAX_DAYS:]},
        "users": len(np.unique(user_code)),
        "time": time_ranges,
        "test_later_than_train": bool(has_both and split_times["test"].min() > split_times["train"].max()),
        "abuse": {
            rule: {
                "rows": int((weight < 1).sum()),
                "users": len(np.unique(user_code[weight < 1])),
                "weight_taken": float((1 - weight).sum(dtype=np.float64)),
                "loved_weight_taken": float((1 - weight)[loved].sum(dtype=np.float64)),
            }
            for rule, weight in rule_weights.items()
        },
        "trust": {
            "mean": float(trust_weight.mean()) if len(trust_weight) else 1.0,
            "rows_below_one": int((trust_weight < 1).sum()),
        },
    }


def finish_statistics(table: IndexTable, keep_mask: Bools) -> dict[str, int]:
    """Retained rows before sampling by how the response (pairs: the chosen one) ended; unknown counts as finished."""
    column = "finish_reason" if "finish_reason" in table.column_names else "chosen_finish_reason"
    if column not in table.column_names:
        return {}
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(table[column].filter(pa.array(keep_mask))).to_pylist():
        counts[entry["values"] or "unknown"] += entry["counts"]
    return dict(sorted(counts.items()))


def count_rows_by_topic(table: IndexTable, keep_mask: Bools) -> dict[str, int]:
    """Retained rows by topic before sampling, the most frequent first."""
    topic_counts = pc.value_counts(table["topic"].filter(pa.array(keep_mask))).to_pylist()
    topic_counts.sort(key=lambda entry: (-entry["counts"], entry["values"]))
    return {entry["values"]: entry["counts"] for entry in topic_counts[:_MAX_LEVELS]}
